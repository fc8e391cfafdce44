"""A policy bundle is whole and unaltered, or it is refused."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from simplevla.bundle import (
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    Bundle,
    CodecEntry,
    Manifest,
    Provenance,
    load_bundle,
    write_bundle,
)
from simplevla.embodiment import load_embodiment
from simplevla.errors import BundleError
from simplevla.files import sha256_file

WEIGHT = {"layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(3)}


def make_manifest() -> Manifest:
    return Manifest(
        name="test",
        created_ns=1,
        embodiment=load_embodiment("piper_single"),
        network={"layers": 1},
        cameras=("head",),
        instructions={"move_can_pot": "move the can next to the pot"},
        action_space="joint_absolute",
        chunk_length=5,
        dt_s=0.1,
        codec=CodecEntry((0.0,) * 7, (1.0,) * 7, (True,) * 7),
        proprio_low=(0.0,) * 10,
        proprio_high=(1.0,) * 10,
        provenance=Provenance(commit="abc", config={"a": [1]}, seeds={"training": 0}, demonstrations=2),
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle", make_manifest(), WEIGHT, b'{"version": "1.0"}')


def rewrite_manifest(folder: Path, **changes: object) -> None:
    data = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps({**data, **changes}))


def test_what_is_written_is_what_is_loaded(bundle: Bundle) -> None:
    again = load_bundle(bundle.path)
    assert again.id == bundle.id
    assert msgspec.structs.replace(again.manifest, files={}) == make_manifest()
    for name, value in again.weights().items():
        np.testing.assert_array_equal(value, WEIGHT[name])
    assert again.tokenizer_path.read_bytes() == b'{"version": "1.0"}'


def test_the_identity_is_the_contents(tmp_path: Path, bundle: Bundle) -> None:
    same = write_bundle(tmp_path / "same", make_manifest(), WEIGHT, b'{"version": "1.0"}')
    other = write_bundle(tmp_path / "other", make_manifest(), {**WEIGHT, "steps": np.array(4)}, b"{}")
    assert same.id == bundle.id != other.id


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([WEIGHTS, TOKENIZER, MANIFEST]), data=st.data())
def test_any_flipped_byte_is_noticed(bundle: Bundle, name: str, data: st.DataObject) -> None:
    path = bundle.path / name
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    try:
        # A flip within the manifest can leave a sound manifest; then the identity differs.
        assert name == MANIFEST
        assert load_bundle(bundle.path).id != bundle.id
    except (BundleError, AssertionError):
        with pytest.raises(BundleError):
            load_bundle(bundle.path)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER, MANIFEST])
@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "symlink"])
def test_a_file_that_is_not_whole_is_refused(bundle: Bundle, name: str, how: str) -> None:
    if name == MANIFEST and how == "symlink":
        pytest.skip("the manifest's contents are the identity, wherever they lie")
    path = bundle.path / name
    whole = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(whole[:-1] if name != MANIFEST else whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "symlink":
        path.with_name("elsewhere").write_bytes(whole)
        path.symlink_to("elsewhere")
    with pytest.raises(BundleError):
        load_bundle(bundle.path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(BundleError, match="not finite"):
        write_bundle(tmp_path / "b", make_manifest(), {"w": np.array([1.0, value])}, b"{}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "..\\outside"])
def test_a_path_that_leads_outside_is_refused(bundle: Bundle, name: str) -> None:
    files = json.loads((bundle.path / MANIFEST).read_bytes())["files"]
    rewrite_manifest(bundle.path, files={**files, name: {"size": 0, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match="outside the bundle"):
        load_bundle(bundle.path)


def test_a_manifest_that_lists_no_weights_is_refused(bundle: Bundle) -> None:
    rewrite_manifest(bundle.path, files={})
    with pytest.raises(BundleError, match="does not list"):
        load_bundle(bundle.path)


def test_weights_that_are_no_safetensors_are_refused_even_with_the_right_hash(bundle: Bundle) -> None:
    path = bundle.path / WEIGHTS
    path.write_bytes(b"\x80\x04pickle")
    files = json.loads((bundle.path / MANIFEST).read_bytes())["files"]
    files[WEIGHTS] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    rewrite_manifest(bundle.path, files=files)
    with pytest.raises(BundleError, match="not a safetensors file"):
        load_bundle(bundle.path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema 2"),
        ({"schema": None}, "schema None"),
        ({"unheard": 1}, "unheard"),
        ({"cameras": ["wrist"]}, "camera 'wrist'"),
        ({"cameras": []}, "cameras"),
        ({"action_space": "torque"}, "action_space"),
        ({"dt_s": -1.0}, "dt_s"),
        ({"codec": {"low": [0.0], "high": [1.0], "varied": [True]}}, "1 values"),
        ({"proprio_low": [2.0], "proprio_high": [1.0]}, "range"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    bundle: Bundle, change: dict[str, object], words: str
) -> None:
    rewrite_manifest(bundle.path, **change)
    with pytest.raises(BundleError, match=words):
        load_bundle(bundle.path)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "[" * 100_000, "\xff"])
def test_a_manifest_that_is_none_is_refused(bundle: Bundle, text: str) -> None:
    (bundle.path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(BundleError):
        load_bundle(bundle.path)


def test_an_existing_path_is_not_overwritten(bundle: Bundle) -> None:
    before = (bundle.path / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="exists already"):
        write_bundle(bundle.path, make_manifest(), WEIGHT, b"{}")
    assert (bundle.path / MANIFEST).read_bytes() == before


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    broken = {"w": np.array([object()])}
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever safetensors raises
        write_bundle(tmp_path / "b", make_manifest(), broken, b"{}")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    save_file(WEIGHT, tmp_path / WEIGHTS)
    with pytest.raises(BundleError, match="not a policy bundle"):
        load_bundle(tmp_path)
    with pytest.raises(BundleError, match="not a policy bundle"):
        load_bundle(tmp_path / "absent")

"""Compiling a bundle, the parity gate, and engines that must not be used."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from policy_server.backends import open_session
from policy_server.backends.base import EngineError, SessionOptions
from policy_server.backends.onnx_runtime import OnnxRuntime, cpu_session
from policy_server.backends.torch_reference import TorchSession
from policy_server.client import PolicyClient
from policy_server.compiler import compile_bundle, measure_parity
from policy_server.engines import (
    LIMITS,
    SIDECAR,
    Engine,
    ParityLimits,
    check_golden,
    engine_key,
    find_engine,
)
from policy_server.examples import write_example_bundle
from policy_server.graphs import PROMPT, STEP, CompileError
from policy_server.machine import processor
from policy_server.observations import load_observations, plausible_observations
from policy_server.served_policy import ServedPolicy
from simplevla.bundle import WEIGHTS, Bundle, load_bundle
from simplevla.cli import main
from simplevla.embodiment import Embodiment
from simplevla.errors import ConfigError, ObservationError
from simplevla.observation import Observation
from simplevla.policy.config import load_sizes

Observe = Callable[..., Observation]
_SIMPLEVLA = [sys.executable, "-c", "import sys; from simplevla.cli import main; sys.exit(main())"]


@pytest.fixture(scope="session")
def engine(bundle: Bundle) -> Engine:
    return compile_bundle(bundle, "onnxruntime")


@pytest.fixture
def compiled(engine: Engine, bundle: Bundle, tmp_path: Path) -> Bundle:
    """Return a copy of the bundle, with its engine, that a test may spoil."""
    assert engine.path.is_relative_to(bundle.path)
    shutil.copytree(bundle.path, tmp_path / "copy")
    return load_bundle(tmp_path / "copy")


@contextmanager
def serve(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run ``simplevla serve`` and yield its first line of output."""
    process = subprocess.Popen(
        [*_SIMPLEVLA, "serve", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.communicate()


def run(*arguments: str) -> tuple[int, str, list[str]]:
    """Run ``simplevla`` and return its status, its output and the lines of its error output."""
    command = [*_SIMPLEVLA, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr.strip().splitlines()


def files_below(path: Path) -> set[str]:
    """Return every path below ``path``."""
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def test_an_engine_carries_its_certificate(engine: Engine, bundle: Bundle) -> None:
    record = engine.record
    assert record.bundle_id == bundle.id
    assert record.key == engine.path.name == engine_key(bundle, "onnxruntime")
    assert record.parity.passed
    assert record.parity.observations == 32
    assert record.parity.worst_logit_error < 1e-3
    assert {"torch", "onnx", "onnxruntime"} <= record.versions.keys()
    assert {file.name for file in engine.path.iterdir()} == {PROMPT, STEP, SIDECAR}


def test_a_graph_holds_its_weights_once_and_no_paths(engine: Engine, bundle: Bundle) -> None:
    models = [(engine.path / name).read_bytes() for name in (PROMPT, STEP)]
    assert sum(map(len, models)) < bundle.weights_path.stat().st_size + 400_000
    assert all(b".py" not in model for model in models)


def test_a_graph_is_static_and_takes_raw_frames(engine: Engine) -> None:
    import onnx

    graph = onnx.load(engine.path / STEP).graph
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
    assert shapes["frames"] == [1, 1, 48, 64, 3]
    assert shapes.keys() == {"frames", "proprio", "constants", "mask", "cosine", "sine"}
    assert all(size > 0 for shape in shapes.values() for size in shape)


def test_compiling_again_finds_what_is_there(engine: Engine, bundle: Bundle) -> None:
    before = (engine.path / SIDECAR).stat().st_mtime_ns
    assert compile_bundle(bundle, "onnxruntime").record == engine.record
    assert (engine.path / SIDECAR).stat().st_mtime_ns == before


def test_both_back_ends_give_the_same_actions(engine: Engine, bundle: Bundle, observe: Observe) -> None:
    assert engine.record.parity.passed
    answers = []
    for backend, options in (("torch", None), ("onnxruntime", SessionOptions(threads=1, spin=True))):
        session = open_session(bundle, backend, options)
        assert session.info.backend == backend
        policy = ServedPolicy.of(bundle, session)
        answers.append([policy.answer(observe(seed))[0].actions for seed in range(4)])
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)
    assert np.ptp(answers[0], axis=0).max() > 0, "the policy does not look at its observation"


def test_an_engine_of_other_weights_fails_the_parity_gate(
    bundle: Bundle, tmp_path: Path, write_small_bundle: Callable[[Path, int], Bundle]
) -> None:
    other = TorchSession(write_small_bundle(tmp_path / "other", 1))
    observations = plausible_observations(bundle.manifest, count=4, seed=0)
    same = measure_parity(
        bundle, TorchSession(bundle), observations, source="synthetic", limits=LIMITS["fp32"]
    )
    assert same.passed
    assert (same.agreement, same.worst_joint_error_rad) == (1.0, 0.0)
    different = measure_parity(bundle, other, observations, source="synthetic", limits=LIMITS["fp32"])
    assert not different.passed
    assert different.agreement < 0.9


def test_a_failed_parity_check_leaves_no_engine(compiled: Bundle) -> None:
    shutil.rmtree(find_engine(compiled, "onnxruntime").path)
    before = files_below(compiled.path)
    impossible = ParityLimits(min_agreement=1.1, max_joint_error_rad=1, max_gripper_error_m=1)
    observations = plausible_observations(compiled.manifest, count=1, seed=0)
    with pytest.raises(CompileError, match="disagrees with torch"):
        compile_bundle(compiled, limits=impossible, observations=observations)
    assert files_below(compiled.path) == before


def test_every_back_end_on_this_processor_shares_one_export(compiled: Bundle) -> None:
    pytest.importorskip("openvino")
    graphs = list((compiled.path / "engines").glob("graph-*"))
    engine = compile_bundle(compiled, "openvino")
    assert engine.record.parity is not None
    assert engine.record.parity.agreement == 1.0
    assert list((compiled.path / "engines").glob("graph-*")) == graphs
    assert (engine.path / STEP).samefile(graphs[0] / STEP)
    session = open_session(compiled, "openvino", SessionOptions(threads=1))
    check_golden(compiled, session)


def test_golden_answers_tell_a_session_from_another(compiled: Bundle) -> None:
    session = open_session(compiled, "onnxruntime")
    check_golden(compiled, session)
    check_golden(compiled, TorchSession(compiled))
    sidecar = find_engine(compiled, "onnxruntime").path / SIDECAR
    record = json.loads(sidecar.read_text())
    golden = record["parity"]["golden"]
    record["parity"]["golden"] = [[(b + 9) % 256 for b in row] for row in golden]
    sidecar.write_text(json.dumps(record))
    with pytest.raises(EngineError, match="does not answer as it did"):
        check_golden(compiled, session)


def test_a_quantised_engine_is_kept_by_agreement_alone_and_for_this_machine(compiled: Bundle) -> None:
    anything = ParityLimits(min_agreement=0.0, max_joint_error_rad=10, max_gripper_error_m=1)
    engine = compile_bundle(compiled, precision="int8", limits=anything)
    parity = engine.record.parity
    assert parity is not None
    assert parity.agreement < 1.0, "integers would round nothing"
    assert parity.machine == processor()
    assert open_session(compiled, "onnxruntime", precision="int8").info.precision == "int8"
    sidecar = engine.path / SIDECAR
    sidecar.write_text(sidecar.read_text().replace(processor(), "another machine"))
    with pytest.raises(EngineError, match="another machine"):
        find_engine(compiled, "onnxruntime", "int8")
    before = (engine.path / STEP).stat().st_mtime_ns
    again = compile_bundle(compiled, precision="int8", limits=anything)
    assert again.record.parity is not None
    assert again.record.parity.machine == processor()
    assert (again.path / STEP).stat().st_mtime_ns == before, "what only lacked a check was built again"


def test_a_precision_that_a_back_end_lacks_is_named(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="unknown precision of onnxruntime 'bf16'"):
        compile_bundle(bundle, "onnxruntime", "bf16")


def test_a_provider_that_is_not_there_is_no_other_one(compiled: Bundle) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    engine = compile_bundle(compiled, "onnxruntime-cuda")
    assert engine.record.parity is None
    with pytest.raises(EngineError, match="never run"):
        open_session(compiled, "onnxruntime-cuda")
    with pytest.raises(EngineError, match="has no CUDAExecutionProvider"):
        OnnxRuntime("onnxruntime-cuda").open(engine.path, "fp32", SessionOptions(), cache=compiled.path)


def test_constants_follow_the_instruction(compiled: Bundle, observe: Observe) -> None:
    """Two instructions in turn give what each gives alone."""
    ours, reference = open_session(compiled, "onnxruntime"), TorchSession(compiled)
    processor_ = ServedPolicy.of(compiled, reference).processor
    first = observe(1)
    other = dataclasses.replace(first, instruction="lift the pot")
    for observation in (first, other, first, other):
        inputs = processor_.inputs(observation)
        np.testing.assert_allclose(ours.run(inputs), reference.run(inputs), atol=1e-4)


def test_inspect_names_what_is_there_and_what_may_be_served(
    compiled: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(compiled.path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["policy_id"] == compiled.id
    assert facts["parameters"] == sum(value.size for value in compiled.weights().values())
    assert [(e["backend"], e["usable"]) for e in facts["engines"]] == [("onnxruntime", True)]
    spoil_model(find_engine(compiled, "onnxruntime").path)
    assert main(["inspect", str(compiled.path)]) == 0
    output = capsys.readouterr().out
    assert "not usable here" in output
    assert compiled.manifest.instructions["move_can_pot"] in output


def test_bench_compares_what_is_named(compiled: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--backend", "torch", "--backend", "onnxruntime", "--rounds", "10", "--threads", "1"]
    assert main(["bench", str(compiled.path), *arguments]) == 0
    output = capsys.readouterr().out
    rows = [line for line in output.splitlines() if line.startswith(("| torch", "| onnxruntime"))]
    assert len(rows) == 4
    assert rows[0].endswith("| 1.00 |")


def test_a_compiled_network_continues_from_committed_actions(tmp_path: Path) -> None:
    sizes = load_sizes("tiny")
    head = msgspec.structs.replace(sizes.head, prefix=True)
    bundle = write_example_bundle(tmp_path / "prefix", msgspec.structs.replace(sizes, head=head))
    observation = plausible_observations(bundle.manifest, count=1, seed=0)[0]
    compile_bundle(bundle, observations=[observation])
    policies = [ServedPolicy.of(bundle, open_session(bundle, name)) for name in ("torch", "onnxruntime")]
    assert all(policy.continues for policy in policies)
    committed = np.tile(observation.state, (2, 1)).astype(np.float32)
    inputs = policies[0].processor.inputs(dataclasses.replace(observation, committed=committed))
    free = policies[0].processor.inputs(observation)
    want, have = (policy.session.run(inputs) for policy in policies)
    np.testing.assert_allclose(have, want, atol=1e-4)
    assert not np.allclose(have, policies[1].session.run(free), atol=1e-4)


def spoil_model(folder: Path) -> None:
    data = bytearray((folder / STEP).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / STEP).write_bytes(data)


def spoil_sidecar(folder: Path) -> None:
    (folder / SIDECAR).write_text("{}")


def spoil_identity(folder: Path) -> None:
    text = (folder / SIDECAR).read_text()
    (folder / SIDECAR).write_text(re.sub(r'"bundle_id": "\w+"', f'"bundle_id": "{"0" * 64}"', text))


def spoil_certificate(folder: Path) -> None:
    text = (folder / SIDECAR).read_text()
    (folder / SIDECAR).write_text(re.sub(r'"agreement": [\d.]+', '"agreement": 0.5', text))


def lose_model(folder: Path) -> None:
    (folder / STEP).unlink()


@pytest.mark.parametrize(
    "spoil", [spoil_model, spoil_sidecar, spoil_identity, spoil_certificate, lose_model]
)
def test_an_engine_that_was_altered_is_refused(compiled: Bundle, spoil: Callable[[Path], None]) -> None:
    spoil(find_engine(compiled, "onnxruntime").path)
    with pytest.raises(EngineError) as caught:
        open_session(compiled, "onnxruntime")
    assert "--force" in caught.value.remedy


def test_another_runtime_needs_another_engine(compiled: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "99.0")
    with pytest.raises(EngineError, match="no onnxruntime engine") as caught:
        open_session(compiled, "onnxruntime")
    assert "simplevla compile" in caught.value.remedy


def test_an_engine_goes_to_the_cache_if_the_bundle_cannot_be_written_to(
    engine: Engine, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(bundle.path, tmp_path / "copy", ignore=shutil.ignore_patterns("engines"))
    (tmp_path / "copy/engines").touch()  # a file where the folder would be; root may write anywhere else
    copy = load_bundle(tmp_path / "copy")
    made = compile_bundle(copy, observations=plausible_observations(copy.manifest, count=2, seed=0))
    assert made.path == tmp_path / "cache/simplevla/engines" / bundle.id / engine.record.key
    assert find_engine(copy, "onnxruntime").record == made.record


def test_onnxruntime_refuses_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / STEP).write_bytes(b"not a model")
    with pytest.raises(EngineError, match="refuses"):
        cpu_session(tmp_path / STEP, SessionOptions())


def test_an_unknown_back_end_is_named(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="'quantum'"):
        open_session(bundle, "quantum")
    with pytest.raises(ConfigError, match="'torch'"):
        compile_bundle(bundle, "torch")


def test_recorded_observations_are_read_back(bundle: Bundle, tmp_path: Path, observe: Observe) -> None:
    recorded = [observe(seed) for seed in range(3)]
    np.savez(
        tmp_path / "recorded.npz",
        **{
            "state": np.stack([o.state for o in recorded]),
            "image/head": np.stack([o.images["head"] for o in recorded]),
            "instruction": np.array([o.instruction for o in recorded]),
        },
    )
    back = load_observations(tmp_path / "recorded.npz", bundle.manifest)
    assert [o.instruction for o in back] == [o.instruction for o in recorded]
    for have, want in zip(back, recorded, strict=True):
        np.testing.assert_array_equal(have.state, want.state)
        np.testing.assert_array_equal(have.images["head"], want.images["head"])


@pytest.mark.parametrize(
    "arrays",
    [
        None,
        {},
        {"state": np.zeros((2, 7), np.float32)},
        {"state": np.zeros((2, 7), np.float32), "image/head": np.zeros((3, 48, 64, 3), np.uint8)},
        {"state": np.zeros((2, 6), np.float32), "image/head": np.zeros((2, 48, 64, 3), np.uint8)},
        {"state": np.array([{}, {}]), "image/head": np.zeros((2, 48, 64, 3), np.uint8)},
    ],
)
def test_what_is_no_recording_is_refused(
    bundle: Bundle, tmp_path: Path, arrays: dict[str, np.ndarray] | None
) -> None:
    path = tmp_path / "recorded.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(ObservationError):
        load_observations(path, bundle.manifest)


def test_a_served_chunk_is_what_torch_answers(
    compiled: Bundle, embodiment: Embodiment, observe: Observe
) -> None:
    reference = ServedPolicy.of(compiled, TorchSession(compiled))
    with serve(str(compiled.path), "--address", "tcp://127.0.0.1:*", "--threads", "1") as (line, process):
        ready = re.fullmatch(r"ready: small (\w{12}) on (tcp://127\.0\.0\.1:\d+) \(onnxruntime\)", line)
        assert ready, line
        assert compiled.id.startswith(ready[1])
        with PolicyClient(ready[2], embodiment=embodiment, timeout_s=10) as client:
            for seed in range(3):
                want, _ = reference.answer(observe(seed))
                np.testing.assert_allclose(client.act(observe(seed)).chunk.actions, want.actions, atol=1e-5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_broken_bundle_is_one_line_and_nothing_is_written(compiled: Bundle) -> None:
    weights = compiled.path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    before = files_below(compiled.path)
    for arguments in (("serve", str(compiled.path), "--compile"), ("compile", str(compiled.path))):
        status, output, errors = run(*arguments)
        assert (status, output, len(errors)) == (2, "", 1), errors
        assert WEIGHTS in errors[0]
    assert files_below(compiled.path) == before


def test_serving_what_was_not_compiled_says_what_to_run(compiled: Bundle) -> None:
    shutil.rmtree(compiled.path / "engines")
    status, output, errors = run("serve", str(compiled.path))
    assert (status, output, len(errors)) == (2, "", 1), errors
    assert f"run: simplevla compile {compiled.path}" in errors[0]


def test_a_port_in_use_is_one_line(compiled: Bundle, server: object) -> None:
    address = server.address  # type: ignore[attr-defined]
    status, output, errors = run("serve", str(compiled.path), "--address", address)
    assert (status, output, len(errors)) == (2, "", 1), errors
    assert f"{address} is in use" in errors[0]


def test_made_up_observations_fit_the_policy_and_follow_their_seed(bundle: Bundle) -> None:
    first, again, other = (plausible_observations(bundle.manifest, count=3, seed=s) for s in (1, 1, 2))
    processor = ServedPolicy.of(bundle, TorchSession(bundle)).processor
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a.images["head"], b.images["head"])
        np.testing.assert_array_equal(a.state, b.state)
        assert not np.array_equal(a.state, c.state)
        assert processor.inputs(a)["frames"].shape == (1, 1, 48, 64, 3)

"""From observation to inputs, and from logits to a chunk."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simplevla.action_chunk import check_chunk
from simplevla.bundle import Bundle, Manifest
from simplevla.errors import BundleError, ChunkError, ObservationError
from simplevla.kinematics.action_space import to_joint_targets
from simplevla.observation import Observation
from simplevla.policy.processor import INPUT_NAMES, PolicyProcessor, PromptEncoder
from simplevla.policy.tokenizer import make_tokenizer, prompt

Observe = Callable[..., Observation]


@pytest.fixture
def processor(manifest: Manifest) -> PolicyProcessor:
    return PolicyProcessor(manifest, make_tokenizer())


def test_inputs_have_the_names_shapes_and_types_of_the_contract(
    processor: PolicyProcessor, observe: Observe
) -> None:
    inputs = processor.inputs(observe())
    assert tuple(inputs) == INPUT_NAMES
    assert inputs["frames"].shape == (1, 1, 240, 320, 3)
    assert inputs["frames"].dtype == np.uint8
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (1, 32)
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == np.int64
    assert inputs["proprio"].shape == (1, 20)
    assert inputs["proprio"].dtype == np.float32


def test_the_prompt_is_openvlas_and_ends_at_the_last_place(
    processor: PolicyProcessor, observe: Observe
) -> None:
    assert prompt("Lift It") == "In: What action should the robot take to lift it?\nOut:"
    inputs = processor.inputs(observe())
    mask = inputs["attention_mask"][0]
    words = int(mask.sum()) - 1
    assert mask[0] == 1
    assert mask[-words:].all()
    assert not mask[1:-words].any()


def test_case_makes_no_difference_and_words_do(processor: PolicyProcessor, observe: Observe) -> None:
    plain = processor.inputs(observe())["input_ids"]
    shouted = processor.inputs(observe(instruction="MOVE the Can next to the Pot"))["input_ids"]
    other = processor.inputs(observe(instruction="move the pot next to the can"))["input_ids"]
    np.testing.assert_array_equal(plain, shouted)
    assert (plain != other).any()


@given(instruction=st.text(max_size=60))
def test_no_text_crashes_the_tokenizer(instruction: str) -> None:
    encoder = PromptEncoder(make_tokenizer(), 128)
    try:
        ids, mask = encoder(instruction)
    except ObservationError:
        return
    assert ids.shape == mask.shape == (128,)
    assert ids.max() < encoder.size


def test_an_unknown_word_is_unknown_and_a_long_instruction_is_refused() -> None:
    encoder = PromptEncoder(make_tokenizer(), 32)
    assert 0 in encoder("move the xyzzy")[0]
    with pytest.raises(ObservationError, match="tokens"):
        encoder("move " * 40)


@pytest.mark.parametrize(
    "changes",
    [
        {"images": {}},
        {"images": {"head": np.zeros((240, 320, 3), np.float32)}},
        {"images": {"head": np.zeros((120, 320, 3), np.uint8)}},
        {"state": np.zeros(7, np.float32)},
        {"state": np.zeros(14, np.float64)},
        {"state": np.full(14, np.nan, np.float32)},
        {"instruction": "word " * 200},
    ],
)
def test_a_broken_observation_is_refused(
    processor: PolicyProcessor, observe: Observe, changes: dict[str, object]
) -> None:
    with pytest.raises(ObservationError):
        processor.inputs(observe(**changes))


def test_a_chunk_is_what_the_likeliest_bins_mean(
    processor: PolicyProcessor, manifest: Manifest, observe: Observe
) -> None:
    rng = np.random.default_rng(1)
    bins = rng.integers(60, 80, (2, 14))
    logits = np.full((2, 14, 256), -5.0, np.float32)
    np.put_along_axis(logits, bins[..., None], 1.0, axis=-1)
    observation = observe()
    chunk = processor.chunk(logits.reshape(1, 28, 256), observation, "policy")
    expected = to_joint_targets(
        "ee_delta", manifest.action_codec().decode(bins), observation.state, manifest.embodiment
    )
    np.testing.assert_allclose(chunk.actions, expected, atol=1e-6)
    assert (chunk.dt_s, chunk.capture_ns, chunk.policy_id) == (0.1, 5, "policy")
    check_chunk(chunk, manifest.embodiment)
    same = processor.chunk(logits.reshape(28, 256), observation, "policy")
    np.testing.assert_array_equal(same.actions, chunk.actions)


@pytest.mark.parametrize(
    "logits", [np.zeros((27, 256)), np.zeros((2, 28, 256)), np.zeros((28, 255)), np.full((28, 256), np.nan)]
)
def test_logits_of_another_shape_or_not_finite_are_refused(
    processor: PolicyProcessor, observe: Observe, logits: np.ndarray
) -> None:
    with pytest.raises(ChunkError):
        processor.chunk(logits, observe(), "policy")


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_length": 3},
        {"network": {}},
        {"proprio_low": (0.0,), "proprio_high": (1.0,)},
    ],
)
def test_a_manifest_whose_parts_do_not_fit_is_refused(
    manifest: Manifest, changes: dict[str, object]
) -> None:
    with pytest.raises(BundleError):
        PolicyProcessor(msgspec.structs.replace(manifest, **changes), make_tokenizer())


@pytest.mark.parametrize(
    "tokenizer", [b"", b"{}", b"\xff\xfe", make_tokenizer().replace(b"<pad>", b"<gap>")]
)
def test_a_tokenizer_that_is_none_is_refused(manifest: Manifest, tokenizer: bytes) -> None:
    with pytest.raises(BundleError):
        PolicyProcessor(manifest, tokenizer)


def test_a_processor_comes_from_a_bundle(bundle: Bundle, observe: Observe) -> None:
    processor = PolicyProcessor.from_bundle(bundle)
    assert processor.embodiment == bundle.manifest.embodiment
    assert processor.inputs(observe())["proprio"][0, 6] == pytest.approx(0.07)

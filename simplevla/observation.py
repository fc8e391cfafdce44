"""What a robot shows a policy at one instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simplevla.embodiment import Embodiment
from simplevla.errors import ObservationError

MAX_INSTRUCTION_CHARS = 512
MAX_COMMITTED = 512


@dataclass(frozen=True)
class Observation:
    """One instant, as a policy sees it.

    Attributes:
        images: {camera: (H, W, 3) uint8 RGB}.
        state: (D,) float32 measured position in the embodiment's order; rad and m.
        instruction: what to do, in words.
        capture_ns: when the images were exposed, ns of the system clock.
        episode: identifies the attempt; a server keeps nothing across episodes.
        last_action: index in the episode of the last action already executed, -1 before the first.
        committed: (m, D) float32 absolute joint targets that will be executed next whatever the answer
            says, in order, the first at index ``last_action + 1``; None if there are none. Where it is
            given, action i of the answer is meant for index ``last_action + 1 + i``, so the answer's
            first m actions are these, and the rest continues from them.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    instruction: str
    capture_ns: int
    episode: str = ""
    last_action: int = -1
    committed: NDArray[np.float32] | None = None


def check_observation(
    observation: Observation, embodiment: Embodiment, cameras: tuple[str, ...] | None = None
) -> None:
    """Check an observation against the robot it claims to come from.

    Args:
        cameras: the cameras that are needed; all of the embodiment's by default.

    Raises:
        ObservationError: a camera is missing, or a shape, type or value is wrong.
    """
    state, size = observation.state, embodiment.dimension
    if state.shape != (size,) or state.dtype != np.float32:
        raise ObservationError(
            f"state is {state.dtype} {state.shape}, not float32 ({size},)",
            f"send the {embodiment.name} state in the order {', '.join(embodiment.names())}",
        )
    if not np.isfinite(state).all():
        bad = [n for n, ok in zip(embodiment.names(), np.isfinite(state), strict=True) if not ok]
        raise ObservationError(f"state is not finite: {', '.join(bad)}", "check the joint feedback")
    committed = observation.committed
    if committed is not None and (
        committed.dtype != np.float32
        or committed.ndim != 2
        or committed.shape[1] != size
        or not 1 <= len(committed) <= MAX_COMMITTED
        or not np.isfinite(committed).all()
    ):
        raise ObservationError(
            f"committed actions are {committed.dtype} {committed.shape}, not finite float32 "
            f"(1 to {MAX_COMMITTED}, {size})",
            "send what is left of the chunk that is being executed",
        )
    if len(observation.instruction) > MAX_INSTRUCTION_CHARS:
        raise ObservationError(
            f"instruction has {len(observation.instruction)} characters",
            f"send at most {MAX_INSTRUCTION_CHARS}",
        )
    for name in cameras if cameras is not None else tuple(c.name for c in embodiment.cameras):
        camera = embodiment.camera(name)
        image = observation.images.get(name)
        want = (camera.height, camera.width, 3)
        if image is None:
            have = ", ".join(sorted(observation.images)) or "none"
            raise ObservationError(f"no image of camera {name!r} (have: {have})", "start that camera")
        if image.shape != want or image.dtype != np.uint8:
            raise ObservationError(
                f"image of {name!r} is {image.dtype} {image.shape}, not uint8 {want}",
                "send RGB in the size that the embodiment names",
            )

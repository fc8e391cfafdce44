"""What a robot shows a policy at one instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simplevla.embodiment import Embodiment
from simplevla.errors import ObservationError

MAX_INSTRUCTION_CHARS = 512


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
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    instruction: str
    capture_ns: int
    episode: str = ""
    last_action: int = -1


def check_observation(
    observation: Observation, embodiment: Embodiment, cameras: tuple[str, ...] | None = None
) -> None:
    """Check an observation against the robot it claims to come from.

    Args:
        cameras: the cameras that are needed; all of the embodiment's by default.

    Raises:
        ObservationError: a camera is missing, or a shape, type or value is wrong.
    """
    names = embodiment.names()
    state = observation.state
    if state.shape != (len(names),) or state.dtype != np.float32:
        raise ObservationError(
            f"state is {state.dtype} {state.shape}, not float32 ({len(names)},)",
            f"send the {embodiment.name} state in the order {', '.join(names)}",
        )
    if not np.isfinite(state).all():
        bad = [n for n, ok in zip(names, np.isfinite(state), strict=True) if not ok]
        raise ObservationError(f"state is not finite: {', '.join(bad)}", "check the joint feedback")
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

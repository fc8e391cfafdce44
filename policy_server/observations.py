"""Observations to compare engines on: recorded ones from a file, or made-up ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simplevla.bundle import Manifest
from simplevla.errors import ObservationError
from simplevla.observation import Observation, check_observation


def plausible_observations(manifest: Manifest, *, count: int, seed: int) -> list[Observation]:
    """Return made-up observations: states around home, noisy and smooth images, known instructions."""
    rng = np.random.default_rng(seed)
    embodiment = manifest.embodiment
    lower, upper = embodiment.position_limits()
    instructions = list(manifest.instructions.values()) or [""]
    observations = []
    for index in range(count):
        spread = 0.2 * (upper - lower) * rng.uniform(-1, 1, embodiment.dimension)
        make = _noise_image if index % 2 else _smooth_image
        cameras = [embodiment.camera(name) for name in manifest.cameras]
        observations.append(
            Observation(
                images={c.name: make(rng, c.height, c.width) for c in cameras},
                state=np.clip(embodiment.home() + spread, lower, upper).astype(np.float32),
                instruction=instructions[index % len(instructions)],
                capture_ns=index,
            )
        )
    return observations


def load_observations(path: Path, manifest: Manifest) -> list[Observation]:
    """Return the recorded observations in an ``.npz`` file.

    It holds ``state`` (N, D) float32, ``image/<camera>`` (N, H, W, 3) uint8 for each camera of the
    policy, and optionally ``instruction`` (N,) text. ``simplevla observe`` writes such a file.

    Raises:
        ObservationError: the file is missing, or does not hold these.
    """
    remedy = "record some: simplevla observe BUNDLE --out FILE.npz"
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays: Mapping[str, NDArray[Any]] = {name: data[name] for name in data.files}
        states = arrays["state"]
        images = {name: arrays[f"image/{name}"] for name in manifest.cameras}
    except OSError as error:
        raise ObservationError(f"{path} cannot be read: {error.strerror or error}", remedy) from error
    except (KeyError, ValueError) as error:
        raise ObservationError(f"{path} holds no observations: {error}", remedy) from error
    default = next(iter(manifest.instructions.values()), "")
    instructions = [str(x) for x in arrays.get("instruction", np.array([default] * len(states)))]
    if {len(instructions), *map(len, images.values())} != {len(states)}:
        raise ObservationError(f"the arrays of {path} have different lengths", remedy)
    observations = [
        Observation(
            images={name: stack[i] for name, stack in images.items()},
            state=states[i],
            instruction=instructions[i],
            capture_ns=i,
        )
        for i in range(len(states))
    ]
    for observation in observations:
        check_observation(observation, manifest.embodiment, manifest.cameras)
    return observations


def _noise_image(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _smooth_image(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Return a few broad colour blobs on a plain ground, so that edges and flat parts occur."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.broadcast_to(rng.uniform(40, 215, 3), (height, width, 3)).copy()
    for _ in range(4):
        centre = rng.uniform((0, 0), (height, width))
        radius = rng.uniform(0.05, 0.25) * height
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        image[inside] = rng.uniform(0, 255, 3)
    return image.astype(np.uint8)

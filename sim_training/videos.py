"""Short films of policies for a report: the same episodes, several at once in one animated picture.

They show what the policy saw, look by look, so that the episodes are those of the evaluation.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sim_training.evaluation import Bench, Policy, PolicySource
from sim_training.randomisation import Randomisation
from simplevla.action_chunk import ActionChunk
from simplevla.errors import MissingExtraError
from simplevla.files import whole_directory
from simplevla.observation import Observation

Picture = NDArray[np.uint8]

_TILE = (240, 180)  # width and height of one episode, pixels
_FRAME = 3
_PICTURE_MS, _END_MS = 250, 2000
_QUALITY = 55
_SUCCESS, _FAILURE, _GOING = (26, 127, 75), (179, 54, 31), (225, 230, 235)


def film_policies(
    sources: Mapping[str, PolicySource],
    task: str,
    seeds: Sequence[int],
    folder: Path,
    randomisation: Randomisation | None = None,
) -> None:
    """Write ``folder/<name>.webp`` for each policy in ``sources``, the folder whole or not at all.

    Args:
        seeds: the episodes; they are shown side by side, in a green frame once they have succeeded and
            in a red one once they have failed.

    Raises:
        FileExistsError: the folder exists.
        MissingExtraError: pillow is not installed.
    """
    with whole_directory(folder) as scratch:
        for name, source in sources.items():
            films = _film(source(), task, seeds, randomisation or Randomisation.none())
            (scratch / f"{name}.webp").write_bytes(side_by_side(films))


class _Filmed:
    """A policy that keeps what it sees through its first camera."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.id, self.embodiment, self.cameras = policy.id, policy.embodiment, policy.cameras
        self.pictures: list[Picture] = []

    def act(self, observation: Observation) -> ActionChunk:
        """Return the next actions."""
        self.pictures.append(observation.images[self.cameras[0]])
        return self._policy.act(observation)


def _film(
    policy: Policy, task: str, seeds: Sequence[int], randomisation: Randomisation
) -> list[tuple[list[Picture], bool]]:
    """Return what the policy saw in each episode and how it stood at the end, and whether it succeeded."""
    filmed, films = _Filmed(policy), []
    with Bench(filmed, task, randomisation) as bench:
        for seed in seeds:
            filmed.pictures = []
            result = bench.run(seed)
            films.append(([*filmed.pictures, bench.world.render(policy.cameras[0])], result.success))
    return films


def side_by_side(films: Sequence[tuple[Sequence[Picture], bool]]) -> bytes:
    """Return an animated WebP that shows all ``films`` at once.

    Args:
        films: for each its (H, W, 3) uint8 pictures, at least one, and whether it ended well.

    Raises:
        MissingExtraError: pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "train") from error
    columns = math.ceil(math.sqrt(len(films)))
    rows = math.ceil(len(films) / columns)
    width, height = _TILE[0] + 2 * _FRAME, _TILE[1] + 2 * _FRAME
    tiles = [[Image.fromarray(picture).resize(_TILE) for picture in pictures] for pictures, _ in films]
    frames = []
    for moment in range(max(map(len, tiles))):
        sheet = Image.new("RGB", (columns * width, rows * height), "white")
        for place, (shown, (_, success)) in enumerate(zip(tiles, films, strict=True)):
            over = moment >= len(shown) - 1
            colour = (_SUCCESS if success else _FAILURE) if over else _GOING
            x, y = place % columns * width, place // columns * height
            sheet.paste(colour, (x, y, x + width, y + height))
            sheet.paste(shown[min(moment, len(shown) - 1)], (x + _FRAME, y + _FRAME))
        frames.append(sheet)
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=[_PICTURE_MS] * (len(frames) - 1) + [_END_MS],
        loop=0,
        quality=_QUALITY,
        method=2,
    )
    return buffer.getvalue()

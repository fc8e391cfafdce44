"""Several worlds in one process, which play chunks of actions and look when they have done so.

A plain class: it runs in a process of :mod:`sim_training.rollouts` and just as well anywhere else. What
it plays is what :func:`sim_training.episode.play` plays, to the bit; it only computes the setpoints of
all worlds at once and draws small pictures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from sim_training.episode import physics_steps, setpoints
from sim_training.pictures import with_small_cameras
from sim_training.randomisation import Randomisation
from sim_training.table_clearance import TableClearance
from sim_training.tasks import load_task
from sim_training.world import PHYSICS_DT_S, World
from simplevla.action_codec import ActionCodec
from simplevla.bundle import ActionSpaceName
from simplevla.embodiment import Embodiment
from simplevla.kinematics.action_space import to_joint_targets
from simplevla.policy.config import NetworkConfig
from simplevla.policy.processor import proprioception
from simplevla.policy.resample import Resample
from simplevla.trial import FailureCode

_NO_PATH = np.zeros((0, 0))
_LYING_LOOKS = 2  # looks at a lying object after which nothing good is to come


@dataclass(frozen=True, eq=False)
class RolloutSettings:
    """What is played, by how many.

    Attributes:
        task: name of the task.
        embodiment: the robot, with its cameras at their own size.
        cameras: what the policy looks through.
        network: says at what size it sees.
        action_space, codec, dt_s: what bins mean.
        horizon: actions after which an episode has failed; 0 for the task's own limit.
        workers: processes.
        slots: worlds of each process.
        small_pictures: draw at the network's size; else at the camera's, and resample as evaluation does.
    """

    task: str
    embodiment: Embodiment
    cameras: tuple[str, ...]
    network: NetworkConfig
    action_space: ActionSpaceName
    codec: ActionCodec
    dt_s: float
    horizon: int
    workers: int = 2
    slots: int = 8
    small_pictures: bool = True
    randomisation: Randomisation = field(default_factory=Randomisation.none)


class Command(NamedTuple):
    """What some of a worker's slots do next.

    Attributes:
        lane: comes back with the answer.
        slots: (n,) slots that act; ``bins`` (n, K, D) uint8 are their chunks.
        begin: (slot, seed) of each episode to begin.
        horizon: actions after which the episodes of all slots have failed; 0 as the settings have it.
    """

    lane: int
    slots: list[int]
    bins: NDArray[np.uint8]
    begin: list[tuple[int, int]]
    horizon: int = 0


class Ended(NamedTuple):
    """How the episode in a slot ended; ``actions`` were begun in it."""

    slot: int
    success: bool
    strategy: str
    failure: str
    region: str
    actions: int


class News(NamedTuple):
    """What came of a command.

    Attributes:
        slots: (n,) slots that look now, with ``images`` (n, n_cameras, 3, h, w) uint8 and ``proprio``
            (n, P) float32.
        ended: episodes that are over; their slots are free.
        seconds: what time was spent on.
    """

    lane: int
    slots: list[int]
    images: NDArray[np.uint8]
    proprio: NDArray[np.float32]
    ended: list[Ended]
    seconds: dict[str, float]


@dataclass(eq=False)
class _Slot:
    """A world, the state (D,) in which it was last looked at, and how its episode goes."""

    world: World
    state: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    done: int = 0
    lying: int = 0


class Worker:
    """The worlds of one process; a context manager."""

    def __init__(self, settings: RolloutSettings) -> None:
        torch.set_num_threads(1)
        network, sizes = settings.network, settings.network.sizes
        seen = tuple(settings.embodiment.camera(name) for name in settings.cameras)
        embodiment = msgspec.structs.replace(settings.embodiment, cameras=seen)
        self._settings = settings
        self._embodiment = embodiment
        self._clearance = TableClearance(embodiment)
        self._steps = physics_steps(settings.dt_s)
        self._resample = (
            None
            if settings.small_pictures
            else Resample(
                (network.frame_height, network.frame_width),
                (sizes.image_height, sizes.image_width),
                sizes.crop_area,
            )
        )
        shown = with_small_cameras(embodiment, network) if settings.small_pictures else embodiment
        task = load_task(settings.task)
        self._own_horizon = self._horizon = settings.horizon or task.step_limit
        self._slots = [
            _Slot(World(shown, task, randomisation=settings.randomisation)) for _ in range(settings.slots)
        ]
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._slots:
            slot.world.close()

    def warm(self) -> None:
        """Draw one picture, so that no episode waits until shaders are compiled, which takes seconds."""
        self._slots[0].world.reset(0)
        self._look([0])

    def advance(self, command: Command) -> News:
        """Play the chunks of ``command``, begin its episodes, and return what there is to see then."""
        self._seconds = {}
        self._horizon = command.horizon or self._own_horizon
        ended = self._play(command.slots, command.bins) if command.slots else []
        over = {end.slot for end in ended}
        with self._timed("scene"):
            for number, seed in command.begin:
                slot = self._slots[number]
                slot.world.reset(seed)
                slot.done = slot.lying = 0
        looking = [number for number in command.slots if number not in over]
        looking += [number for number, _ in command.begin]
        images, proprio = self._look(looking)
        return News(command.lane, looking, images, proprio, ended, self._seconds)

    def _play(self, numbers: list[int], bins: NDArray[np.uint8]) -> list[Ended]:
        settings, slots = self._settings, [self._slots[number] for number in numbers]
        with self._timed("kinematics"):
            targets = np.stack(
                [
                    to_joint_targets(settings.action_space, actions, slot.state, self._embodiment)
                    for slot, actions in zip(slots, settings.codec.decode(bins), strict=True)
                ]
            ).astype(np.float64)
            paths = self._paths(slots, targets)
        ended = []
        for number, slot, path in zip(numbers, slots, paths, strict=True):
            with self._timed("physics"):
                steps, success = slot.world.follow(path)
            left = min(targets.shape[1], self._horizon - slot.done)
            slot.done += min(-(-steps // self._steps), left)
            end = self._ended(number, slot, success)
            if end is not None:
                ended.append(end)
        return ended

    def _paths(self, slots: list[_Slot], targets: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Return the setpoints of each slot; what would go beyond the horizon is left out."""
        paths: list[NDArray[np.float64]] = [_NO_PATH] * len(slots)
        lefts = np.array([min(targets.shape[1], self._horizon - slot.done) for slot in slots])
        start = np.stack([slot.world.targets() for slot in slots])
        tops = np.array([slot.world.table_top_m for slot in slots])
        for left in np.unique(lefts):
            rows = np.flatnonzero(lefts == left)
            found = setpoints(
                self._clearance, start[rows], targets[rows, :left], self._settings.dt_s, tops[rows]
            )
            for row, path in zip(rows, found, strict=True):
                paths[row] = path
        return paths

    def _ended(self, number: int, slot: _Slot, success: bool) -> Ended | None:
        world = slot.world
        failure = FailureCode.NONE if success else world.failure()
        slot.lying = slot.lying + 1 if failure is FailureCode.NOT_UPRIGHT else 0
        lost = failure is FailureCode.DROPPED or slot.lying >= _LYING_LOOKS
        if not (success or lost or slot.done >= self._horizon):
            return None
        strategy = world.strategy().value if success else ""
        return Ended(number, success, strategy, "" if success else failure.value, world.region, slot.done)

    def _look(self, numbers: list[int]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return pictures and proprioception of some slots; all begin to be drawn before one is awaited."""
        slots = [self._slots[number] for number in numbers]
        with self._timed("rendering"):
            for slot in slots:
                slot.state = slot.world.positions()
                slot.world.expose(*self._settings.cameras)
        with self._timed("physics"):
            for slot in slots:
                slot.world.step(round(slot.world.variation.think_s / PHYSICS_DT_S))
        with self._timed("rendering"):
            frames = [[slot.world.develop(name) for name in self._settings.cameras] for slot in slots]
            images = self._at_network_size(np.array(frames, dtype=np.uint8))
        with self._timed("kinematics"):
            proprio = [proprioception(slot.state, self._embodiment) for slot in slots]
        return images, np.array(proprio, dtype=np.float32)

    def _at_network_size(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not len(frames):
            return np.zeros((0, len(self._settings.cameras), 3, 1, 1), dtype=np.uint8)
        if self._resample is None:
            return np.ascontiguousarray(frames.transpose(0, 1, 4, 2, 3))
        with torch.no_grad():
            small: torch.Tensor = self._resample(torch.from_numpy(frames))
        pixels: NDArray[np.uint8] = (small * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        return pixels

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - start

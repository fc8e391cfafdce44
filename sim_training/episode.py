"""Playing actions in a world the way the real stack plays them, and looking at it as a policy does."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim_training.table_clearance import TableClearance
from sim_training.world import PHYSICS_DT_S, World
from simplevla.errors import ChunkError
from simplevla.motion import MotionLimits, approach
from simplevla.observation import Observation

Array = NDArray[np.float64]

_REST_S = 0.3  # braking from 0.75 rad/s and coming back takes this long at 5 rad/s2
_AT_REST = 1e-3  # rad/s and m/s


class Played(NamedTuple):
    """How many actions were begun, and whether the task was fulfilled while they were played."""

    actions: int
    success: bool


def play(
    world: World, actions: ArrayLike, dt_s: float, *, after_action: Callable[[World], None] | None = None
) -> Played:
    """Play (K, D) absolute targets, one every ``dt_s``, and stop at the first moment of success.

    What is wanted moves in a straight line from the last setpoint to each target (the arm node passes
    through the same targets on a smoother path), and the setpoint follows within the embodiment's
    velocity and acceleration limits and keeps clear of the table, as the limits before the bus have it.
    Those between two arms, and of an arm from itself, are left out: few policies come near them. After
    the last target the arms come to rest, as they do while the real stack looks and asks again. Success
    is tested at every physics step, as in RoboTwin.

    Args:
        world: where.
        actions: the targets; rad and m.
        dt_s: time between two.
        after_action: is shown the world every ``dt_s`` and at the end, and changes nothing.

    Raises:
        ChunkError: ``dt_s`` is shorter than a physics step, or the targets are not finite (K, D).
    """
    targets = np.asarray(actions, dtype=np.float64)
    if (
        targets.ndim != 2
        or targets.shape[1] != world.embodiment.dimension
        or not np.isfinite(targets).all()
    ):
        raise ChunkError(
            f"actions of shape {targets.shape} are not finite (K, {world.embodiment.dimension}) targets",
            "check the policy",
        )
    table_top_m = np.array([world.table_top_m])
    path = setpoints(world.clearance, world.targets()[None], targets[None], dt_s, table_top_m)
    each = physics_steps(dt_s)
    if after_action is None:
        steps, success = world.follow(path[0])
    else:
        steps, success = _shown(world, path[0], each, after_action)
    return Played(min(-(-steps // each), len(targets)), success)


def setpoints(
    clearance: TableClearance, start: Array, targets: Array, dt_s: float, table_top_m: Array
) -> list[Array]:
    """Return what N robots are driven by, physics step by physics step, until they rest again.

    Nothing measured enters, so that all of them are computed at once.

    Args:
        clearance: the robot's.
        start: (N, D) where the setpoints are, at rest.
        targets: (N, K, D) absolute targets, one every ``dt_s``.
        table_top_m: (N,) heights of the tables in the world.

    Returns:
        N arrays (T, D); T differs, since each rests after a time of its own.

    Raises:
        ChunkError: ``dt_s`` is shorter than a physics step.
    """
    paths = _paths(clearance.limits, start, targets, dt_s)
    low = [
        row
        for row, (path, top) in enumerate(zip(paths, table_top_m, strict=True))
        if clearance.endangers(start[row], path, PHYSICS_DT_S, top)
    ]
    if low:  # few are: asking of all paths at once and then again is quicker than asking step by step

        def keep(position: Array, velocity: Array, wanted: Array) -> Array:
            return clearance.kept(position, velocity, wanted, PHYSICS_DT_S, table_top_m[low])

        for row, path in zip(
            low, _paths(clearance.limits, start[low], targets[low], dt_s, keep), strict=True
        ):
            paths[row] = path
    return paths


def _paths(
    limits: MotionLimits,
    start: Array,
    targets: Array,
    dt_s: float,
    keep: Callable[[Array, Array, Array], Array] | None = None,
) -> list[Array]:
    """Return what :func:`setpoints` does; ``keep`` makes of velocities that are wanted safe ones."""
    steps = physics_steps(dt_s)
    resting = np.repeat(targets[:, -1:], round(_REST_S / dt_s), axis=1)
    corner = before = setpoint = start
    velocity = np.zeros_like(start)
    path, ends = [], np.zeros(len(start), dtype=np.int64)
    last = targets.shape[1]
    for index, target in enumerate(np.concatenate([targets, resting], axis=1).swapaxes(0, 1)):
        for step in range(1, steps + 1):
            wanted = corner + (target - corner) * (step / steps)
            towards = approach(limits, setpoint, velocity, before, wanted, PHYSICS_DT_S).velocity
            velocity = towards if keep is None else keep(setpoint, velocity, towards)
            setpoint = setpoint + velocity * PHYSICS_DT_S
            before = wanted
            path.append(setpoint)
            if index >= last:
                still = np.abs(velocity).max(axis=1) < _AT_REST
                ends = np.where(still & (ends == 0), len(path), ends)
                if ends.all():
                    return _cut(path, ends)
        corner = target
    return _cut(path, np.where(ends == 0, len(path), ends))


def physics_steps(dt_s: float) -> int:
    """Return how many physics steps an action takes.

    Raises:
        ChunkError: not one.
    """
    steps = round(dt_s / PHYSICS_DT_S)
    if steps < 1:
        raise ChunkError(f"dt is {dt_s} s, physics steps by {PHYSICS_DT_S} s", "use a longer dt")
    return steps


def _shown(world: World, path: Array, each: int, show: Callable[[World], None]) -> tuple[int, bool]:
    total = 0
    for start in range(0, len(path), each):
        steps, success = world.follow(path[start : start + each])
        total += steps
        show(world)
        if success:
            return total, True
    return total, False


def _cut(path: list[Array], ends: NDArray[np.int64]) -> list[Array]:
    return [
        np.ascontiguousarray(column[:end]) for column, end in zip(np.stack(path, axis=1), ends, strict=True)
    ]


def observe(world: World, cameras: tuple[str, ...], last_action: int) -> Observation:
    """Return what the robot in ``world`` shows a policy now.

    With the randomisation ``latency`` the world then goes on for as long as the answer will take.
    """
    observation = Observation(
        images={name: world.render(name) for name in cameras},
        state=world.positions().astype(np.float32),
        instruction=world.task.instruction,
        capture_ns=round(world.time_s * 1e9),
        episode=str(world.seed),
        last_action=last_action,
    )
    world.step(round(world.variation.think_s / PHYSICS_DT_S))
    return observation

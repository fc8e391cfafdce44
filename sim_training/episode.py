"""Playing actions in a world the way the real stack plays them, and looking at it as a policy does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sim_training.world import PHYSICS_DT_S, World
from simplevla.errors import ChunkError
from simplevla.motion import MotionLimits, approach
from simplevla.observation import Observation

_REST_S = 0.3  # braking from 0.75 rad/s and coming back takes this long at 5 rad/s2
_AT_REST = 1e-3  # rad/s and m/s


class Played(NamedTuple):
    """How many actions were begun, and whether the task was fulfilled while they were played."""

    actions: int
    success: bool


def play(world: World, actions: ArrayLike, dt_s: float) -> Played:
    """Play (K, D) absolute targets, one every ``dt_s``, and stop at the first moment of success.

    What is wanted moves in a straight line from the last setpoint to each target, as the arm node
    interpolates, and the setpoint follows within the embodiment's velocity and acceleration limits, as
    the limits before the bus have it. After the last target the arms come to rest, as they do while
    the real stack looks and asks again. Success is tested at every physics step, as in RoboTwin.

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
    steps = round(dt_s / PHYSICS_DT_S)
    if steps < 1:
        raise ChunkError(f"dt is {dt_s} s, physics steps by {PHYSICS_DT_S} s", "use a longer dt")
    limits = MotionLimits.of(world.embodiment)
    start = before = setpoint = world.targets()
    velocity = np.zeros_like(start)
    resting = np.repeat(targets[-1:], round(_REST_S / dt_s), axis=0)
    for index, target in enumerate([*targets, *resting]):
        for step in range(1, steps + 1):
            wanted = start + (target - start) * (step / steps)
            velocity = approach(limits, setpoint, velocity, before, wanted, PHYSICS_DT_S).velocity
            setpoint = setpoint + velocity * PHYSICS_DT_S
            before = wanted
            world.set_targets(setpoint)
            world.step()
            if world.success():
                return Played(min(index + 1, len(targets)), True)
            if index >= len(targets) and np.abs(velocity).max() < _AT_REST:
                return Played(len(targets), False)
        start = target
    return Played(len(targets), False)


def observe(world: World, cameras: tuple[str, ...], last_action: int) -> Observation:
    """Return what the robot in ``world`` shows a policy now."""
    return Observation(
        images={name: world.render(name) for name in cameras},
        state=world.positions().astype(np.float32),
        instruction=world.task.instruction,
        capture_ns=round(world.time_s * 1e9),
        episode=str(world.seed),
        last_action=last_action,
    )

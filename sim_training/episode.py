"""Playing actions in a world the way the real stack plays them, and looking at it as a policy does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sim_training.world import PHYSICS_DT_S, World
from simplevla.errors import ChunkError
from simplevla.observation import Observation


class Played(NamedTuple):
    """How many actions were begun, and whether the task was fulfilled while they were played."""

    actions: int
    success: bool


def play(world: World, actions: ArrayLike, dt_s: float) -> Played:
    """Play (K, D) absolute targets, one every ``dt_s``, and stop at the first moment of success.

    The setpoint moves in a straight line from the last one to each target, as the arm node
    interpolates, but no faster than the embodiment's velocity limits, as the limits before the bus
    have it. Success is tested at every physics step, as in RoboTwin.

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
    reach = world.embodiment.velocity_limits() * PHYSICS_DT_S
    start = setpoint = world.targets()
    for index, target in enumerate(targets):
        for step in range(1, steps + 1):
            wanted = start + (target - start) * (step / steps)
            setpoint = setpoint + np.clip(wanted - setpoint, -reach, reach)
            world.set_targets(setpoint)
            world.step()
            if world.success():
                return Played(index + 1, True)
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

"""The tasks as Gymnasium environments.

Gymnasium knows them once this module is imported, which its own syntax does::

    gymnasium.make("sim_training.gymnasium_env:simplevla/move_can_pot-v0")

An observation has the cameras' pictures, the measured state and the instruction; an action is the
absolute joint targets of the next 0.1 s, or of the next K times 0.1 s with ``chunk_length=K``. The
reward is 1 at success and 0 before. Motion, scenes and success are those of training and evaluation.
"""

from __future__ import annotations

from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

try:
    import gymnasium
    from gymnasium import spaces
except ImportError as error:
    from simplevla.errors import MissingExtraError

    raise MissingExtraError("gymnasium", "sim") from error

from sim_training.episode import observe, play
from sim_training.randomisation import Randomisation
from sim_training.seeds import FIRST_EVALUATION_SEED
from sim_training.tasks import load_task, task_names
from sim_training.world import World
from simplevla.embodiment import load_embodiment
from simplevla.errors import ConfigError
from simplevla.trial import FailureCode

Array = NDArray[np.float32]
Observed = dict[str, Any]

_DT_S = 0.1
_BEYOND_RAD, _BEYOND_M = 0.2, 0.02  # a measurement may be that far beyond a limit
_TEXT = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ,.'-"


class TaskEnv(gymnasium.Env[Observed, Array]):
    """One task with one robot; see the module's text.

    Episodes are those of training, with seeds from 0 up, or of evaluation: scenes that no policy is
    trained on. Each reset draws one; ``reset(options={"episode": 10003})`` begins a certain one.

    The dictionary ``info`` of ``reset`` and ``step`` holds ``episode`` (its seed), ``success``,
    ``strategy`` and ``failure`` (their words), ``actions`` (begun so far) and ``region``.

    Args:
        task: its name.
        embodiment: name of a robot.
        cameras: whose pictures an observation has, all by default; without any there are no
            ``images``, and no graphics driver is needed.
        chunk_length: how many targets an action has; 1 makes an action (D,), more (K, D).
        randomisation: names of what differs between scenes, as ``simplevla evaluate`` takes them.
        scenes: ``all``, ``seen`` or the unseen part of a split, as ``unseen_spatial``.
        evaluation: whether resets draw seeds of evaluation.
        render_mode: ``rgb_array``, for which there must be a camera, or None.

    Raises:
        ConfigError: a name is unknown, or ``chunk_length`` is less than 1.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's own contract)

    def __init__(
        self,
        task: str = "move_can_pot",
        *,
        embodiment: str = "piper_dual",
        cameras: tuple[str, ...] | None = None,
        chunk_length: int = 1,
        randomisation: tuple[str, ...] = (),
        scenes: str = "all",
        evaluation: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if chunk_length < 1:
            raise ConfigError(f"a chunk of {chunk_length} actions is none", "choose at least 1")
        if render_mode is not None and cameras == ():
            raise ConfigError("without cameras nothing can be rendered", "leave out render_mode")
        robot = load_embodiment(embodiment)
        self._cameras = tuple(camera.name for camera in robot.cameras) if cameras is None else cameras
        pictures = {name: robot.camera(name) for name in self._cameras}
        self._world = World(
            robot,
            load_task(task),
            randomisation=Randomisation.of(randomisation, scenes),
            render=bool(pictures),
        )
        self._first = FIRST_EVALUATION_SEED if evaluation else 0
        self._actions = 0
        self.render_mode = render_mode
        lower, upper = (limits.astype(np.float32) for limits in robot.position_limits())
        gripper = np.array(["gripper" in name for name in robot.names()])
        beyond = np.where(gripper, _BEYOND_M, _BEYOND_RAD).astype(np.float32)
        observed: dict[str, spaces.Space[Any]] = {
            "state": spaces.Box(lower - beyond, upper + beyond, dtype=np.float32),
            "instruction": spaces.Text(200, charset=_TEXT),
        }
        if pictures:
            observed["images"] = spaces.Dict(
                {
                    name: spaces.Box(0, 255, (camera.height, camera.width, 3), np.uint8)
                    for name, camera in pictures.items()
                }
            )
        self.observation_space = spaces.Dict(observed)
        shape = (robot.dimension,) if chunk_length == 1 else (chunk_length, robot.dimension)
        self.action_space = spaces.Box(
            np.broadcast_to(lower, shape).copy(), np.broadcast_to(upper, shape).copy(), dtype=np.float32
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observed, dict[str, Any]]:
        """Begin an episode: that of ``options["episode"]``, or one drawn by Gymnasium's generator."""
        super().reset(seed=seed)
        episode = (options or {}).get("episode")
        if episode is None:
            episode = self._first + int(self.np_random.integers(FIRST_EVALUATION_SEED))
        self._world.reset(int(episode))
        self._actions = 0
        return self._observe(), self._info()

    def step(self, action: Array) -> tuple[Observed, SupportsFloat, bool, bool, dict[str, Any]]:
        """Play an action, at most up to success or the task's limit.

        Raises:
            ChunkError: the action is not finite or of another shape.
        """
        world, left = self._world, self._world.task.step_limit - self._actions
        targets = np.asarray(action, dtype=np.float64)
        played = play(world, targets[None] if targets.ndim == 1 else targets[:left], _DT_S)
        self._actions += played.actions
        lost = world.failure() is FailureCode.DROPPED
        limit = self._actions >= world.task.step_limit
        info = self._info(success=played.success)
        ended = played.success or lost
        return self._observe(), float(played.success), ended, limit and not ended, info

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """Return the first camera's picture now, (H, W, 3) uint8, with ``render_mode="rgb_array"``."""
        return self._world.render(self._cameras[0]) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Give the scene back."""
        self._world.close()

    def _observe(self) -> Observed:
        seen = observe(self._world, self._cameras, self._actions - 1)
        observed: Observed = {"state": seen.state, "instruction": seen.instruction}
        return observed | {"images": dict(seen.images)} if self._cameras else observed

    def _info(self, *, success: bool = False) -> dict[str, Any]:
        world = self._world
        failure = FailureCode.NONE if success else world.failure()
        return {
            "episode": world.seed,
            "success": success,
            "strategy": world.strategy().value,
            "failure": failure.value,
            "actions": self._actions,
            "region": world.region,
        }


def register() -> None:
    """Tell Gymnasium of every task, as ``simplevla/<task>-v0``; calling it again changes nothing."""
    for task in task_names():
        name = f"simplevla/{task}-v0"
        if name not in gymnasium.registry:
            gymnasium.register(
                name, entry_point="sim_training.gymnasium_env:TaskEnv", kwargs={"task": task}
            )


register()

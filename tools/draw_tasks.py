"""Draw each task for the documentation: python tools/draw_tasks.py [folder] (default: docs/images)."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2

from sim_training.demonstrations import DT_S
from sim_training.episode import play
from sim_training.expert import Expert
from sim_training.tasks import load_task, task_names
from sim_training.world import World
from simplevla.embodiment import load_embodiment

_SEED = 10_000
_POSITION_M, _LOOK_AT_M = (
    (0.12, 0.37, 1.26),
    (0.01, -0.10, 0.79),
)  # from before the wall, towards the robots
_LOOKS = 3  # chunks that the expert plays first, so that it can be seen what it is about


def main() -> None:
    """Write one ``task_<name>.png`` a task: the first evaluation episode, the expert at work."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/images")
    for name in task_names():
        task = load_task(name)
        with World(load_embodiment("piper_dual"), task) as world:
            world.reset(_SEED)
            expert = Expert(world, task)
            for _ in range(_LOOKS):
                play(world, expert.plan(5), DT_S)
            picture = world.view(_POSITION_M, _LOOK_AT_M, width=640, height=420, fov_deg=60)
        path = folder / f"task_{name}.png"
        if not cv2.imwrite(str(path), picture[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9]):
            raise SystemExit(f"{path} cannot be written")
        print(path)


if __name__ == "__main__":
    main()

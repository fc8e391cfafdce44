"""Records every topic of a run to one MCAP, for the runs that no trial records."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rclpy.node import Node

from robot_bridge.nodes.process import declare, destroying, run_node
from robot_bridge.recording import TopicTap, TrialRecorder, trial_topics
from robot_bridge.rig import load_rig

logger = logging.getLogger(__name__)

_NAME = "session"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node until it is asked to end; return the exit status."""
    return run_node("recorder", open_recorder, sys.argv if argv is None else argv)


@contextmanager
def open_recorder() -> Iterator[Node]:
    """Yield a node whose every message heard is written; the recording is whole when the block ends."""
    node = Node("recorder")
    with destroying(node), ExitStack() as resources:
        rig = declare(node, "rig", "twin", "name of a rig in config/rig, or a path to a .yaml file")
        out = declare(node, "out", "runs/session", "folder that gets the recording")
        topics = trial_topics(load_rig(rig).load_embodiment())
        tap = TopicTap(node, topics)
        recorder = TrialRecorder(Path(out), _NAME, topics, namespace=node.get_namespace())
        tap.recorder = resources.enter_context(recorder)
        yield node
    logger.info("recorded to %s", recorder.folder)


if __name__ == "__main__":
    sys.exit(main())

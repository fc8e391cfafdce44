"""Records every topic of a run to one MCAP, for the runs that no trial records.

A lifecycle node (:mod:`robot_bridge.nodes.managed`): inactive, it listens; each time it is active, it
records to a new folder, which is whole when it is deactivated. ``/diagnostics`` has what was written and
dropped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from diagnostic_msgs.msg import DiagnosticStatus

from robot_bridge.nodes.managed import ManagedNode
from robot_bridge.nodes.process import run_node, status
from robot_bridge.nodes.topic_tap import TopicTap
from robot_bridge.recording import INTERRUPTED, TrialRecorder, trial_topics
from robot_bridge.rig import load_rig

logger = logging.getLogger(__name__)

_NAME = "session"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node until it is asked to end; return the exit status."""
    return run_node("recorder", RecorderNode, sys.argv if argv is None else argv)


class RecorderNode(ManagedNode):
    """Writes every message heard while it is active."""

    def __init__(self) -> None:
        super().__init__("recorder")
        self.declare("rig", "twin", "name of a rig in config/rig, or a path to a .yaml file")
        self.declare("out", "runs/session", "folder that gets the recordings")
        self._recorder: TrialRecorder | None = None

    @contextmanager
    def configured(self) -> Iterator[None]:
        """Listen to every topic."""
        self._tap = TopicTap(self, trial_topics(load_rig(self.value("rig")).load_embodiment()))
        yield

    @contextmanager
    def active(self) -> Iterator[None]:
        """Write what is heard."""
        folder = Path(self.value("out"))
        name = free_name(folder)
        with TrialRecorder(folder, name, self._tap.topics, namespace=self.get_namespace()) as recorder:
            self._recorder = self._tap.recorder = recorder
            try:
                yield
            finally:
                self._recorder = self._tap.recorder = None
        logger.info("recorded to %s", recorder.folder)

    def diagnose(self) -> list[DiagnosticStatus]:
        """Return what was written and dropped so far."""
        recorder = self._recorder
        if recorder is None:
            return [status("recorder", "not recording", {})]
        summary, dropped = recorder.so_far, sum(recorder.so_far.dropped.values())
        values = {
            "recording": str(summary.path),
            "written": sum(summary.counts.values()),
            "waiting_bytes": recorder.pending_bytes,
            "dropped_images": dropped,
        }
        text = "images are dropped: the disk is too slow" if dropped else "recording"
        return [status("recorder", text, values, level="warn" if dropped else "ok")]


def free_name(folder: Path) -> str:
    """Return the first of session, session_001, ... that is not taken in ``folder``."""
    number, name = 0, _NAME
    while (folder / name).exists() or (folder / INTERRUPTED / name).exists():
        number += 1
        name = f"{_NAME}_{number:03d}"
    return name


if __name__ == "__main__":
    sys.exit(main())

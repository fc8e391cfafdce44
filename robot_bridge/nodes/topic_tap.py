"""Subscriptions to everything that a trial records, as the bytes that come off the wire."""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Callable, Iterable

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from robot_bridge.recording import RecordedTopic, TrialRecorder

_VITAL_DEPTH, _IMAGE_DEPTH = 2000, 10
_LATCHED_KEPT = 64


class TopicTap:
    """Subscriptions to every recorded topic, for as long as the node lives.

    Callbacks only stamp and hand on.

    Attributes:
        latest: {topic: (when it was last heard, ns of the system clock; the serialised message)}.
    """

    def __init__(
        self,
        node: Node,
        topics: Iterable[RecordedTopic],
        *,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.topics = tuple(topics)
        self.latest: dict[str, tuple[int, bytes]] = {}
        self._recorder: TrialRecorder | None = None
        self._clock_ns = clock_ns
        self._kept: dict[str, deque[bytes]] = {
            topic.name: deque(maxlen=_LATCHED_KEPT) for topic in self.topics if topic.latched
        }
        for topic in self.topics:
            node.create_subscription(
                message_class(topic.type),
                topic.resolved(node.get_namespace()),
                self._handler(topic.name),
                _profile(topic),
                raw=True,
            )

    @property
    def recorder(self) -> TrialRecorder | None:
        """Where to, or None between trials; a new one is first told what was latched."""
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: TrialRecorder | None) -> None:
        now_ns = self._clock_ns()
        if recorder is not None:
            for name, kept in self._kept.items():
                for data in list(kept):
                    recorder.write(name, data, now_ns)
        self._recorder = recorder

    def _handler(self, name: str) -> Callable[[bytes], None]:
        kept = self._kept.get(name)

        def hear(data: bytes) -> None:
            now_ns = self._clock_ns()
            self.latest[name] = (now_ns, data)
            if kept is not None and data not in kept:
                kept.append(data)
            recorder = self._recorder
            if recorder is not None:
                recorder.write(name, data, now_ns)

        return hear


def message_class(message_type: str) -> type:
    """Return the rclpy class of a type such as ``sensor_msgs/msg/JointState``."""
    package, kind, name = message_type.split("/")
    found: type = getattr(importlib.import_module(f"{package}.{kind}"), name)
    return found


def _profile(topic: RecordedTopic) -> QoSProfile:
    latched = DurabilityPolicy.TRANSIENT_LOCAL if topic.latched else DurabilityPolicy.VOLATILE
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=_VITAL_DEPTH if topic.vital else _IMAGE_DEPTH,
        reliability=ReliabilityPolicy.RELIABLE if topic.vital else ReliabilityPolicy.BEST_EFFORT,
        durability=latched,
    )

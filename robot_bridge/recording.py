"""One MCAP a trial: what was seen, asked, answered, sent and measured, as raw DDS messages.

A :class:`~robot_bridge.nodes.topic_tap.TopicTap` holds the subscriptions for a whole run, so that no trial
waits for discovery; for each trial a :class:`TrialRecorder` takes what the tap hears, through a bounded
queue, to a writer thread. Messages stay the serialised bytes that came off the wire (CDR): nothing is
decoded or encoded on the way. When the disk cannot keep up images go first, and are counted; joints,
setpoints and chunks are never dropped.

A recording is a rosbag2 folder ``<name>/`` with ``<name>.mcap`` and ``metadata.yaml``, as ``ros2
bag`` and Foxglove open it. While it grows it lies in ``interrupted/``; it moves to its place only
when it is whole. So what a crash leaves behind is kept, under a name that says what it is, and
:mod:`robot_bridge.recovery` makes a recording of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simplevla.embodiment import Embodiment
from simplevla.errors import MissingExtraError, RecordError
from simplevla.files import write_atomic

if TYPE_CHECKING:
    from rosbags.typesys.store import Typestore

INTERRUPTED = "interrupted"
ABOUT = "about.json"  # beside an unfinished recording: what its metadata will be
NAMESPACE, DROPPED = "namespace", "dropped"  # keys of a recording's metadata
JOINT_STATE = "sensor_msgs/msg/JointState"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
DIAGNOSTICS = "diagnostic_msgs/msg/DiagnosticArray"
TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"

_PENDING_BYTES = 32 << 20
_FAILED_BYTES = 512 << 20
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedTopic:
    """A topic to record.

    Attributes:
        name: in the stack's namespace.
        type: message type, such as ``sensor_msgs/msg/JointState``.
        vital: never dropped, and asked for reliably; the others go first when the disk is slow.
        latched: said once, for whoever comes later; every recording begins with it.
        shared: one topic of all namespaces.
    """

    name: str
    type: str
    vital: bool = True
    latched: bool = False
    shared: bool = False

    def resolved(self, namespace: str) -> str:
        """Return the topic's absolute name for a stack in ``namespace``."""
        return f"/{self.name}" if self.shared else f"{namespace.rstrip('/')}/{self.name}"


def trial_topics(embodiment: Embodiment) -> tuple[RecordedTopic, ...]:
    """Return everything that is worth keeping of a trial on ``embodiment``."""
    cameras = [
        topic
        for camera in embodiment.cameras
        for topic in (
            RecordedTopic(f"{camera.name}/color/image_raw/compressed", COMPRESSED_IMAGE, vital=False),
            RecordedTopic(f"{camera.name}/color/camera_info", "sensor_msgs/msg/CameraInfo", vital=False),
        )
    ]
    return (
        RecordedTopic("joint_states", JOINT_STATE),
        RecordedTopic("setpoints", JOINT_STATE),
        RecordedTopic("joint_trajectory", TRAJECTORY),
        RecordedTopic("policy/answers", TRAJECTORY),
        RecordedTopic("policy/chunks", DIAGNOSTICS),
        RecordedTopic("policy/state", DIAGNOSTICS),
        RecordedTopic("arms/executed", DIAGNOSTICS),
        RecordedTopic("arms/limits", DIAGNOSTICS),
        RecordedTopic("diagnostics", DIAGNOSTICS, shared=True),
        RecordedTopic("robot_description", "std_msgs/msg/String", latched=True),
        RecordedTopic("static_transforms", "geometry_msgs/msg/TransformStamped", latched=True),
        *cameras,
    )


@dataclass(frozen=True)
class RecordingSummary:
    """What a finished recording holds: {topic: messages written} and {topic: messages dropped}."""

    path: Path
    counts: dict[str, int]
    dropped: dict[str, int]


class TrialRecorder:
    """Writes one trial's messages from a thread of its own.

    As a context manager it finishes the recording when the block ends, and leaves it in
    ``interrupted/`` when the block raises.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        topics: Iterable[RecordedTopic],
        *,
        namespace: str = "/",
        metadata: Mapping[str, str] | None = None,
        max_pending_bytes: int = _PENDING_BYTES,
    ) -> None:
        """Start a recording.

        Args:
            folder: of the run.
            name: of the recording, which becomes the folder ``folder/name``.
            topics: what may be written; all are listed in the recording, heard or not.
            namespace: of the node that hears them.
            metadata: kept with the recording.
            max_pending_bytes: bound of the queue, beyond which images are dropped.

        Raises:
            RecordError: there is a recording of that name, or the folder cannot be written.
            MissingExtraError: rosbags is not installed.
        """
        self._final = folder / name
        self._scratch = folder / INTERRUPTED / name
        for path in (self._final, self._scratch):
            if path.exists():
                raise RecordError(f"{path} exists already", "record into a new folder")
        self._topics = {topic.name: topic for topic in topics}
        self._max_pending_bytes = max_pending_bytes
        self._writer, self._connections = open_bag(self._scratch, self._topics.values(), namespace)
        custom = {**(metadata or {}), NAMESPACE: namespace}
        # The writer keeps it until the end, which may never come.
        write_atomic(self._scratch / ABOUT, json.dumps(custom).encode())
        self._lock = (self._scratch / ABOUT).open("rb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # the kernel gives it back with the process: see recovery
        for key, value in custom.items():
            self._writer.set_custom_data(key, value)
        self._pending: deque[tuple[RecordedTopic, int, bytes]] = deque()
        self._pending_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._summary: RecordingSummary | None = None
        self._counts: Counter[str] = Counter(dict.fromkeys(self._topics, 0))
        self._dropped: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._drain, name=f"record-{name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> TrialRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()

    @property
    def folder(self) -> Path:
        """Where the recording lies once it is finished."""
        return self._final

    @property
    def so_far(self) -> RecordingSummary:
        """What was written and dropped until now."""
        return RecordingSummary(self._final, dict(self._counts), dict(self._dropped))

    @property
    def pending_bytes(self) -> int:
        """What waits to be written, bytes."""
        return self._pending_bytes

    def write(self, topic: str, data: bytes, stamp_ns: int) -> None:
        """Queue one serialised message; never blocks, and does nothing once the recording ends.

        Args:
            topic: relative name of one of the recorded topics.
            data: the message in CDR, as it came off the wire.
            stamp_ns: when it was heard, ns of the system clock.
        """
        recorded = self._topics[topic]
        with self._changed:
            if self._closing or self._failure is not None:
                return
            if self._pending_bytes + len(data) > self._max_pending_bytes:
                if not recorded.vital:
                    self._dropped[topic] += 1
                    return
                self._drop_pending_images()
                if self._pending_bytes + len(data) > _FAILED_BYTES:
                    self._failure = OSError("the disk has not kept up for too long")
            self._pending.append((recorded, stamp_ns, data))
            self._pending_bytes += len(data)
            self._changed.notify()

    def finish(self) -> RecordingSummary:
        """Write what is queued, close the recording and move it to its place; once is enough.

        Raises:
            RecordError: something could not be written; what there is stays in ``interrupted/``.
        """
        if self._summary is not None:
            return self._summary
        self._stop()
        if self._failure is None:
            try:
                self._writer.set_custom_data(DROPPED, json.dumps(dict(self._dropped)))
                self._writer.close()
                (self._scratch / ABOUT).unlink()
                _fsync(self._scratch)
                os.rename(self._scratch, self._final)
                with contextlib.suppress(OSError):
                    self._scratch.parent.rmdir()
            except OSError as error:
                self._failure = error
        if self._failure is not None:
            self._writer.abort()
            raise RecordError(
                f"the recording {self._final.name} is not whole: {self._failure}",
                f"free space on the disk; what there is lies in {self._scratch}",
            ) from self._failure
        if self._dropped:
            _logger.warning("%s: images dropped: %s", self._final.name, dict(self._dropped))
        self._summary = RecordingSummary(self._final, dict(self._counts), dict(self._dropped))
        return self._summary

    def abandon(self) -> None:
        """Close a recording that will not be whole; it stays in ``interrupted/``."""
        if self._summary is None and self._failure is None:
            self._stop()
            with contextlib.suppress(OSError):
                self._writer.close()
            self._failure = RecordError(f"the recording {self._final.name} was abandoned")

    def _stop(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._lock.close()

    def _drop_pending_images(self) -> None:
        kept = deque(entry for entry in self._pending if entry[0].vital)
        for topic, _, data in self._pending:
            if not topic.vital:
                self._dropped[topic.name] += 1
                self._pending_bytes -= len(data)
        self._pending = kept

    def _drain(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                topic, stamp_ns, data = self._pending.popleft()
                self._pending_bytes -= len(data)
            try:
                self._writer.write(self._connections[topic.name], stamp_ns, data)
            except OSError as error:
                with self._changed:
                    self._failure = error
                    self._pending.clear()
                return
            self._counts[topic.name] += 1


@dataclass(frozen=True)
class JointSeries:
    """Joint values over time.

    Attributes:
        names: the D names.
        stamp_ns: (N,) int64 stamps of the messages' headers, ns of the system clock.
        position: (N, D) float64; rad and m.
    """

    names: tuple[str, ...] = ()
    stamp_ns: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    position: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True)
class Frame:
    """A camera image as it was published: stamp (ns of the system clock) and JPEG bytes."""

    stamp_ns: int
    jpeg: bytes


@dataclass(frozen=True)
class TargetSeries:
    """A trajectory's stamp (ns), the time between its targets, and (K, D) the targets; rad and m."""

    stamp_ns: int
    dt_s: float
    targets: NDArray[np.float64]


@dataclass(frozen=True)
class Status:
    """One status of a DiagnosticArray: its array's stamp (ns), name, message and values."""

    stamp_ns: int
    name: str
    message: str
    values: dict[str, str]


@dataclass(frozen=True)
class Recording:
    """A recording in arrays.

    Attributes:
        metadata: what was kept with it.
        counts, dropped: {topic: messages}.
        measured, commanded: ``joint_states`` and ``setpoints``.
        frames: {camera: frames in order}.
        statuses: {topic: statuses in order} of the diagnostic topics.
        trajectories: {topic: trajectories in order}.
    """

    path: Path
    metadata: dict[str, str]
    counts: dict[str, int]
    dropped: dict[str, int]
    measured: JointSeries
    commanded: JointSeries
    frames: dict[str, tuple[Frame, ...]]
    statuses: dict[str, tuple[Status, ...]]
    trajectories: dict[str, tuple[TargetSeries, ...]] = field(default_factory=dict)


def read_recording(path: Path, *, images: bool = True) -> Recording:
    """Return the recording in the folder ``path``.

    Args:
        path: the folder that a :class:`TrialRecorder` left.
        images: whether to read the frames too.

    Raises:
        RecordError: it is missing, was interrupted, or is damaged.
        MissingExtraError: rosbags is not installed.
    """
    try:
        from rosbags.rosbag2 import Reader, ReaderError
        from rosbags.typesys import Stores, get_typestore
    except ImportError as error:
        raise MissingExtraError("rosbags", "robot") from error
    if path.parent.name == INTERRUPTED or not (path / "metadata.yaml").is_file():
        state = "was interrupted" if any(path.glob("*.mcap")) else "does not exist"
        raise RecordError(f"the recording {path} {state}", "give the folder of a finished recording")
    store = get_typestore(Stores.ROS2_KILTED)
    messages: dict[str, list[Any]] = {}
    types: dict[str, str] = {}
    counts: dict[str, int] = {}
    try:
        with Reader(path) as reader:
            custom = dict(reader.storage.metadata.custom or {})
            prefix = custom.pop(NAMESPACE, "/").rstrip("/") + "/"
            dropped = json.loads(custom.pop(DROPPED, "{}"))
            for connection in reader.connections:
                name = connection.topic.removeprefix(prefix).lstrip("/")
                counts[name], types[name], messages[name] = connection.msgcount, connection.msgtype, []
            wanted = [c for c in reader.connections if images or c.msgtype != COMPRESSED_IMAGE]
            for connection, _, data in reader.messages(connections=wanted):
                name = connection.topic.removeprefix(prefix).lstrip("/")
                messages[name].append(_decode(store, data, connection.msgtype))
    except (ReaderError, OSError, ValueError, KeyError, AssertionError, struct.error) as error:
        raise RecordError(f"the recording {path} is damaged: {error}", "it cannot be read") from error
    return Recording(
        path=path,
        metadata=custom,
        counts=counts,
        dropped=dropped,
        measured=_joint_series(messages.get("joint_states", [])),
        commanded=_joint_series(messages.get("setpoints", [])),
        frames={
            topic.split("/")[0]: tuple(Frame(_stamp_ns(m), m.data.tobytes()) for m in messages[topic])
            for topic, kind in types.items()
            if kind == COMPRESSED_IMAGE
        },
        statuses={
            topic: tuple(status for m in messages[topic] for status in _statuses(m))
            for topic, kind in types.items()
            if kind == DIAGNOSTICS
        },
        trajectories={
            topic: tuple(_target_series(m) for m in messages[topic] if len(m.points))
            for topic, kind in types.items()
            if kind == TRAJECTORY
        },
    )


def open_bag(folder: Path, topics: Iterable[RecordedTopic], namespace: str) -> tuple[Any, dict[str, Any]]:
    """Return a writer of a new bag in ``folder``, and {topic's name: its connection}.

    Raises:
        RecordError: the folder cannot be written.
        MissingExtraError: rosbags is not installed.
    """
    try:
        from rosbags.rosbag2 import StoragePlugin, Writer
        from rosbags.typesys import Stores, get_typestore
    except ImportError as error:
        raise MissingExtraError("rosbags", "robot") from error
    store = get_typestore(Stores.ROS2_KILTED)
    writer = Writer(folder, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP)
    try:
        writer.open()
    except OSError as error:
        raise RecordError(
            f"{folder} cannot be written: {error.strerror}", "choose another folder"
        ) from error
    return writer, {
        topic.name: writer.add_connection(topic.resolved(namespace), topic.type, typestore=store)
        for topic in topics
    }


def _fsync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _decode(store: Typestore, data: bytes, message_type: str) -> Any:
    """Return the message in ``data``, whatever follows it.

    Fast CDR may pad a message, which the store's own ``deserialize_cdr`` takes for damage.
    """
    definition = store.get_msgdef(message_type)
    if data[:2] not in (b"\x00\x00", b"\x00\x01"):
        raise ValueError(f"a {message_type} is not plain CDR")
    decode = definition.deserialize_cdr_le if data[1] else definition.deserialize_cdr_be
    return decode(data[4:], 0, definition.cls, store)[0]


def _stamp_ns(message: Any) -> int:
    return int(message.header.stamp.sec) * 1_000_000_000 + int(message.header.stamp.nanosec)


def _joint_series(messages: list[Any]) -> JointSeries:
    if not messages:
        return JointSeries()
    names = tuple(messages[0].name)
    whole = [m for m in messages if tuple(m.name) == names and len(m.position) == len(names)]
    return JointSeries(
        names,
        np.array([_stamp_ns(m) for m in whole], dtype=np.int64),
        np.array([m.position for m in whole], dtype=np.float64).reshape(len(whole), len(names)),
    )


def _target_series(message: Any) -> TargetSeries:
    last = message.points[-1].time_from_start
    ends_s = last.sec + last.nanosec / 1e9
    targets = np.array([point.positions for point in message.points], dtype=np.float64)
    return TargetSeries(_stamp_ns(message), ends_s / len(targets), targets)


def _statuses(message: Any) -> list[Status]:
    stamp_ns = _stamp_ns(message)
    return [
        Status(stamp_ns, status.name, status.message, {v.key: v.value for v in status.values})
        for status in message.status
    ]

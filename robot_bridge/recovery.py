"""Makes a recording of what an interrupted one has left behind.

A recorder that was killed leaves an MCAP without its index and end, which neither ``ros2 bag`` nor our own
reader opens. Its chunks were checked and written one after another, so all but the last one, and what was
still in memory, can be read front to back (MCAP's specification, https://mcap.dev/spec, "Chunk"). They are
written to a new recording, which appears in its place only when it is whole; what was interrupted stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from robot_bridge.recording import ABOUT, DROPPED, INTERRUPTED, NAMESPACE, RecordedTopic, open_bag
from simplevla.errors import MissingExtraError, RecordError
from simplevla.files import whole_directory

RECOVERED = "recovered"  # key of the metadata that says so


@dataclass(frozen=True)
class Recovered:
    """A recording that was recovered.

    Attributes:
        path: its folder.
        counts: {topic: messages}.
        duration_s: from its first message to its last, s.
    """

    path: Path
    counts: dict[str, int]
    duration_s: float


def interrupted_recordings(path: Path) -> list[Path]:
    """Return the folders of the interrupted recordings that ``path`` means.

    Args:
        path: a run's folder, an interrupted recording's folder, or the .mcap file in it.

    Raises:
        RecordError: it means none.
    """
    folder = path.parent if path.suffix == ".mcap" else path
    if _mcap_of(folder) is not None and folder.parent.name == INTERRUPTED:
        return [folder]
    among = folder if folder.name == INTERRUPTED else folder / INTERRUPTED
    found = [each for each in sorted(among.glob("*")) if _mcap_of(each) is not None]
    if not found:
        raise RecordError(
            f"{path} holds no interrupted recording", f"give a run's folder, or one in its {INTERRUPTED}/"
        )
    return found


def recover(interrupted: Path) -> Recovered:
    """Write what can be read of the recording in ``interrupted`` to its place in the run's folder.

    Raises:
        RecordError: it is being written still, nothing can be read of it, or its place is taken.
        MissingExtraError: mcap or rosbags is not installed.
    """
    final = interrupted.parent.parent / interrupted.name
    source = _mcap_of(interrupted)
    if source is None:
        raise RecordError(f"{interrupted} holds no recording", "give the folder of an interrupted one")
    with _not_being_written(interrupted):
        custom = _about(interrupted)
        try:
            with whole_directory(final) as scratch:
                counts, span_ns = _copy(source, scratch, final.name, custom)
        except FileExistsError as error:
            raise RecordError(f"{final} exists already", "it was recovered before") from error
        except OSError as error:
            raise RecordError(f"{final} cannot be written: {error}", "free space on the disk") from error
    return Recovered(final, counts, span_ns / 1e9)


def _copy(source: Path, scratch: Path, name: str, custom: dict[str, str]) -> tuple[dict[str, int], int]:
    """Fill ``scratch`` with a bag of what can be read of ``source``; return {topic: messages} and ns."""
    topics = {topic: kind for topic, kind, _, _ in read_linearly(source)}
    if not topics:
        raise RecordError(f"nothing can be read of {source}", "it ended before its first chunk was full")
    bag = scratch / name
    absolute = [RecordedTopic(topic.lstrip("/"), kind, shared=True) for topic, kind in topics.items()]
    writer, connections = open_bag(bag, absolute, "/")
    counts: Counter[str] = Counter()
    first_ns, last_ns = 2**63, 0
    try:
        for topic, _, stamp_ns, data in read_linearly(source):
            writer.write(connections[topic.lstrip("/")], stamp_ns, data)
            counts[topic] += 1
            first_ns, last_ns = min(first_ns, stamp_ns), max(last_ns, stamp_ns)
        for key, value in {NAMESPACE: "/", DROPPED: "{}", **custom, RECOVERED: "true"}.items():
            writer.set_custom_data(key, value)
        writer.close()
    except BaseException:
        writer.abort()
        raise
    for file in list(bag.iterdir()):
        os.rename(file, scratch / file.name)
    bag.rmdir()
    return dict(counts), last_ns - first_ns


def read_linearly(source: Path) -> Iterator[tuple[str, str, int, bytes]]:
    """Yield the messages of an MCAP, whole or cut, as far as it is sound.

    Each is (topic, type, log time in ns, serialised message).

    Raises:
        MissingExtraError: mcap is not installed.
    """
    try:
        from mcap.exceptions import McapError
        from mcap.records import Channel, Message, Schema
        from mcap.stream_reader import StreamReader
    except ImportError as error:
        raise MissingExtraError("mcap", "robot") from error
    kinds: dict[int, str] = {}
    channels: dict[int, tuple[str, str]] = {}
    with source.open("rb") as stream:
        reader = StreamReader(stream, validate_crcs=True, record_size_limit=source.stat().st_size)
        records: Iterator[Any] = iter(reader.records)
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except (McapError, struct.error, ValueError, RuntimeError, OverflowError, EOFError):
                return  # the cut: what follows it cannot be trusted
            if isinstance(record, Schema):
                kinds[record.id] = record.name
            elif isinstance(record, Channel):
                channels[record.id] = (record.topic, kinds.get(record.schema_id, ""))
            elif isinstance(record, Message) and record.channel_id in channels:
                topic, kind = channels[record.channel_id]
                yield topic, kind, record.log_time, record.data


def _mcap_of(folder: Path) -> Path | None:
    files = sorted(folder.glob("*.mcap")) if folder.is_dir() else []
    return files[0] if files else None


def _about(interrupted: Path) -> dict[str, str]:
    """Return what the recorder knew at its start; nothing if it was killed before it had noted it."""
    try:
        return msgspec.json.decode((interrupted / ABOUT).read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        raise RecordError(f"{interrupted / ABOUT} is damaged: {error}", "remove it, and recover") from error


@contextlib.contextmanager
def _not_being_written(interrupted: Path) -> Iterator[None]:
    path = interrupted / ABOUT
    if not path.exists():
        yield
        return
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordError(f"{interrupted} is being written", "end its recorder first") from error
        yield

"""Runs the processes that :mod:`robot_bridge.bringup` describes: start, watch, start again, end in order.

For machines without ``ros2 launch``; with it, ``launch/bringup.launch.py`` does the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

from robot_bridge.bringup import READY, Process, Settings, check, environment, processes
from robot_bridge.respawn import DELAY_S, Respawns
from robot_bridge.rig import Rig, load_rig, save_rig, with_free_ports
from simplevla.errors import UnavailableError

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_ENDING_S = 60.0  # longer than ending every process takes, even if each has to be killed
_ASK = signal.SIGINT
_PATIENCE_S = ((_ASK, 8.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0))


class ProcessEndedError(UnavailableError):
    """A required process ended by itself.

    Attributes:
        process: its name.
        for_good: it is not started again.
    """

    def __init__(self, process: str, message: str, remedy: str, *, for_good: bool = True) -> None:
        super().__init__(message, remedy)
        self.process = process
        self.for_good = for_good


def run_up(settings: Settings) -> int:
    """Start everything, say so, and keep it running until Ctrl-C; return the exit status.

    Raises:
        SimplevlaError: the settings are bad, or a process does not start.
    """
    check(settings)
    with interruptible():
        try:
            with Stack(settings) as stack:
                names = ", ".join(stack.names)
                print(f"{READY} {names}; logs in {stack.logs}; end with Ctrl-C", flush=True)
                stack.wait()
        except KeyboardInterrupt:
            print("ended", flush=True)
            return 0
        except UnavailableError as error:
            print(f"simplevla up: {error}", file=sys.stderr)
    return 1


class Stack:
    """Running processes. A context manager: all are ready inside the block, none is left after it.

    Args:
        settings: as checked by :func:`robot_bridge.bringup.check`.

    Attributes:
        rig: the rig that runs.
        logs: folder with one log for each process.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rig: Rig = load_rig(settings.rig)
        self.logs = settings.out / "logs"
        self._described = processes(settings)
        self._running: dict[str, _Running] = {}

    def __enter__(self) -> Stack:
        self.logs.mkdir(parents=True, exist_ok=True)
        # This process takes part in ROS too: it must be in the same domain as those it starts.
        os.environ.update(environment(self.settings, self.rig))
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """The processes' names."""
        return [process.name for process in self._described]

    def check(self) -> None:
        """Check that everything that is required runs, and start again what has ended and may be.

        Raises:
            ProcessEndedError: a process is down; the message names it and its log. One that is being
                started again is no error any more once it is ready.
        """
        down: ProcessEndedError | None = None
        for running in self._running.values():
            if running.status is not None:
                running.start_again_when_due()
            if running.process.required and (running.status is not None or not running.ready):
                down = down or running.death()
        if down is not None:
            raise down

    def wait(self) -> None:
        """Return never, until a required process has ended for good.

        Raises:
            UnavailableError: one did.
        """
        while True:
            try:
                self.check()
            except ProcessEndedError as error:
                if error.for_good:
                    raise
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End every process, in order; one that does not listen is killed."""
        order = sorted(self._running.values(), key=lambda running: running.process.stop_order)
        for _, together in itertools.groupby(order, key=lambda running: running.process.stop_order):
            ending = list(together)
            for running in ending:
                running.ask_to_end()
            for running in ending:
                running.stop()
        self._running.clear()

    def _start(self) -> None:
        waiting = list(self._described)
        while waiting or not all(running.ready for running in self._running.values()):
            for process in [p for p in waiting if all(self._is_ready(name) for name in p.after)]:
                self._running[process.name] = _Running(process, self.logs, self._shows_output)
                waiting.remove(process)
            for running in self._running.values():
                running.require_ready_in_time()
            time.sleep(_POLL_S / 4)

    def _is_ready(self, name: str) -> bool:
        return name in self._running and self._running[name].ready

    @property
    def _shows_output(self) -> bool:
        return self.settings.log_level == "debug"


def private(settings: Settings) -> Settings:
    """Return ``settings`` on ports of their own, so that two runs on one machine do not meet.

    The twin's rig with its new ports is written to the run's folder.
    """
    if settings.is_local:
        settings = dataclasses.replace(settings, address=f"tcp://127.0.0.1:{_free_port()}")
    rig = load_rig(settings.rig)
    if not rig.is_twin:
        return settings
    path = settings.out / "rig.yaml"
    save_rig(with_free_ports(rig), path)
    return dataclasses.replace(settings, rig=str(path))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM alike interrupt the block, so that everything is ended in order.

    SIGINT too: a process that a shell starts in the background has it ignored. A second signal soon
    after the first, from an impatient hand or a wrapper that passes on what the terminal has sent
    already, must not interrupt the ending itself: it would leave arms and buses without a parent.
    """
    interrupted_s: float | None = None

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted_s
        if interrupted_s is None or time.monotonic() - interrupted_s > _ENDING_S:
            interrupted_s = time.monotonic()
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Running:
    """One child in a process group of its own, so that a Ctrl-C reaches the parent alone."""

    def __init__(self, process: Process, logs: Path, shows_output: bool) -> None:
        self.process = process
        self.log = logs / f"{process.name}.log"
        self._last: deque[str] = deque(maxlen=5)
        self._shows_output = shows_output
        self._respawns = Respawns()
        self._due_s: float | None = None  # when it is started again
        self._given_up = not process.respawn
        self.log.write_bytes(b"")
        self._begin()

    def _begin(self) -> None:
        self._began_s = time.monotonic()
        self._ready = threading.Event()
        self._child = subprocess.Popen(
            self.process.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | self.process.env,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(
            target=self._read, args=(self._child, self._ready), name=f"log-{self.process.name}", daemon=True
        )
        self._reader.start()

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    @property
    def status(self) -> int | None:
        return self._child.poll()

    @property
    def comes_back(self) -> bool:
        """Whether it runs, or is about to run again."""
        if self.status is None:
            return self.ready or time.monotonic() - self._began_s <= self.process.ready_timeout_s
        return not self._given_up

    def start_again_when_due(self) -> None:
        """Start a process that has ended again, a moment after it did."""
        if self._given_up:
            return
        if self._due_s is None:
            self._given_up = not self._respawns.allowed()
            self._due_s = time.monotonic() + DELAY_S
            logger.warning("%s%s", self.death(), "" if self._given_up else "; it is started again")
        elif time.monotonic() >= self._due_s:
            self._due_s = None
            self._begin()

    def require_ready_in_time(self) -> None:
        if self.status is not None:
            raise self.death()
        if not self.ready and time.monotonic() - self._began_s > self.process.ready_timeout_s:
            raise UnavailableError(
                f"{self.process.name} was not ready within {self.process.ready_timeout_s:g} s",
                f"see {self.log}",
            )

    def death(self) -> ProcessEndedError:
        if self.status is None:
            message = f"{self.process.name} has ended, and is being started again"
        else:
            self._reader.join(1.0)
            said = self._last[-1] if self._last else "it said nothing"
            message = f"{self.process.name} ended with status {self.status}: {said}"
        return ProcessEndedError(
            self.process.name, message, f"see {self.log}", for_good=not self.comes_back
        )

    def ask_to_end(self) -> None:
        if self.status is None:
            self._signal(_ASK)

    def stop(self) -> None:
        """Wait for a process that was asked to end; ask it in other ways, if need be."""
        for number, patience_s in _PATIENCE_S:
            if self.status is not None:
                break
            if number is not _ASK:
                self._signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(patience_s)
        self._reader.join(1.0)
        logger.debug("%s ended with status %s", self.process.name, self.status)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)

    def _read(self, child: subprocess.Popen[str], ready: threading.Event) -> None:
        assert child.stdout is not None
        with self.log.open("a", encoding="utf-8") as log, child.stdout as lines:
            for line in lines:
                log.write(line)
                log.flush()
                text = line.rstrip()
                if text:
                    self._last.append(text)
                if self._shows_output:
                    print(f"[{self.process.name}] {text}", file=sys.stderr, flush=True)
                if text.startswith(READY) and not ready.is_set():
                    ready.set()
                    logger.info("%s is ready (%.1f s)", self.process.name, time.monotonic() - self._began_s)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

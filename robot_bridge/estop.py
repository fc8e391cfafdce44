"""``simplevla estop``: stops the arms from a terminal, by one key, whatever else runs or hangs.

It needs nothing of the policy: it speaks to the arms' node alone, by topic and by service
(:mod:`robot_bridge.nodes.stop_line`). If that does not confirm the stop in time, for it is dead or hangs,
the stop goes straight to every arm's bus; without a key, by ``--now``, it goes there first. A stop is no
joint command: it is the one thing that needs no limits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from robot_bridge.rig import Rig
from simplevla.errors import MissingExtraError, SimplevlaError, UnavailableError

logger = logging.getLogger(__name__)

_STOP_ID, _STOP = 0x150, bytes([1, 0, 0, 0, 0, 0, 0, 0])  # the vendor's damped stop
_STOP_REPEATS, _STOP_PAUSE_S = 5, 0.005
_CONFIRM_S = 0.3
_DISCOVERY_S = 2.0
_HEARD_S = 2.5  # diagnostics come once a second
_LOOK_S = 0.2
_QUIT = ("q", "\x03", "\x04")
_HELP = "space, or any key but q: stop all arms    q: leave this, and the arms as they are"


@dataclass(frozen=True)
class Stopped:
    """How a stop went.

    Attributes:
        way: ``node`` (it confirmed) or ``bus`` (it did not; the frames were sent to the buses).
        message: what a person is told.
        seconds: from the key to that.
    """

    way: str
    message: str
    seconds: float


class StopButton:
    """A ROS node in a thread, ready to stop the arms of ``rig``. A context manager."""

    def __init__(self, rig: Rig, namespace: str = "") -> None:
        self._rig = rig
        self._namespace = namespace
        self._mode = ""
        self._heard_s = float("-inf")

    def __enter__(self) -> StopButton:
        try:
            import rclpy
            from diagnostic_msgs.msg import DiagnosticArray
            from rclpy.executors import SingleThreadedExecutor
            from rclpy.signals import SignalHandlerOptions
            from std_msgs.msg import Bool
            from std_srvs.srv import Trigger
        except ImportError as error:
            raise MissingExtraError("rclpy", "ros_wheels") from error
        self._press, self._request = Bool(data=True), Trigger.Request()
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node(
            f"estop_button_{os.getpid()}", namespace=self._namespace or None, context=self._context
        )
        self._topic = self._node.create_publisher(Bool, "estop", 10)
        self._client: Any = self._node.create_client(Trigger, "arms/estop")
        self._node.create_subscription(DiagnosticArray, "/diagnostics", self._hear, 10)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._executor.spin, name="estop-button", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(timeout_sec=2)
        self._thread.join(2)
        self._node.destroy_node()
        self._context.try_shutdown()

    @property
    def state(self) -> str:
        """What the arms' node last said of itself, or that it says nothing."""
        silent = time.monotonic() - self._heard_s > _HEARD_S
        return "the arms' node says nothing" if silent else f"arms: {self._mode}"

    def wait(self, timeout_s: float) -> bool:
        """Wait until the arms' node can be reached; return whether it can."""
        return bool(self._client.wait_for_service(timeout_sec=timeout_s))

    def press(self, confirm_s: float = _CONFIRM_S) -> Stopped:
        """Stop every arm now, and return when that is confirmed or all was tried.

        Args:
            confirm_s: how long the arms' node has to confirm it before the buses are told directly.

        Raises:
            UnavailableError: neither the node nor every bus could be reached.
        """
        began_s = time.monotonic()
        confirmed = self.tell_node(confirm_s)
        if confirmed:
            return Stopped("node", confirmed, time.monotonic() - began_s)
        logger.warning("the arms' node does not confirm the stop; telling the buses")
        stop_on_bus(self._rig)
        message = "the arms' node does not confirm it; the stop was sent to every arm's bus"
        return Stopped("bus", message, time.monotonic() - began_s)

    def tell_node(self, confirm_s: float) -> str:
        """Ask the arms' node to stop the arms; return what it says when it has, else nothing."""
        self._topic.publish(self._press)
        answer = self._ask(confirm_s)
        if answer is None or not answer.success:
            return ""
        message: str = answer.message
        return message

    def _ask(self, timeout_s: float) -> Any:
        if not self._client.service_is_ready():
            return None
        answered = threading.Event()
        future = self._client.call_async(self._request)
        future.add_done_callback(lambda _: answered.set())
        return future.result() if answered.wait(timeout_s) else None

    def _hear(self, message: Any) -> None:
        for status in message.status:
            if status.name == "arms: control loop":
                self._mode, self._heard_s = status.message, time.monotonic()


def stop_on_bus(rig: Rig) -> None:
    """Send the vendor's damped stop to every arm's bus, past everything else.

    Raises:
        UnavailableError: a bus could not be told; the others were.
        MissingExtraError: python-can is not installed.
    """
    try:
        import can
    except ImportError as error:
        raise MissingExtraError("python-can", "robot") from error
    failed: dict[str, Exception] = {}
    for arm, port in rig.arms.items():
        try:
            with can.Bus(interface=port.interface, channel=port.channel, bitrate=port.bitrate) as bus:
                for _ in range(_STOP_REPEATS):
                    bus.send(can.Message(arbitration_id=_STOP_ID, data=_STOP, is_extended_id=False))
                    time.sleep(_STOP_PAUSE_S)
        except (can.CanError, OSError, ValueError) as error:
            failed[arm] = error
    if failed:
        said = "; ".join(f"{arm}: {error}" for arm, error in failed.items())
        raise UnavailableError(f"the stop did not reach every bus: {said}", "CUT THE ARMS' POWER")


def run_button(button: StopButton, keys: TextIO, out: TextIO) -> int:
    """Wait for keys and stop the arms at each but ``q``; return the exit status.

    Args:
        button: entered.
        keys: a terminal.
        out: where the state is shown.
    """
    print(_HELP, file=out, flush=True)
    shown = ""
    with _key_by_key(keys):
        while True:
            if button.state != shown:
                shown = button.state
                print(shown, file=out, flush=True)
            if not select.select([keys], [], [], _LOOK_S)[0]:
                continue
            key = os.read(keys.fileno(), 1).decode(errors="replace")
            if key in ("", *_QUIT):
                return 0
            try:
                stopped = button.press()
                print(f"STOP ({1e3 * stopped.seconds:.0f} ms): {stopped.message}", file=out, flush=True)
            except SimplevlaError as error:
                print(f"STOP FAILED: {error}", file=out, flush=True)


@contextlib.contextmanager
def _key_by_key(keys: TextIO) -> Iterator[None]:
    """Have a terminal give each key at once and without showing it, Ctrl-C among them."""
    import termios
    import tty

    before = termios.tcgetattr(keys)
    try:
        tty.setraw(keys, termios.TCSANOW)
        # Output stays as it is: raw mode would take the carriage returns from every line.
        mode = termios.tcgetattr(keys)
        mode[1] = before[1]
        termios.tcsetattr(keys, termios.TCSANOW, mode)
        yield
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)


def run_estop(rig: Rig, namespace: str, *, now: bool) -> int:
    """Stop the arms now, or by key; return the exit status: 0 only if a stop that was asked for was done.

    Raises:
        UnavailableError: without a terminal and without ``now``; or the stop reached neither node nor bus.
    """
    if now:
        stopped = stop_now(rig, namespace)
        print(f"{stopped.message} ({1e3 * stopped.seconds:.0f} ms)", flush=True)
        return 0
    if not sys.stdin.isatty():
        raise UnavailableError("there is no terminal to press a key at", "run it in one, or with --now")
    with StopButton(rig, namespace) as button:
        return run_button(button, sys.stdin, sys.stdout)


def stop_now(rig: Rig, namespace: str) -> Stopped:
    """Stop the arms by their buses at once, and then by their node, so that it latches the stop.

    Whatever is wrong with ROS keeps no arm from its stop.

    Raises:
        UnavailableError: the stop reached neither every bus nor the node.
    """
    began_s = time.monotonic()
    failed: SimplevlaError | None = None
    try:
        stop_on_bus(rig)
    except SimplevlaError as error:
        failed = error
        logger.error("%s", error)
    took_s = time.monotonic() - began_s
    confirmed = ""
    try:
        with StopButton(rig, namespace) as button:
            button.wait(_DISCOVERY_S)
            confirmed = button.tell_node(_CONFIRM_S)
    except Exception as error:
        logger.warning("ROS cannot be used: %s", error)
    if failed is not None and not confirmed:
        raise failed
    if failed is not None:
        return Stopped("node", f"the arms' node: {confirmed}", time.monotonic() - began_s)
    node = f"the arms' node: {confirmed}" if confirmed else "the arms' node does not confirm it"
    return Stopped("bus", f"the stop was sent to every arm's bus; {node}", took_s)

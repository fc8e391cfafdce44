"""What every node's process does alike: start, wait for a signal, end in order; and message helpers."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future
from std_srvs.srv import Trigger

from robot_bridge.order import in_place, wait_for_others
from simplevla.errors import SimplevlaError

if TYPE_CHECKING:
    from robot_bridge.nodes.managed import ManagedNode

logger = logging.getLogger(__name__)

EXIT_BAD_INPUT = 2
READY = "ready"


def run_node(name: str, make_node: Callable[[], ManagedNode], argv: Sequence[str]) -> int:
    """Make a node, bring it up, say ``ready``, and spin it until SIGINT or SIGTERM; return the status.

    It is brought up to the state active, unless its parameter ``autostart`` is false: then it waits,
    unconfigured, for a lifecycle manager. At the end motion stops first; then the process waits for those
    it must outlive, while its topics still say how things are (:mod:`robot_bridge.order`). One thread runs
    callbacks; what takes long runs in threads of its own.

    Args:
        name: for messages.
        make_node: makes the node; a :class:`SimplevlaError` of its start is told in one line.
        argv: the ROS arguments.
    """
    logging.basicConfig(
        level=os.environ.get("SIMPLEVLA_LOG_LEVEL", "info").upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    ending = threading.Event()
    _end_on_signals(ending)
    rclpy.init(args=list(argv), signal_handler_options=SignalHandlerOptions.NO)
    try:
        with in_place(), make_node() as node:
            node.bring_up()
            executor = SingleThreadedExecutor()
            executor.add_node(node)
            print(f"{READY} {name}", flush=True)
            while not ending.is_set():
                executor.spin_once(timeout_sec=0.1)
            logger.info("%s: ending", name)
            node.stop_motion()
            wait_for_others(lambda seconds: executor.spin_once(timeout_sec=seconds))
    except SimplevlaError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    finally:
        rclpy.try_shutdown()
    return 0


def in_thread(work: Callable[[], Any]) -> Awaitable[Any]:
    """Run ``work`` in a thread of its own; a service callback can await it while others are served."""
    future: Any = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="service", daemon=True).start()
    return future


def trigger(node: Node, name: str, work: Callable[[], str], *, at_once: bool = False) -> None:
    """Offer the service ``name`` (std_srvs/Trigger); ``work`` returns the message or raises the reason.

    Args:
        node: whose service it is.
        name: such as ``~/enable``.
        work: what to do; in a thread of its own.
        at_once: run it in the callback itself: for what must wait for nothing.
    """

    async def serve(_: Any, response: Any) -> Any:
        try:
            response.message = work() if at_once else await in_thread(work)
            response.success = True
        except SimplevlaError as error:
            response.message = str(error)
            response.success = False
            logger.warning("%s: %s", name, error)
        return response

    node.create_service(Trigger, name, serve)


def status(name: str, message: str, values: Mapping[str, object], *, level: str = "ok") -> DiagnosticStatus:
    """Return one diagnostic status; ``level`` is ok, warn or error."""
    levels = {"ok": DiagnosticStatus.OK, "warn": DiagnosticStatus.WARN, "error": DiagnosticStatus.ERROR}
    return DiagnosticStatus(
        level=levels[level],
        name=name,
        message=message,
        values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
    )


def diagnostics(stamp_ns: int, *statuses: DiagnosticStatus) -> DiagnosticArray:
    """Return a DiagnosticArray with this stamp, ns of the system clock."""
    message = DiagnosticArray(status=list(statuses))
    set_stamp(message.header.stamp, stamp_ns)
    return message


def set_stamp(stamp: Any, stamp_ns: int) -> None:
    """Fill a builtin_interfaces/Time, or a Duration, with ns."""
    stamp.sec, stamp.nanosec = divmod(stamp_ns, 1_000_000_000)


def stamp_ns(stamp: Any) -> int:
    """Return a builtin_interfaces/Time, or a Duration, in ns."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def declare(
    node: Node,
    name: str,
    default: Any,
    description: str,
    *,
    low: float | None = None,
    high: float = 0.0,
) -> Any:
    """Declare a parameter and return its value.

    Args:
        node: whose parameter it is.
        name: of the parameter.
        default: its default, which decides its type.
        description: for ``ros2 param describe``.
        low: smallest value, of a number.
        high: largest value, of a number.
    """
    descriptor = ParameterDescriptor(description=description)
    if low is not None and isinstance(default, float):
        descriptor.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high))]
    elif low is not None:
        descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high))]
    return node.declare_parameter(name, default, descriptor).value


def _end_on_signals(ending: threading.Event) -> None:
    def end(number: int, _: FrameType | None) -> None:
        if ending.is_set():
            return
        logger.info("%s: ending", signal.Signals(number).name)
        ending.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)

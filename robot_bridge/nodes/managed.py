"""A lifecycle node whose states are open contexts: what a transition opens, the way back closes.

==============  ===================================================================================
unconfigured    parameters can be set; nothing is open
inactive        :meth:`ManagedNode.configured` is open: devices speak, what they say is published
active          :meth:`ManagedNode.active` is open too: the node does its work
==============  ===================================================================================

As ROS 2's managed nodes (https://design.ros2.org/articles/node_lifecycle.html); ``ros2 lifecycle set`` and
``ros2 lifecycle nodes`` see them. Whatever goes wrong in a transition closes what it had opened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter

from robot_bridge.nodes.process import declare, diagnostics, status
from simplevla.errors import SimplevlaError, UnavailableError
from simplevla.session_record import SessionRecord, load_session_record

logger = logging.getLogger(__name__)

DIAGNOSTICS_TOPIC = "/diagnostics"  # of the whole machine, as ROS's own diagnostic_updater has it
_DIAGNOSTICS_PERIOD_S = 1.0


class ManagedNode(LifecycleNode):
    """Base of our nodes. A context manager: at the end everything is closed and the node destroyed."""

    def __init__(self, name: str) -> None:
        """Make an unconfigured node called ``name``; the subclass declares its parameters."""
        super().__init__(name)
        self._fixed: set[str] = set()
        self._configured: ExitStack | None = None
        self._active: ExitStack | None = None
        self._failure: Exception | None = None
        self.add_on_set_parameters_callback(self._judge_parameters)
        self.declare(
            "autostart", True, "go to active at the start; false: wait for a lifecycle manager to do it"
        )
        self._diagnostics = self.create_publisher(DiagnosticArray, DIAGNOSTICS_TOPIC, 10)
        self.repeat(_DIAGNOSTICS_PERIOD_S, self.publish_diagnostics)

    def configured(self) -> AbstractContextManager[object]:
        """Return what is open while the node is configured; overridden."""
        return nullcontext()

    def active(self) -> AbstractContextManager[object]:
        """Return what is open while the node is active; overridden."""
        return nullcontext()

    def diagnose(self) -> Iterable[DiagnosticStatus]:
        """Return how things are, while the node is configured; overridden."""
        return ()

    def stop_motion(self) -> None:
        """Stop what moves, at once; the first thing that happens at the end. Nothing by default."""

    def __enter__(self) -> ManagedNode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.trigger_shutdown()
        finally:
            self.destroy_node()

    def bring_up(self) -> None:
        """Go to active, unless the parameter ``autostart`` is false.

        Raises:
            SimplevlaError: what keeps it from that.
        """
        if not self.value("autostart"):
            logger.info("%s waits to be configured", self.get_name())
            return
        for go in (self.trigger_configure, self.trigger_activate):
            if go() != TransitionCallbackReturn.SUCCESS:
                raise self._failure or UnavailableError(f"{self.get_name()} did not come up")

    @property
    def is_configured(self) -> bool:
        """Whether the node is inactive or active."""
        return self._configured is not None

    @property
    def is_active(self) -> bool:
        """Whether the node is active."""
        return self._active is not None

    def require_active(self) -> None:
        """Check that the node is active.

        Raises:
            UnavailableError: it is not.
        """
        if not self.is_active:
            raise UnavailableError(
                f"{self.get_name()} is not active",
                f"ros2 lifecycle set {self.get_fully_qualified_name()} activate",
            )

    def declare(
        self,
        name: str,
        default: Any,
        description: str,
        *,
        low: float | None = None,
        high: float = 0.0,
        changing: bool = False,
    ) -> None:
        """Declare a parameter; see :func:`robot_bridge.nodes.process.declare`.

        Args:
            name: of the parameter.
            default: its default, which decides its type.
            description: for ``ros2 param describe``.
            low: smallest value, of a number.
            high: largest value, of a number.
            changing: it may be set at any time; else it is read when the node is configured, and may only
                be set before.
        """
        if not changing:
            self._fixed.add(name)
        declare(self, name, default, description, low=low, high=high)

    def declare_record(self) -> None:
        """Declare the parameter ``session_record``; :meth:`record` reads what it names."""
        self.declare("session_record", "", "the last calibration's record; empty: nominal poses, no delays")

    def record(self) -> SessionRecord | None:
        """Return the record that the parameter ``session_record`` names, if any.

        Raises:
            RecordError: there is no such record.
        """
        path = self.value("session_record")
        return load_session_record(Path(path)) if path else None

    def value(self, name: str) -> Any:
        """Return a parameter's value."""
        return self.get_parameter(name).value

    def repeat(self, period_s: float, work: Callable[[], None]) -> None:
        """Call ``work`` every ``period_s``, whatever ``use_sim_time`` makes of the node's own clock."""
        self.create_timer(period_s, work, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def publish_diagnostics(self) -> None:
        """Publish how things are, now."""
        state = "active" if self.is_active else "inactive" if self.is_configured else "unconfigured"
        own = status(
            f"{self.get_name()}: lifecycle",
            state,
            {"state": state},
            level="ok" if self.is_active else "warn",
        )
        found = list(self.diagnose()) if self.is_configured else []
        self._diagnostics.publish(diagnostics(time.time_ns(), *found, own))

    def on_configure(self, _: LifecycleState) -> TransitionCallbackReturn:
        """Open :meth:`configured`."""
        self._configured, done = self._opened(self.configured)
        return done

    def on_activate(self, _: LifecycleState) -> TransitionCallbackReturn:
        """Open :meth:`active`."""
        self._active, done = self._opened(self.active)
        return done

    def on_deactivate(self, _: LifecycleState) -> TransitionCallbackReturn:
        """Close :meth:`active`."""
        return self._close(configured=False)

    def on_cleanup(self, _: LifecycleState) -> TransitionCallbackReturn:
        """Close :meth:`configured`."""
        return self._close()

    def on_shutdown(self, _: LifecycleState) -> TransitionCallbackReturn:
        """Close whatever is open."""
        return self._close()

    def on_error(self, _: LifecycleState) -> TransitionCallbackReturn:
        """Close whatever is open; the node can be configured again."""
        return self._close()

    def _opened(
        self, open_: Callable[[], AbstractContextManager[object]]
    ) -> tuple[ExitStack | None, TransitionCallbackReturn]:
        # rclpy takes an exception of a transition's callback for an error and says nothing of it.
        stack = ExitStack()
        try:
            stack.enter_context(self._removing_what_is_added())
            stack.enter_context(open_())
        except Exception as error:
            stack.close()
            self._failure = error
            if not isinstance(error, SimplevlaError):
                logger.exception("%s", self.get_name())
            elif not self.value("autostart"):  # else the start tells it, and ends
                logger.error("%s: %s", self.get_name(), error)
            return None, TransitionCallbackReturn.FAILURE
        return stack, TransitionCallbackReturn.SUCCESS

    def _close(self, *, configured: bool = True) -> TransitionCallbackReturn:
        stacks, self._active = [self._active], None
        if configured:
            stacks.append(self._configured)
            self._configured = None
        done = TransitionCallbackReturn.SUCCESS
        for stack in stacks:
            try:
                if stack is not None:
                    stack.close()
            except Exception:
                logger.exception("%s", self.get_name())
                done = TransitionCallbackReturn.ERROR
        return done

    @contextmanager
    def _removing_what_is_added(self) -> Iterator[None]:
        """Destroy the topics, services and timers that the block has added to the node."""
        kinds: tuple[tuple[str, Callable[[Any], object]], ...] = (
            ("timers", self.destroy_timer),
            ("subscriptions", self.destroy_subscription),
            ("services", self.destroy_service),
            ("publishers", self.destroy_publisher),
        )
        before = {id(each) for kind, _ in kinds for each in getattr(self, kind)}
        try:
            yield
        finally:
            for kind, destroy in kinds:
                for each in list(getattr(self, kind)):
                    if id(each) not in before:
                        destroy(each)

    def _judge_parameters(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            if self.is_configured and parameter.name in self._fixed:
                return SetParametersResult(
                    successful=False,
                    reason=f"{parameter.name} is read when the node is configured: first "
                    f"ros2 lifecycle set {self.get_fully_qualified_name()} cleanup",
                )
        return SetParametersResult(successful=True)

"""The trial's side of ROS: hears what the arms and the policy say, and asks them to act.

It runs in the process that makes the trials, spun by a thread of its own, so that a prompt or a
slow disk in the main thread never keeps a message waiting.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robot_bridge.recording import trial_topics
from simplevla.embodiment import Embodiment
from simplevla.errors import MissingExtraError, UnavailableError
from simplevla.trial import FailureCode

if TYPE_CHECKING:
    from robot_bridge.nodes.topic_tap import TopicTap

_LOOK_PERIOD_S = 0.05
_STILL_LOOKS = 8
_STILL_RAD_OR_M = 3e-3
_FAILURES = frozenset(code.value for code in FailureCode)


@dataclass(frozen=True)
class PolicyState:
    """What the policy node last said of itself.

    Attributes:
        phase: ``idle``, ``running``, ``finished`` (the step limit was reached) or ``failed``.
        episode: which one this is about.
        actions: executed since its start.
        failure: why it failed.
        reason: the same in words.
        heard_s: when this was heard, s of the monotonic clock.
    """

    phase: str = "unknown"
    episode: str = ""
    actions: int = 0
    failure: FailureCode = FailureCode.NONE
    reason: str = ""
    heard_s: float = 0.0


class TrialNode:
    """A ROS node in a thread; a context manager.

    Attributes:
        tap: hears every topic that a trial records.
        namespace: of the node.
    """

    def __init__(self, embodiment: Embodiment, namespace: str = "", *, silent_after_s: float = 1.0) -> None:
        """Prepare a node for ``embodiment`` in the stack's namespace; nothing is opened yet.

        Arms that have said nothing for ``silent_after_s`` are taken to be lost.
        """
        self._embodiment = embodiment
        self._silent_after_ns = round(silent_after_s * 1e9)
        self._namespace = namespace
        self._lock = threading.Lock()
        self._policy = PolicyState()
        self._clients: dict[str, Any] = {}

    def __enter__(self) -> TrialNode:
        try:
            import rclpy
            from diagnostic_msgs.msg import DiagnosticArray
            from rclpy.executors import SingleThreadedExecutor
            from rclpy.signals import SignalHandlerOptions

            from robot_bridge.nodes.topic_tap import TopicTap
        except ImportError as error:
            raise MissingExtraError("rclpy", "ros_wheels") from error
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node("trials", namespace=self._namespace or None, context=self._context)
        self.namespace: str = self._node.get_namespace()
        self.tap: TopicTap = TopicTap(self._node, trial_topics(self._embodiment))
        self._node.create_subscription(DiagnosticArray, "policy/state", self._hear_policy, 10)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._executor.spin, name="trial-node", daemon=True)
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
    def policy(self) -> PolicyState:
        """What the policy node last said."""
        with self._lock:
            return self._policy

    def call(self, service: str, timeout_s: float) -> str:
        """Call a std_srvs/Trigger service and return its message.

        Args:
            service: relative name, such as ``arms/go_home``.
            timeout_s: longest wait for the service to be there and to answer, s.

        Raises:
            UnavailableError: it is not there, does not answer in time, or says no.
        """
        from std_srvs.srv import Trigger

        answer = self._ask(Trigger, service, Trigger.Request(), timeout_s)
        if not answer.success:
            raise UnavailableError(f"{service}: {answer.message}")
        message: str = answer.message
        return message

    def set_parameters(self, node: str, values: Mapping[str, str | int], timeout_s: float) -> None:
        """Set parameters of another node.

        Raises:
            UnavailableError: it is not there, does not answer in time, or refuses one.
        """
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        request = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        )
        answer = self._ask(SetParameters, f"{node}/set_parameters", request, timeout_s)
        for name, result in zip(values, answer.results, strict=True):
            if not result.successful:
                raise UnavailableError(f"{node} refuses its parameter {name}: {result.reason}")

    def _ask(self, kind: Any, service: str, request: Any, timeout_s: float) -> Any:
        if service not in self._clients:
            self._clients[service] = self._node.create_client(kind, service)
        client = self._clients[service]
        deadline = time.monotonic() + timeout_s
        if not client.wait_for_service(timeout_sec=timeout_s):
            raise UnavailableError(f"nothing offers the service {service}", "start the stack: simplevla up")
        answered = threading.Event()
        future = client.call_async(request)
        future.add_done_callback(lambda _: answered.set())
        if not answered.wait(max(0.1, deadline - time.monotonic())):
            client.remove_pending_request(future)
            raise UnavailableError(f"{service} did not answer in {timeout_s:.0f} s", "see that node's log")
        return future.result()

    def silent_joints(self) -> bool:
        """Return whether no joint states have come for longer than arms may be silent."""
        heard_ns, _ = self.tap.latest.get("joint_states", (0, b""))
        return time.time_ns() - heard_ns > self._silent_after_ns

    def wait_for_joints(self, timeout_s: float) -> None:
        """Wait until joint states come.

        Raises:
            UnavailableError: none came in time.
        """
        deadline = time.monotonic() + timeout_s
        while self.silent_joints():
            if time.monotonic() > deadline:
                raise UnavailableError(
                    "no joint states from the arms", "start the stack: simplevla up; check ROS_DOMAIN_ID"
                )
            time.sleep(0.05)

    def wait_still(self, timeout_s: float) -> bool:
        """Wait until no joint moves any more; return whether that was in time."""
        deadline = time.monotonic() + timeout_s
        poses: deque[NDArray[np.float64]] = deque(maxlen=_STILL_LOOKS)
        while time.monotonic() < deadline:
            poses.append(self._joints())
            if len(poses) == _STILL_LOOKS and np.ptp(poses, axis=0).max() < _STILL_RAD_OR_M:
                return True
            time.sleep(_LOOK_PERIOD_S)
        return False

    def _joints(self) -> NDArray[np.float64]:
        """Return the positions (D,) that were last heard; NaN, which is never still, if none were."""
        from rclpy.serialization import deserialize_message
        from sensor_msgs.msg import JointState

        if self.silent_joints():
            return np.full(self._embodiment.dimension, np.nan)
        return np.array(deserialize_message(self.tap.latest["joint_states"][1], JointState).position)

    def _hear_policy(self, message: Any) -> None:
        for status in message.status[:1]:
            values = {pair.key: pair.value for pair in status.values}
            count, failure = values.get("actions", ""), values.get("failure", "")
            state = PolicyState(
                phase=values.get("phase", ""),
                episode=values.get("episode", ""),
                actions=int(count) if count.isdecimal() else 0,
                failure=FailureCode(failure) if failure in _FAILURES else FailureCode.OTHER,
                reason=values.get("reason", ""),
                heard_s=time.monotonic(),
            )
            with self._lock:
                self._policy = state

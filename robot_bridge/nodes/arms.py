"""The arms' node: trajectories in, joint states out, and the services that a person needs.

One process drives every arm of the rig. Motors are off at the start.

=========================  ==================================================================
subscribes                 ``joint_trajectory`` (trajectory_msgs/JointTrajectory): all of the
                           embodiment's names; ``header.stamp`` is the start, target i is for
                           ``(i + 1) dt`` after it
publishes                  ``joint_states`` (measured), ``setpoints`` (what was really sent),
                           ``arms/executed`` (keyed by a trajectory's stamp: when its first
                           setpoint went out, how many targets were played, and by when),
                           ``arms/limits`` (a cause beginning to act on a joint), where the bases
                           stand (:mod:`robot_bridge.nodes.transforms`),
                           ``diagnostics`` at 1 Hz
services, std_srvs/Trigger  ``~/enable``, ``~/go_home``, ``~/hold``, ``~/estop``, and, for a
                           person with the arms supported, ``~/disable`` and ``~/reset``
=========================  ==================================================================
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from robot_bridge.chunk_execution import Trajectory
from robot_bridge.clearance import TABLE_TOP_M, Workspace
from robot_bridge.control_loop import ControlLoop, Mode, Tick
from robot_bridge.drivers.choice import arm_driver
from robot_bridge.limits import Limiter, LimitEvent
from robot_bridge.nodes.process import (
    declare,
    declare_record,
    destroying,
    diagnostics,
    run_node,
    set_stamp,
    stamp_ns,
    status,
    trigger,
)
from robot_bridge.nodes.transforms import publish_transforms
from robot_bridge.priority import ask_for_priority
from robot_bridge.rig import load_rig
from simplevla.embodiment import Embodiment
from simplevla.errors import ChunkError, SimplevlaError
from simplevla.session_record import calibrated

logger = logging.getLogger(__name__)

_SPACING_SLACK = 1e-3  # of dt: how unevenly the targets of a trajectory may be spaced
_DROPS = "the motors have no power now: an arm that was not supported has dropped"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node until it is asked to end; return the exit status."""
    ask_for_priority()
    sys.setswitchinterval(0.0005)  # the loop's turn must not wait 5 ms for another thread's
    return run_node("arms", open_arms, sys.argv if argv is None else argv)


@contextmanager
def open_arms() -> Iterator[ArmsNode]:
    """Yield the node with its drivers open and its loop running; parameters come from ROS."""
    node = ArmsNode()
    with destroying(node), ExitStack() as resources:
        rig = load_rig(node.rig_name)
        embodiment = calibrated(rig.load_embodiment(), node.record)
        drivers = [resources.enter_context(arm_driver(rig, arm, node.record)) for arm in embodiment.arms]
        limiter = Limiter(embodiment, Workspace(embodiment, table_top_m=node.table_top_m))
        publish_transforms(node, {f"{arm.name}_base": arm.base for arm in embodiment.arms})
        loop = ControlLoop(
            embodiment, drivers, limiter, node.on_tick, max_feedback_age_s=node.max_feedback_age_s
        )
        node.attach(embodiment, loop)
        gc.collect()
        gc.freeze()  # what exists now stays; no later collection has to walk through it
        resources.enter_context(loop)
        yield node


class ArmsNode(Node):
    """ROS's view of a :class:`~robot_bridge.control_loop.ControlLoop`."""

    def __init__(self) -> None:
        super().__init__("arms")
        self.rig_name: str = declare(
            self, "rig", "twin", "name of a rig in config/rig, or a path to a .yaml file"
        )
        self.record = declare_record(self)
        measured = self.record.table_top_m if self.record else None
        self.table_top_m: float = declare(
            self,
            "table_top_m",
            TABLE_TOP_M if measured is None else measured,
            "height of the table's top in the world frame, m; as measured, if it was",
            low=-2,
            high=3,
        )
        self.max_feedback_age_s: float = declare(
            self,
            "max_feedback_age_s",
            0.1,
            "joint feedback older than this: the arms hold, s",
            low=0.01,
            high=1,
        )
        self._publish_rate_hz: float = declare(
            self, "publish_rate_hz", 100.0, "rate of joint_states and setpoints, Hz", low=1, high=200
        )
        self._joint_states = self.create_publisher(JointState, "joint_states", 10)
        self._setpoints = self.create_publisher(JointState, "setpoints", 10)
        self._executed = self.create_publisher(DiagnosticArray, "arms/executed", 50)
        self._limits = self.create_publisher(DiagnosticArray, "arms/limits", 50)
        self._diagnostics = self.create_publisher(DiagnosticArray, "diagnostics", 10)

    def attach(self, embodiment: Embodiment, loop: ControlLoop) -> None:
        """Take up work for ``loop``: from now on trajectories and services reach it."""
        self._names = embodiment.names()
        self._arm_names = [arm.name for arm in embodiment.arms]
        self._loop = loop
        self._every = max(1, round(embodiment.control_rate_hz / self._publish_rate_hz))
        self._next_publish = 0
        self._acting: frozenset[LimitEvent] = frozenset()
        self._said: dict[int, tuple[int, int]] = {}  # {stamp: first setpoint, ns, and targets played}
        self._newest: Tick | None = None
        self.create_subscription(JointTrajectory, "joint_trajectory", self._take, 10)
        self.create_timer(1.0, self._diagnose)
        trigger(self, "~/enable", self._enable)
        trigger(self, "~/go_home", self._go_home)
        trigger(self, "~/hold", self._hold, at_once=True)
        trigger(self, "~/estop", self._stop, at_once=True)
        trigger(self, "~/disable", self._disable)
        trigger(self, "~/reset", self._reset)

    def on_tick(self, tick: Tick) -> None:
        """Publish a turn of the loop; in the loop's thread."""
        self._newest = tick
        if tick.index >= self._next_publish:
            self._next_publish = tick.index + self._every
            self._publish_joints(tick)
        acting = frozenset(tick.events)
        if fresh := acting - self._acting:
            self._limits.publish(
                diagnostics(
                    tick.stamp_ns,
                    *(
                        status(f"limits: {e.cause.value}", e.joint, {}, level="warn")
                        for e in sorted(fresh, key=str)
                    ),
                )
            )
        self._acting = acting
        self._publish_executed(tick)

    def _publish_joints(self, tick: Tick) -> None:
        measured = JointState(name=self._names)
        set_stamp(measured.header.stamp, min(state.stamp_ns for state in tick.states))
        measured.position = np.concatenate([state.position for state in tick.states]).tolist()
        measured.velocity = np.concatenate([state.velocity for state in tick.states]).tolist()
        measured.effort = np.concatenate([state.effort for state in tick.states]).tolist()
        self._joint_states.publish(measured)
        if tick.sent is not None:
            sent = JointState(name=self._names, position=tick.sent.tolist())
            set_stamp(sent.header.stamp, tick.stamp_ns)
            self._setpoints.publish(sent)

    def _publish_executed(self, tick: Tick) -> None:
        for stamp, count in tick.played:
            first_ns, said = self._said.get(stamp, (tick.stamp_ns, -1))
            if count == said:
                continue
            self._said[stamp] = (first_ns, count)
            values = {"first_setpoint_ns": first_ns, "executed": count, "at_ns": tick.stamp_ns}
            self._executed.publish(diagnostics(stamp, status("executed", "", values)))
        for stamp in self._said.keys() - {played.stamp_ns for played in tick.played}:
            del self._said[stamp]

    def _take(self, message: JointTrajectory) -> None:
        try:
            skipped = self._loop.play(
                read_trajectory(message, self._names, time.time_ns(), time.monotonic())
            )
        except SimplevlaError as error:
            logger.warning("trajectory refused: %s", error)
            return
        if skipped:
            logger.warning("a trajectory came late: its first %d targets are skipped", skipped)

    def _diagnose(self) -> None:
        health, tick = self._loop.health(), self._newest
        values: dict[str, object] = {
            "mode": health.mode.value,
            "period_p50_ms": f"{health.period_p50_ms:.2f}",
            "period_p99_ms": f"{health.period_p99_ms:.2f}",
            "missed_turns": health.missed,
            **{f"limits.{cause}": count for cause, count in sorted(health.limits.items())},
        }
        well = health.mode is Mode.OFF or (health.mode is Mode.ON and not health.reason)
        message = health.reason or health.mode.value
        statuses = [status("arms: control loop", message, values, level="ok" if well else "error")]
        now_ns = time.time_ns()
        for name, state in zip(self._arm_names, tick.states if tick else (), strict=False):
            age_ms = (now_ns - state.stamp_ns) / 1e6
            level = "error" if age_ms > 1e3 * self.max_feedback_age_s else "warn" if state.faults else "ok"
            arm_values = {
                "enabled": state.enabled,
                "stopped": state.stopped,
                "feedback_age_ms": f"{age_ms:.1f}",
            }
            text = "; ".join(state.faults) or state.status
            statuses.append(status(f"arms: {name}", text, arm_values, level=level))
        self._diagnostics.publish(diagnostics(now_ns, *statuses))

    def _enable(self) -> str:
        self._loop.enable()
        return "enabled: holding the measured pose"

    def _go_home(self) -> str:
        self._loop.go_home()
        return "home"

    def _hold(self) -> str:
        self._loop.hold()
        return "holding"

    def _stop(self) -> str:
        self._loop.stop()
        return "stopped; to go on support the arms, reset them (this cuts their power), then enable them"

    def _disable(self) -> str:
        self._loop.disable()
        return _DROPS

    def _reset(self) -> str:
        self._loop.reset()
        return _DROPS


def read_trajectory(message: Any, names: Sequence[str], now_ns: int, now_s: float) -> Trajectory:
    """Return a trajectory_msgs/JointTrajectory as a trajectory on the monotonic clock.

    Args:
        message: the message.
        names: the embodiment's names, all of which must be there, in this order.
        now_ns: the system clock, ns.
        now_s: the monotonic clock at the same moment, s.

    Raises:
        ChunkError: names, shape or timing are wrong, or a value is not finite.
    """
    if list(message.joint_names) != list(names):
        raise ChunkError(
            f"joint names are {', '.join(message.joint_names) or 'missing'}", f"send {', '.join(names)}"
        )
    points = message.points
    if not points or any(len(point.positions) != len(names) for point in points):
        raise ChunkError("there are no targets, or one is incomplete", f"send {len(names)} positions each")
    times = np.array([stamp_ns(point.time_from_start) for point in points], dtype=np.float64) / 1e9
    dt_s = float(times[-1] / len(times))
    even = dt_s * np.arange(1, len(times) + 1)
    if not np.abs(times - even).max() <= _SPACING_SLACK * dt_s:
        raise ChunkError("targets are not evenly spaced", "send target i for (i + 1) dt after the stamp")
    start_ns = stamp_ns(message.header.stamp)
    targets = np.array([point.positions for point in points], dtype=np.float64)
    return Trajectory(now_s + (start_ns - now_ns) / 1e9, dt_s, targets, start_ns)


if __name__ == "__main__":
    sys.exit(main())

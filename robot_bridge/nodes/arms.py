"""The arms' node: trajectories in, joint states out, and the services that a person needs.

One process drives every arm of the rig. Motors are off at the start. A lifecycle node
(:mod:`robot_bridge.nodes.managed`): inactive, it reads the arms, and stops and holds them; active, it takes
trajectories too, and enables them.

=========================  ==================================================================
subscribes                 ``joint_trajectory`` (trajectory_msgs/JointTrajectory): all of the
                           embodiment's names; ``header.stamp`` is the start, target i is for
                           ``(i + 1) dt`` after it; ``estop`` (:mod:`robot_bridge.nodes.stop_line`)
publishes                  ``joint_states`` (measured), ``setpoints`` (what was really sent),
                           ``arms/executed`` (keyed by a trajectory's stamp: when its first
                           setpoint went out, how many targets were played, and by when),
                           ``arms/limits`` (a cause beginning to act on a joint),
                           ``/diagnostics`` at 1 Hz
services, std_srvs/Trigger  ``~/enable``, ``~/go_home``, ``~/hold``, ``~/estop``, and, for a
                           person with the arms supported, ``~/disable`` and ``~/reset``
with ``piper_topics``      what the vendor's ROS driver offers, for each arm
                           (:mod:`robot_bridge.nodes.piper_topics`)
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
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from robot_bridge.chunk_execution import Trajectory
from robot_bridge.clearance import TABLE_TOP_M, Box, Workspace
from robot_bridge.control_loop import ControlLoop, Mode, Tick
from robot_bridge.drivers.choice import arm_driver
from robot_bridge.drivers.piper_feedback import ArmState
from robot_bridge.limits import Limiter, LimitEvent
from robot_bridge.nodes.managed import ManagedNode
from robot_bridge.nodes.piper_topics import PiperTopics
from robot_bridge.nodes.process import diagnostics, run_node, set_stamp, stamp_ns, status, trigger
from robot_bridge.nodes.stop_line import stop_line
from robot_bridge.priority import ask_for_priority, ask_for_real_time, in_real_time
from robot_bridge.rig import load_rig, named
from simplevla.embodiment import Arm
from simplevla.errors import ChunkError, SimplevlaError
from simplevla.session_record import calibrated

logger = logging.getLogger(__name__)

_SPACING_SLACK = 1e-3  # of dt: how unevenly the targets of a trajectory may be spaced
_DROPS = "the motors have no power now: an arm that was not supported has dropped"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node until it is asked to end; return the exit status."""
    ask_for_real_time() or ask_for_priority()
    sys.setswitchinterval(0.0005)  # the loop's turn must not wait 5 ms for another thread's
    return run_node("arms", ArmsNode, sys.argv if argv is None else argv)


class ArmsNode(ManagedNode):
    """ROS's view of a :class:`~robot_bridge.control_loop.ControlLoop`."""

    def __init__(self) -> None:
        super().__init__("arms")
        self.declare("rig", "twin", "name of a rig in config/rig, or a path to a .yaml file")
        self.declare("arms", "", "names of the arms to drive, by commas; empty: all of the rig")
        self.declare_record()
        self.declare(
            "table_top_m",
            TABLE_TOP_M,
            "height of the table's top in the world frame, m; a session record's replaces the default",
            low=-2,
            high=3,
        )
        self.declare(
            "max_feedback_age_s", 0.04, "joint feedback older than this: the arms hold, s", low=0.01, high=1
        )
        self.declare(
            "stop_silent_after_s",
            1.0,
            "an arm without joint feedback for so long is stopped, s",
            low=0.1,
            high=60,
        )
        self.declare(
            "max_setpoint_age_s",
            3.0,
            "nothing fresher than a trajectory for so long: the arms hold, s",
            low=0.1,
            high=60,
        )
        self.declare("publish_rate_hz", 100.0, "rate of joint_states and setpoints, Hz", low=1, high=200)
        self.declare("piper_topics", False, "offer the topics of the vendor's ROS driver as well")

    @contextmanager
    def configured(self) -> Iterator[None]:
        """Open the drivers and run the loop; motors stay as they are found."""
        with ExitStack() as resources:
            record = self.record()
            rig = load_rig(self.value("rig")).with_arms(named(self.value("arms")))
            embodiment = calibrated(rig.load_embodiment(), record)
            drivers = [resources.enter_context(arm_driver(rig, arm, record)) for arm in embodiment.arms]
            table_top_m = self.value("table_top_m")
            if record and record.table_top_m is not None and table_top_m == TABLE_TOP_M:
                table_top_m = record.table_top_m
            box = Box(*rig.workspace_m) if rig.workspace_m else None
            limiter = Limiter(embodiment, Workspace(embodiment, table_top_m=table_top_m, box=box))
            self._max_age_s: float = self.value("max_feedback_age_s")
            loop = ControlLoop(
                embodiment,
                drivers,
                limiter,
                self._on_tick,
                max_feedback_age_s=self._max_age_s,
                stop_silent_after_s=self.value("stop_silent_after_s"),
                max_setpoint_age_s=self.value("max_setpoint_age_s"),
            )
            self._loop = loop
            self._names = embodiment.names()
            self._drivers = drivers
            self._every = max(1, round(embodiment.control_rate_hz / self.value("publish_rate_hz")))
            self._next_publish = 0
            self._acting: frozenset[LimitEvent] = frozenset()
            self._said: dict[int, tuple[int, int]] = {}  # {stamp: first setpoint, ns, and targets played}
            self._newest: Tick | None = None
            self._piper: PiperTopics | None = None
            self._open_topics()
            if self.value("piper_topics"):
                self._piper = PiperTopics(self, embodiment, loop, self.require_active)
            resources.enter_context(stop_line(self, self._stop))
            gc.collect()
            gc.freeze()  # what exists now stays; no later collection has to walk through it
            resources.enter_context(loop)
            yield

    @contextmanager
    def active(self) -> Iterator[None]:
        """Take trajectories, and allow the arms to be enabled; at the end they brake and hold."""
        self.create_subscription(JointTrajectory, "joint_trajectory", self._take, 10)
        try:
            yield
        finally:
            self._loop.hold()

    def stop_motion(self) -> None:
        """Brake and hold, and take no trajectory any more."""
        if self.is_active:
            self.trigger_deactivate()

    def _open_topics(self) -> None:
        self._joint_states = self.create_publisher(JointState, "joint_states", 10)
        self._setpoints = self.create_publisher(JointState, "setpoints", 10)
        self._executed = self.create_publisher(DiagnosticArray, "arms/executed", 50)
        self._limits = self.create_publisher(DiagnosticArray, "arms/limits", 50)
        trigger(self, "~/enable", self._enable)
        trigger(self, "~/go_home", self._go_home)
        trigger(self, "~/hold", self._hold, at_once=True)
        trigger(self, "~/disable", self._disable)
        trigger(self, "~/reset", self._reset)

    def _on_tick(self, tick: Tick) -> None:
        """Publish a turn of the loop; in the loop's thread."""
        self._newest = tick
        if tick.index >= self._next_publish:
            self._next_publish = tick.index + self._every
            self._publish_joints(tick)
            if self._piper is not None:
                self._piper.publish(tick)
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

    def diagnose(self) -> list[DiagnosticStatus]:
        """Return how the loop and each arm are."""
        health, tick = self._loop.health(), self._newest
        values: dict[str, object] = {
            "mode": health.mode.value,
            "period_p50_ms": f"{health.period_p50_ms:.2f}",
            "period_p99_ms": f"{health.period_p99_ms:.2f}",
            "missed_turns": health.missed,
            "real_time": in_real_time(),
            **{f"limits.{cause}": count for cause, count in sorted(health.limits.items())},
        }
        well = health.mode is Mode.OFF or (health.mode is Mode.ON and not health.reason)
        message = health.reason or health.mode.value
        statuses = [status("arms: control loop", message, values, level="ok" if well else "error")]
        now_ns = time.time_ns()
        for driver, state in zip(self._drivers, tick.states if tick else (), strict=False):
            age_ms = (now_ns - state.stamp_ns) / 1e6
            level = "error" if age_ms > 1e3 * self._max_age_s else "warn" if state.faults else "ok"
            arm_values = {
                "enabled": state.enabled,
                "stopped": state.stopped,
                "feedback_age_ms": f"{age_ms:.1f}",
                "feedback_doubted": driver.doubted,
                "firmware": driver.firmware,
                **motor_values(driver.arm, state),
            }
            text = "; ".join(state.faults) or state.status
            statuses.append(status(f"arms: {driver.arm.name}", text, arm_values, level=level))
        return statuses

    def _enable(self) -> str:
        self.require_active()
        self._loop.enable()
        return "enabled: holding the measured pose"

    def _go_home(self) -> str:
        self.require_active()
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


def motor_values(arm: Arm, state: ArmState) -> dict[str, str]:
    """Return how warm an arm's motors and their drivers are, degC, what they draw, A, and the supply, V."""
    values = {"supply_v": f"{state.supply_v:.1f}"}
    for i, joint in enumerate(arm.joints):
        values[f"{joint.name}.motor_c"] = f"{state.motor_c[i]:.0f}"
        values[f"{joint.name}.driver_c"] = f"{state.driver_c[i]:.0f}"
        values[f"{joint.name}.current_a"] = f"{state.current_a[i]:.3f}"
    return values


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

"""The loop that moves the arms: states in, setpoints out, 200 times a second, one thread for all arms.

Each tick reads every arm, asks the player what is wanted, passes that through the limits and sends what
comes out. Everything else (ROS, services, trajectories) talks to it through methods that any thread
may call. What it does on a fault:

===================================  =======================================================
no trajectory, or its end            the arms hold the last setpoint
no fresh trajectory within a bound   brake and hold, however much of the last one is left (dead man's rule)
joint feedback older than a bound    brake, hold, take nothing new; go on when it is back
the same for 2.5 times as long       as above, and forget what was to be played; an arm that heard nothing
                                     meanwhile goes on from where it stands
a joint that does not follow         is not pushed on; after half a second as for a fault
the same for a second                the silent arm's own damped stop, repeated until it confirms; latched
motors lost power, an arm stopped,   brake, hold, take nothing new until someone enables the arms again
a fault of an arm, a hand on it
emergency stop                       the arms' own damped stop, repeated until they confirm; latched
closing                              brake, hold, and leave the arms holding
===================================  =======================================================
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from robot_bridge.chunk_execution import ChunkPlayer, Played, Trajectory, smooth_move
from robot_bridge.limits import Cause, Limiter, LimitEvent, LimitsError, Vector
from simplevla.embodiment import Embodiment
from simplevla.errors import SimplevlaError, UnavailableError

if TYPE_CHECKING:
    from robot_bridge.drivers.piper import ArmState, PiperDriver

logger = logging.getLogger(__name__)

_HOME_SPEED = 0.3  # of the limits, on the way home
_HOME_PATIENCE_S = 3.0
_BRAKE_PATIENCE_S = 1.5
_RESET_PATIENCE_S = 2.0
_SEND_AFTER_S = 0.002  # into a turn: nearly all have computed by then, so that setpoints leave evenly
_PERIODS_KEPT = 400
_REPEAT_STOP = 20  # turns
_FORGET_AFTER = 2.5  # times the age at which the arms hold
_FOLLOWS_RAD = 1e-4  # nearer than this to its set point an arm has heard it
_BLOCKED_S = 0.5
_STILL_RAD_S = 0.05
_OFF = "motors are off: enable the arms"


class Mode(str, Enum):
    """What the loop does with the arms."""

    OFF = "off"  # motors as they were found; nothing is sent
    ON = "on"  # playing and holding
    FAULT = "fault"  # holding; nothing new is taken until the arms are enabled again
    STOPPED = "stopped"  # after an emergency stop; only a person resets the arms


@dataclass(frozen=True)
class Tick:
    """What one turn of the loop saw and did.

    Attributes:
        index: how many turns were due before it.
        stamp_ns: when the setpoints had been sent, ns of the system clock.
        states: of each arm, in the embodiment's order.
        sent: (D,) what was really sent; None if nothing was.
        events: what the limits changed, and what made the arms hold.
        mode, reason: what the loop does with the arms, and why it takes no trajectories.
        played: how far the last trajectories came; empty in a hold.
    """

    index: int
    stamp_ns: int
    states: tuple[ArmState, ...]
    sent: Vector | None
    events: tuple[LimitEvent, ...]
    mode: Mode
    reason: str
    played: tuple[Played, ...]


@dataclass(frozen=True)
class Health:
    """How the loop is.

    Attributes:
        reason: why it is in a mode that takes no trajectories; empty otherwise.
        period_p50_ms, period_p99_ms: time between turns over the last seconds, taken where a turn has sent
            its setpoints, so that it is what the buses see.
        missed: turns that were left out because the machine was late, since the start.
        limits: {cause: setpoints it changed since the start}.
    """

    mode: Mode
    reason: str
    period_p50_ms: float
    period_p99_ms: float
    missed: int
    limits: dict[str, int]


class ControlLoop:
    """Owns the thread. A context manager; the drivers must stay open around it.

    Args:
        embodiment: the robot.
        drivers: one open driver for each arm, in the embodiment's order.
        limiter: the limits.
        on_tick: called in the loop's thread after each turn; must be quick.
        max_feedback_age_s: joint feedback older than this means that the arms hold. The default finds a
            lost bus within 50 ms.
        stop_silent_after_s: an arm that is silent for this long, and for four times the age above, is
            stopped.
        max_setpoint_age_s: what :meth:`play` took is played for this long at most unless something fresher
            comes; None where whoever plays cannot die without this process.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        drivers: Sequence[PiperDriver],
        limiter: Limiter,
        on_tick: Callable[[Tick], None],
        *,
        max_feedback_age_s: float = 0.04,
        stop_silent_after_s: float = 1.0,
        max_setpoint_age_s: float | None = 3.0,
    ) -> None:
        self._embodiment = embodiment
        self._arms = [
            (driver, part) for driver, (_, part) in zip(drivers, embodiment.slices(), strict=True)
        ]
        self._limiter = limiter
        self._player = ChunkPlayer(np.zeros(embodiment.dimension), embodiment.position_limits())
        self._on_tick = on_tick
        self._max_age_s = max_feedback_age_s
        self._forget_s = _FORGET_AFTER * max_feedback_age_s
        self._stop_after_s = max(stop_silent_after_s, 4 * max_feedback_age_s)
        self._max_setpoint_age_s = np.inf if max_setpoint_age_s is None else max_setpoint_age_s
        self._fresh_until_s = np.inf
        self._happened: list[LimitEvent] = []  # since the last turn, beside what the limits changed
        self._forgot = False
        self._blocked_s = 0.0  # how long a joint has not followed
        self._to_stop = [False] * len(self._arms)
        self._period_s = 1.0 / embodiment.control_rate_hz
        self._lock = threading.Lock()  # guards the mode and the player; never held while sending
        self._mode = Mode.OFF
        self._reason = _OFF
        self._periods: deque[float] = deque(maxlen=_PERIODS_KEPT)
        self._sent_s = 0.0
        self._missed = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control-loop", daemon=True)

    def __enter__(self) -> ControlLoop:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Brake, hold, and end the thread. The arms go on holding."""
        self.hold()
        if not self._wait_resting(Mode.ON, Mode.FAULT):
            logger.warning("the arms were still moving when the loop ended")
        self._closing.set()
        self._thread.join()

    def enable(self) -> None:
        """Power the motors at the measured pose and take trajectories from then on. Takes seconds.

        Raises:
            UnavailableError: an arm does not come on, is stopped, or is silent.
            LimitsError: an arm stands outside its limits.
        """
        self._wait_resting()  # or what is commanded on enabling would be a jump
        with self._lock:
            if self._mode is Mode.ON:
                return
            before, self._mode, self._reason = self._mode, Mode.OFF, "the arms are being enabled"
        try:
            for driver, _ in self._arms:
                driver.enable()
            measured = np.concatenate([driver.state().position for driver, _ in self._arms])
            with self._lock:
                start = self._limiter.reset(measured)
                self._player.hold(start.positions)
                self._mode, self._reason = Mode.ON, ""
                self._forgot, self._blocked_s = False, 0.0
        except SimplevlaError as error:
            with self._lock:
                self._mode = Mode.STOPPED if before is Mode.STOPPED else Mode.OFF
                self._reason = f"not enabled: {error.message}"
            raise
        logger.info("enabled: holding the measured pose")

    def disable(self) -> None:
        """Cut the motors' power: **the arms drop**. Only for a person, with the arms supported."""
        with self._lock:
            self._mode, self._reason = Mode.OFF, _OFF
        for driver, _ in self._arms:
            driver.disable()

    def reset(self) -> None:
        """Clear a stop or a fault; cuts power, **the arms drop**. Only for a person, as above.

        Where only some arms were stopped, because they were silent, the others keep their power.

        Raises:
            UnavailableError: an arm does not confirm it.
        """
        with self._lock:
            chosen = self._to_stop if self._mode is Mode.STOPPED else [True] * len(self._arms)
            self._mode, self._reason = Mode.OFF, _OFF
        time.sleep(2 * self._period_s)  # a turn that has begun may still repeat the stop
        for (driver, _), due in zip(self._arms, chosen, strict=True):
            if due:
                driver.reset()
        deadline = time.monotonic() + _RESET_PATIENCE_S
        while stopped := [driver.arm.name for driver, _ in self._arms if driver.state().stopped]:
            if time.monotonic() > deadline:
                raise UnavailableError(f"still stopped: {', '.join(stopped)}", "check those arms' bus")
            time.sleep(self._period_s)

    def stop(self) -> None:
        """Stop all arms now, in their own damped way, until they are reset and enabled."""
        with self._lock:
            self._mode, self._reason = Mode.STOPPED, "emergency stop: reset the arms, then enable them"
            self._to_stop = [True] * len(self._arms)
            self._happened.append(LimitEvent(Cause.STOP))
        self._stop_all(self._to_stop)

    def hold(self) -> None:
        """Brake and stay; what was to be played is forgotten."""
        with self._lock:
            self._player.hold(self._limiter.rest())

    def play(self, trajectory: Trajectory) -> int:
        """Play ``trajectory``, whose times are on the monotonic clock; see :meth:`ChunkPlayer.offer`.

        Raises:
            ChunkError: it is stale or does not fit.
            UnavailableError: the arms do not take trajectories now.
        """
        with self._lock:
            if self._mode is not Mode.ON or self._reason:
                raise UnavailableError(self._reason or "the arms are off", "see the arms' diagnostics")
            now_s = time.monotonic()
            skipped = self._player.offer(trajectory, now_s)
            self._fresh_until_s = now_s + self._max_setpoint_age_s
            return skipped

    def go_home(self) -> None:
        """Move smoothly to the rest position and return when the arms are there.

        Raises:
            UnavailableError: the arms are not on, or did not arrive.
        """
        home, limiter = self._embodiment.home(), self._limiter
        with self._lock:
            if limiter.position is None or self._mode is not Mode.ON or self._reason:
                raise UnavailableError(self._reason or "the arms are off", "see the arms' diagnostics")
            self._player.hold(limiter.rest())
            now_s = time.monotonic()
            move = smooth_move(
                limiter.rest(),
                home,
                dt_s=self._period_s,
                start_s=now_s,
                stamp_ns=time.time_ns(),
                speed=_HOME_SPEED * self._embodiment.velocity_limits(),
                acceleration=_HOME_SPEED * self._embodiment.acceleration_limits(),
            )
            self._player.offer(move, now_s)
            self._fresh_until_s = np.inf
        deadline = move.times()[-1] + _HOME_PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(0.02)
            with self._lock:
                if self._mode is not Mode.ON or self._reason:
                    raise UnavailableError(f"not home: {self._reason}", "see the arms' diagnostics")
                if limiter.resting and np.array_equal(limiter.position, home):
                    return
        raise UnavailableError("the arms did not get home", "see the limit events: something is in the way")

    def health(self) -> Health:
        """Return how the loop is."""
        periods_ms = 1e3 * np.array(list(self._periods) or [0.0])
        p50, p99 = np.percentile(periods_ms, [50, 99])
        limits = {cause.value: count for cause, count in list(self._limiter.counts.items())}
        return Health(self._mode, self._reason, float(p50), float(p99), self._missed, limits)

    def _run(self) -> None:
        due_s = self._sent_s = time.monotonic()
        index = 0
        while not self._closing.is_set():
            late = max(0, int((time.monotonic() - due_s) / self._period_s))
            self._missed += late  # left out: the setpoints follow the clock, not the count of turns
            index += late
            due_s += late * self._period_s
            try:
                self._turn(index, due_s, (1 + late) * self._period_s)
            except Exception:
                with self._lock:
                    if self._mode is not Mode.FAULT:
                        logger.exception("the control loop failed")
                    self._fail("the control loop failed: see its log")
            index += 1
            due_s += self._period_s
            self._closing.wait(max(0.0, due_s - time.monotonic()))

    def _turn(self, index: int, t_s: float, dt_s: float) -> None:
        states = tuple(driver.state() for driver, _ in self._arms)
        setpoint, played = None, tuple[Played, ...]()
        with self._lock:
            self._judge(states)
            mode, reason = self._mode, self._reason
            # At rest a silent arm is told nothing more: it may have heard none of it, and would jump.
            at_rest = self._limiter.resting and (mode is Mode.FAULT or self._forgot)
            if mode in (Mode.ON, Mode.FAULT) and not at_rest:
                self._mind_the_dead_man(t_s)
                measured = np.concatenate([self._trusted(state) for state in states])
                effort = np.concatenate([state.effort for state in states])
                setpoint = self._limiter.admit(self._player.wanted(t_s), measured, dt_s, effort)
                self._mind_the_blocked(setpoint.events, dt_s)
                played = self._player.played(t_s)
            events = (*self._happened, *(setpoint.events if setpoint is not None else ()))
            self._limiter.counts.update({event.cause for event in self._happened})
            self._happened.clear()
            to_stop = self._to_stop
        sent = None
        if setpoint is not None:
            self._closing.wait(max(0.0, t_s + _SEND_AFTER_S - time.monotonic()))
            sent = _joined([driver.send(setpoint, part) for driver, part in self._arms])
        elif mode is Mode.STOPPED and index % _REPEAT_STOP == 0:
            due = [want and not state.stopped for want, state in zip(to_stop, states, strict=True)]
            self._stop_all(due)
        now_s = time.monotonic()
        self._periods.append(now_s - self._sent_s)
        self._sent_s = now_s
        self._on_tick(Tick(index, time.time_ns(), states, sent, events, mode, reason, played))

    def _judge(self, states: Sequence[ArmState]) -> None:
        """Change the mode to what the arms say of themselves; the lock is held."""
        if self._mode is not Mode.ON:
            return
        names = [arm.name for arm in self._embodiment.arms]
        for name, state in zip(names, states, strict=True):
            if state.stopped or not state.enabled:
                what = "is stopped" if state.stopped else "has lost motor power"
                self._fail(f"arm {name} {what}: enable the arms again", name)
                return
            if state.must_hold:
                self._fail(f"arm {name}: {'; '.join(state.faults)}: see to it, then enable the arms", name)
                return
        ages = [state.age_s for state in states]
        silent = [name for name, age_s in zip(names, ages, strict=True) if age_s > self._max_age_s]
        if silent and not self._reason:
            self._reason = f"no joint feedback from: {', '.join(silent)}"
            logger.error("%s: the arms hold", self._reason)
        elif not silent and self._reason and (not self._forgot or self._settled(states)):
            logger.warning("joint feedback is back")
            self._reason = ""
            if self._forgot:
                self._go_on_from_here(states)
            self._forgot = False
        if max(ages) > self._forget_s:
            self._forgot = True
        if self._forgot:
            self._player.hold(self._limiter.rest())
        if max(ages) > self._stop_after_s:
            self._mode, self._to_stop = Mode.STOPPED, [age_s > self._stop_after_s for age_s in ages]
            self._reason += ", which are stopped: see to their buses and power, then reset and enable them"
            self._happened.append(LimitEvent(Cause.STOP, ",".join(silent)))
            logger.error("%s", self._reason)

    def _settled(self, states: Sequence[ArmState]) -> bool:
        """Return whether setpoints and joints are at rest, grippers aside."""
        speeds = [float(np.abs(state.velocity[:-1]).max()) for state in states]
        return self._limiter.resting and max(speeds) < _STILL_RAD_S

    def _go_on_from_here(self, states: Sequence[ArmState]) -> None:
        """Set out anew from the measured pose if an arm has not followed meanwhile; the lock is held."""
        measured = np.concatenate([state.position for state in states])
        if self._limiter.position is None or self._limiter.leads(measured) < _FOLLOWS_RAD:
            return
        try:
            self._player.hold(self._limiter.reset(measured).positions)
        except LimitsError as error:
            self._fail(f"{error.message}: {error.remedy}")

    def _mind_the_blocked(self, events: Sequence[LimitEvent], dt_s: float) -> None:
        """Take it for a fault if a joint does not follow for long; the lock is held."""
        blocked = [event.joint for event in events if event.cause is Cause.TRACKING]
        self._blocked_s = self._blocked_s + dt_s if blocked else 0.0
        if self._blocked_s > _BLOCKED_S and self._limiter.resting:
            self._fail(f"does not follow: {', '.join(blocked)}: see to it, then enable the arms")

    def _mind_the_dead_man(self, t_s: float) -> None:
        """Hold if what plays is stale and nothing fresher came; the lock is held."""
        if t_s > self._fresh_until_s and not self._player.done(t_s):
            logger.error("no fresh trajectory for %.1f s: the arms hold", self._max_setpoint_age_s)
            self._player.hold(self._limiter.rest())
            self._happened.append(LimitEvent(Cause.STALE))

    def _fail(self, reason: str, arm: str = "") -> None:
        """Hold until the arms are enabled again; the lock is held."""
        if self._mode is Mode.ON:
            logger.error("%s: the arms hold", reason)
            self._mode, self._reason = Mode.FAULT, reason
            self._happened.append(LimitEvent(Cause.FAULT, arm))
            self._player.hold(self._limiter.rest())

    def _trusted(self, state: ArmState) -> Vector:
        """Return the measured position, NaN if it is too old to mean anything."""
        return state.position if state.age_s <= self._max_age_s else np.full_like(state.position, np.nan)

    def _wait_resting(self, *modes: Mode) -> bool:
        """Wait while the setpoints move in one of ``modes`` (a fault); return whether they rest."""
        deadline = time.monotonic() + _BRAKE_PATIENCE_S
        while self._mode in (modes or (Mode.FAULT,)) and not self._limiter.resting:
            if time.monotonic() > deadline or not self._thread.is_alive():
                return not self._thread.is_alive()
            time.sleep(self._period_s)
        return True

    def _stop_all(self, due: Sequence[bool]) -> None:
        """Stop every arm that is due; one that fails keeps no other from its stop."""
        errors: list[Exception] = []
        for (driver, _), now in zip(self._arms, due, strict=True):
            try:
                if now:
                    driver.stop()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def _joined(parts: list[Vector | None]) -> Vector | None:
    whole = [part for part in parts if part is not None]
    return np.concatenate(whole) if len(whole) == len(parts) else None

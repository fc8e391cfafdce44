"""The robot as calibration works with it: arms that move under the bridge's limits, cameras, a memory.

The way to the bus is the bridge's own: its control loop, its limiter, its drivers. What happened in each
turn of the loop is kept for a while, so that delays can be read from it afterwards.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from calibration.camera import CameraModel
from calibration.settings import Settings
from robot_bridge.chunk_execution import Trajectory, smooth_move
from robot_bridge.clearance import TABLE_TOP_M, Workspace
from robot_bridge.control_loop import ControlLoop, Tick
from robot_bridge.drivers.choice import arm_driver, camera_driver
from robot_bridge.drivers.realsense import RealSenseDriver
from robot_bridge.limits import Cause, Limiter
from robot_bridge.rig import Rig
from simplevla.embodiment import Camera, Embodiment
from simplevla.errors import UnavailableError

logger = logging.getLogger(__name__)

Vector = NDArray[np.float64]

_KEPT_S = 90.0
_STILL_RAD_S = 2e-3  # between two looks 0.1 s apart, per second
_STILL_M_S = 1e-3
_STILL_PATIENCE_S = 10.0
_ARRIVE_PATIENCE_S = 4.0
_MOVE_ATTEMPTS = 5
_FRESH_NS = 150_000_000
_CATCH_UP_S, _CAUGHT_UP_RAD = 3.0, 0.02
_HELD_S = 0.3
_LEAD_S = 0.02
_PICTURE_PATIENCE_S = 15.0  # a busy machine draws its twin slowly
_AVERAGED_S = 0.1
# Joint feedback older than this: the arms hold. A busy machine pauses its twin for long, and harms nothing.
_TWIN_AGE_S, _METAL_AGE_S = 2.0, 0.1


@dataclass(frozen=True, eq=False)
class Turn:
    """One turn of the control loop.

    Attributes:
        stamp_ns: when the setpoint had been sent, ns of the system clock.
        sent: (D,) the setpoint; None if none was sent.
        measured: (D,) what the arms reported.
        measured_ns: when each arm reported it, in the embodiment's order.
    """

    stamp_ns: int
    sent: Vector | None
    measured: Vector
    measured_ns: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Shot:
    """One picture and when it came.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        stamp_ns: the camera's stamp of it.
        arrival_ns: when the driver had it, ns of the system clock.
    """

    image: NDArray[np.uint8]
    stamp_ns: int
    arrival_ns: int


class Cell:
    """Arms and cameras of a rig. A context manager: motors as they were found until :meth:`enable`.

    Args:
        rig: the rig.
        embodiment: the robot, its cameras as calibration streams them.
        settings: how fast to move, and what to wait for.
        table_top_m: height of the table, m.

    Attributes:
        workspace: what the limits keep clear of; see :meth:`carry`.
    """

    def __init__(
        self,
        rig: Rig,
        embodiment: Embodiment,
        settings: Settings,
        *,
        table_top_m: float = TABLE_TOP_M,
    ) -> None:
        self.rig = rig
        self.embodiment = embodiment
        self.settings = settings
        self.workspace = Workspace(embodiment, table_top_m=table_top_m)
        self._table_top_m = table_top_m
        self._limiter = Limiter(embodiment, self)
        self._turns: deque[Turn] = deque(maxlen=round(_KEPT_S * embodiment.control_rate_hz))
        self._cameras: dict[str, RealSenseDriver] = {}
        self._resources = ExitStack()

    def __enter__(self) -> Cell:
        try:
            self._open()
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def carry(self, carried: Mapping[str, Vector]) -> None:
        """Keep what grippers hold clear as well: {arm: (N, 3) points of it, tool frame, m}."""
        self.workspace = Workspace(self.embodiment, table_top_m=self._table_top_m, carried=carried)

    def unsafe(self, way: Vector, now: Vector) -> list[tuple[Cause, slice]]:
        """Return what must hold, by cause; see :class:`~robot_bridge.limits.Clearance`."""
        return self.workspace.unsafe(way, now)

    def enable(self) -> None:
        """Power the motors at the measured pose; nothing moves.

        Raises:
            UnavailableError: an arm does not come on.
            LimitsError: an arm stands outside its limits.
        """
        self._loop.enable()

    def home(self) -> None:
        """Move all arms to rest.

        Raises:
            UnavailableError: they did not arrive.
        """
        self.move(self.embodiment.home())

    def move(self, goal: Vector) -> None:
        """Move smoothly to ``goal`` (D,), rad and m, and return when the setpoint is there.

        Raises:
            UnavailableError: the limits did not let the arms arrive, or feedback was lost.
        """
        for _ in range(_MOVE_ATTEMPTS):
            if self._move_once(goal):
                return
            logger.warning("the arms held on the way: they set out again")
            self._catch_up()
        counts = ", ".join(f"{cause} {n}" for cause, n in self._loop.health().limits.items()) or "none"
        raise UnavailableError(
            f"the arms did not arrive (limits that acted so far: {counts})",
            "clear the way, and check that board and table are where the settings say",
        )

    def _catch_up(self) -> None:
        """Wait until the arms are where they were sent; arms that are blocked never are."""
        deadline = time.monotonic() + _CATCH_UP_S
        while time.monotonic() < deadline:
            if self._is_there():
                return
            time.sleep(0.05)

    def _is_there(self) -> bool:
        """Return whether the joints are about where they were sent; grippers may hold something."""
        off = np.abs(self.measured() - self._position())
        return all((off[part][:-1] < _CAUGHT_UP_RAD).all() for _, part in self.embodiment.slices())

    def _move_once(self, goal: Vector) -> bool:
        """Set out for ``goal`` and return whether the setpoint got there.

        A gap in the joint feedback makes the arms hold and forget the rest of the way.
        """
        start = self._position()
        if np.allclose(start, goal, atol=1e-9):
            return True
        now_s = time.monotonic()
        move = smooth_move(
            start,
            goal,
            dt_s=1 / self.embodiment.control_rate_hz,
            start_s=now_s + _LEAD_S,
            stamp_ns=time.time_ns(),
            speed=self.settings.speed * self.embodiment.velocity_limits(),
            acceleration=self.settings.speed * self.embodiment.acceleration_limits(),
        )
        try:
            self._loop.play(move)
        except UnavailableError as error:
            logger.warning("%s", error)
            time.sleep(_HELD_S)
            return False
        ends_s = float(move.times()[-1])
        while time.monotonic() < ends_s + _ARRIVE_PATIENCE_S:
            if self._limiter.resting and np.allclose(self._position(), goal, atol=1e-9):
                return True
            if self._limiter.resting and time.monotonic() > ends_s + _HELD_S:
                return False
            time.sleep(0.02)
        return False

    def start(self, targets: Vector, dt_s: float) -> float:
        """Begin to play (K, D) targets ``dt_s`` apart, and return when they end, s of the monotonic clock.

        Raises:
            UnavailableError: the arms take no trajectory now.
        """
        trajectory = Trajectory(time.monotonic() + _LEAD_S, dt_s, targets, time.time_ns())
        self._loop.play(trajectory)
        return float(trajectory.times()[-1])

    def settle(self) -> None:
        """Return when the arms have been still for the time that the settings ask for.

        Raises:
            UnavailableError: they do not come to rest.
        """
        deadline = time.monotonic() + _STILL_PATIENCE_S + self.settings.settle_s
        still_since = time.monotonic()
        arriving = still_since + _CATCH_UP_S  # arms that are not there by then are blocked
        before, before_s = self.measured(), time.monotonic()
        bounds = np.concatenate(
            [[*(_STILL_RAD_S for _ in arm.joints), _STILL_M_S] for arm in self.embodiment.arms]
        )
        while time.monotonic() - still_since < self.settings.settle_s:
            time.sleep(0.1)
            now, now_s = self.measured(), time.monotonic()
            moved = bool((np.abs(now - before) > bounds * (now_s - before_s)).any())
            if moved or (now_s < arriving and not self._is_there()) or not self._hears():
                still_since = now_s
            before, before_s = now, now_s
            if now_s > deadline:
                raise UnavailableError("the arms do not come to rest", "check what holds or pushes them")

    def _hears(self) -> bool:
        """Return whether every arm's feedback is fresh: one that is silent only seems to be still."""
        return time.time_ns() - min(self._turns[-1].measured_ns) < _FRESH_NS

    def measured(self) -> Vector:
        """Return (D,) the newest measured positions; rad and m."""
        return self._turns[-1].measured.copy()

    def averaged(self) -> Vector:
        """Return (D,) measured positions averaged over the last tenth of a second; rad and m."""
        count = max(1, round(_AVERAGED_S * self.embodiment.control_rate_hz))
        turns = list(self._turns)[-count:]
        mean: Vector = np.mean([turn.measured for turn in turns], axis=0)
        return mean

    def turns(self, since_ns: int) -> list[Turn]:
        """Return the turns since ``since_ns`` of the system clock, the oldest first."""
        return [turn for turn in list(self._turns) if turn.stamp_ns >= since_ns]

    def look(self, camera: str, after_ns: int | None = None) -> Shot:
        """Return the first new picture of ``camera`` that is stamped after ``after_ns``, or after now.

        Raises:
            UnavailableError: none comes.
        """
        since_ns = time.time_ns() if after_ns is None else after_ns
        frame = self._cameras[camera].wait_newer(since_ns, _PICTURE_PATIENCE_S)
        return Shot(frame.image, frame.capture_ns, frame.arrival_ns)

    def lens(self, camera: str) -> CameraModel:
        """Return what a camera says of its own lens, in pixels of its present stream."""
        told = self._cameras[camera].intrinsics
        stream = self.embodiment.camera(camera)
        return CameraModel(
            width=stream.width,
            height=stream.height,
            fx=told.fx,
            fy=told.fy,
            cx=told.cx,
            cy=told.cy,
            distortion=told.distortion,
        )

    def cameras(self) -> tuple[Camera, ...]:
        """Return the cameras, as they are streamed."""
        return self.embodiment.cameras

    def _open(self) -> None:
        keep = self._resources.enter_context
        switch_s = sys.getswitchinterval()
        sys.setswitchinterval(0.0005)  # the loop's turn must not wait 5 ms for another thread's
        self._resources.callback(sys.setswitchinterval, switch_s)
        gc.collect()
        gc.freeze()  # nor for a collection that walks through all libraries
        self._resources.callback(gc.unfreeze)
        self._cameras = {
            camera.name: keep(camera_driver(self.rig, camera)) for camera in self.embodiment.cameras
        }
        drivers = [keep(arm_driver(self.rig, arm)) for arm in self.embodiment.arms]
        self._loop = ControlLoop(
            self.embodiment,
            drivers,
            self._limiter,
            self._remember,
            max_feedback_age_s=_TWIN_AGE_S if self.rig.is_twin else _METAL_AGE_S,
            max_setpoint_age_s=None,  # a move is one trajectory, and who sends it is this process
        )
        keep(self._loop)
        deadline = time.monotonic() + 2.0
        while not self._turns:
            if time.monotonic() > deadline:
                raise UnavailableError("the control loop does not turn", "see the log")
            time.sleep(0.01)

    def _remember(self, tick: Tick) -> None:
        measured = np.concatenate([state.position for state in tick.states])
        stamps = tuple(state.stamp_ns for state in tick.states)
        self._turns.append(Turn(tick.stamp_ns, tick.sent, measured, stamps))

    def _position(self) -> Vector:
        if self._limiter.position is None:
            raise UnavailableError("the arms are off", "enable them first")
        return self._limiter.position.copy()

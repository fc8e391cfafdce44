"""The twin process: one simulated world behind emulated arms and cameras, in real time.

Two threads share one small board of numbers. The physics thread owns the simulator: it steps it to
keep pace with the wall clock, draws the cameras, and answers the control endpoint. The bus thread
serves every arm's CAN bus 200 times a second, so that feedback goes on while a picture is drawn or a
scene is built. A machine that cannot keep pace makes the twin slower than the wall clock; the
real-time factor says by how much.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from robot_bridge.priority import ask_for_priority
from robot_bridge.rig import Rig
from robot_bridge.twin.can_bus import CanHub
from robot_bridge.twin.control import (
    MAX_MESSAGE_BYTES,
    GetStatus,
    Message,
    Refused,
    Reset,
    Shutdown,
    TwinStatus,
    decode_request,
)
from robot_bridge.twin.frames import FrameWriter, slot_name
from robot_bridge.twin.piper_emulator import FeedbackRates, PiperEmulator
from sim_training.tasks import load_task
from sim_training.world import PHYSICS_DT_S, World
from simplevla.embodiment import Camera
from simplevla.errors import ConfigError, MissingExtraError, SimplevlaError, UnavailableError
from simplevla.trial import FailureCode, Strategy

logger = logging.getLogger(__name__)

_BUS_TICK_S = 0.005
_MAX_BEHIND_S = 0.1  # further behind than this, time is lost instead of made up for
_MAX_BATCH = 5  # physics steps between two looks at the clock and the judge
_MAX_LAG_S = 0.008
_DRAW_S, _MIN_DRAW_S, _MAX_DRAW_S = 0.03, 0.01, 0.06
_SWITCH_S = 0.001


def run(
    rig: Rig, *, task: str | None = None, seed: int = 0, announce: Callable[[str], None] = print
) -> int:
    """Run the twin of ``rig`` until SIGINT, SIGTERM or a shutdown request; return the exit status.

    Args:
        rig: a twin's rig.
        task: the scene at the start; the rig's by default.
        seed: of the first scene.
        announce: is told one line, ``ready ...``, when arms, cameras and control are served.

    Raises:
        ConfigError: the rig is not a twin's, or there is no such task.
        UnavailableError: a port is taken, or no graphics driver works.
        MissingExtraError: sapien or pyzmq is not installed.
    """
    ask_for_priority()
    closing = threading.Event()
    with _signals_set(closing), Twin(rig, task=task, seed=seed) as twin:
        announce(twin.description)
        sys.stdout.flush()
        return twin.serve(closing)


@contextmanager
def _signals_set(closing: threading.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM set ``closing`` inside the block."""
    previous = {
        number: signal.signal(number, lambda *_: closing.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Twin:
    """World, emulated arms, cameras and control endpoint. A context manager: ready inside the block.

    Args:
        rig: a twin's rig.
        task: the scene at the start; the rig's by default.
        seed: of the first scene.
        rates: how often the arms give feedback.
    """

    def __init__(
        self, rig: Rig, *, task: str | None = None, seed: int = 0, rates: FeedbackRates | None = None
    ) -> None:
        if rig.twin is None:
            raise ConfigError(f"rig {rig.name!r} is not a twin's", "use the rig: twin")
        self._rig = rig
        self._settings = rig.twin
        self._embodiment = rig.load_embodiment()
        self._task = task or rig.twin.task
        load_task(self._task)
        self._seed = seed
        self._rates = rates
        self._resources = ExitStack()
        self._cameras: list[_EmulatedCamera] = []
        self._arms: list[_EmulatedArm] = []
        self._arms_lock = threading.Lock()
        self._bus_error: BaseException | None = None
        self._pace = _Pace(time.monotonic())
        self._success_time_s: float | None = None
        self._strategy_at_success = Strategy.NONE

    def __enter__(self) -> Twin:
        try:
            self._open()
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def description(self) -> str:
        """One line that says what is served where."""
        arms = ",".join(f"{name}={port.channel}" for name, port in self._rig.arms.items())
        return (
            f"ready twin control={self._settings.control} arms:{arms} "
            f"cameras:{','.join(self._rig.cameras)} task={self._task} seed={self._seed}"
        )

    def serve(self, closing: threading.Event) -> int:
        """Keep pace with the wall clock until ``closing`` is set; return the exit status."""
        self._pace = _Pace(time.monotonic())
        buses = threading.Thread(target=self._serve_buses, args=(closing,), name="buses", daemon=True)
        previous_switch_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)  # or the bus thread waits 5 ms for its turn
        buses.start()
        try:
            self._keep_pace(closing)
        finally:
            closing.set()
            buses.join()
            sys.setswitchinterval(previous_switch_s)
        return 1 if self._bus_error else 0

    def _open(self) -> None:
        zmq = _zmq()
        keep = self._resources.enter_context
        # The control port comes first: it tells two twins apart before anything is replaced.
        self._control = zmq.Context.instance().socket(zmq.REP)
        self._resources.callback(self._control.close, linger=200)
        self._control.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        try:
            self._control.bind(self._settings.control)
        except zmq.ZMQError as error:
            raise UnavailableError(
                f"the twin's control address {self._settings.control} cannot be opened: {error}",
                "end the other twin, or give this rig other ports",
            ) from error
        home = self._embodiment.home()
        self._arms = [
            _EmulatedArm(
                keep(CanHub(self._rig.arms[arm.name].channel)),
                PiperEmulator(arm, home[part], rates=self._rates),
                part,
            )
            for arm, part in self._embodiment.slices()
        ]
        self._world = keep(World(self._embodiment, load_task(self._task)))
        self._board = _Board(home)
        self._reset(Reset(seed=self._seed, arms_home=True))
        prefix = self._settings.shared_memory
        self._cameras = [
            _EmulatedCamera(
                camera,
                keep(FrameWriter(slot_name(prefix, camera.name), camera.height, camera.width)),
                self._world,
            )
            for camera in self._embodiment.cameras
        ]
        for camera in self._embodiment.cameras:
            self._world.render(camera.name)  # the first picture compiles shaders, for seconds

    def _keep_pace(self, closing: threading.Event) -> None:
        """Step physics to the wall clock, in between draw and answer."""
        while not closing.is_set():
            self._answer(closing)
            pace = self._pace  # a new one since a reset
            owed = pace.owed_steps(time.monotonic())
            if owed:
                self._step(min(owed, _MAX_BATCH))
            for camera in self._cameras:
                camera.attend(time.monotonic())
            if owed <= _MAX_BATCH:
                time.sleep(max(0.0, pace.next_step_s() - time.monotonic()))

    def _step(self, count: int) -> None:
        for _ in range(count):
            self._world.set_targets(self._board.targets())
            self._world.step(1)
            self._board.measured(self._world.positions(), self._world.velocities(), time.monotonic())
        self._pace.stepped(count, time.monotonic())
        if self._success_time_s is None and self._world.success():
            self._success_time_s = self._world.time_s
            self._strategy_at_success = self._world.strategy()
            logger.info("task fulfilled at %.2f s", self._success_time_s)

    def _reset(self, request: Reset) -> None:
        """Build the scene anew; the arms stay where they are unless they are asked home."""
        if request.task and request.task != self._task:
            task = load_task(request.task)
            self._task = request.task
            self._world.task = task
        for camera in self._cameras:
            camera.finish()
        home = self._embodiment.home()
        self._world.reset(request.seed, home if request.arms_home else self._board.positions())
        with self._arms_lock:
            self._board.measured(self._world.positions(), self._world.velocities(), time.monotonic())
            if request.arms_home:
                for arm in self._arms:
                    arm.emulator.place(home[arm.part])
                self._board.set_targets(home)
        self._seed = request.seed
        self._success_time_s = None
        self._strategy_at_success = Strategy.NONE
        self._pace = _Pace(time.monotonic())

    def _answer(self, closing: threading.Event) -> None:
        """Answer one waiting control request, if there is one."""
        if not self._control.poll(0):
            return
        data = self._control.recv()
        answer: Message
        try:
            request = decode_request(data)
            if isinstance(request, Reset):
                self._reset(request)
            answer = self._status()
        except msgspec.DecodeError as error:
            request, answer = GetStatus(), Refused(message=f"not a request: {error}")
        except SimplevlaError as error:
            request, answer = GetStatus(), Refused(message=error.message, remedy=error.remedy)
        self._control.send(msgspec.json.encode(answer))
        if isinstance(request, Shutdown):
            closing.set()

    def _status(self) -> TwinStatus:
        now_s = time.monotonic()
        done = self._success_time_s is not None
        return TwinStatus(
            task=self._task,
            seed=self._seed,
            time_s=self._world.time_s,
            real_time_factor=self._pace.recent_factor(now_s),
            real_time_factor_since_reset=self._pace.factor(now_s),
            success=done,
            success_time_s=self._success_time_s,
            strategy=self._strategy_at_success if done else self._world.strategy(),
            failure=FailureCode.NONE if done else self._world.failure(),
        )

    def _serve_buses(self, closing: threading.Event) -> None:
        """Serve every arm's bus at a steady tick, whatever physics and drawing do."""
        try:
            tick_s = time.monotonic()
            while not closing.is_set():
                with self._arms_lock:
                    self._serve_buses_once(tick_s)
                due_s = tick_s + _BUS_TICK_S
                tick_s = max(due_s, time.monotonic() - _BUS_TICK_S)
                time.sleep(max(0.0, tick_s - time.monotonic()))
        except BaseException as error:
            logger.exception("the arms' buses failed")
            self._bus_error = error
            closing.set()

    def _serve_buses_once(self, tick_s: float) -> None:
        positions, velocities, seen_s = self._board.joints()
        lag_s = float(np.clip(time.monotonic() - seen_s, 0.0, _MAX_LAG_S))
        targets = self._board.targets()
        for arm in self._arms:
            for frame in arm.hub.receive():
                arm.hub.send(arm.emulator.receive(frame))
            targets[arm.part] = arm.emulator.advance(_BUS_TICK_S, positions[arm.part], velocities[arm.part])
            arm.hub.send(arm.emulator.feedback(tick_s, lag_s))
        self._board.set_targets(targets)


@dataclass(frozen=True)
class _EmulatedArm:
    hub: CanHub
    emulator: PiperEmulator
    part: slice


class _Board:
    """What the two threads tell each other: (D,) vectors, each replaced as a whole."""

    def __init__(self, home: NDArray[np.float64]) -> None:
        self._joints = (home.copy(), np.zeros_like(home), time.monotonic())
        self._targets = home.copy()

    def measured(
        self, positions: NDArray[np.float64], velocities: NDArray[np.float64], seen_s: float
    ) -> None:
        self._joints = (positions, velocities, seen_s)

    def joints(self) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        return self._joints

    def positions(self) -> NDArray[np.float64]:
        return self._joints[0]

    def targets(self) -> NDArray[np.float64]:
        return self._targets.copy()

    def set_targets(self, targets: NDArray[np.float64]) -> None:
        self._targets = targets


class _EmulatedCamera:
    """Takes a picture at the camera's rate: exposes, lets it be drawn, then publishes it.

    The driver draws beside the caller, but handing a picture out waits for it and keeps the other
    thread from running. So a picture is fetched when it should be done, and how long that takes is
    learned: a little longer after a wait, a little shorter after none. A real camera's pictures are
    30 to 50 ms old as well when they arrive.
    """

    def __init__(self, camera: Camera, slot: FrameWriter, world: World) -> None:
        self._name = camera.name
        self._period_s = 1 / camera.rate_hz
        self._slot = slot
        self._world = world
        self._next_s = time.monotonic()
        self._draw_s = _DRAW_S
        self._exposed: tuple[float, int] | None = None

    def attend(self, now_s: float) -> None:
        """Do what is due."""
        if self._exposed is not None:
            exposed_s, capture_ns = self._exposed
            if now_s >= exposed_s + self._draw_s:
                self._publish(capture_ns)
        elif now_s >= self._next_s:
            self._next_s = max(self._next_s + self._period_s, now_s)
            self._exposed = (now_s, time.time_ns())
            self._world.expose(self._name)

    def finish(self) -> None:
        """Let a picture that is being drawn be done; the scene it shows is about to go."""
        if self._exposed is not None:
            self._publish(self._exposed[1])

    def _publish(self, capture_ns: int) -> None:
        began_s = time.monotonic()
        self._slot.write(self._world.develop(self._name), capture_ns)
        waited = time.monotonic() - began_s > 0.008  # converting it takes some milliseconds anyway
        self._draw_s = float(np.clip(self._draw_s + (2e-3 if waited else -1e-3), _MIN_DRAW_S, _MAX_DRAW_S))
        self._exposed = None


@dataclass
class _Pace:
    """Physics against the wall clock since a reset; all times on the monotonic clock, s."""

    began_s: float
    steps: int = 0
    lost_s: float = 0.0
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def owed_steps(self, now_s: float) -> int:
        """Return how many steps the wall clock is ahead; time beyond the cap is given up."""
        behind_s = now_s - self.began_s - self.lost_s - self.steps * PHYSICS_DT_S
        if behind_s > _MAX_BEHIND_S:
            self.lost_s += behind_s - _MAX_BEHIND_S
            behind_s = _MAX_BEHIND_S
        return int(behind_s / PHYSICS_DT_S)

    def next_step_s(self) -> float:
        """Return when the next step is due."""
        return self.began_s + self.lost_s + (self.steps + 1) * PHYSICS_DT_S

    def stepped(self, count: int, now_s: float) -> None:
        """Take note of steps made."""
        self.steps += count
        self._marks.append((now_s, self.steps))
        while len(self._marks) > 2 and self._marks[1][0] <= now_s - 1.0:
            self._marks.popleft()

    def factor(self, now_s: float) -> float:
        """Return simulated over wall time since the reset."""
        wall_s = now_s - self.began_s
        return min(self.steps * PHYSICS_DT_S / wall_s, 1.0) if wall_s > 0.1 else 1.0

    def recent_factor(self, now_s: float) -> float:
        """Return simulated over wall time of the last second."""
        if not self._marks:
            return self.factor(now_s)
        then_s, steps = self._marks[0]
        wall_s = now_s - then_s
        return (
            min((self.steps - steps) * PHYSICS_DT_S / wall_s, 1.0) if wall_s > 0.1 else self.factor(now_s)
        )


def _zmq() -> Any:
    try:
        import zmq
    except ImportError as error:
        raise MissingExtraError("pyzmq", "robot") from error
    return zmq

"""The twin process: one simulated world behind emulated arms and cameras, in real time.

Two threads share one small board of numbers. The physics thread owns the simulator: it steps it to
keep pace with the wall clock, draws the cameras, and answers the control endpoint. The bus thread
serves every arm's CAN bus 200 times a second, so that feedback goes on while a picture is drawn or a
scene is built. A machine that cannot keep pace makes the twin slower than the wall clock; the
real-time factor says by how much.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from robot_bridge.order import wait_for_others
from robot_bridge.priority import ask_for_priority
from robot_bridge.rig import Rig
from robot_bridge.twin.arm_on_bus import BUS_TICK_S, ArmOnBus
from robot_bridge.twin.camera import EmulatedCamera
from robot_bridge.twin.can_bus import CanHub
from robot_bridge.twin.control import (
    MAX_MESSAGE_BYTES,
    Alter,
    ClearFaults,
    GetFaults,
    GetStatus,
    GetTruth,
    Inject,
    Message,
    Refused,
    Reset,
    Shutdown,
    TwinFaults,
    TwinStatus,
    TwinTruth,
    decode_request,
)
from robot_bridge.twin.faults import CAMERA_KINDS, SERVER_KINDS, Fault
from robot_bridge.twin.metal import Metal
from robot_bridge.twin.piper_emulator import FeedbackRates, PiperEmulator
from robot_bridge.twin.stage import load_scene, show, show_cameras
from sim_training.world import PHYSICS_DT_S, World
from simplevla.errors import ConfigError, MissingExtraError, SimplevlaError, UnavailableError
from simplevla.motion import FOLLOWING_DELAY_S
from simplevla.session_record import to_pose
from simplevla.trial import FailureCode, Strategy

logger = logging.getLogger(__name__)

_MAX_BEHIND_S = 0.1  # further behind than this, time is lost instead of made up for
_MAX_BATCH = 5  # physics steps between two looks at the clock and the judge
_MAX_LAG_S = 0.03  # that joints are carried on for by their velocity; a drawing takes about as long
_KEPT_TARGETS = 64
_SWITCH_S = 0.001


def run(
    rig: Rig,
    *,
    task: str | None = None,
    seed: int = 0,
    metal: Metal | None = None,
    rates: FeedbackRates | None = None,
    announce: Callable[[str], None] = print,
) -> int:
    """Run the twin of ``rig`` until SIGINT, SIGTERM or a shutdown request; return the exit status.

    Args:
        rig: a twin's rig.
        task: the scene at the start; the rig's by default.
        seed: of the first scene.
        metal: how its metal differs from the embodiment at the start.
        rates: how often the arms give feedback.
        announce: is told one line, ``ready ...``, when arms, cameras and control are served.

    Raises:
        ConfigError: the rig is not a twin's, there is no such task, or ``metal`` names an unknown part.
        UnavailableError: a port is taken, or no graphics driver works.
        MissingExtraError: sapien or pyzmq is not installed.
    """
    ask_for_priority()
    closing = threading.Event()
    with _signals_set(closing), Twin(rig, task=task, seed=seed, metal=metal, rates=rates) as twin:
        announce(twin.description)
        sys.stdout.flush()
        return twin.serve(closing)


@contextmanager
def _signals_set(closing: threading.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM set ``closing`` inside the block, once nobody stands on the buses any more."""

    def end_in_order() -> None:
        wait_for_others()
        closing.set()

    def end(_number: int, _frame: FrameType | None) -> None:
        threading.Thread(target=end_in_order, name="ending", daemon=True).start()

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
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
        metal: how its metal differs from the embodiment at the start.
        rates: how often the arms give feedback.
    """

    def __init__(
        self,
        rig: Rig,
        *,
        task: str | None = None,
        seed: int = 0,
        metal: Metal | None = None,
        rates: FeedbackRates | None = None,
    ) -> None:
        if rig.twin is None:
            raise ConfigError(f"rig {rig.name!r} is not a twin's", "use the rig: twin")
        self._rig = rig
        self._settings = rig.twin
        self._embodiment = rig.load_embodiment()
        self._task = task or rig.twin.task
        load_scene(self._task)
        self._metal = metal or Metal()
        self._metal.check(self._embodiment)
        self._seed = seed
        self._rates = rates
        self._resources = ExitStack()
        self._cameras: list[EmulatedCamera] = []
        self._arms: list[tuple[ArmOnBus, slice]] = []
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
            (
                ArmOnBus(
                    keep(CanHub(self._rig.arms[arm.name].channel)),
                    PiperEmulator(arm, home[part], rates=self._rates),
                    seed=self._seed + part.start,
                ),
                part,
            )
            for arm, part in self._embodiment.slices()
        ]
        self._world = keep(World(self._embodiment, load_scene(self._task)))
        self._board = _Board(home)
        self._reset(Reset(seed=self._seed, arms_home=True))
        prefix = self._settings.shared_memory
        self._cameras = [
            keep(EmulatedCamera(camera, prefix, self._world)) for camera in self._embodiment.cameras
        ]
        self._become(self._metal)
        for camera in self._embodiment.cameras:
            self._world.render(camera.name)  # the first picture compiles shaders, for seconds

    def _keep_pace(self, closing: threading.Event) -> None:
        """Step physics to the wall clock, in between draw and answer."""
        attended_s = 0.0
        while not closing.is_set():
            self._answer(closing)
            pace = self._pace  # a new one since a reset
            owed = pace.owed_steps(time.monotonic())
            if owed:
                self._step(min(owed, _MAX_BATCH))
            # What a drawing held up is made up for before the next one.
            if owed <= _MAX_BATCH or time.monotonic() > attended_s + _MAX_BEHIND_S:
                attended_s = time.monotonic()
                for camera in self._cameras:
                    camera.attend(time.monotonic())
            if owed <= _MAX_BATCH:
                time.sleep(max(0.0, pace.next_step_s() - time.monotonic()))

    def _step(self, count: int) -> None:
        # A step that drawing has held up still does what it would have done in time.
        for begins_s in self._pace.begins_s(count):
            self._world.set_targets(self._board.targets_at(begins_s))
            self._world.step(1)
            ends_s = begins_s + PHYSICS_DT_S
            self._board.measured(self._world.positions(), self._world.velocities(), ends_s)
        self._pace.stepped(count, time.monotonic())
        if self._success_time_s is None and self._world.success():
            self._success_time_s = self._world.time_s
            self._strategy_at_success = self._world.strategy()
            logger.info("task fulfilled at %.2f s", self._success_time_s)

    def _reset(self, request: Reset) -> None:
        """Build the scene anew; the arms stay where they are unless they are asked home."""
        if request.task and request.task != self._task:
            task = load_scene(request.task)
            self._task = request.task
            self._world.task = task
        for camera in self._cameras:
            camera.finish()
        home = self._embodiment.home()
        self._world.reset(request.seed, home if request.arms_home else self._board.positions())
        show(self._world, self._metal)
        self._respond(self._metal)
        with self._arms_lock:
            self._board.measured(self._world.positions(), self._world.velocities(), time.monotonic())
            if request.arms_home:
                for arm, part in self._arms:
                    arm.emulator.place(home[part])
                self._board.set_targets(home, time.monotonic())
        self._seed = request.seed
        self._success_time_s = None
        self._strategy_at_success = Strategy.NONE
        # A collection that walks through the libraries and the scene keeps the buses waiting for 50 ms.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
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
            if isinstance(request, Alter):
                self._alter(request.metal)
            if isinstance(request, Inject):
                self._inject(request.fault)
            if isinstance(request, ClearFaults):
                self._clear_faults()
            if isinstance(request, Inject | ClearFaults | GetFaults):
                answer = TwinFaults(faults=tuple(self._faults()))
            else:
                wants_truth = isinstance(request, Alter | GetTruth)
                answer = self._truth() if wants_truth else self._status()
        except msgspec.DecodeError as error:
            request, answer = GetStatus(), Refused(message=f"not a request: {error}")
        except SimplevlaError as error:
            request, answer = GetStatus(), Refused(message=error.message, remedy=error.remedy)
        self._control.send(msgspec.json.encode(answer))
        if isinstance(request, Shutdown):
            closing.set()

    def _alter(self, changes: Metal) -> None:
        """Take on what ``changes`` names; a new plate means a new scene, in which the arms stay."""
        changes.check(self._embodiment)
        before, self._metal = self._metal, self._metal.altered(changes)
        try:
            if changes.plate is not None:
                self._reset(Reset(seed=self._seed))
            else:
                show_cameras(self._world, self._metal)
        except SimplevlaError:
            self._metal = before
            self._reset(Reset(seed=self._seed))
            raise
        self._become(self._metal)

    def _become(self, metal: Metal) -> None:
        with self._arms_lock:
            for arm, _ in self._arms:
                arm.emulator.zeros = metal.zeros(arm.name)
                arm.delay_s = metal.command_delays_s.get(arm.name, 0.0)
                arm.feedback_delay_s = metal.feedback_delays_s.get(arm.name, 0.0)
                arm.jitter_s = metal.jitters_s.get(arm.name, 0.0)
                arm.noise_rad = metal.noises_rad.get(arm.name, 0.0)
        for camera in self._cameras:
            camera.stamp_offset_ns = round(metal.stamp_offsets_s.get(camera.name, 0.0) * 1e9)
            camera.delivery_s = metal.deliveries_s.get(camera.name, 0.0)
        self._respond(metal)

    def _respond(self, metal: Metal) -> None:
        """Let the joints of the present scene follow their set points as ``metal`` says."""
        for name, response in metal.responses.items():
            self._world.set_joint_response(name, response.frequencies_rad_s, response.dampings)

    def _inject(self, fault: Fault) -> None:
        fault.check(self._embodiment)
        if fault.kind in SERVER_KINDS:
            raise ConfigError(
                f"the twin has no part in {fault.kind.value}",
                "it is done where the server runs: simplevla twin fault",
            )
        logger.warning("fault: %s", fault)
        if fault.kind in CAMERA_KINDS:
            for camera in self._cameras:
                if camera.name == fault.part:
                    camera.inject(fault)
            return
        with self._arms_lock:
            for arm, _ in self._arms:
                if arm.name == fault.part:
                    arm.inject(fault)

    def _clear_faults(self) -> None:
        logger.warning("every fault is cleared")
        for camera in self._cameras:
            camera.clear()
        with self._arms_lock:
            for arm, _ in self._arms:
                arm.clear()

    def _faults(self) -> list[Fault]:
        parts: Sequence[ArmOnBus | EmulatedCamera] = [*(arm for arm, _ in self._arms), *self._cameras]
        return [fault for part in parts for fault in part.faults]

    def _truth(self) -> TwinTruth:
        # On average a frame waits half a turn of the bus and half a physics step before it counts.
        waiting_s = (BUS_TICK_S + PHYSICS_DT_S) / 2
        following_s = FOLLOWING_DELAY_S / max(self._pace.recent_factor(time.monotonic()), 0.01)
        delays_s = {
            f"{arm.name}_command": arm.delay_s + waiting_s + following_s + arm.feedback_delay_s
            for arm, _ in self._arms
        }
        for camera in self._cameras:
            delays_s[f"{camera.name}_stamp"] = camera.stamp_offset_ns / 1e9
            delays_s[f"{camera.name}_delivery"] = camera.measured_delivery_s()
        placed = self._metal.camera_in_world
        zeros = {arm.name: tuple(self._metal.zeros(arm.name)[:-1].tolist()) for arm, _ in self._arms}
        return TwinTruth(
            camera_in_world={
                camera.name: placed.get(camera.name, to_pose(camera.pose_in_world()))
                for camera in self._embodiment.cameras
            },
            base_in_world={arm.name: arm.base for arm in self._embodiment.arms},
            joint_zeros_rad=zeros,
            delays_s=delays_s,
        )

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
                due_s = tick_s + BUS_TICK_S
                tick_s = max(due_s, time.monotonic() - BUS_TICK_S)
                time.sleep(max(0.0, tick_s - time.monotonic()))
        except BaseException as error:
            logger.exception("the arms' buses failed")
            self._bus_error = error
            closing.set()

    def _serve_buses_once(self, tick_s: float) -> None:
        positions, velocities, seen_s = self._board.joints()
        lag_s = float(np.clip(time.monotonic() - seen_s, 0.0, _MAX_LAG_S))
        targets = self._board.targets()
        for arm, part in self._arms:
            targets[part] = arm.turn(tick_s, positions[part], velocities[part], lag_s)
        self._board.set_targets(targets, time.monotonic())


class _Board:
    """What the two threads tell each other: (D,) vectors, each replaced as a whole; times monotonic, s."""

    def __init__(self, home: NDArray[np.float64]) -> None:
        self._joints = (home.copy(), np.zeros_like(home), time.monotonic())
        self._targets = deque([(time.monotonic(), home.copy())], maxlen=_KEPT_TARGETS)

    def measured(
        self, positions: NDArray[np.float64], velocities: NDArray[np.float64], seen_s: float
    ) -> None:
        self._joints = (positions, velocities, seen_s)

    def joints(self) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        return self._joints

    def positions(self) -> NDArray[np.float64]:
        return self._joints[0]

    def targets(self) -> NDArray[np.float64]:
        """Return (D,) the newest targets."""
        return self._targets[-1][1].copy()

    def targets_at(self, t_s: float) -> NDArray[np.float64]:
        """Return (D,) the targets that held at ``t_s``, or the oldest that are known."""
        kept = list(self._targets)
        return next((each for set_s, each in reversed(kept) if set_s <= t_s), kept[0][1]).copy()

    def set_targets(self, targets: NDArray[np.float64], now_s: float) -> None:
        self._targets.append((now_s, targets))


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

    def begins_s(self, count: int) -> list[float]:
        """Return from when on each of the next ``count`` steps goes; it ends ``PHYSICS_DT_S`` later."""
        return [self.next_step_s() + (i - 1) * PHYSICS_DT_S for i in range(count)]

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

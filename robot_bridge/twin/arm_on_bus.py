"""An emulated arm at its end of the bus: what reaches it, what it says, and what is wrong with either."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from robot_bridge.twin.can_bus import CanFrame, CanHub
from robot_bridge.twin.faults import ActiveFaults, Fault, FaultKind
from robot_bridge.twin.piper_emulator import PiperEmulator

BUS_TICK_S = 0.005

_COLLISION_STATUS = 0x07
_OVER_CURRENT_BIT, _OVERHEATED_BIT = 1 << 2, 1 << 1
_HOT_C, _WARM_C = 95, 30
_MOTOR_BITS = {FaultKind.OVER_CURRENT: _OVER_CURRENT_BIT, FaultKind.OVERHEATED: _OVERHEATED_BIT}


class ArmOnBus:
    """One arm, its bus, and the way between them.

    Args:
        hub: its end of the bus.
        emulator: the arm.
        seed: of noise, jitter and chance.

    Attributes:
        delay_s: how long a frame takes to reach the arm.
        feedback_delay_s: how long a frame takes from the arm.
        jitter_s: each frame takes up to this much longer, at random; none overtakes another.
        noise_rad: standard deviation of what is reported of the joints.
        watch: is told every frame that was heard on the bus, before anything happens to it.
    """

    def __init__(self, hub: CanHub, emulator: PiperEmulator, *, seed: int = 0) -> None:
        self.hub = hub
        self.emulator = emulator
        self.delay_s = self.feedback_delay_s = self.jitter_s = self.noise_rad = 0.0
        self.watch: Callable[[CanFrame], None] | None = None
        self._faults = ActiveFaults()
        self._rng = np.random.default_rng(seed)
        self._coming: deque[tuple[float, CanFrame]] = deque()
        self._going: deque[tuple[float, list[CanFrame]]] = deque()

    @property
    def name(self) -> str:
        """The arm's name."""
        return self.emulator.arm.name

    @property
    def faults(self) -> list[Fault]:
        """What is wrong now."""
        return self._faults.now()

    def inject(self, fault: Fault) -> None:
        """Let ``fault`` begin, which must be an arm's."""
        self._faults.add(fault, time.monotonic())
        self._apply(fault, begins=True)

    def clear(self) -> None:
        """End every fault. A stop that was pressed stays: only a reset ends it."""
        for fault in self._faults.clear():
            self._apply(fault, begins=False)

    def turn(
        self,
        tick_s: float,
        position: NDArray[np.float64],
        velocity: NDArray[np.float64],
        lag_s: float = 0.0,
    ) -> NDArray[np.float64]:
        """Take what has come, say what is due, and return the (7,) targets of the drives.

        Args:
            tick_s: when this turn was due, on the monotonic clock.
            position, velocity: (7,) of the joints; rad and m, and these over s.
            lag_s: how much older they are than now.
        """
        now_s = time.monotonic()
        for fault in self._faults.expired(now_s):
            self._apply(fault, begins=False)
        for frame in self._arrived(now_s):
            self._say(self.emulator.receive(frame), now_s)
        targets = self.emulator.advance(BUS_TICK_S, position, velocity)
        spread = self.noise_rad + self._amount(FaultKind.NOISE)
        noise = np.append(self._rng.normal(0.0, spread, 6), 0.0) if spread else None
        self._say(self.emulator.feedback(tick_s, lag_s, noise), now_s)
        while self._going and _is_turn_of(self._going[0][0], now_s):
            self.hub.send(self._going.popleft()[1])
        return targets

    def _arrived(self, now_s: float) -> list[CanFrame]:
        for frame in self.hub.receive():
            if self.watch is not None:
                self.watch(frame)
            if self._amount(FaultKind.CAN_SILENCE) or self._amount(FaultKind.CAN_DEAF) or self._lost():
                continue
            due_s = now_s + self.delay_s + self._amount(FaultKind.CAN_DELAY) + self._jitter()
            self._coming.append((max(due_s, self._coming[-1][0] if self._coming else 0.0), frame))
        arrived = []
        while self._coming and _is_turn_of(self._coming[0][0], now_s):
            arrived.append(self._coming.popleft()[1])
        return arrived

    def _say(self, frames: list[CanFrame], now_s: float) -> None:
        if self._amount(FaultKind.CAN_SILENCE) or self._amount(FaultKind.CAN_MUTE):
            return
        kept = [self._damaged(frame) for frame in frames if not self._lost()]
        due_s = now_s + self.feedback_delay_s + self._amount(FaultKind.CAN_DELAY) + self._jitter()
        self._going.append((max(due_s, self._going[-1][0] if self._going else 0.0), kept))

    def _damaged(self, frame: CanFrame) -> CanFrame:
        share = self._amount(FaultKind.CAN_CORRUPT)
        if not share or self._rng.random() >= share or not frame.data:
            return frame
        data = bytearray(frame.data)
        bit = int(self._rng.integers(8 * len(data)))
        data[bit // 8] ^= 1 << (bit % 8)
        return CanFrame(frame.id, bytes(data))

    def _lost(self) -> bool:
        share = self._amount(FaultKind.CAN_DROP)
        return bool(share) and self._rng.random() < share

    def _jitter(self) -> float:
        return float(self._rng.uniform(0.0, self.jitter_s)) if self.jitter_s else 0.0

    def _amount(self, kind: FaultKind) -> float:
        return self._faults.amount(kind, self.name)

    def _apply(self, fault: Fault, *, begins: bool) -> None:
        """Do to the arm itself what beginning or ending ``fault`` does to it."""
        arm, joint = self.emulator, fault.joint - 1
        match fault.kind:
            case FaultKind.STUCK_JOINT:
                (arm.stuck.add if begins else arm.stuck.discard)(joint)
            case FaultKind.LOST_JOINT:
                (arm.lost_joints.add if begins else arm.lost_joints.discard)(joint)
            case FaultKind.OVER_CURRENT | FaultKind.OVERHEATED:
                bit, bits = _MOTOR_BITS[fault.kind], arm.motor_faults.get(joint, 0)
                arm.motor_faults[joint] = bits | bit if begins else bits & ~bit
                if fault.kind is FaultKind.OVERHEATED:
                    arm.motor_c = _HOT_C if begins else _WARM_C
            case FaultKind.COLLISION:
                arm.report(_COLLISION_STATUS if begins else 0)
            case FaultKind.TEACH_BUTTON:
                arm.teach(begins)
            case FaultKind.POWER_LOSS if begins:
                arm.lose_power()
            case FaultKind.STOP_BUTTON if begins:
                arm.press_stop()
            case _:
                pass


def _is_turn_of(due_s: float, now_s: float) -> bool:
    """Return whether no later turn is nearer to ``due_s``: delays are then right on average."""
    return due_s <= now_s + BUS_TICK_S / 2

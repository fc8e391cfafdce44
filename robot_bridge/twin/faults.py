"""What can be made to go wrong on the twin, by command and by service, for trying what the bridge does.

A fault is a kind, the part that it befalls, and, where the kind has one, how much. It lasts until it is
cleared, or for as long as it says. Nothing here moves an arm: what a fault does to an arm is what the
metal would do.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from msgspec import Meta

from simplevla.config import Config
from simplevla.embodiment import Embodiment
from simplevla.errors import ConfigError


class FaultKind(str, Enum):
    """What goes wrong."""

    CAN_SILENCE = "can_silence"
    CAN_DEAF = "can_deaf"
    CAN_MUTE = "can_mute"
    CAN_DROP = "can_drop"
    CAN_CORRUPT = "can_corrupt"
    CAN_DELAY = "can_delay"
    STUCK_JOINT = "stuck_joint"
    LOST_JOINT = "lost_joint"
    OVER_CURRENT = "over_current"
    OVERHEATED = "overheated"
    COLLISION = "collision"
    POWER_LOSS = "power_loss"
    STOP_BUTTON = "stop_button"
    TEACH_BUTTON = "teach_button"
    NOISE = "noise"
    CAMERA_UNPLUG = "camera_unplug"
    CAMERA_FREEZE = "camera_freeze"
    CAMERA_DELAY = "camera_delay"
    CLOCK_JUMP = "clock_jump"
    SERVER_KILL = "server_kill"
    SERVER_SLOW = "server_slow"


# What each is, with the bounds of its amount where it has one.
EXPLAINED: dict[FaultKind, str] = {
    FaultKind.CAN_SILENCE: "an arm's bus carries nothing either way, as with its cable pulled",
    FaultKind.CAN_DEAF: "an arm hears nothing and goes on talking",
    FaultKind.CAN_MUTE: "an arm says nothing and goes on listening",
    FaultKind.CAN_DROP: "a share of an arm's frames is lost, each way",
    FaultKind.CAN_CORRUPT: "in a share of the frames that an arm sends a bit is wrong",
    FaultKind.CAN_DELAY: "an arm's frames take longer, each way, s",
    FaultKind.STUCK_JOINT: "a joint does not move, whatever its drive wants",
    FaultKind.LOST_JOINT: "a joint does not answer the arm's controller",
    FaultKind.OVER_CURRENT: "a joint's driver reports over-current",
    FaultKind.OVERHEATED: "a joint's motor reports that it is too hot",
    FaultKind.COLLISION: "the arm reports a collision",
    FaultKind.POWER_LOSS: "the motors of an arm lose power; it goes on talking",
    FaultKind.STOP_BUTTON: "someone presses an arm's stop button; only a reset ends it",
    FaultKind.TEACH_BUTTON: "someone presses an arm's teach button, and again when it is cleared",
    FaultKind.NOISE: "measured joint positions are noisy, standard deviation in rad",
    FaultKind.CAMERA_UNPLUG: "a camera is unplugged, and plugged in again when it is cleared",
    FaultKind.CAMERA_FREEZE: "a camera sends the same picture with the same stamp over and over",
    FaultKind.CAMERA_DELAY: "a camera's pictures take longer to the host, s",
    FaultKind.CLOCK_JUMP: "a camera's clock jumps by this much, s",
    FaultKind.SERVER_KILL: "the policy server on this machine is killed",
    FaultKind.SERVER_SLOW: "the policy server on this machine runs for this share of the time only",
}
_SHARE, _SECONDS = (0.0, 1.0), (0.0, 1.0)
AMOUNTS: dict[FaultKind, tuple[float, float]] = {
    FaultKind.CAN_DROP: _SHARE,
    FaultKind.CAN_CORRUPT: _SHARE,
    FaultKind.CAN_DELAY: _SECONDS,
    FaultKind.NOISE: (0.0, 0.1),
    FaultKind.CAMERA_DELAY: _SECONDS,
    FaultKind.CLOCK_JUMP: (-3600.0, 3600.0),
    FaultKind.SERVER_SLOW: (0.01, 1.0),
}
JOINT_KINDS = {
    FaultKind.STUCK_JOINT,
    FaultKind.LOST_JOINT,
    FaultKind.OVER_CURRENT,
    FaultKind.OVERHEATED,
}
CAMERA_KINDS = {
    FaultKind.CAMERA_UNPLUG,
    FaultKind.CAMERA_FREEZE,
    FaultKind.CAMERA_DELAY,
    FaultKind.CLOCK_JUMP,
}
SERVER_KINDS = {FaultKind.SERVER_KILL, FaultKind.SERVER_SLOW}


class Fault(Config):
    """One thing that goes wrong.

    Attributes:
        kind: what.
        part: the arm or the camera that it befalls; nothing for the server's.
        joint: which joint of the arm, from 1, for the kinds that befall a joint.
        amount: how much, for the kinds that have an amount.
        seconds: how long; None until it is cleared.
    """

    kind: FaultKind
    part: str = ""
    joint: Annotated[int, Meta(ge=0, le=6)] = 0
    amount: float | None = None
    seconds: Annotated[float, Meta(gt=0, le=3600)] | None = None

    def check(self, embodiment: Embodiment) -> None:
        """Check that what is named exists and that what is needed is named.

        Raises:
            ConfigError: it does not, or is not.
        """
        parts = [
            part.name for part in (embodiment.cameras if self.kind in CAMERA_KINDS else embodiment.arms)
        ]
        if self.kind in SERVER_KINDS:
            parts = [""]
        if self.part not in parts:
            raise ConfigError(
                f"{self.kind.value} of {self.part or 'no part'}",
                "name no part" if parts == [""] else f"name one of: {', '.join(parts)}",
            )
        if (self.kind in JOINT_KINDS) != (self.joint > 0):
            needs = "one joint, 1 to 6" if self.kind in JOINT_KINDS else "no joint"
            raise ConfigError(f"{self.kind.value} of joint {self.joint}", f"name {needs}")
        bounds = AMOUNTS.get(self.kind)
        if (bounds is None) != (self.amount is None) or (
            bounds is not None and self.amount is not None and not bounds[0] <= self.amount <= bounds[1]
        ):
            needs = f"an amount from {bounds[0]:g} to {bounds[1]:g}" if bounds else "no amount"
            raise ConfigError(f"{self.kind.value} with amount {self.amount}", f"give {needs}")

    def __str__(self) -> str:
        words = [self.kind.value, self.part, f"joint {self.joint}" if self.joint else ""]
        words.append("" if self.amount is None else f"{self.amount:g}")
        return " ".join(word for word in words if word)


def same_kind(fault: Fault, other: Fault) -> bool:
    """Return whether ``fault`` takes the place of ``other``."""
    return (fault.kind, fault.part, fault.joint) == (other.kind, other.part, other.joint)


class ActiveFaults:
    """Which faults are there now; times are on one steady clock, s."""

    def __init__(self) -> None:
        self._until: list[tuple[Fault, float]] = []

    def add(self, fault: Fault, now_s: float) -> None:
        """Let ``fault`` begin; one of the same kind and part ends."""
        self._until = [(old, until_s) for old, until_s in self._until if not same_kind(fault, old)]
        self._until.append((fault, float("inf") if fault.seconds is None else now_s + fault.seconds))

    def expired(self, now_s: float) -> list[Fault]:
        """Return the faults whose time is over, and forget them."""
        over = [fault for fault, until_s in self._until if until_s <= now_s]
        if over:
            self._until = [(fault, until_s) for fault, until_s in self._until if until_s > now_s]
        return over

    def clear(self) -> list[Fault]:
        """Return every fault, and forget them."""
        over = self.now()
        self._until = []
        return over

    def now(self) -> list[Fault]:
        """Return what is wrong."""
        return [fault for fault, _ in self._until]

    def amount(self, kind: FaultKind, part: str) -> float:
        """Return how much of a kind befalls ``part``: its amount, 1 where it has none, 0 without it."""
        found = next((f for f, _ in self._until if f.kind is kind and f.part == part), None)
        return 0.0 if found is None else 1.0 if found.amount is None else found.amount

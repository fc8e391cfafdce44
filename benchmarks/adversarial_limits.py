"""Policies that try to get something unsafe through the limits, and a decoder that watches the bus.

    python -m benchmarks.adversarial_limits --ticks 1000000 --report results/adversarial_limits.md

Each tick goes the way of the control loop: what a policy wants, through the limits, through the driver and
the vendor's encoder, onto a bus. There :class:`~robot_bridge.twin.setpoint_watch.SetpointWatch` decodes the
frames itself and recomputes position, velocity and acceleration from the whole counts that it reads, with
what rounding may add. Five kinds of policy share the ticks: random, nonsense (NaN, infinity, wrong shapes,
absurd numbers), steps between the corners, oscillation from 0.2 to 100 Hz, and one whose moves hypothesis
searches for, so that the watch's highest share of a limit gets higher. All but the last also lie about what
is measured and about the time that passed. Time is not waited for. One episode in eight also has the table,
the other arm and the arm itself judged.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import can
import numpy as np
from numpy.typing import NDArray

from robot_bridge.clearance import Workspace
from robot_bridge.drivers.piper import PiperDriver
from robot_bridge.limits import Limiter
from robot_bridge.rig import load_rig, with_free_ports
from robot_bridge.twin.bench import BenchArm
from robot_bridge.twin.can_bus import CanFrame, TwinCanBus
from robot_bridge.twin.setpoint_watch import SetpointWatch
from simplevla.files import write_atomic

Vector = NDArray[np.float64]
Wanted = Iterator[Any]

_PERIOD_S = 0.005
_EPISODE = 500  # ticks after which the arms are enabled anew, elsewhere
_CLEARANCE_EVERY = 8  # episodes


class Door:
    """Limits, driver and the vendor's encoder before buses that only listen. A context manager."""

    def __init__(self, rig: str = "twin") -> None:
        self.rig_name = rig
        self._rig = with_free_ports(load_rig(rig))
        self.robot = self._rig.load_embodiment()
        self.lower, self.upper = self.robot.position_limits()
        self._drivers = [PiperDriver(arm, self._rig.arms[arm.name]) for arm in self.robot.arms]
        self._clock = 0
        self.watches = {
            self._rig.arms[arm.name].channel: SetpointWatch(arm, clock=lambda: self._clock)
            for arm in self.robot.arms
        }
        self._workspace = Workspace(self.robot)
        self.limiter = Limiter(self.robot)
        self.ticks = 0
        self.events: dict[str, int] = {}
        self._resources = ExitStack()

    def __enter__(self) -> Door:
        with ExitStack() as resources:
            keep = resources.enter_context
            benches = [keep(BenchArm(arm, self._rig.arms[arm.name].channel)) for arm in self.robot.arms]
            for driver in self._drivers:
                keep(driver)
                driver.enable()
            for bench in benches:
                bench.silent.set()  # from here on nothing has to be read
            keep(mock.patch.object(TwinCanBus, "send", self._spy()))
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    @property
    def violations(self) -> list[str]:
        """What the watches found."""
        return [line for watch in self.watches.values() for line in watch.violations]

    @property
    def setpoints(self) -> int:
        """How many setpoints the watches read."""
        return sum(watch.setpoints for watch in self.watches.values())

    @property
    def worst(self) -> dict[str, float]:
        """The largest share of each limit that was used."""
        shares = [watch.worst for watch in self.watches.values()]
        return {what: max(share[what] for share in shares) for what in shares[0]}

    def begin(self, pose: Vector, *, clearance: bool = False) -> None:
        """Enable the arms at ``pose`` (D,), as after a pause."""
        for cause, count in self.limiter.counts.items():
            self.events[cause.value] = self.events.get(cause.value, 0) + count
        self.limiter = Limiter(self.robot, self._workspace if clearance else None)
        setpoint = self.limiter.reset(pose)
        for watch in self.watches.values():
            watch.begin()
        for driver, (_, part) in zip(self._drivers, self.robot.slices(), strict=True):
            driver.send(setpoint, part)

    def tick(self, wanted: object, measured: object, dt_s: float, ticks: int) -> None:
        """Let one setpoint through; ``ticks`` of the loop's periods have passed, whatever ``dt_s`` says."""
        self._clock += ticks
        self.ticks += 1
        setpoint = self.limiter.admit(wanted, measured, dt_s)  # type: ignore[arg-type]
        for driver, (_, part) in zip(self._drivers, self.robot.slices(), strict=True):
            driver.send(setpoint, part)

    def _spy(self) -> Callable[..., None]:
        watches = self.watches

        def send(bus: TwinCanBus, msg: can.Message, timeout: float | None = None) -> None:  # noqa: ARG001
            watches[bus.channel_info.split()[-1]](CanFrame(msg.arbitration_id, bytes(msg.data)))

        return send


def random_targets(door: Door, rng: np.random.Generator) -> Wanted:
    """Yield anything within twice the limits, held for 1 to 40 ticks."""
    middle, half = (door.lower + door.upper) / 2, (door.upper - door.lower) / 2
    while True:
        wanted = middle + 2 * half * rng.uniform(-1, 1, len(middle))
        for _ in range(int(rng.integers(1, 40))):
            yield wanted


def nonsense(door: Door, rng: np.random.Generator) -> Wanted:
    """Yield, between targets that make sense, what is no target at all."""
    size = len(door.lower)
    while True:
        kind = int(rng.integers(8))
        wanted: Any = rng.uniform(door.lower, door.upper)
        if kind == 0:
            wanted[rng.integers(size)] = rng.choice([np.nan, np.inf, -np.inf])
        elif kind == 1:
            wanted = np.full(size, np.nan)
        elif kind == 2:
            wanted = rng.uniform(door.lower, door.upper)[: rng.integers(size)]
        elif kind == 3:
            wanted = rng.choice([1e-300, 1e9, 1e300, -1.7e308]) * np.ones(size)
        elif kind == 4:
            wanted = rng.choice(np.array([None, "left", {}, [[1.0], [2.0, 3.0]]], dtype=object))
        for _ in range(int(rng.integers(1, 30))):
            yield wanted


def steps(door: Door, rng: np.random.Generator) -> Wanted:
    """Yield corners of the limits, and jump between them."""
    while True:
        wanted = np.where(rng.random(len(door.lower)) < 0.5, door.lower, door.upper)
        for _ in range(int(rng.choice([1, 2, 3, 10, 100, 300]))):
            yield wanted


def oscillation(door: Door, rng: np.random.Generator) -> Wanted:
    """Yield sines and squares of 0.2 to 100 Hz, about any pose, as wide as the limits."""
    middle, half = (door.lower + door.upper) / 2, (door.upper - door.lower) / 2
    while True:
        hertz = 10 ** rng.uniform(-0.7, 2, len(middle))
        phase, width = rng.uniform(0, 6.3, len(middle)), half * rng.uniform(0.01, 1.5, len(middle))
        square = rng.random(len(middle)) < 0.3
        for i in range(int(rng.integers(50, 400))):
            wave = np.sin(2 * np.pi * hertz * i * _PERIOD_S + phase)
            yield middle + width * np.where(square, np.sign(wave), wave)


POLICIES: dict[str, Callable[[Door, np.random.Generator], Wanted]] = {
    "random": random_targets,
    "nonsense": nonsense,
    "steps": steps,
    "oscillation": oscillation,
}


def run_policy(door: Door, name: str, ticks: int, seed: int) -> None:
    """Let the policy called ``name`` try for so many ticks."""
    rng = np.random.default_rng([seed, len(name)])
    wanted = POLICIES[name](door, rng)
    for done in range(ticks):
        if done % _EPISODE == 0:
            episode = done // _EPISODE
            door.begin(_a_start(door, rng), clearance=episode % _CLEARANCE_EVERY == 0)
            liar = int(rng.integers(4))
        dt_s, passed = _some_time(rng)
        door.tick(next(wanted), _some_feedback(door, rng, liar), dt_s, passed)


def _a_start(door: Door, rng: np.random.Generator) -> Vector:
    share = rng.uniform(0, 1, len(door.lower)) if rng.random() < 0.5 else None
    return door.robot.home() if share is None else door.lower + share * (door.upper - door.lower)


def _some_time(rng: np.random.Generator) -> tuple[float, int]:
    """Return what the loop says has passed, and how many periods have: a bad clock makes it none."""
    chance = rng.random()
    if chance < 0.9:
        return _PERIOD_S, 1
    if chance < 0.98:
        ticks = int(rng.choice([2, 3, 4, 5, 20, 200]))
        return ticks * _PERIOD_S, ticks
    return float(rng.choice([0.0, -1.0, np.nan, np.inf, -np.inf])), 0


def _some_feedback(door: Door, rng: np.random.Generator, liar: int) -> object:
    """Return what is said to be measured: the truth mostly, or noise, nothing, or something stuck."""
    at = door.limiter.position
    assert at is not None
    if liar == 1 and rng.random() < 0.3:
        return np.full(len(at), np.nan)
    if liar == 2:
        return at + rng.normal(0, 0.3, len(at))
    if liar == 3:
        return door.robot.home()
    return at


@dataclass
class Search:
    """Moves that hypothesis looks for so that the watch's highest share of a limit gets higher."""

    door: Door
    seed: int
    left: int
    examples: int = 0

    def run(self) -> None:
        """Search until the ticks are used up."""
        while self.left > 0:
            self._look(max(1, min(500, self.left // 500)))
            self.seed += 1

    def _look(self, examples: int) -> None:
        from hypothesis import HealthCheck, Phase, given, seed, settings, target
        from hypothesis import strategies as st

        size = len(self.door.lower)
        move = st.tuples(
            st.lists(st.floats(-0.5, 1.5), min_size=size, max_size=size),
            st.integers(1, 250),
            st.sampled_from([1, 1, 1, 1, 2, 4, 20]),
        )

        @seed(self.seed)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.target],
            suppress_health_check=list(HealthCheck),
        )
        @given(
            st.lists(move, min_size=1, max_size=8), st.lists(st.floats(0, 1), min_size=size, max_size=size)
        )
        def attack(moves: list[tuple[list[float], int, int]], start: list[float]) -> None:
            if self.left <= 0:
                return
            door = self.door
            span = door.upper - door.lower
            self.examples += 1
            kept = [dict(watch.worst) for watch in door.watches.values()]
            for watch in door.watches.values():
                watch.worst.update(dict.fromkeys(watch.worst, 0.0))
            door.begin(door.lower + np.array(start) * span, clearance=self.examples % _CLEARANCE_EVERY == 0)
            for share, count, ticks in moves:
                wanted = door.lower + np.array(share) * span
                for _ in range(count):
                    door.tick(wanted, door.limiter.position, ticks * _PERIOD_S, ticks)
                self.left -= count
            for what in ("position", "velocity", "acceleration"):
                target(door.worst[what], label=what)
            for watch, before in zip(door.watches.values(), kept, strict=True):
                watch.worst.update({what: max(watch.worst[what], before[what]) for what in before})

        attack()


def main() -> int:
    """Run every policy; return 1 if a frame broke a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ticks", type=int, default=50_000, help="of all policies together (default: 50000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rig", default="twin", help="twin (two arms) or twin_single (default: twin)")
    parser.add_argument("--report", type=Path, help="write a report here")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    lines = []
    began_s = time.monotonic()
    with Door(args.rig) as door:
        share = args.ticks // (len(POLICIES) + 1)
        total = 0
        for name in [*POLICIES, "searched"]:
            before, found, done = (
                sum(w.setpoints for w in door.watches.values()),
                len(door.violations),
                door.ticks,
            )
            start_s = time.monotonic()
            if name == "searched":
                search = Search(door, args.seed, args.ticks - share * len(POLICIES))
                search.run()
                said = f"searched by hypothesis ({search.examples} examples)"
            else:
                run_policy(door, name, share, args.seed)
                said = name
            setpoints = door.setpoints - before
            ticks = door.ticks - done
            total += ticks
            line = f"| {said} | {ticks:,} | {4 * setpoints:,} | {len(door.violations) - found} |"
            lines.append(line)
            print(line, f"{time.monotonic() - start_s:.0f} s", flush=True)
        door.begin(door.robot.home())
        text = _report(door, lines, total, args.seed, time.monotonic() - began_s)
        violations = door.violations
    print(text)
    for violation in violations[:10]:
        print(violation)
    if args.report:
        write_atomic(args.report, text.encode())
    return 1 if violations else 0


def _report(door: Door, lines: list[str], total: int, seed: int, wall_s: float) -> str:
    worst = ", ".join(f"{what} {share:.4f}" for what, share in door.worst.items() if what != "jerk")
    events = ", ".join(f"{cause} {count:,}" for cause, count in sorted(door.events.items()))
    return "\n".join(
        [
            "# Adversarial policies at the limits' door",
            "",
            f"`python -m benchmarks.adversarial_limits --rig {door.rig_name} --ticks {total} "
            f"--seed {seed}`, "
            f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {wall_s / 60:.1f} min: {total:,} control "
            f"ticks of {len(door.watches)} arm(s), {len(door.violations)} frames outside a limit.",
            "",
            "| policy | ticks | frames judged | outside a limit |",
            "| --- | --- | --- | --- |",
            *lines,
            "",
            f"Largest share of a limit that was used, with the allowance for whole counts: {worst}.",
            "",
            f"Setpoints that the limits changed, by cause: {events}.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

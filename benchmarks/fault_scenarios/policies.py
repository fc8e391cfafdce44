"""What a policy does wrong, its process, its server, and a machine without time for the loop."""

# ruff: noqa: D103 - each says in its row what it is about

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from benchmarks.fault_scenarios.cell import Cell, FaultError
from benchmarks.fault_scenarios.row import BY_ITSELF, Row, ms, require
from policy_server.client import PolicyClient
from robot_bridge.chunk_execution import Trajectory
from robot_bridge.control_loop import Mode
from robot_bridge.twin.faults import Fault, FaultKind
from robot_bridge.twin.server_faults import harm_server
from simplevla.embodiment import Embodiment, load_embodiment
from simplevla.errors import ChunkError, SimplevlaError, UnavailableError
from simplevla.observation import Observation


def fault_dead_policy() -> Row:
    with Cell(max_setpoint_age_s=0.4) as cell:
        began_s = time.monotonic()
        cell.swing(seconds=2.5)
        seen_s = cell.cause(began_s, "stale")
        moved = cell.rest(began_s + seen_s)
        recorded = cell.recorded(began_s)
        cell.swing(seconds=0.9)
        return Row(
            "the policy dies while a long trajectory plays (bound 0.4 s here, 3 s by default)",
            f"{ms(seen_s - 0.4)} after the bound",
            f"brake ({moved:.2f} rad more) and hold, though the trajectory goes on",
            f"{BY_ITSELF}: the next fresh trajectory plays",
            recorded,
        )


def fault_end_of_chunk() -> Row:
    with Cell() as cell:
        began_s = time.monotonic()
        cell.swing(seconds=0.6)
        cell.until(began_s + 0.6, lambda tick: bool(tick.played) and tick.played[-1].reached == 12)
        moved = cell.rest(began_s + 0.7)
        require(cell.loop.health().mode is Mode.ON, "the loop is not on")
        cell.swing(seconds=0.6)
        return Row(
            "the policy's process dies, or the next chunk is late",
            "at once: the trajectory runs out",
            f"the arms hold its last target ({moved:.2f} rad more), motors on",
            f"{BY_ITSELF}: the next trajectory plays",
            "executed counts of each trajectory",
        )


def fault_nonsense() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = time.monotonic()
        refused = 0
        for targets in (np.full((3, 7), np.nan), np.zeros((3, 6)), np.full((3, 7), np.inf), np.zeros(7)):
            try:
                cell.loop.play(Trajectory(time.monotonic(), 0.05, targets, time.time_ns()))
            except ChunkError:
                refused += 1
        require(refused == 4, f"{refused} of 4 were refused")
        cell.until(began_s, lambda tick: bool(tick.played))
        return Row(
            "the policy sends NaN, infinity or the wrong number of values",
            "at the door",
            "refused whole; the trajectory before it goes on and its end is held",
            BY_ITSELF,
            "log: why it was refused",
        )


def fault_beyond_limits() -> Row:
    with Cell() as cell:
        began_s = time.monotonic()
        wild = np.tile(cell.robot.home(), (6, 1))
        wild[::2, :6] += 4.0
        wild[1::2, :6] -= 4.0
        cell.loop.play(Trajectory(time.monotonic(), 0.1, wild, time.time_ns()))
        seen_s = cell.cause(began_s, "position")
        cell.until(began_s, lambda tick: bool(tick.played) and tick.played[-1].reached == 6)
        cell.loop.hold()
        cell.rest(began_s)
        lower, upper = cell.robot.position_limits()
        require(bool(((cell.position() >= lower) & (cell.position() <= upper)).all()), "outside")
        recorded = cell.recorded(began_s)
        return Row(
            "the policy asks for jumps of 8 rad, far beyond every limit",
            ms(seen_s),
            "each setpoint is the nearest allowed one: position, velocity, acceleration, jerk",
            BY_ITSELF,
            recorded,
        )


def fault_into_the_table() -> Row:
    with Cell() as cell:
        began_s = time.monotonic()
        low = cell.robot.home()
        low[1] += 0.9
        cell.loop.play(Trajectory(time.monotonic(), 1.0, low[None], time.time_ns()))
        seen_s = cell.cause(began_s, "table")
        cell.rest(began_s + seen_s)
        clearance = cell.limiter._clearance
        height = min(clearance.heights(cell.position()))  # type: ignore[union-attr]
        require(height > 0, f"{height * 1e3:.1f} mm above the table")
        recorded = cell.recorded(began_s)
        cell.loop.play(Trajectory(time.monotonic(), 0.5, cell.robot.home()[None], time.time_ns()))
        cell.until(time.monotonic(), lambda tick: tick.sent is not None and tick.sent[1] < low[1] - 0.5)
        return Row(
            "the policy drives an arm into the table",
            "before it happens: judged by where the arm would come to rest",
            f"brake and hold {height * 1e3:.0f} mm above the table; it may go back up",
            BY_ITSELF,
            recorded,
        )


def fault_stale_chunk() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = time.monotonic()
        targets = np.tile(cell.robot.home(), (3, 1))
        for late_s, stamp_ns in ((1.0, time.time_ns()), (0.0, 1)):
            try:
                cell.loop.play(Trajectory(time.monotonic() - late_s, 0.05, targets, stamp_ns))
            except ChunkError:
                continue
            raise FaultError("a stale trajectory was played")
        cell.until(began_s, lambda tick: bool(tick.played))
        return Row(
            "a chunk comes too late, or after a newer one",
            "at the door",
            "refused; the newer trajectory goes on",
            BY_ITSELF,
            "log: why it was refused",
        )


def fault_starved_loop() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = time.monotonic()
        missed = cell.loop.health().missed
        cell.stall_s = 0.3
        cell.until(began_s + 0.3, lambda tick: tick.sent is not None)
        left_out = cell.loop.health().missed - missed
        require(left_out >= 40, f"{left_out} turns were left out")
        time.sleep(0.2)
        return Row(
            "the machine starves the control loop for 300 ms",
            f"at its next turn ({left_out} turns left out)",
            "the arms hold meanwhile; then the trajectory is caught up with within the limits, no jump",
            BY_ITSELF,
            "missed turns in diagnostics",
        )


def fault_server_killed() -> Row:
    with ExitStack() as stack:
        address, robot, observation, server = _server(stack)
        client = stack.enter_context(PolicyClient(address, embodiment=robot, timeout_s=1.0, wait_s=20.0))
        client.act(observation)
        began_s = time.monotonic()
        harm_server(Fault(kind=FaultKind.SERVER_KILL), address)
        server.wait(5)
        try:
            client.act(observation)
        except UnavailableError as error:
            seen_s, why = time.monotonic() - began_s, error.message
        else:
            raise FaultError("a dead server answered")
        _server(stack, address)
        deadline = time.monotonic() + 20
        while True:
            try:
                client.act(observation)
                break
            except SimplevlaError:
                if time.monotonic() > deadline:
                    raise
        return Row(
            "the policy server is killed",
            f"{seen_s:.2f} s (the client's timeout is 1 s here)",
            "the arms play the chunk they have and hold; the episode ends with server_lost",
            "the next request connects anew once the server is back",
            f"failure code and reason: {why.split(' (')[0][:60]}",
        )


def fault_slow_server() -> Row:
    with ExitStack() as stack:
        address, robot, observation, _ = _server(stack)
        client = stack.enter_context(PolicyClient(address, embodiment=robot, timeout_s=2.0, wait_s=20.0))
        quick = _times(lambda: client.act(observation), 20)
        fault = Fault(kind=FaultKind.SERVER_SLOW, amount=0.1, seconds=1.2)
        slow = threading.Thread(target=harm_server, args=(fault, address))
        slow.start()
        times = []
        while slow.is_alive():
            times += _times(lambda: client.act(observation), 1)
            time.sleep(0.01)
        slow.join()
        require(max(times) > 0.05, "it was not slow")
        client.act(observation)
        return Row(
            "the policy server gets a tenth of its processor",
            f"with each answer: {ms(max(times))} at the most instead of {ms(float(np.median(quick)))}",
            "the arms hold between chunks; what comes too late is refused",
            BY_ITSELF,
            "request, inference and reply times of each chunk",
        )


_SERVER = """
import sys
from policy_server.server import PolicyServer
from benchmarks.server_overhead import instant_policy
from simplevla.embodiment import Embodiment, load_embodiment
server = PolicyServer(instant_policy(load_embodiment("piper_single")), sys.argv[1])
with server:
    print("ready", server.address, flush=True)
    server.serve()
"""


def _server(
    stack: ExitStack, address: str = "tcp://127.0.0.1:*"
) -> tuple[str, Embodiment, Observation, subprocess.Popen[str]]:
    """Start a policy server; return its address, a robot, what it sees, and the server's process."""
    robot = load_embodiment("piper_single")
    process = subprocess.Popen([sys.executable, "-c", _SERVER, address], stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    stack.callback(process.stdout.close)
    words = process.stdout.readline().split()
    require(words[:1] == ["ready"], "the server did not start")
    observation = Observation(
        images={c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in robot.cameras},
        state=robot.home().astype(np.float32),
        instruction="wait",
        capture_ns=time.time_ns(),
        episode="fault",
        last_action=-1,
    )
    return words[1], robot, observation, process


def _times(work: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return times

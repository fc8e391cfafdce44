"""Delays from a swing: found where there is one, refused where there is none."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.latency import NoCommonMotionError, delay_between, principal, swing
from calibration.steps.latency import Swing, load_swing, read_delays
from robot_bridge.twin.can_bus import CanFrame
from robot_bridge.twin.piper_emulator import PiperEmulator
from sim_training import world
from simplevla.embodiment import load_embodiment
from simplevla.errors import ConfigError
from simplevla.motion import FOLLOWING_DELAY_S

DT_S = 0.005
TARGETS = swing(np.zeros(7), 0, amplitude=0.12, period_s=1.6, cycles=5, dt_s=DT_S)[:, 0]
TIMES_NS = 1_000_000_000_000 + np.arange(len(TARGETS)) * DT_S * 1e9


def seen(delay_s, count=48, noise_px=0.1, seed=0):
    """Return stamps and pixels of pictures that show the swing ``delay_s`` late, bent and mirrored."""
    rng = np.random.default_rng(seed)
    stamps = np.sort(rng.uniform(TIMES_NS[0], TIMES_NS[-1], count))
    angle = np.interp(stamps - delay_s * 1e9, TIMES_NS, TARGETS)
    px = 320 - 500 * angle + 150 * angle**2
    return stamps, px + rng.normal(0, noise_px, count)


@settings(max_examples=20, deadline=None)
@given(st.floats(-0.1, 0.3))
def test_a_delay_is_found_to_a_millisecond_with_its_own_doubt(delay_s):
    found = delay_between(TIMES_NS, TARGETS, *seen(delay_s))
    assert found.seconds == pytest.approx(delay_s, abs=1e-3)
    assert abs(found.seconds - delay_s) < 6 * found.std_s


@pytest.mark.parametrize(
    ("times", "values"),
    [
        pytest.param(*seen(0.0, count=6), id="too few"),
        pytest.param(seen(0.0)[0], np.full(48, 320.0), id="nothing moved"),
        pytest.param(seen(0.0)[0], np.random.default_rng(1).normal(0, 50, 48), id="something else moved"),
        pytest.param(*seen(0.6), id="later than is looked for"),
    ],
)
def test_what_shows_no_common_motion_is_refused(times, values):
    with pytest.raises(NoCommonMotionError):
        delay_between(TIMES_NS, TARGETS, times, values)


def test_a_swing_begins_and_ends_at_rest_within_its_amplitude():
    targets = swing(np.ones(7), 2, amplitude=0.1, period_s=1.0, cycles=4, dt_s=0.01)
    assert targets.shape == (400, 7)
    assert (np.delete(targets, 2, axis=1) == 1).all()
    assert 0.09 < np.abs(targets[:, 2] - 1).max() <= 0.1 + 1e-9
    speed = np.abs(np.diff(targets[:, 2])) / 0.01
    assert speed[0] < 0.02
    assert speed[-1] < 0.02
    assert targets[-1, 2] == pytest.approx(1.0, abs=1e-6)


def test_the_principal_direction_is_that_of_the_motion():
    t = np.linspace(0, 6, 50)
    points = np.stack([100 + 3 * np.sin(t), 200 + 4 * np.sin(t)], axis=1)
    along = principal(points)
    assert np.abs(along).max() == pytest.approx(5 * np.abs(np.sin(t) - np.sin(t).mean()).max())


def recorded(command_s=0.04, stamp_s=0.02, wait_s=0.05):
    """A joint that is where it was told to be ``command_s`` ago; a setpoint holds until the next."""
    stamps, px = seen(command_s + DT_S / 2 + stamp_s)
    measured_ns = TIMES_NS + DT_S / 2 * 1e9
    held = np.searchsorted(TIMES_NS, measured_ns - command_s * 1e9, side="right") - 1
    measured = TARGETS[np.maximum(held, 0)]
    arrival = stamps + wait_s * 1e9
    return Swing(TIMES_NS, TARGETS, measured_ns, measured, stamps, arrival, np.stack([px, px], axis=1))


def test_a_recorded_swing_says_how_late_command_stamp_and_picture_are(tmp_path):
    recorded().save(tmp_path / "swing.npz")
    delays = read_delays(load_swing(tmp_path / "swing.npz"))
    assert delays.command.seconds == pytest.approx(0.04, abs=1e-3)
    assert delays.stamp.seconds == pytest.approx(0.02, abs=1e-3)
    assert delays.delivery_s == pytest.approx(0.07, abs=1e-3)


@pytest.mark.parametrize("change", ["missing", "junk", "field", "length", "nan"])
def test_a_file_that_is_no_swing_is_refused(tmp_path, change):
    path = tmp_path / "swing.npz"
    one = recorded()
    values = {name: getattr(one, name) for name in one.__dataclass_fields__}
    if change == "field":
        del values["sent"]
    elif change == "length":
        values["sent"] = values["sent"][:-1]
    elif change == "nan":
        values["seen_px"] = values["seen_px"] * np.nan
    if change == "junk":
        path.write_bytes(b"PK nothing")
    elif change != "missing":
        np.savez(path, **values)
    with pytest.raises(ConfigError, match=r"swing\.npz"):
        load_swing(path)


FREQUENCY = world._JOINT_FREQUENCY_RAD_S


def joint_1_command(positions):
    """Return frame 0x155, which carries joints 1 and 2 in 0.001 deg."""
    counts = np.rint(np.degrees(positions[:2]) * 1000).astype(int)
    return CanFrame(0x155, struct.pack(">ii", *counts.tolist()))


def test_the_twins_word_on_its_command_delay_is_what_a_swing_finds():
    """An emulated arm on a bus served every 5 ms and physics every 4 ms, on a clock of its own.

    The twin says: its cable's delay, half a turn of each, and how far a joint lags behind a setpoint.
    """
    arm = load_embodiment("piper_single").arms[0]
    home = np.array([*arm.home_rad, arm.home_gripper_m])
    emulator = PiperEmulator(arm, home)
    emulator.receive(CanFrame(0x471, bytes([7, 2, 0, 0, 0, 0, 0, 0])))
    emulator.receive(CanFrame(0x151, bytes([1, 1, 100, 0, 0, 0, 0, 0])))
    cable_s, stamp_s, wait_s = 0.045, 0.025, 0.07
    targets = swing(home, 0, amplitude=0.12, period_s=1.6, cycles=5, dt_s=DT_S)
    tick_s, step_s = 0.005, 1 / 250
    position, velocity = home.copy(), np.zeros(7)
    drive = applied = home.copy()
    on_the_way, sent, measured, pictures = [], [], [], []
    next_bus, next_step, next_picture = 0.0013, 0.0021, 0.1
    for t in np.arange(0.0, 8.9, 0.001):
        index = round(t / DT_S)
        if abs(t - index * DT_S) < 1e-6 and index < len(targets):
            on_the_way.append((t + cable_s, targets[index]))
            sent.append((t, targets[index][0]))
        if t >= next_bus:
            next_bus += 0.994 * tick_s  # two clocks are never quite the same
            while on_the_way and on_the_way[0][0] <= t:
                emulator.receive(joint_1_command(on_the_way.pop(0)[1]))
            drive = emulator.advance(tick_s, position, velocity)
            measured.append((t, position[0] + velocity[0] * (t - (next_step - step_s))))
        if t >= next_step:
            next_step += step_s
            # Implicitly, as PhysX integrates a drive, to what was wanted when the step began.
            pushed = velocity + step_s * FREQUENCY**2 * (applied - position)
            applied = drive
            velocity = pushed / (1 + 2 * FREQUENCY * step_s + (FREQUENCY * step_s) ** 2)
            position = position + velocity * step_s
        if t >= next_picture:
            next_picture += 1 / 6
            pictures.append((t + stamp_s, t + wait_s, 320 - 500 * position[0] + 100 * position[0] ** 2))
    sent_s, sent_rad = np.array(sent).T
    measured_s, measured_rad = np.array(measured).T
    stamp, arrival, px = np.array(pictures).T
    one = Swing(
        sent_s * 1e9,
        sent_rad,
        measured_s * 1e9,
        measured_rad,
        stamp * 1e9,
        arrival * 1e9,
        np.stack([px, 0.3 * px], axis=1),
    )
    found = read_delays(one)
    said = cable_s + (tick_s + step_s) / 2 + FOLLOWING_DELAY_S
    assert found.command.seconds == pytest.approx(said, abs=0.001)
    assert found.stamp.seconds == pytest.approx(stamp_s, abs=0.003)
    assert found.delivery_s == pytest.approx(wait_s, abs=0.003)


def test_simulated_joints_follow_as_late_as_is_said():
    assert pytest.approx(2 / FREQUENCY) == FOLLOWING_DELAY_S

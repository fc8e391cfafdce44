"""Randomisation switches, and the things that stand on the table."""

from dataclasses import fields

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_training.assets import (
    bells,
    clutter,
    coaster,
    empty_cup,
    pots,
    sauce_cans,
    section,
    small_black_things,
    small_things,
)
from sim_training.episode import observe, play
from sim_training.randomisation import Randomisation, Variation, draw
from sim_training.tasks import load_task
from sim_training.tasks.move_can_pot import CAN, POT
from sim_training.world import World
from simplevla.embodiment import Embodiment, load_embodiment
from simplevla.errors import ConfigError
from simplevla.motion import FOLLOWING_DELAY_S
from simplevla.session_record import SessionRecord

SWITCHES = Randomisation.all().names()
OWN = {
    "textures": {"table", "wall"},
    "lights": {"light_colours"},
    "camera": {"cameras"},
    "table_height": {"table_height_m"},
    "clutter": {"strays"},
    "physics": {"mass_factor", "friction_factor"},
    "actuation": {"setpoint_delay_s", "drive_gain"},
    "latency": {"think_s"},
}


def described(variation: Variation) -> dict[str, str]:
    def plain(value: object) -> object:
        return value.name if hasattr(value, "hulls") else repr(value)

    out = {f.name: getattr(variation, f.name) for f in fields(variation)}
    for name in ("table", "wall"):
        surface = out[name]
        out[name] = (surface.colour, None if surface.texture is None else surface.texture.tobytes())
    out["strays"] = [(plain(s.asset), s.xy_m, s.yaw_rad) for s in out["strays"]]
    return {name: repr(value) for name, value in out.items()}


def test_a_simulator_is_at_least_as_late_as_the_calibrated_robot() -> None:
    robot = load_embodiment("piper_dual")
    delays = {"left_command": 0.05, "right_command": 0.07, "head_stamp": 0.02, "head_delivery": 0.08}
    record = SessionRecord(created_ns=1, embodiment=robot.name, serials={}, checks=(), delays_s=delays)
    as_it_is = Randomisation.none().measured(record, robot)
    plain = draw(as_it_is, 0, cameras=1)
    assert plain.setpoint_delay_s == pytest.approx(0.07 - FOLLOWING_DELAY_S)
    assert plain.think_s == pytest.approx(0.08)
    for seed in range(5):
        drawn = draw(Randomisation.all(), seed, cameras=1)
        both = draw(Randomisation.all().measured(record, robot), seed, cameras=1)
        assert both.setpoint_delay_s == max(drawn.setpoint_delay_s, plain.setpoint_delay_s)
        assert both.think_s == max(drawn.think_s, plain.think_s)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_its_own_draws_and_no_other(switch: str) -> None:
    for seed in range(5):
        plain = described(draw(Randomisation.none(), seed, cameras=1))
        alone = described(draw(Randomisation.of([switch]), seed, cameras=1))
        all_on = draw(Randomisation.all(), seed, cameras=1)
        rest = draw(Randomisation.of([s for s in SWITCHES if s != switch]), seed, cameras=1)
        assert {n for n in plain if plain[n] != alone[n]} == OWN[switch]
        assert {n for n, v in described(all_on).items() if v != described(rest)[n]} == OWN[switch]
        assert all(described(all_on)[n] == alone[n] for n in OWN[switch])


@given(st.integers(0, 2**31 - 1))
def test_draws_stay_in_their_ranges_and_repeat(seed: int) -> None:
    variation = draw(Randomisation.all(), seed, cameras=2)
    assert described(variation) == described(draw(Randomisation.all(), seed, cameras=2))
    assert -0.03 <= variation.table_height_m <= 0
    assert 0.7 <= variation.mass_factor <= 1.4
    assert 0.7 <= variation.friction_factor <= 1.3
    assert 0 <= variation.setpoint_delay_s <= 0.06
    assert 0.8 <= variation.drive_gain <= 1.2
    assert 0.04 <= variation.think_s <= 0.16
    assert np.abs([c.xyz_m for c in variation.cameras]).max() <= 0.01
    assert np.abs([c.rpy_rad for c in variation.cameras]).max() <= np.deg2rad(1.5)


def test_placements_do_not_depend_on_the_switches(blind: World, dual: Embodiment) -> None:
    blind.reset(11)
    plain = [(p.name, p.asset.name, p.xy_m, p.yaw_rad) for p in blind.placements]
    with World(dual, load_task("move_can_pot"), randomisation=Randomisation.all(), render=False) as world:
        world.reset(11)
        assert [(p.name, p.asset.name, p.xy_m, p.yaw_rad) for p in world.placements] == plain
        assert world.table_top_m < 0.74
        assert world.object_pose(CAN)[2, 3] == pytest.approx(world.table_top_m, abs=1e-3)


@pytest.mark.parametrize("switch", ["textures", "lights", "camera", "clutter"])
def test_what_a_switch_changes_can_be_seen(seeing: World, dual: Embodiment, switch: str) -> None:
    seeing.reset(12)
    plain = seeing.render("head").astype(int)
    with World(dual, load_task("move_can_pot"), randomisation=Randomisation.of([switch])) as world:
        world.reset(12)
        changed = np.abs(world.render("head") - plain).sum(axis=2) > 12
        assert changed.mean() > 0.002


def test_clutter_leaves_the_task_alone(dual: Embodiment) -> None:
    with World(
        dual, load_task("move_can_pot"), randomisation=Randomisation.of(["clutter"]), render=False
    ) as world:
        for seed in range(5):
            world.reset(seed)
            before = {n: world.object_pose(n) for n in (CAN, POT)}
            world.step(50)
            for name, pose in before.items():
                assert np.abs(world.object_pose(name) - pose).max() < 1e-4


def test_the_switches_have_names() -> None:
    assert Randomisation.of(["lights", "clutter"]).names() == ["lights", "clutter"]
    assert Randomisation.of(["all"]) == Randomisation.all()
    assert Randomisation.of(["none"]) == Randomisation.none()
    with pytest.raises(ConfigError, match="textures"):
        Randomisation.of(["weather"])
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"weather": True}, Randomisation)


EVERY = (
    *(*sauce_cans(), *pots(), *clutter(), *small_things()),
    *(*small_black_things(), *bells(), empty_cup(), coaster()),
)


def test_late_setpoints_move_the_arm_as_much_later(dual: Embodiment) -> None:
    paths = []
    for names in ([], ["actuation"]):
        with World(
            dual, load_task("move_can_pot"), randomisation=Randomisation.of(names), render=False
        ) as world:
            world.reset(3)
            start, path = dual.home(), []
            for step in range(60):
                world.set_targets(start + 0.002 * min(step, 40) * np.eye(dual.dimension)[0])
                world.step()
                path.append(world.positions()[0] - start[0])
            delay = world.variation.setpoint_delay_s
        paths.append(np.array(path))
    steps = round(delay * 250)
    assert steps > 3
    assert np.abs(paths[1][:steps]).max() < 1e-4
    assert paths[1][steps:] == pytest.approx(paths[0][: 60 - steps], abs=0.006)


def test_the_world_goes_on_while_the_policy_thinks(dual: Embodiment) -> None:
    with World(
        dual, load_task("move_can_pot"), randomisation=Randomisation.of(["latency"]), render=False
    ) as world:
        world.reset(4)
        observation = observe(world, (), -1)
        assert observation.capture_ns == 0
        assert world.time_s == pytest.approx(world.variation.think_s, abs=0.005)
        assert play(world, [dual.home()], 0.1).actions == 1


@pytest.mark.parametrize("asset", EVERY, ids=lambda a: a.name)
def test_assets_stand_on_the_ground_and_look_as_large_as_they_are(asset) -> None:
    vertices = np.concatenate([visual.mesh.vertices for visual in asset.visuals])
    points = np.concatenate(asset.hulls)
    assert vertices[:, 2].min() == pytest.approx(0, abs=1e-4)
    assert points[:, 2].min() == pytest.approx(0, abs=1e-4)
    assert vertices[:, 2].max() >= asset.height_m - 1e-3
    assert np.hypot(*points[:, :2].T).max() >= asset.radius_m - 1e-6
    for visual in asset.visuals:
        mesh = visual.mesh
        assert mesh.triangles.max() < len(mesh.vertices) == len(mesh.normals) == len(mesh.uvs)
        assert np.linalg.norm(mesh.normals, axis=1) == pytest.approx(1, abs=1e-5)
        corners = mesh.vertices[mesh.triangles]
        faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        outward = np.einsum("ij,ij->i", faces, mesh.normals[mesh.triangles[:, 0]])
        assert (outward >= -1e-9).all()


@pytest.mark.parametrize("asset", [*small_things(), empty_cup()], ids=lambda a: a.name)
def test_what_is_to_be_grasped_fits_a_gripper_at_any_yaw(asset) -> None:
    assert len({thing.name for thing in small_things()}) == 12
    across = np.concatenate(asset.hulls)[:, :2]
    angles = np.linspace(0, np.pi, 60)
    widths = np.ptp(across @ np.stack([np.cos(angles), np.sin(angles)]), axis=0)
    assert widths.max() < 0.060
    outline = section(asset, 0.5 * asset.height_m)
    assert np.hypot(*outline.T).max() <= asset.radius_m + 1e-9
    with pytest.raises(ValueError, match="nothing at"):
        section(asset, asset.height_m + 0.001)


def test_cans_fit_the_gripper_and_beside_the_pots() -> None:
    for can in sauce_cans():
        assert 0.044 <= 2 * can.radius_m <= 0.052
        assert 0.09 <= can.height_m <= 0.12
    assert all(pot.radius_m <= 0.09 for pot in pots())

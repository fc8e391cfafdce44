"""The scene: determinism, drives, and cameras that see what is there."""

import msgspec
import numpy as np
import pytest

from sim_training.tasks import load_task
from sim_training.tasks.move_can_pot import CAN, POT
from sim_training.world import PHYSICS_DT_S, World
from simplevla.embodiment import Embodiment
from simplevla.errors import EmbodimentError, UnavailableError


def trajectory(world: World, seed: int) -> np.ndarray:
    """Return what happens when the arms sweep across the table."""
    world.reset(seed)
    home, seen = world.embodiment.home(), []
    for i in range(200):
        sway = 0.4 * np.sin(i / 60)
        target = home.copy()
        target[[0, 7]] += sway
        target[[1, 8]] += 0.5 * abs(sway)
        world.set_targets(target)
        world.step()
        seen.append(np.concatenate([world.positions(), world.object_pose(CAN).ravel()]))
    return np.array(seen)


def test_a_seed_gives_the_same_trajectory_bit_for_bit_whatever_came_before(
    blind: World, dual: Embodiment
) -> None:
    first = trajectory(blind, 5)
    assert not np.array_equal(first, trajectory(blind, 6))
    assert np.array_equal(first, trajectory(blind, 5))
    with World(dual, load_task("move_can_pot"), render=False) as other:
        assert np.array_equal(first, trajectory(other, 5))


def test_pictures_change_nothing_in_the_physics(blind: World, seeing: World) -> None:
    assert np.array_equal(trajectory(blind, 5), trajectory(seeing, 5))


def test_the_arms_start_and_stay_at_home(blind: World, dual: Embodiment) -> None:
    blind.reset(0)
    assert blind.time_s == 0
    blind.step(100)
    assert blind.time_s == pytest.approx(100 * PHYSICS_DT_S)
    assert np.abs(blind.positions() - dual.home()).max() < 1e-4
    assert np.abs(blind.velocities()).max() < 1e-3
    assert blind.openings() == pytest.approx([1, 1])


def test_things_stand_still_on_the_table(blind: World) -> None:
    blind.reset(4)
    before = {name: blind.object_pose(name) for name in (CAN, POT)}
    blind.step(250)
    for name, pose in before.items():
        assert np.abs(blind.object_pose(name) - pose).max() < 1e-4
        assert pose[2, 3] == pytest.approx(0.74, abs=1e-3)


def test_a_moving_setpoint_is_followed_closely_and_late(blind: World) -> None:
    blind.reset(0)
    start, speed = blind.positions(), 0.5
    for i in range(1, 126):
        target = start.copy()
        target[[0, 7]] += speed * i * PHYSICS_DT_S
        blind.set_targets(target)
        blind.step()
    lag = (blind.targets() - blind.positions())[[0, 7]]
    assert lag == pytest.approx(speed * 2 / 60, rel=0.1)
    blind.step(100)
    assert np.abs(blind.targets() - blind.positions()).max() < 2e-3


def test_the_gripper_opens_and_closes_by_its_total_opening(blind: World) -> None:
    blind.reset(0)
    target = blind.targets()
    target[6], target[13] = 0.03, 0.05
    blind.set_targets(target)
    blind.step(100)
    assert blind.positions()[[6, 13]] == pytest.approx([0.03, 0.05], abs=1e-3)


def test_arms_can_be_left_where_they_are(blind: World, dual: Embodiment) -> None:
    somewhere = dual.home() + 0.1
    somewhere[[6, 13]] = 0.05
    blind.reset(0, positions=somewhere)
    assert blind.positions() == pytest.approx(somewhere, abs=2e-3)


def test_the_tool_is_where_the_kinematics_say(blind: World, dual: Embodiment) -> None:
    from simplevla.kinematics.action_space import tool_poses

    blind.reset(0)
    poses = tool_poses(blind.positions(), dual)
    for arm in dual.arms:
        x, y, z = arm.base.xyz_m
        base = np.array([[0, -1, 0, x], [1, 0, 0, y], [0, 0, 1, z], [0, 0, 0, 1.0]])
        assert np.abs(blind.tool_pose(arm.name) - base @ poses[arm.name]).max() < 1e-4


def pixel(embodiment: Embodiment, camera: str, point: np.ndarray) -> np.ndarray:
    """Return where the pinhole with the embodiment's intrinsics sees a point of the world."""
    c = embodiment.camera(camera)
    forward = np.subtract(c.look_at_m, c.position_m)
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    x, y, z = np.stack([right, down, forward]) @ (point - c.position_m)
    return np.array([c.cx + c.fx * x / z, c.cy + c.fy * y / z])


@pytest.mark.parametrize("seed", [0, 8])
def test_the_can_is_seen_where_the_intrinsics_say(seeing: World, dual: Embodiment, seed: int) -> None:
    seeing.reset(seed)
    pose, asset = seeing.object_pose(CAN), seeing.asset(CAN)
    with_can = seeing.render("head").astype(int)
    seeing.set_object_pose(CAN, np.block([[np.eye(3), np.array([[0], [-3], [0.0]])], [0, 0, 0, 1]]))
    changed = np.abs(seeing.render("head") - with_can).sum(axis=2) > 60
    rows, columns = np.nonzero(changed)
    lateral = asset.radius_m * np.array([np.cos(a) for a in np.linspace(0, 6, 20)])
    outline = [
        pixel(dual, "head", pose[:3, 3] + [dx, dy, h])
        for dx, dy in zip(lateral, np.roll(lateral, 5), strict=True)
        for h in (0, asset.height_m)
    ]
    centre = pixel(dual, "head", pose[:3, 3] + [0, 0, asset.height_m / 2])
    seen = np.array([np.median(columns), np.median(rows)])
    assert np.abs(seen - centre).max() < 5, (seen, centre, outline)


def test_pictures_show_something_and_never_lag_behind(seeing: World) -> None:
    seeing.reset(2)
    first = seeing.render("head")
    assert first.shape == (240, 320, 3)
    assert first.dtype == np.uint8
    assert 20 < first.mean() < 235
    assert first.std() > 20
    assert np.array_equal(first, seeing.render("head"))
    target = seeing.targets()
    target[0] -= 0.5
    target[7] += 0.5
    seeing.set_targets(target)
    seeing.step(100)
    assert (seeing.render("head") != first).any()


def test_pictures_of_several_cameras_are_drawn_at_once_and_outlast_the_next_exposure(
    dual: Embodiment,
) -> None:
    head = dual.cameras[0]
    beside = msgspec.structs.replace(head, name="side", position_m=(0.4, *head.position_m[1:]))
    several = msgspec.structs.replace(dual, cameras=(head, beside))
    with World(several, load_task("move_can_pot")) as world:
        world.reset(2)
        alone = {name: world.render(name) for name in ("head", "side")}
        world.expose("head", "side")
        assert world.drawing
        assert all(np.array_equal(world.develop(name), alone[name]) for name in ("side", "head"))
        assert not world.drawing
        world.expose("head")
        target = world.targets()
        target[0] -= 0.5
        world.set_targets(target)
        world.step(100)
        world.expose("side")
        assert np.array_equal(world.develop("head"), alone["head"])
        assert (world.develop("side") != alone["side"]).any()
        with pytest.raises(UnavailableError, match="exposed no picture"):
            world.develop("side")


def test_a_camera_can_be_moved(seeing: World) -> None:
    seeing.reset(2)
    first = seeing.render("head").astype(int)
    seeing.move_camera("head", (0.1, -0.45, 1.35), (0.1, 0.01, 0.74))
    moved = seeing.render("head").astype(int)
    assert np.abs(moved - first).mean() > 5


def test_an_observer_may_look_from_anywhere(seeing: World) -> None:
    seeing.reset(2)
    picture = seeing.view((1.0, -0.9, 1.5), (0, 0, 0.8), width=64, height=48, fov_deg=45)
    assert picture.shape == (48, 64, 3)
    assert picture.std() > 10


def test_a_missing_camera_is_a_clear_error(seeing: World, blind: World) -> None:
    seeing.reset(0)
    blind.reset(0)
    with pytest.raises(EmbodimentError, match="head"):
        seeing.render("wrist")
    with pytest.raises(UnavailableError, match="without cameras"):
        blind.render("head")

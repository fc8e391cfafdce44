"""Distances between segments, and that the capsules of an arm hold its model's shapes."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from robot_bridge.capsules import segment_distances
from robot_bridge.clearance import Workspace
from simplevla.embodiment import load_embodiment
from simplevla.files import share_dir

GRID = np.linspace(0, 1, 21)
ROBOT = load_embodiment("piper_single")

points = st.tuples(*(st.floats(-1, 1, width=16),) * 3).map(np.array)


@given(points, points, points, points)
@example(*(np.array(p, dtype=float) for p in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0))))  # parallel
@example(*(np.array(p, dtype=float) for p in ((0, 0, 0), (0, 0, 0), (1, 1, 0), (1, 1, 0))))  # two points
@example(*(np.array(p, dtype=float) for p in ((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0))))  # in a line
def test_no_two_places_of_the_segments_are_nearer_and_two_are_as_near(a, b, c, d):
    distance = segment_distances(a[None], b[None], c[None], d[None])[0]
    on_first = a + GRID[:, None] * (b - a)
    on_second = c + GRID[:, None] * (d - c)
    sampled = np.linalg.norm(on_first[:, None] - on_second[None], axis=-1).min()
    step = GRID[1] * max(np.linalg.norm(b - a), np.linalg.norm(d - c))
    assert sampled - step <= distance <= sampled + 1e-9
    back = segment_distances(d[None], c[None], b[None], a[None])[0]
    assert back == pytest.approx(distance, abs=1e-6)


def test_many_pairs_are_answered_as_each_alone():
    rng = np.random.default_rng(0)
    ends = rng.normal(size=(4, 50, 3))
    together = segment_distances(*ends)
    alone = [segment_distances(*(end[i : i + 1] for end in ends))[0] for i in range(50)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("seed", range(3))
def test_every_corner_of_the_models_shapes_lies_in_a_capsule(seed):
    lower, upper = ROBOT.position_limits()
    positions = np.random.default_rng(seed).uniform(lower, upper)
    shape = Workspace(ROBOT)._arms[0][0]
    frames = shape.frames(positions)
    start, end = shape.capsules(frames)
    outside = {}
    for link, corner in model_corners(frames, positions[-1]):
        places = np.repeat(corner[None], len(start), axis=0)
        over = (segment_distances(start, end, places, places) - shape.radii).min()
        outside[link] = max(outside.get(link, -np.inf), over)
    back_of_the_base = outside.pop("base_link")  # the connector block, which no part of an arm reaches
    assert back_of_the_base < 0.02
    assert max(outside.values()) < 0.002, outside


def model_corners(frames, opening_m):
    """Yield (link, (3,) corner in the world) of the boxes and of boxes around the cylinders of the URDF.

    A cylinder's corners are taken on its rim, at eight places.
    """
    named = {"base_link": 0, **{f"link{i}": i for i in range(1, 7)}, "gripper_base": 6}
    root = ET.parse(share_dir() / "urdf/piper.urdf").getroot()  # noqa: S314 - our own file
    for link in root.findall("link"):
        name = link.attrib["name"]
        for collision in link.findall("collision"):
            geometry = collision.find("geometry")[0]
            if geometry.tag == "box":
                size = np.array([float(word) for word in geometry.attrib["size"].split()])
                corners = np.array(list(product((-0.5, 0.5), repeat=3))) * size
            else:
                radius, length = float(geometry.attrib["radius"]), float(geometry.attrib["length"])
                around = np.arange(8) * np.pi / 4
                rim = radius * np.stack([np.cos(around), np.sin(around)], axis=1)
                corners = np.array([[*xy, z] for xy in rim for z in (-length / 2, length / 2)])
            pose = placed(collision.find("origin"))
            if name in named:
                frame = frames[named[name]]
            else:
                side = 1 if name == "finger1" else -1
                finger = np.eye(4)
                turn = [np.pi / 2, 0, 0 if side == 1 else np.pi]
                finger[:3, :3] = Rotation.from_euler("xyz", turn).as_matrix()
                finger[:3, 3] = [0, -side * opening_m / 2, 0.1358]
                frame = frames[6] @ finger
            for corner in corners:
                yield name, (frame @ pose @ [*corner, 1.0])[:3]


def placed(origin):
    """Return a URDF origin as (4, 4)."""
    pose = np.eye(4)
    if origin is not None:
        numbers = {key: [float(word) for word in text.split()] for key, text in origin.attrib.items()}
        pose[:3, :3] = Rotation.from_euler("xyz", numbers.get("rpy", [0, 0, 0])).as_matrix()
        pose[:3, 3] = numbers.get("xyz", [0, 0, 0])
    return pose

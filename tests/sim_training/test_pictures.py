"""Random pictures: places are true, both kinds of camera agree, and the same seed draws the same."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sim_training.pictures import (
    PictureSettings,
    draw_pictures,
    load_pictures,
    save_pictures,
    small_camera,
)
from simplevla.embodiment import Embodiment
from simplevla.errors import ConfigError
from simplevla.policy.config import NetworkConfig, load_sizes
from simplevla.policy.processor import proprio_size


@pytest.fixture(scope="module")
def network(dual: Embodiment) -> NetworkConfig:
    return NetworkConfig(
        sizes=load_sizes("tiny"),
        frame_height=240,
        frame_width=320,
        n_cameras=1,
        chunk_length=5,
        dimension=14,
        proprio=proprio_size(dual),
    )


def test_pictures_are_drawn_again_the_same_and_survive_the_disk(
    dual: Embodiment, network: NetworkConfig, tmp_path: Path
) -> None:
    settings = PictureSettings(scenes=2, poses=3)
    pictures = draw_pictures(settings, "move_can_pot", dual, ("head",), network)
    assert pictures.images.shape == (6, 1, 3, 96, 128)
    assert pictures.objects.shape == (6, 2, 3)
    assert pictures.episodes.tolist() == [0, 0, 0, 1, 1, 1]
    assert len({tuple(place.flatten().tolist()) for place in pictures.objects}) == 6
    save_pictures(pictures, tmp_path / "pictures.safetensors")
    again = load_pictures(tmp_path / "pictures.safetensors")
    assert torch.equal(again.images, pictures.images)
    once_more = draw_pictures(settings, "move_can_pot", dual, ("head",), network)
    assert torch.equal(once_more.images, pictures.images)
    assert torch.equal(once_more.objects, pictures.objects)


def test_the_small_camera_sees_what_the_network_keeps(dual: Embodiment, network: NetworkConfig) -> None:
    camera = dual.camera("head")
    small = small_camera(camera, network)
    assert (small.width, small.height) == (128, 96)
    for point in ((0.0, 0.0), (0.3, -0.2)):  # x / z and y / z in the optical frame
        large_px = np.array([camera.fx, camera.fy]) * point + [camera.cx, camera.cy]
        small_px = np.array([small.fx, small.fy]) * point + [small.cx, small.cy]
        assert small_px == pytest.approx(large_px * 0.4)


def test_pictures_of_evaluations_are_refused(dual: Embodiment, network: NetworkConfig) -> None:
    with pytest.raises(ConfigError, match="evaluation"):
        draw_pictures(PictureSettings(scenes=3, first_seed=9999), "move_can_pot", dual, ("head",), network)


def test_what_is_no_file_of_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="no pictures"):
        load_pictures(tmp_path / "x.safetensors")

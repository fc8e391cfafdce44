"""The simulator's scene drawn over the live picture: what was calibrated well shows no coloured edges."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from calibration.settings import Settings
from calibration.twin_cell import running_twin
from robot_bridge.drivers.choice import camera_driver
from robot_bridge.rig import TWIN_BUS, CanPort, Rig, TwinSettings
from robot_bridge.twin.metal import Metal
from simplevla.files import write_atomic
from simplevla.session_record import SessionRecord

_FIRST_PICTURE_S = 20.0


def write_overlay(
    live: NDArray[np.uint8], camera: str, record: SessionRecord, rig: Rig, settings: Settings, folder: Path
) -> Path:
    """Draw the empty scene with the arms at home from where ``record`` puts ``camera``; return the picture.

    Args:
        live: (H, W, 3) uint8 RGB, taken with the arms at home.
        camera: which camera took it.
        record: where it stands.
        rig: the rig; a twin of its embodiment draws.
        settings: in which size.
        folder: gets ``overlay.png`` and the twin's files.

    Raises:
        UnavailableError: the twin does not start.
    """
    ports = {arm: CanPort(interface=TWIN_BUS, channel="127.0.0.1:1") for arm in rig.arms}
    stand_in = msgspec.structs.replace(rig, arms=ports, twin=TwinSettings())
    metal = Metal(camera_in_world=dict(record.camera_in_world))
    with running_twin(stand_in, settings, folder / "overlay", metal=metal) as twin:
        stream = twin.rig.load_embodiment().camera(camera)
        with camera_driver(twin.rig, stream) as driver:
            drawn = driver.wait_newer(time.time_ns(), _FIRST_PICTURE_S).image
    path = folder / "overlay.png"
    write_atomic(path, cv2.imencode(".png", overlay(live, drawn)[..., ::-1])[1].tobytes())
    return path


def overlay(live: NDArray[np.uint8], drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the live picture in red and the drawn one in cyan, (H, W, 3): what agrees is grey."""
    size = (live.shape[1], live.shape[0])
    fitting = cv2.resize(drawn, size, interpolation=cv2.INTER_AREA)
    red, cyan = (cv2.cvtColor(each, cv2.COLOR_RGB2GRAY) for each in (live, fitting))
    return np.stack([red, cyan, cyan], axis=2).astype(np.uint8)

"""Which driver with which bus or device a rig asks for: the only place that tells twin from metal."""

from __future__ import annotations

from robot_bridge.drivers.piper import PiperDriver
from robot_bridge.drivers.realsense import RealSenseDriver
from robot_bridge.rig import Rig
from simplevla.embodiment import Arm, Camera
from simplevla.session_record import SessionRecord


def arm_driver(rig: Rig, arm: Arm, record: SessionRecord | None = None) -> PiperDriver:
    """Return the driver of one of the rig's arms, not yet open; ``record`` corrects its joints' zeros."""
    zeros = record.joint_zeros_rad.get(arm.name) if record else None
    return PiperDriver(arm, rig.arms[arm.name], zeros_rad=zeros)


def camera_driver(rig: Rig, camera: Camera, record: SessionRecord | None = None) -> RealSenseDriver:
    """Return the driver of one of the rig's cameras, not yet open; ``record`` corrects its stamps."""
    source = None
    if rig.twin is not None:
        from robot_bridge.twin.realsense_device import twin_device_source

        source = twin_device_source(rig)
    return RealSenseDriver(
        camera,
        rig.cameras[camera.name],
        device_source=source,
        stamp_offset_s=record.stamp_offset_s(camera.name) if record else 0.0,
    )

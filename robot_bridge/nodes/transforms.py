"""Where things stand that do not move, for ROS: latched, so that a late listener hears it too.

``/tf_static`` takes tf2_msgs, which an installed ROS has and its wheels have not; the same transforms go
to ``static_transforms`` (geometry_msgs/TransformStamped, one message a frame) either way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from geometry_msgs.msg import TransformStamped
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from scipy.spatial.transform import Rotation

from simplevla.embodiment import Pose

WORLD = "world"


def publish_transforms(node: Node, poses: Mapping[str, Pose]) -> None:
    """Publish {frame: its pose in the world} once; the publishers live as long as ``node``."""
    transforms = [transform(frame, pose) for frame, pose in poses.items()]
    latched = QoSProfile(depth=max(1, len(transforms)), durability=DurabilityPolicy.TRANSIENT_LOCAL)
    publisher = node.create_publisher(TransformStamped, "static_transforms", latched)
    for each in transforms:
        publisher.publish(each)
    if importlib.util.find_spec("tf2_msgs") is not None:
        from tf2_msgs.msg import TFMessage

        node.create_publisher(TFMessage, "/tf_static", latched).publish(TFMessage(transforms=transforms))


def transform(frame: str, pose: Pose) -> TransformStamped:
    """Return a pose in the world as a message."""
    message = TransformStamped(child_frame_id=frame)
    message.header.frame_id = WORLD
    to, turn = message.transform.translation, message.transform.rotation
    to.x, to.y, to.z = pose.xyz_m
    turn.x, turn.y, turn.z, turn.w = Rotation.from_euler("xyz", pose.rpy_rad).as_quat().tolist()
    return message

"""Says what the robot looks like and where everything stands, for RViz, Foxglove and recordings.

A lifecycle node (:mod:`robot_bridge.nodes.managed`) of its own process: it goes on whatever becomes of the
others.

=======================  ======================================================================
publishes, latched       ``robot_description`` (std_msgs/String, URDF of the whole robot),
                         ``/tf_static``, and the same on ``static_transforms``
                         (geometry_msgs/TransformStamped, one message a frame)
publishes                ``/tf``: the arms' links, from ``joint_states``; ``/diagnostics``
=======================  ======================================================================

``/tf`` and ``/tf_static`` take tf2_msgs, which an installed ROS has and its wheels have not. Bases and
cameras are where calibration found them if a session record is given, else where the embodiment has them;
frames follow REP 103 and 105: metres, ``world`` at the root, ``<arm>_base_link``, cameras' frames optical.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import TransformStamped
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from robot_bridge.nodes.managed import ManagedNode
from robot_bridge.nodes.process import run_node, set_stamp, stamp_ns, status
from robot_bridge.rig import load_rig, named
from robot_bridge.robot_description import WORLD, LinkFrames, fixed_frames, robot_description
from simplevla.embodiment import Pose
from simplevla.session_record import calibrated

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node until it is asked to end; return the exit status."""
    return run_node("transforms", TransformsNode, sys.argv if argv is None else argv)


class TransformsNode(ManagedNode):
    """Publishes the description and the frames."""

    def __init__(self) -> None:
        super().__init__("transforms")
        self.declare("rig", "twin", "name of a rig in config/rig, or a path to a .yaml file")
        self.declare("arms", "", "names of the arms that are driven, by commas; empty: all of the rig")
        self.declare_record()
        self.declare("tf_rate_hz", 30.0, "rate of the moving links on /tf, Hz", low=1, high=200)

    @contextmanager
    def configured(self) -> Iterator[None]:
        """Read rig and record."""
        rig = load_rig(self.value("rig")).with_arms(named(self.value("arms")))
        self._embodiment = calibrated(rig.load_embodiment(), self.record())
        self._description = robot_description(self._embodiment)
        self._links = LinkFrames(self._description)
        self._newest: JointState | None = None
        yield

    @contextmanager
    def active(self) -> Iterator[None]:
        """Publish."""
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.create_publisher(String, "robot_description", latched).publish(String(data=self._description))
        publish_transforms(self, fixed_frames(self._embodiment))
        if (message_class := tf_message()) is not None:
            topic = self.create_publisher(message_class, "/tf", 100)
            self.create_subscription(JointState, "joint_states", self._take, 10)
            self.repeat(1 / self.value("tf_rate_hz"), lambda: self._publish_links(topic, message_class))
        yield

    def diagnose(self) -> list[DiagnosticStatus]:
        """Return what is published."""
        has_tf = tf_message() is not None
        values = {"frames": len(fixed_frames(self._embodiment)), "tf": has_tf}
        return [status("transforms", "" if has_tf else "without tf2_msgs there is no /tf", values)]

    def _take(self, message: JointState) -> None:
        self._newest = message

    def _publish_links(self, topic: Any, message_class: Any) -> None:
        state, self._newest = self._newest, None
        if state is not None:
            topic.publish(message_class(transforms=link_transforms(self._links, state)))


def link_transforms(links: LinkFrames, state: JointState) -> list[TransformStamped]:
    """Return where every moving link stands on its parent at the joint states of a message."""
    found = links.at(dict(zip(state.name, state.position, strict=False)))
    stamp = stamp_ns(state.header.stamp)
    return [_stamped(parent, child, pose, stamp) for (parent, child), pose in found.items()]


def publish_transforms(node: Node, poses: Mapping[str, Pose]) -> None:
    """Publish {frame: its pose in the world} once; the publishers live as long as ``node``."""
    transforms = [transform(frame, pose) for frame, pose in poses.items()]
    latched = QoSProfile(depth=max(1, len(transforms)), durability=DurabilityPolicy.TRANSIENT_LOCAL)
    publisher = node.create_publisher(TransformStamped, "static_transforms", latched)
    for each in transforms:
        publisher.publish(each)
    if (message_class := tf_message()) is not None:
        node.create_publisher(message_class, "/tf_static", latched).publish(
            message_class(transforms=transforms)
        )


def tf_message() -> Any:
    """Return the class tf2_msgs/TFMessage, or None where it is not installed."""
    if importlib.util.find_spec("tf2_msgs") is None:
        return None
    from tf2_msgs.msg import TFMessage

    return TFMessage


def transform(frame: str, pose: Pose) -> TransformStamped:
    """Return a pose in the world as a message."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", pose.rpy_rad).as_matrix()
    matrix[:3, 3] = pose.xyz_m
    return _stamped(WORLD, frame, matrix, 0)


def _stamped(parent: str, child: str, pose: NDArray[np.float64], stamp: int) -> TransformStamped:
    message = TransformStamped(child_frame_id=child)
    message.header.frame_id = parent
    set_stamp(message.header.stamp, stamp)
    to, turn = message.transform.translation, message.transform.rotation
    to.x, to.y, to.z = pose[:3, 3].tolist()
    turn.x, turn.y, turn.z, turn.w = Rotation.from_matrix(pose[:3, :3]).as_quat().tolist()
    return message


if __name__ == "__main__":
    sys.exit(main())

"""What users of the vendor's ROS driver (piper_ros) know, arm by arm, in the namespace of the arm's name.

Through the same limits as everything else, and with the standard messages alone, for the vendor's own
(``arm_status``, ``pos_cmd``, ``enable_srv``, ``go_zero_srv``, ``gripper_srv``) need its package.

===========================================  ====================================================
publishes ``<arm>/joint_states_single``,     measured (sensor_msgs/JointState): joint1 ... joint6,
``<arm>/joint_states_feedback``              gripper (total opening); rad and m
publishes ``<arm>/end_pose``,                flange (link6) in the arm's base, geometry_msgs/Pose
``<arm>/end_pose_stamped``                   and PoseStamped
subscribes ``<arm>/joint_ctrl_single``       where to go (JointState, as above, without a gripper
                                             too): at a third of the speed limits, in place of what
                                             plays
subscribes ``<arm>/enable_flag``             std_msgs/Bool: true enables **all** arms; false is
                                             refused, for without power they drop: ``~/disable``
services ``<arm>/stop_srv``, ``reset_srv``   std_srvs/Trigger: emergency stop and reset of **all**
===========================================  ====================================================
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from geometry_msgs.msg import Pose, PoseStamped
from numpy.typing import NDArray
from rclpy.node import Node
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool

from robot_bridge.chunk_execution import Trajectory
from robot_bridge.control_loop import ControlLoop, Tick
from robot_bridge.nodes.process import set_stamp, trigger
from simplevla.embodiment import Arm, Embodiment
from simplevla.errors import ChunkError, SimplevlaError, UnavailableError
from simplevla.files import share_dir
from simplevla.kinematics.chain import Chain

logger = logging.getLogger(__name__)

_FLANGE = "link6"
_SPEED = 1 / 3  # of the limits
_SHORTEST_S = 0.01


class PiperTopics:
    """The topics and services of every arm, on ``node``.

    Args:
        node: the arms' node.
        embodiment: the robot.
        loop: what moves it.
        require_active: raises if the node takes no commands now.
    """

    def __init__(
        self, node: Node, embodiment: Embodiment, loop: ControlLoop, require_active: Callable[[], None]
    ) -> None:
        self._embodiment = embodiment
        self._loop = loop
        self._require_active = require_active
        self._newest: Tick | None = None
        self._arms = [_OneArm(node, arm) for arm in embodiment.arms]
        for index, arm in enumerate(embodiment.arms):
            node.create_subscription(
                JointState, f"{arm.name}/joint_ctrl_single", lambda m, i=index: self._go(i, m), 10
            )
            node.create_subscription(Bool, f"{arm.name}/enable_flag", self._enable, 10)
            trigger(node, f"{arm.name}/stop_srv", self._stop, at_once=True)
            trigger(node, f"{arm.name}/reset_srv", self._reset)

    def publish(self, tick: Tick) -> None:
        """Publish a turn of the loop; in the loop's thread."""
        self._newest = tick
        for topics, state in zip(self._arms, tick.states, strict=True):
            topics.publish(state.stamp_ns, state.position, state.velocity, state.effort)

    def _go(self, index: int, message: JointState) -> None:
        try:
            self._require_active()
            tick = self._newest
            if tick is None or tick.sent is None:
                raise UnavailableError("the arms are off", "enable them first")
            arm, part = self._embodiment.slices()[index]
            goal = tick.sent.copy()
            wanted = arm_positions(message, arm)
            goal[part][: len(wanted)] = wanted
            distance = np.abs(goal - tick.sent) / (_SPEED * self._embodiment.velocity_limits())
            duration_s = max(_SHORTEST_S, float(distance.max()))
            self._loop.play(Trajectory(time.monotonic(), duration_s, goal[None], time.time_ns()))
        except SimplevlaError as error:
            logger.warning("joint_ctrl_single refused: %s", error)

    def _enable(self, message: Bool) -> None:
        if not message.data:
            logger.warning("enable_flag false is refused: without power the arms drop; call ~/disable")
            return

        def enable() -> None:
            try:
                self._require_active()
                self._loop.enable()
            except SimplevlaError as error:
                logger.warning("enable_flag: %s", error)

        threading.Thread(target=enable, name="enable_flag", daemon=True).start()

    def _stop(self) -> str:
        self._loop.stop()
        return "all arms are stopped"

    def _reset(self) -> str:
        self._loop.reset()
        return "all arms are reset, their motors have no power"


class _OneArm:
    def __init__(self, node: Node, arm: Arm) -> None:
        self._names = [*(joint.name for joint in arm.joints), "gripper"]
        self._frame = f"{arm.name}_base_link"
        self._chain = Chain.from_urdf(share_dir() / "urdf" / arm.urdf, _FLANGE)
        self._states = [
            node.create_publisher(JointState, f"{arm.name}/{name}", 10)
            for name in ("joint_states_single", "joint_states_feedback")
        ]
        self._pose = node.create_publisher(Pose, f"{arm.name}/end_pose", 10)
        self._stamped = node.create_publisher(PoseStamped, f"{arm.name}/end_pose_stamped", 10)

    def publish(
        self,
        stamp_ns: int,
        position: NDArray[np.float64],
        velocity: NDArray[np.float64],
        effort: NDArray[np.float64],
    ) -> None:
        heard = [topic for topic in self._states if topic.get_subscription_count()]
        if heard:
            state = JointState(
                name=self._names,
                position=position.tolist(),
                velocity=velocity.tolist(),
                effort=effort.tolist(),
            )
            set_stamp(state.header.stamp, stamp_ns)
            for topic in heard:
                topic.publish(state)
        if self._pose.get_subscription_count() or self._stamped.get_subscription_count():
            pose = _pose(self._chain.forward(position[: len(self._chain.joint_names)]))
            stamped = PoseStamped(pose=pose)
            stamped.header.frame_id = self._frame
            set_stamp(stamped.header.stamp, stamp_ns)
            self._pose.publish(pose)
            self._stamped.publish(stamped)


def arm_positions(message: JointState, arm: Arm) -> NDArray[np.float64]:
    """Return the positions that a JointState wants of ``arm``: its joints, and its gripper if given.

    Args:
        message: names and positions; as the vendor's driver has it, without names in the arm's order.
        arm: whose joints they are.

    Raises:
        ChunkError: names or their number are wrong, or a value is not finite.
    """
    names = [*(joint.name for joint in arm.joints), "gripper"]
    given = dict(zip(message.name, message.position, strict=False)) or dict(
        zip(names, message.position, strict=False)
    )
    known: Sequence[str] = names if len(given) == len(names) else names[:-1]
    if set(given) != set(known) or len(message.position) != len(known):
        raise ChunkError(
            f"joint names are {', '.join(message.name) or 'missing'}, for {len(message.position)} values",
            f"send {', '.join(names)}; the gripper may be left out",
        )
    positions = np.array([given[name] for name in known], dtype=np.float64)
    if not np.isfinite(positions).all():
        raise ChunkError("a position is not finite", "send rad and m")
    return positions


def _pose(matrix: NDArray[np.float64]) -> Pose:
    pose = Pose()
    pose.position.x, pose.position.y, pose.position.z = matrix[:3, 3].tolist()
    turn = Rotation.from_matrix(matrix[:3, :3]).as_quat().tolist()
    pose.orientation.x, pose.orientation.y, pose.orientation.z, pose.orientation.w = turn
    return pose

"""Where an arm's tool is, how to bring it elsewhere, and what a policy's actions mean in joints."""

from simplevla.kinematics.action_space import from_joint_targets, to_joint_targets, tool_poses
from simplevla.kinematics.chain import Chain, arm_chain
from simplevla.kinematics.inverse import rotation_vector

__all__ = ["Chain", "arm_chain", "from_joint_targets", "rotation_vector", "to_joint_targets", "tool_poses"]

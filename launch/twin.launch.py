"""Bring everything up on the twin: no robot, no camera, no GPU.

    ros2 launch simplevla twin.launch.py --show-args
    ros2 launch simplevla twin.launch.py rig:=twin_single task:=move_can_pot seed:=3

The arguments of ``bringup.launch.py`` that mean something there; it refuses a robot's rig.
"""

from launch.actions import OpaqueFunction

from launch import LaunchDescription
from robot_bridge.bringup import TWIN_ARGUMENTS, Settings, require_twin
from robot_bridge.launching import bring_up, declared, given


def generate_launch_description():
    """Return the arguments, and what they lead to."""
    return LaunchDescription([*declared(TWIN_ARGUMENTS), OpaqueFunction(function=_bring_up)])


def _bring_up(context):
    settings = Settings.from_arguments(given(TWIN_ARGUMENTS, context))
    require_twin(settings)
    return bring_up(settings)

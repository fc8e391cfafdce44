"""Bring up twin or robot, policy server and bridge with ROS 2's own launch (Humble to Kilted).

    ros2 launch simplevla bringup.launch.py --show-args
    ros2 launch simplevla bringup.launch.py rig:=twin
    ros2 launch simplevla bringup.launch.py rig:=/etc/simplevla/rig.yaml server:=tcp://127.0.0.1:5555

What runs, and with which arguments, is described once, in ``robot_bridge.bringup``; ``simplevla up``
starts the same without ROS 2's launch. Motors stay off until someone calls ``arms/enable``. A robot
moves only with a valid session record, unless ``override_session_record:=true``. Ctrl-C stops motion
first; then each process waits for those that it must outlive.
"""

from launch.actions import OpaqueFunction

from launch import LaunchDescription
from robot_bridge.bringup import ARGUMENTS, Settings
from robot_bridge.launching import bring_up, declared, given


def generate_launch_description():
    """Return the arguments, and what they lead to."""
    return LaunchDescription([*declared(ARGUMENTS), OpaqueFunction(function=_bring_up)])


def _bring_up(context):
    return bring_up(Settings.from_arguments(given(ARGUMENTS, context)))

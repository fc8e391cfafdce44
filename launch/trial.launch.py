"""Bring everything up, make judged and recorded trials of the policy, and end.

    ros2 launch simplevla trial.launch.py --show-args
    ros2 launch simplevla trial.launch.py trials:=20 seed:=500
    ros2 launch simplevla trial.launch.py rig:=/etc/simplevla/rig.yaml server:=tcp://127.0.0.1:5555

On the twin the simulation judges; on a robot you do, at the terminal this was started from. The run's
folder gets a recording of each trial, an index and a report.
"""

from launch.actions import OpaqueFunction

from launch import LaunchDescription
from robot_bridge.bringup import ARGUMENTS, TRIAL_ARGUMENTS, Settings, trial_process
from robot_bridge.launching import bring_up, declared, given


def generate_launch_description():
    """Return the arguments, and what they lead to."""
    return LaunchDescription([*declared(ARGUMENTS + TRIAL_ARGUMENTS), OpaqueFunction(function=_bring_up)])


def _bring_up(context):
    settings = Settings.from_arguments(given(ARGUMENTS, context))
    return bring_up(settings, trial_process(settings, given(TRIAL_ARGUMENTS, context)))

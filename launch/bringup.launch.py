"""Bring up twin or robot, policy server and bridge with ROS 2's own launch (Humble to Kilted).

    ros2 launch simplevla bringup.launch.py --show-args
    ros2 launch simplevla bringup.launch.py rig:=twin
    ros2 launch simplevla bringup.launch.py rig:=/etc/simplevla/rig.yaml server:=tcp://127.0.0.1:5555

What runs, and with which arguments, is described once, in ``robot_bridge.bringup``; ``simplevla up``
starts the same without ROS 2's launch. Motors stay off until someone calls ``arms/enable``. A robot
moves only with a valid session record, unless ``override_session_record:=true``. Ctrl-C ends the
policy, and the arms brake and hold.
"""

from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    ExecuteProcess,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.event_handlers import OnProcessExit, OnProcessIO
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration

from launch import LaunchDescription
from robot_bridge.bringup import ARGUMENTS, READY, Settings, check, processes


def generate_launch_description():
    """Return the arguments, and what they lead to."""
    declared = [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.default,
            description=argument.description,
            **({"choices": list(argument.choices)} if argument.choices else {}),
        )
        for argument in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_bring_up)])


def _bring_up(context):
    """Return the actions: each process starts when those it waits for have said that they are ready."""
    values = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in ARGUMENTS}
    settings = Settings.from_arguments(values)
    check(settings)
    described = processes(settings)
    actions = {process.name: _action(process) for process in described}
    ready, started = set(), set()

    def start_what_can():
        able = [p for p in described if p.name not in started and ready.issuperset(p.after)]
        started.update(process.name for process in able)
        return [actions[process.name] for process in able]

    def listen(name):
        def hear(event):
            lines = event.text.decode(errors="replace").splitlines()
            if name in ready or not any(line.startswith(READY) for line in lines):
                return None
            ready.add(name)
            return start_what_can()

        return hear

    handlers = []
    for process in described:
        action = actions[process.name]
        handlers.append(
            RegisterEventHandler(OnProcessIO(target_action=action, on_stdout=listen(process.name)))
        )
        if process.required:
            ending = [
                LogInfo(msg=f"{process.name} has ended: ending everything"),
                EmitEvent(event=Shutdown(reason=f"{process.name} has ended")),
            ]
            handlers.append(RegisterEventHandler(OnProcessExit(target_action=action, on_exit=ending)))
    return [*handlers, *start_what_can()]


def _action(process):
    return ExecuteProcess(
        cmd=list(process.command),
        name=process.name,
        additional_env=process.env,
        output="both",
        sigterm_timeout="10",
        sigkill_timeout="5",
    )

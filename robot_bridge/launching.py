"""What :mod:`robot_bridge.bringup` describes, as actions of ROS 2's launch (Humble to Kilted).

Only the launch files import this, for ``launch`` comes with an installed ROS alone. Nothing here needs
launch_ros: a node is a process of the Python that runs the launch, whichever environment that is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    ExecuteProcess,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
    TimerAction,
)
from launch.event_handlers import OnProcessExit, OnProcessIO
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration

from robot_bridge.bringup import READY, Argument, Process, Settings, check, processes
from robot_bridge.respawn import DELAY_S, Respawns

_SIGTERM_S, _SIGKILL_S = "12", "5"  # after the shutdown; waiting for others takes up to 6 s


def declared(arguments: Sequence[Argument]) -> list[Any]:
    """Return the declarations of launch arguments, with their descriptions and choices."""
    return [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.default,
            description=argument.description,
            **({"choices": list(argument.choices)} if argument.choices else {}),
        )
        for argument in arguments
    ]


def given(arguments: Sequence[Argument], context: Any) -> dict[str, str]:
    """Return {argument: what was given for it, or its default}."""
    return {a.name: LaunchConfiguration(a.name).perform(context) for a in arguments}


def bring_up(settings: Settings, last: Process | None = None) -> list[Any]:
    """Return the actions: each process starts when those it waits for have said that they are ready.

    Args:
        settings: are checked first.
        last: starts when all others are ready; when it ends, everything ends.

    Raises:
        SimplevlaError: the settings are bad.
    """
    check(settings)
    described = processes(settings)
    if last is not None:
        described = [*described, last]
    return _BringUp(described).begin()


class _BringUp:
    def __init__(self, described: list[Process]) -> None:
        self._described = described
        self._ready: set[str] = set()
        self._started: set[str] = set()
        self._respawns = {process.name: Respawns() for process in described}

    def begin(self) -> list[Any]:
        return self._start_what_can()

    def _start_what_can(self) -> list[Any]:
        able = [
            p for p in self._described if p.name not in self._started and self._ready.issuperset(p.after)
        ]
        self._started.update(process.name for process in able)
        return [action for process in able for action in self._start(process)]

    def _start(self, process: Process) -> list[Any]:
        action = ExecuteProcess(
            cmd=list(process.command),
            name=process.name,
            additional_env=process.env,
            output="both",
            sigterm_timeout=_SIGTERM_S,
            sigkill_timeout=_SIGKILL_S,
        )
        heard = OnProcessIO(target_action=action, on_stdout=self._hear(process))
        ended = OnProcessExit(target_action=action, on_exit=self._end(process))
        return [RegisterEventHandler(heard), RegisterEventHandler(ended), action]

    def _hear(self, process: Process) -> Callable[[Any], list[Any] | None]:
        def hear(event: Any) -> list[Any] | None:
            lines = event.text.decode(errors="replace").splitlines()
            if process.name in self._ready or not any(line.startswith(READY) for line in lines):
                return None
            self._ready.add(process.name)
            return self._start_what_can()

        return hear

    def _end(self, process: Process) -> Callable[[Any, Any], list[Any] | None]:
        def end(event: Any, context: Any) -> list[Any] | None:
            if context.is_shutdown:
                return None
            name = process.name
            if process.respawn and name in self._ready and self._respawns[name].allowed():
                again = OpaqueFunction(function=lambda _: self._start(process))
                said = f"{name} has ended with status {event.returncode}: it is started again"
                return [LogInfo(msg=said), TimerAction(period=DELAY_S, actions=[again])]
            if not process.required:
                return [LogInfo(msg=f"{name} has ended: the others go on")]
            reason = f"{name} has ended with status {event.returncode}"
            return [LogInfo(msg=f"{reason}: ending everything"), EmitEvent(event=Shutdown(reason=reason))]

        return end

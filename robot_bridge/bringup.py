"""The one description of what runs: read by ``launch/bringup.launch.py`` and by ``simplevla up``.

Which processes there are, with which command and environment, what each waits for, and in which order
they end. Nothing is started here, and nothing heavy is imported.
"""

from __future__ import annotations

import datetime
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from robot_bridge.execution_modes import Execution, ExecutionMode
from robot_bridge.rig import Rig, load_rig
from simplevla.cli import require_choice
from simplevla.embodiment import Embodiment, require_same
from simplevla.errors import ConfigError, MissingExtraError, RecordError
from simplevla.files import share_dir

logger = logging.getLogger(__name__)

LOCAL = "local"
DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"
READY = "ready"
MAX_RECORD_AGE_S = 24 * 3600.0

_TRUTH = ("false", "true")
_LEVELS = ("debug", "info", "warning", "error")
_BACKENDS = ("onnxruntime", "torch")
EXECUTIONS = tuple(mode.value for mode in ExecutionMode)
_HARDWARE_DOMAIN = 0  # ROS's own default
_TWIN_DOMAIN = 77  # so that a twin never meets the robot that the same PC drives
_HARDWARE_AGE_S = 0.1
_TWIN_AGE_S = 0.5  # a busy machine pauses its twin for longer than a bus may ever be silent


@dataclass(frozen=True)
class Argument:
    """One launch argument, which is also an option of ``simplevla up``; no choices: any text."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


ARGUMENTS = (
    Argument(
        "rig",
        "twin",
        "which robot, and with it which arms and cameras: the name of a rig in config/rig (twin, "
        "twin_single, hardware) or a path to a .yaml file",
    ),
    Argument("task", "move_can_pot", "task of the policy and of the twin's scene"),
    Argument("bundle", "", "folder of the policy bundle; empty: bundles/<task> that ships"),
    Argument(
        "server", LOCAL, f"'{LOCAL}' starts a policy server, an address such as {DEFAULT_ADDRESS} uses one"
    ),
    Argument("address", DEFAULT_ADDRESS, "where the local policy server listens"),
    Argument("backend", "onnxruntime", "what computes the network in the local policy server", _BACKENDS),
    Argument(
        "execution",
        "synchronous",
        "how chunks become motion: hold and look between them, the same after part of each, or ask while "
        "moving and average, or splice",
        EXECUTIONS,
    ),
    Argument(
        "horizon", "0", "actions played of each answer, receding or in real time; 0: as the mode has it"
    ),
    Argument("cameras", "", "cameras to start, by commas; empty: all of the rig"),
    Argument("seed", "0", "decides the twin's first scene"),
    Argument("namespace", "", "ROS namespace of every node"),
    Argument("record", "false", "record every topic of the run to MCAP from the start", _TRUTH),
    Argument("out", "", "folder of the run's logs and recordings; empty: runs/<time>"),
    Argument("log_level", "info", "how much to log; debug also shows it on the terminal", _LEVELS),
    Argument(
        "session_record",
        "runs/session.json",
        "the last calibration's record: where cameras and arms stand and how late they are; metal moves "
        "only with a valid one, a twin uses one that is valid for it",
    ),
    Argument("override_session_record", "false", "move metal without a valid session record", _TRUTH),
)


def run_folder() -> Path:
    """Return ``runs/<time>``."""
    return Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


@dataclass(frozen=True)
class Settings:
    """The arguments, typed; names and defaults are those of :data:`ARGUMENTS`.

    Attributes:
        out: folder of the run, which may exist.
    """

    rig: str = "twin"
    task: str = "move_can_pot"
    bundle: Path | None = None
    server: str = LOCAL
    address: str = DEFAULT_ADDRESS
    backend: str = "onnxruntime"
    execution: str = "synchronous"
    horizon: int = 0
    cameras: tuple[str, ...] = ()
    seed: int = 0
    namespace: str = ""
    record: bool = False
    out: Path = field(default_factory=run_folder)
    log_level: str = "info"
    session_record: Path = Path("runs/session.json")
    override_session_record: bool = False

    @classmethod
    def from_arguments(cls, values: Mapping[str, str]) -> Settings:
        """Return the settings that texts by argument name ask for; what is missing has its default.

        Raises:
            ConfigError: a value is none of the choices, or no number.
        """
        texts = {argument.name: values.get(argument.name, argument.default) for argument in ARGUMENTS}
        for argument in ARGUMENTS:
            if argument.choices:
                require_choice(argument.name, texts[argument.name], argument.choices)
        for name in ("seed", "horizon"):
            if not texts[name].isdecimal():
                raise ConfigError(f"{name} is {texts[name]!r}", "give a whole number that is not negative")
        return cls(
            rig=texts["rig"],
            task=texts["task"],
            bundle=Path(texts["bundle"]) if texts["bundle"] else None,
            server=texts["server"],
            address=texts["address"],
            backend=texts["backend"],
            execution=texts["execution"],
            horizon=int(texts["horizon"]),
            cameras=tuple(name for name in texts["cameras"].replace(" ", "").split(",") if name),
            seed=int(texts["seed"]),
            namespace=texts["namespace"].strip("/"),
            record=texts["record"] == "true",
            out=Path(texts["out"]) if texts["out"] else run_folder(),
            log_level=texts["log_level"],
            session_record=Path(texts["session_record"]),
            override_session_record=texts["override_session_record"] == "true",
        )

    @property
    def is_local(self) -> bool:
        """Whether a policy server is started."""
        return self.server == LOCAL

    @property
    def server_address(self) -> str:
        """Where the policy server is, started or not."""
        return self.address if self.is_local else self.server

    @property
    def bundle_path(self) -> Path:
        """The bundle to serve."""
        return self.bundle if self.bundle is not None else share_dir() / "bundles" / self.task


@dataclass(frozen=True)
class Process:
    """One process.

    Attributes:
        name: of the process and of its log.
        command: what to run, without a shell. It prints a line that starts with ``ready`` when it is.
        env: what is set in its environment beyond the caller's.
        after: names of the processes that must be ready before it starts.
        required: the run ends when it ends.
        stop_order: processes with lower numbers end first, so that nothing asks for motion any more
            when the arms are asked to hold, and the arms end before what they stand on.
        ready_timeout_s: how long it may take to be ready.
    """

    name: str
    command: tuple[str, ...]
    env: dict[str, str]
    after: tuple[str, ...] = ()
    required: bool = True
    stop_order: int = 0
    ready_timeout_s: float = 60.0


def processes(settings: Settings) -> list[Process]:
    """Return what runs under ``settings``, each process after those that it waits for."""
    rig = load_rig(settings.rig)
    env = environment(settings, rig)
    found: list[Process] = []
    if rig.is_twin:
        scene = ("--task", settings.task, "--seed", str(settings.seed))
        found.append(
            Process(
                "twin",
                _simplevla(settings, "twin", "--rig", settings.rig, *scene),
                env,
                stop_order=4,
                ready_timeout_s=120,
            )
        )
    if settings.is_local:
        serve = ("serve", str(settings.bundle_path), "--backend", settings.backend)
        compiled = ("--compile",) if settings.backend != "torch" else ()
        found.append(
            Process(
                "server",
                _simplevla(settings, *serve, "--address", settings.address, *compiled),
                env,
                stop_order=3,
                ready_timeout_s=600,
            )
        )
    twin = ("twin",) if rig.is_twin else ()
    record = _valid_record(settings, rig)
    arms = {
        "rig": settings.rig,
        "max_feedback_age_s": str(_TWIN_AGE_S if rig.is_twin else _HARDWARE_AGE_S),
        "session_record": record,
    }
    found.append(Process("arms", _node(settings, "arms", arms), env, after=twin, stop_order=2))
    if settings.record:
        where = {"rig": settings.rig, "out": str(settings.out)}
        found.append(
            Process("recorder", _node(settings, "recorder", where), env, required=False, stop_order=1)
        )
    policy = {
        "rig": settings.rig,
        "server": settings.server_address,
        "cameras": ",".join(settings.cameras),
        "task": settings.task,
        "session_record": record,
        "execution": settings.execution,
        "horizon": str(settings.horizon),
    }
    server = ("server",) if settings.is_local else ()
    found.append(
        Process("policy", _node(settings, "policy", policy), env, after=twin + server, stop_order=0)
    )
    return found


def environment(settings: Settings, rig: Rig) -> dict[str, str]:
    """Return what every process needs in its environment and the caller's does not have.

    With ROS from wheels nothing has set the ament prefix. Discovery stays on this machine unless it
    was widened on purpose.
    """
    defaults = {
        "AMENT_PREFIX_PATH": sys.prefix,
        "ROS_DOMAIN_ID": str(_TWIN_DOMAIN if rig.is_twin else _HARDWARE_DOMAIN),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "OMP_NUM_THREADS": "1",
        "LP_NUM_THREADS": "1",
    }
    missing = {name: value for name, value in defaults.items() if not os.environ.get(name)}
    return {**missing, "SIMPLEVLA_LOG_LEVEL": settings.log_level, "PYTHONUNBUFFERED": "1"}


def check(settings: Settings) -> None:
    """Check everything that can be checked before a process starts or a file is written.

    Raises:
        SimplevlaError: what is wrong, and what to do about it.
    """
    if importlib.util.find_spec("rclpy") is None:
        raise MissingExtraError("rclpy", "ros_wheels")
    Execution(ExecutionMode(settings.execution), settings.horizon)
    rig = load_rig(settings.rig)
    embodiment = rig.load_embodiment()
    known = [camera.name for camera in embodiment.cameras]
    for name in settings.cameras:
        require_choice("camera", name, known)
    if not rig.is_twin and not settings.override_session_record:
        try:
            _require_record(settings, rig)
        except RecordError as error:
            raise RecordError(
                f"rig {rig.name} may not move: {error.message}",
                f"{error.remedy}; or set override_session_record, and move arms that nothing has checked",
            ) from error
    needed = (
        _check_bundle(settings, embodiment) if settings.is_local else _check_server(settings, embodiment)
    )
    for name in needed:
        if settings.cameras and name not in settings.cameras:
            raise ConfigError(f"the policy needs camera {name!r}, which is left out", "start that camera")


def _check_bundle(settings: Settings, embodiment: Embodiment) -> tuple[str, ...]:
    """Return the cameras that the bundle needs, after checking that it fits robot and task."""
    from simplevla.bundle import load_bundle

    if settings.bundle is None:
        shipped = sorted(path.parent.name for path in (share_dir() / "bundles").glob("*/manifest.json"))
        require_choice("task", settings.task, shipped)
    manifest = load_bundle(settings.bundle_path).manifest
    require_same(manifest.embodiment, embodiment, have_is="the bundle's", want_is="the rig's")
    require_choice("task", settings.task, sorted(manifest.instructions))
    return manifest.cameras


def _check_server(settings: Settings, embodiment: Embodiment) -> tuple[str, ...]:
    """Return the cameras that the served policy needs, after checking that it fits robot and task."""
    from policy_server.client import PolicyClient, keys_for

    with PolicyClient(settings.server, embodiment=embodiment, keys=keys_for(settings.server)) as client:
        require_choice("task", settings.task, sorted(client.info.instructions))
        return tuple(need.name for need in client.info.cameras)


def _valid_record(settings: Settings, rig: Rig) -> str:
    """Return the path of a session record that is true for this rig now; empty if there is none."""
    try:
        _require_record(settings, rig)
    except RecordError as error:
        logger.info("nominal poses and delays are used: %s", error.message)
        return ""
    return str(settings.session_record.resolve())


def _require_record(settings: Settings, rig: Rig) -> None:
    from simplevla.session_record import load_session_record, require_valid

    require_valid(
        load_session_record(settings.session_record),
        embodiment=rig.embodiment,
        serials=rig.cameras,
        now_ns=time.time_ns(),
        max_age_s=MAX_RECORD_AGE_S,
    )


def _simplevla(settings: Settings, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "simplevla", "--log-level", settings.log_level, *words)


def _node(settings: Settings, module: str, parameters: Mapping[str, str]) -> tuple[str, ...]:
    command = [sys.executable, "-m", f"robot_bridge.nodes.{module}", "--ros-args"]
    if settings.namespace:
        command += ["-r", f"__ns:=/{settings.namespace}"]
    for name, value in parameters.items():
        if value:
            command += ["-p", f"{name}:={value}"]
    return tuple(command)

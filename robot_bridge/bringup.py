"""The one description of what runs: read by ``launch/bringup.launch.py`` and by ``simplevla up``.

Which processes there are, with which command and environment, what each waits for, and in which order
they end. Nothing is started here, and nothing heavy is imported.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from robot_bridge.execution_modes import Execution, ExecutionMode
from robot_bridge.order import place_in_order
from robot_bridge.rig import Rig, load_rig, named
from simplevla.cli import require_choice
from simplevla.embodiment import Embodiment, require_same
from simplevla.errors import ConfigError, MissingExtraError, RecordError
from simplevla.files import share_dir

logger = logging.getLogger(__name__)

LOCAL = "local"
NO_SERVER = "none"
DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"
READY = "ready"
KEYS = "SIMPLEVLA_KEYS"  # where policy_server.keys looks
MAX_RECORD_AGE_S = 24 * 3600.0

_TRUTH = ("false", "true")
_LEVELS = ("debug", "info", "warning", "error")
_BACKENDS = ("onnxruntime", "torch")
EXECUTIONS = tuple(mode.value for mode in ExecutionMode)
_HARDWARE_DOMAIN = 0  # ROS's own default
_TWIN_DOMAIN = 77  # so that a twin never meets the robot that the same PC drives
_HARDWARE_AGE_S = 0.04  # a lost bus is found within 50 ms
_HARDWARE_STOP_S, _TWIN_STOP_S = 1.0, 5.0
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
    Argument("arms", "", "arms to drive, by commas, such as left; empty: all of the rig"),
    Argument("task", "move_can_pot", "task of the policy and of the twin's scene"),
    Argument("bundle", "", "folder of the policy bundle; empty: bundles/<task> that ships"),
    Argument(
        "server",
        LOCAL,
        f"'{LOCAL}' starts a policy server, an address such as {DEFAULT_ADDRESS} uses one, '{NO_SERVER}' "
        "brings arms and cameras up without a policy",
    ),
    Argument(
        "keys",
        "",
        "folder of this robot's keys for a server on another machine (simplevla keys); empty: that of "
        "SIMPLEVLA_KEYS, if any",
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
    Argument(
        "faults", "false", "offer services that make things go wrong (docs/faults.md); a twin alone", _TRUTH
    ),
    Argument("namespace", "", "ROS namespace of every node"),
    Argument(
        "params_file",
        "",
        "YAML of the nodes' parameters, as config/nodes.yaml; what a launch argument says wins",
    ),
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
TWIN_ARGUMENTS = tuple(
    argument
    for argument in ARGUMENTS
    if argument.name not in ("keys", "session_record", "override_session_record")
)
TRIAL_ARGUMENTS = (
    Argument("trials", "5", "how many trials"),
    Argument("first_seed", "10000", "seed of the first trial; the next have the seeds that follow"),
    Argument("step_limit", "200", "actions after which a trial has failed"),
    Argument("operator", "", "who makes the trials; empty: the user's name"),
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
    arms: tuple[str, ...] = ()
    task: str = "move_can_pot"
    bundle: Path | None = None
    server: str = LOCAL
    keys: Path | None = None
    address: str = DEFAULT_ADDRESS
    backend: str = "onnxruntime"
    execution: str = "synchronous"
    horizon: int = 0
    cameras: tuple[str, ...] = ()
    seed: int = 0
    faults: bool = False
    namespace: str = ""
    params_file: Path | None = None
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
            arms=tuple(named(texts["arms"])),
            task=texts["task"],
            bundle=Path(texts["bundle"]) if texts["bundle"] else None,
            server=texts["server"],
            keys=Path(texts["keys"]).expanduser() if texts["keys"] else None,
            address=texts["address"],
            backend=texts["backend"],
            execution=texts["execution"],
            horizon=int(texts["horizon"]),
            cameras=tuple(named(texts["cameras"])),
            seed=int(texts["seed"]),
            faults=texts["faults"] == "true",
            namespace=texts["namespace"].strip("/"),
            params_file=Path(texts["params_file"]).expanduser() if texts["params_file"] else None,
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
        env: what is set in its environment beyond the caller's; with it, its place in the order of ending.
        after: names of the processes that must be ready before it starts.
        required: the run ends when it ends, and is not started again in time.
        respawn: it is started again when it ends by itself. Not what stands for metal: an arms' node that
            comes back is off until a person enables the arms.
        stop_order: processes with lower numbers are asked to end first, those with the same one together;
            what outlives whom within that is in ``env`` (:mod:`robot_bridge.order`).
        ready_timeout_s: how long it may take to be ready.
    """

    name: str
    command: tuple[str, ...]
    env: dict[str, str]
    after: tuple[str, ...] = ()
    required: bool = True
    respawn: bool = False
    stop_order: int = 0
    ready_timeout_s: float = 60.0


def processes(settings: Settings) -> list[Process]:
    """Return what runs under ``settings``, each process after those that it waits for.

    At the end the arms brake and hold at once, and the policy ends; then the arms' process, the recorder,
    which has heard that, the server, and the twin, on whose bus the arms stood.
    """
    rig = load_rig(settings.rig)
    env = environment(settings, rig)
    run = hashlib.sha256(str(settings.out.resolve()).encode()).hexdigest()[:16]

    def placed(name: str, *outlives: str) -> dict[str, str]:
        return env | place_in_order(run, name, outlives)

    found: list[Process] = []
    if rig.is_twin:
        scene = ("--task", settings.task, "--seed", str(settings.seed))
        found.append(
            Process(
                "twin",
                _simplevla(settings, "twin", "--rig", settings.rig, *scene),
                placed("twin", "policy", "arms"),
                stop_order=3,
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
                placed("server"),
                respawn=True,
                stop_order=2,
                ready_timeout_s=600,
            )
        )
    twin = ("twin",) if rig.is_twin else ()
    server = ("server",) if settings.is_local else ()
    record = _valid_record(settings, rig)
    robot = {"rig": settings.rig, "arms": ",".join(settings.arms), "session_record": record}
    bounds = {
        "max_feedback_age_s": str(_TWIN_AGE_S if rig.is_twin else _HARDWARE_AGE_S),
        "stop_silent_after_s": str(_TWIN_STOP_S if rig.is_twin else _HARDWARE_STOP_S),
    }
    found.append(
        Process(
            "arms",
            _node(settings, "arms", robot, defaults=bounds),
            placed("arms", "policy"),
            after=twin,
            respawn=True,
        )
    )
    found.append(
        Process(
            "transforms",
            _node(settings, "transforms", robot),
            placed("transforms"),
            required=False,
            respawn=True,
            stop_order=1,
        )
    )
    if settings.faults:
        found.append(
            Process(
                "faults",
                _node(settings, "faults", {"rig": settings.rig}),
                placed("faults"),
                after=twin,
                required=False,
                respawn=True,
                stop_order=1,
            )
        )
    if settings.record:
        where = {"rig": settings.rig, "out": str(settings.out)}
        found.append(
            Process(
                "recorder",
                _node(settings, "recorder", where),
                placed("recorder", "policy", "arms"),
                required=False,
                respawn=True,
                stop_order=1,
            )
        )
    policy = {
        **robot,
        "server": settings.server_address,
        "cameras": ",".join(settings.cameras),
        "task": settings.task if settings.server != NO_SERVER else "",
        "execution": settings.execution,
        "horizon": str(settings.horizon),
    }
    found.append(
        Process(
            "policy",
            _node(settings, "policy", policy),
            placed("policy"),
            after=twin + server,
            respawn=True,
        )
    )
    return found


def trial_process(settings: Settings, values: Mapping[str, str]) -> Process:
    """Return the process that makes trials with everything that runs under ``settings``.

    Args:
        settings: of the rest.
        values: {argument of TRIAL_ARGUMENTS: text}; ``simplevla trial`` checks them.
    """
    options = {
        "rig": settings.rig,
        "task": settings.task,
        "bundle": str(settings.bundle or ""),
        "server": "" if settings.is_local else settings.server,
        "namespace": settings.namespace,
        "execution": settings.execution,
        "horizon": str(settings.horizon),
        "out": str(settings.out / "trials"),
        "trials": values["trials"],
        "seed": values["first_seed"],
        "step-limit": values["step_limit"],
        "operator": values["operator"],
    }
    words = [word for name, value in options.items() if value for word in (f"--{name}", value)]
    env = environment(settings, load_rig(settings.rig))
    everyone = tuple(process.name for process in processes(settings))
    return Process("trial", _simplevla(settings, "trial", "--attach", *words), env, after=everyone)


def require_twin(settings: Settings) -> None:
    """Check that the rig is a twin's.

    Raises:
        ConfigError: it is not.
    """
    if not load_rig(settings.rig).is_twin:
        raise ConfigError(
            f"the rig {settings.rig} is no twin's",
            "use bringup.launch.py without faults, or: rig:=twin, rig:=twin_single",
        )


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
    keys = {KEYS: str(settings.keys.resolve())} if settings.keys is not None else {}
    return {**missing, **keys, "SIMPLEVLA_LOG_LEVEL": settings.log_level, "PYTHONUNBUFFERED": "1"}


def check(settings: Settings) -> None:
    """Check everything that can be checked before a process starts or a file is written.

    Raises:
        SimplevlaError: what is wrong, and what to do about it.
    """
    if importlib.util.find_spec("rclpy") is None:
        raise MissingExtraError("rclpy", "ros_wheels")
    Execution(ExecutionMode(settings.execution), settings.horizon)
    if settings.faults:
        require_twin(settings)
    rig = load_rig(settings.rig).with_arms(settings.arms)
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
    if settings.params_file is not None:
        check_params_file(settings.params_file)
    if settings.keys is not None and not settings.keys.is_dir():
        raise ConfigError(f"there is no folder of keys {settings.keys}", "simplevla keys new NAME")
    if settings.server == NO_SERVER:
        return
    needed = (
        _check_bundle(settings, embodiment) if settings.is_local else _check_server(settings, embodiment)
    )
    for name in needed:
        if settings.cameras and name not in settings.cameras:
            raise ConfigError(f"the policy needs camera {name!r}, which is left out", "start that camera")


def check_params_file(path: Path) -> None:
    """Check that a file has the shape of ROS 2's parameter files; what it names, each node checks.

    Raises:
        ConfigError: it is missing, no YAML, or has another shape.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "give a YAML file") from error
    nodes = content.values() if isinstance(content, dict) else ()
    if not nodes or not all(isinstance(node, dict) and set(node) == {"ros__parameters"} for node in nodes):
        raise ConfigError(
            f"{path} is no file of ROS 2 parameters",
            "write it as config/nodes.yaml is written",
        )


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
    from policy_server.client import ClientKeys, PolicyClient, keys_for

    keys = ClientKeys.find(settings.keys) if settings.keys is not None else keys_for(settings.server)
    with PolicyClient(settings.server, embodiment=embodiment, keys=keys) as client:
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


def _node(
    settings: Settings,
    module: str,
    parameters: Mapping[str, str],
    *,
    defaults: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Return the command of a node; the file of parameters wins over ``defaults``, the others over it."""
    command = [sys.executable, "-m", f"robot_bridge.nodes.{module}", "--ros-args"]
    if settings.namespace:
        command += ["-r", f"__ns:=/{settings.namespace}"]
    command += _parameters(defaults or {})
    if settings.params_file is not None:
        command += ["--params-file", str(settings.params_file.resolve())]
    return (*command, *_parameters(parameters))


def _parameters(values: Mapping[str, str]) -> list[str]:
    return [word for name, value in values.items() if value for word in ("-p", f"{name}:={value}")]

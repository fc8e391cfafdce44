"""What a run of trials is to be: its settings, and what they lead to once all of it was found good.

Everything that can be checked is checked here, before a process starts or a file is written.
"""

from __future__ import annotations

import getpass
import time
from dataclasses import dataclass
from pathlib import Path

from policy_server.client import PolicyClient, keys_for
from robot_bridge import bringup
from robot_bridge.rig import Rig, load_rig
from robot_bridge.scene import has_operator
from simplevla import __version__
from simplevla.bundle import MANIFEST, Bundle, load_bundle
from simplevla.cli import require_choice
from simplevla.embodiment import Embodiment, require_same
from simplevla.errors import BundleError, ConfigError
from simplevla.files import share_dir
from simplevla.trial import RunInfo


@dataclass(frozen=True)
class TrialSettings:
    """What to try, with what, and how often.

    Attributes:
        task: name of the task.
        bundle: the policy; the one that ships for the task by default.
        rig: name of a rig in ``config/rig``, or a path to a .yaml file.
        trials: how many.
        seed: of the first trial; the next have the seeds that follow. The default is the first
            start of the evaluation in simulation, so that the two can be compared start by start.
        step_limit: actions after which a trial fails; RoboTwin gives ``move_can_pot`` 200.
        backend: of the policy server that is started.
        execution: how chunks become motion; see :mod:`robot_bridge.execution_modes`.
        horizon: actions played of each answer; 0 as the mode has it.
        server: address of a policy server that runs already; none is started then.
        attach: use a stack that runs already, on the rig's own ports, instead of starting one.
        namespace: ROS namespace of the stack.
        session_record: the last calibration's record; metal moves only with a valid one.
        override_session_record: move metal without one.
        operator: who makes the trials; the user's name by default.
        out: folder of the run, new or empty; ``runs/<time>`` by default.
    """

    task: str = "move_can_pot"
    bundle: Path | None = None
    rig: str = "twin"
    trials: int = 5
    seed: int = 10_000
    step_limit: int = 200
    backend: str = "onnxruntime"
    execution: str = "synchronous"
    horizon: int = 0
    server: str | None = None
    attach: bool = False
    namespace: str = ""
    session_record: Path = Path("runs/session.json")
    override_session_record: bool = False
    operator: str = ""
    out: Path | None = None


@dataclass(frozen=True)
class Plan:
    """Settings that were found good, with everything they name."""

    settings: TrialSettings
    rig: Rig
    embodiment: Embodiment
    bundle: Bundle
    instruction: str
    out: Path

    @property
    def patience_s(self) -> float:
        """Wall-clock bound of a trial: generous, for a part that hangs without saying so."""
        return 60.0 + 5.0 * self.settings.step_limit * self.bundle.manifest.dt_s

    @property
    def operator(self) -> str:
        """Who makes the trials."""
        if self.settings.operator:
            return self.settings.operator
        try:
            return getpass.getuser()
        except (KeyError, OSError):
            return "unknown"

    def bringup_settings(self) -> bringup.Settings:
        """Return what has to run for the trials."""
        settings = self.settings
        return bringup.Settings(
            rig=settings.rig,
            task=settings.task,
            bundle=self.bundle.path,
            server=settings.server or bringup.LOCAL,
            backend=settings.backend,
            execution=settings.execution,
            horizon=settings.horizon,
            seed=settings.seed,
            namespace=settings.namespace,
            out=self.out,
            session_record=settings.session_record,
            override_session_record=settings.override_session_record,
        )

    def run_info(self) -> RunInfo:
        """Return what the index says of the whole run."""
        manifest = self.bundle.manifest
        return RunInfo(
            task=self.settings.task,
            instruction=self.instruction,
            rig=self.rig.name,
            embodiment=self.embodiment.name,
            operator=self.operator,
            policy_name=manifest.name,
            policy_id=self.bundle.id,
            policy_commit=manifest.provenance.commit,
            demonstrations=manifest.provenance.demonstrations,
            evaluation=manifest.provenance.evaluation,
            backend=self.settings.backend,
            step_limit=self.settings.step_limit,
            started_ns=time.time_ns(),
            version=__version__,
        )


def prepare(settings: TrialSettings) -> Plan:
    """Check everything that can be checked before a process starts or a file is written.

    Raises:
        SimplevlaError: what is wrong, and what to do about it.
    """
    if settings.trials < 1 or settings.step_limit < 1 or settings.seed < 0:
        raise ConfigError("trials and the step limit must be positive, the seed not negative", "correct it")
    rig = load_rig(settings.rig)
    embodiment = rig.load_embodiment()
    bundle = load_bundle(settings.bundle or _shipped_bundle(settings.task))
    instructions = bundle.manifest.instructions
    require_choice("task", settings.task, sorted(instructions))
    require_same(bundle.manifest.embodiment, embodiment, have_is="the bundle's", want_is="the rig's")
    if settings.server is not None:
        _check_server(settings.server, embodiment, bundle)
    if not rig.is_twin and not has_operator():
        raise ConfigError("trials on a robot need an operator at a terminal", "run this from a terminal")
    out = settings.out or bringup.run_folder()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty", "choose another folder for the run")
    plan = Plan(settings, rig, embodiment, bundle, instructions[settings.task], out)
    if not settings.attach:
        bringup.check(plan.bringup_settings())
    return plan


def _shipped_bundle(task: str) -> Path:
    folder = share_dir() / "bundles"
    shipped = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if not shipped:
        raise BundleError("no policy bundle ships with this installation", "name one with --bundle")
    return folder / require_choice("task", task, shipped)


def _check_server(address: str, embodiment: Embodiment, bundle: Bundle) -> None:
    with PolicyClient(address, embodiment=embodiment, keys=keys_for(address)) as client:
        if client.info.policy_id != bundle.id:
            raise ConfigError(
                f"the server at {address} serves {client.info.name!r} ({client.info.policy_id[:12]}), "
                f"not the bundle {bundle.path} ({bundle.id[:12]})",
                "serve that bundle, or name the one that is served",
            )

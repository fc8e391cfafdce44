"""A twin to calibrate: its own process, on ports of its own, with the pictures that calibration wants."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import yaml

from calibration.guide import TwinGuide
from calibration.settings import Settings
from robot_bridge.rig import Rig, save_rig, with_free_ports
from robot_bridge.twin.control import TwinControl
from robot_bridge.twin.metal import EMPTY_TABLE, Metal
from simplevla.errors import ConfigError, UnavailableError
from simplevla.files import write_atomic

_START_S = 240.0  # of a busy machine; seconds are usual
_END_S = 8.0
_ANSWER_S = 30.0  # a busy machine draws a new scene slowly


@dataclass(frozen=True)
class TwinToCalibrate:
    """A running twin.

    Attributes:
        rig: how to reach it; its embodiment has the cameras as calibration streams them.
        guide: does what a person does at a robot.
    """

    rig: Rig
    guide: TwinGuide


@contextlib.contextmanager
def running_twin(
    rig: Rig, settings: Settings, folder: Path, *, metal: Metal | None = None
) -> Iterator[TwinToCalibrate]:
    """Yield a twin of ``rig`` that runs inside the block.

    Args:
        rig: a twin's rig; its ports are not used.
        settings: what calibration uses.
        folder: gets the twin's rig, embodiment, metal, board and log.
        metal: how its metal differs from the embodiment.

    Raises:
        ConfigError: the rig is not a twin's.
        UnavailableError: the twin does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    embodiment = folder / "embodiment.yaml"
    streamed = settings.streamed(rig.load_embodiment())
    write_atomic(embodiment, yaml.safe_dump(msgspec.to_builtins(streamed), sort_keys=False).encode())
    private = msgspec.structs.replace(with_free_ports(rig), embodiment=str(embodiment.resolve()))
    save_rig(private, folder / "rig.yaml")
    command = [sys.executable, "-m", "simplevla", "twin", "--rig", str(folder / "rig.yaml")]
    command += ["--task", EMPTY_TABLE]
    if metal is not None:
        text = yaml.safe_dump(msgspec.to_builtins(metal), sort_keys=False)
        write_atomic(folder / "metal.yaml", text.encode())
        command += ["--metal", str(folder / "metal.yaml")]
    if private.twin is None:
        raise ConfigError(f"rig {rig.name!r} is not a twin's", "use the rig: twin")
    with (
        _process(command, folder / "twin.log"),
        TwinGuide(TwinControl(private.twin.control, timeout_s=_ANSWER_S), settings, folder) as guide,
    ):
        yield TwinToCalibrate(private, guide)


@contextlib.contextmanager
def _process(command: list[str], log: Path) -> Iterator[None]:
    """Run a process that says ``ready`` while the block runs; what it says goes to ``log``."""
    ready = threading.Event()
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

        def read() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                stream.write(line)
                stream.flush()
                if line.startswith("ready"):
                    ready.set()
            ready.set()  # it has ended: nobody shall wait for it

        reader = threading.Thread(target=read, name="twin-log", daemon=True)
        reader.start()
        try:
            if not ready.wait(_START_S) or child.poll() is not None:
                raise UnavailableError("the twin does not start", f"see {log}")
            yield
        finally:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(_END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            reader.join(1.0)

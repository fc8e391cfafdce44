"""The folder of a training run: what lies where, whose it is, and when each stage was made.

    config.json             the configuration; a run of another one is refused
    run.json                where it began: commit, version, machine
    stages.jsonl            one line for each stage that was made
    demonstrations/         the expert's episodes
    pictures.safetensors    pictures of random scenes
    encoder.safetensors     a network whose encoder was pretrained; encoder.json, how well it sees
    policy-0/               fine-tuned: bundle, history.json; policy-1/ after the first corrections, ...
    corrections-1/          ...
    before.json             evaluation before reinforcement learning
    grpo/                   history.jsonl, checkpoints, tensorboard
    policy-grpo/            the bundle after it
    evaluation.json         the final evaluation
    splits.json             evaluation on seen and held-out scenes
    videos/                 before.webp, after.webp
    bundle/                 the result
    training_report.html    made from everything above; learning_curve.png

What training keeps of a run under ``results/`` has the same layout, with the large files left out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from sim_training.demonstrations import MANIFEST
from sim_training.training_config import TrainingConfig
from simplevla import __version__
from simplevla.errors import ConfigError, UnavailableError
from simplevla.files import share_dir, write_atomic

CONFIG, ORIGIN, STAGES = "config.json", "run.json", "stages.jsonl"
DEMONSTRATIONS, DEMONSTRATIONS_DONE = "demonstrations", f"demonstrations/{MANIFEST}"
PICTURES = "pictures.safetensors"
ENCODER, ENCODER_ERRORS = "encoder.safetensors", "encoder.json"
BEFORE, EVALUATION = "before.json", "evaluation.json"
GRPO, GRPO_POLICY = "grpo", "policy-grpo/bundle"
BUNDLE, VIDEOS = "bundle", "videos"
REPORT, CURVE = "training_report.html", "learning_curve.png"


def policy(number: int) -> str:
    """Return where the bundle lies that was fine-tuned after ``number`` rounds of corrections."""
    return f"policy-{number}/bundle"


def corrections_folder(number: int) -> str:
    """Return where the corrections of round ``number`` lie, counted from 1."""
    return f"corrections-{number}"


def corrections(number: int) -> str:
    """Return the file that is there when the corrections of round ``number`` are complete."""
    return f"{corrections_folder(number)}/{MANIFEST}"


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where and with what a run began."""

    started_ns: int
    commit: str
    version: str
    machine: str


class StageEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A stage that was made, in how much time by the call that finished it, and what came out."""

    stage: str
    seconds: float
    finished_ns: int
    outcome: str


@contextlib.contextmanager
def claim(folder: Path, config: TrainingConfig) -> Iterator[bool]:
    """Hold ``folder`` as the folder of this run; yield whether it had begun before.

    Raises:
        ConfigError: the folder belongs to another run or holds something else.
        UnavailableError: another process is at work on this run.
    """
    encoded = msgspec.json.format(msgspec.json.encode(config), indent=1) + b"\n"
    path = folder / CONFIG
    begun = path.exists()
    if begun and not _same(path, config):
        raise ConfigError(
            f"{folder} holds a run of another configuration", "choose another folder, or remove it"
        )
    if (
        not begun
        and folder.exists()
        and any(not p.name.startswith(f".{CONFIG}.") for p in folder.iterdir())
    ):
        raise ConfigError(f"{folder} is not empty", "choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UnavailableError(
                f"another process works on the run in {folder}", "wait for it, or end it"
            ) from error
        if not begun:
            write_atomic(path, encoded)
        if not (folder / ORIGIN).exists():
            origin = Origin(
                started_ns=time.time_ns(), commit=commit(), version=__version__, machine=machine()
            )
            write_atomic(
                folder / ORIGIN, msgspec.json.format(msgspec.json.encode(origin), indent=1) + b"\n"
            )
        yield begun
    finally:
        os.close(handle)


def _same(path: Path, config: TrainingConfig) -> bool:
    """Return whether the file says the same; keys that a newer version added count as their defaults."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=TrainingConfig) == config
    except msgspec.DecodeError:
        return False


def note_stage(folder: Path, entry: StageEntry) -> None:
    """Add a line to the stages that were made, in the place of an earlier one of that stage."""
    kept = [one for one in read_stages(folder) if one.stage != entry.stage]
    lines = [msgspec.json.encode(one) + b"\n" for one in [*kept, entry]]
    write_atomic(folder / STAGES, b"".join(lines))


def read_stages(folder: Path) -> list[StageEntry]:
    """Return the stages that were made, in that order.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / STAGES
    if not path.exists():
        return []
    try:
        return [msgspec.json.decode(line, type=StageEntry) for line in path.read_bytes().splitlines()]
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "remove it") from error


def commit() -> str:
    """Return the version of the code: the commit if git knows it, else that there is none."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(share_dir()), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip() or "unknown"


def machine() -> str:
    """Return the class of this machine: processor, cores, memory, GPUs if torch sees any."""
    import torch

    model = "unknown processor"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{model}, {os.cpu_count()} cores, {memory_gib:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return ", ".join(parts)

"""The walls between the rooms: which import which, and what comes in with a light import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = [
    "torch",
    "transformers",
    "rclpy",
    "sapien",
    "pyrealsense2",
    "piper_sdk",
    "onnx",
    "onnxruntime",
    "cv2",
]
NEEDS_TORCH = {f"simplevla.policy.{name}" for name in ("network", "folded", "prefix", "resample")}


def test_every_import_contract_is_kept():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param("core", id="every module of the shared words but the network"),
        pytest.param("cli", id="every command of the command line"),
    ],
)
def test_nothing_heavy_comes_with(modules):
    if modules == "core":
        sources = [p for p in (ROOT / "simplevla").rglob("*.py") if p.name != "__main__.py"]
        dotted = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sources}
        names = sorted(name.removesuffix(".__init__") for name in dotted - NEEDS_TORCH)
        assert "simplevla.action_chunk" in names
    else:
        names = ["policy_server.cli", "sim_training.cli", "robot_bridge.cli", "calibration.cli"]
    code = (
        f"import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

"""Resolve ``requirements/lock-py3*.txt`` anew: ``make lock``.

Takes the requirements of setup.cfg (all extras but those of one vendor's GPU) and the pins of
``requirements/pins.in``, and lets uv resolve them for each Python. CUDA libraries are left out of
the locks: whether torch needs them depends on the torch wheel a machine takes (CPU or CUDA), and
pip adds what the wheel asks for.
"""

from __future__ import annotations

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12")
LEFT_OUT_EXTRAS = {"gpu"}
CUDA = re.compile(r"^(nvidia-|cuda-|triton\b)")
HEADER = "# Made by `make lock` for Python {python} on x86-64 Linux, from setup.cfg and pins.in.\n"


def main() -> int:
    """Write one lock for each Python; return 0."""
    wanted = requirements() + (ROOT / "requirements/pins.in").read_text()
    for python in PYTHONS:
        lock = ROOT / f"requirements/lock-py{python.replace('.', '')}.txt"
        lines = [line for line in resolve(wanted, python) if not CUDA.match(line)]
        lock.write_text(HEADER.format(python=python) + "\n".join(lines) + "\n")
        print(f"{lock.relative_to(ROOT)}: {len(lines)} packages")
    return 0


def requirements() -> str:
    """Return what setup.cfg asks for, one requirement a line."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    blocks = [config["options"]["install_requires"]]
    blocks += [extras[name] for name in extras if name not in LEFT_OUT_EXTRAS]
    return "\n".join(blocks) + "\n"


def resolve(wanted: str, python: str) -> list[str]:
    """Return ``name==version`` of every package that ``wanted`` needs on ``python``."""
    options = ["--no-header", "--no-annotate", "--quiet", "--python-version", python, "--upgrade"]
    command = [sys.executable, "-m", "uv", "pip", "compile", *options, "-"]
    done = subprocess.run(command, input=wanted, text=True, check=True, stdout=subprocess.PIPE)
    return done.stdout.splitlines()


if __name__ == "__main__":
    sys.exit(main())

"""Tests that run at the same time: each process in a ROS domain of its own, real-time modules alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist", reason="pytest-xdist is not installed")

HERE = Path(__file__).resolve().parent
MODULE = """
import os, time
import pytest

pytestmark = [{marks}]

@pytest.mark.parametrize("number", range(2))
def test_it_takes_a_while(number):
    began = time.monotonic()
    time.sleep(0.2)
    with open({log!r}, "a") as log:
        domain = os.environ["ROS_DOMAIN_ID"]
        log.write(f"{{__name__}} {{os.getpid()}} {{domain}} {{began}} {{time.monotonic()}}\\n")
"""


def test_while_a_realtime_module_runs_the_other_process_waits(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "tests").mkdir()
    shutil.copy(HERE / "conftest.py", tmp_path / "tests")
    shutil.copy(HERE.parent / "pytest.ini", tmp_path)
    for name in ("a_realtime", "b", "c_realtime", "d"):
        marks = "pytest.mark.realtime" if "realtime" in name else ""
        (tmp_path / f"tests/test_{name}.py").write_text(MODULE.format(marks=marks, log=str(log)))
    plugins = ["-p", "xdist", "-p", "pytest_timeout", "-p", "pytest_rerunfailures"]
    two = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]  # as in the Makefile
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *two],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in log.read_text().splitlines()]
    assert len(rows) == 8
    assert len({(process, domain) for _, process, domain, *_ in rows}) == 2
    assert len({domain for _, _, domain, *_ in rows}) == 2

    spans: dict[str, tuple[float, float]] = {}
    for module, _, _, began, ended in rows:
        first, last = spans.get(module, (float(began), float(ended)))
        spans[module] = min(first, float(began)), max(last, float(ended))
    for realtime in (name for name in spans if "realtime" in name):
        first, last = spans[realtime]
        for module, _, _, began, ended in rows:
            assert module == realtime or float(ended) <= first or float(began) >= last
    assert not rows[0][0].endswith("realtime")

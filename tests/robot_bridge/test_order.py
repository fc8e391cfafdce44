"""Ending in order when every process is signalled at once, as a terminal's Ctrl-C does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robot_bridge.order import in_place, place_in_order, wait_for_others

SCRIPT = """
import signal, sys, threading, time
from robot_bridge.order import in_place, wait_for_others
ending = threading.Event()
signal.signal(signal.SIGINT, lambda *_: ending.set())
with in_place():
    print("ready", flush=True)
    ending.wait()
    time.sleep(float(sys.argv[2]))
    wait_for_others()
    with open(sys.argv[1], "a") as note:
        note.write(sys.argv[3] + " ")
"""


def start(note: Path, name: str, outlives: tuple[str, ...], slow_s: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(note), str(slow_s), name],
        env=os.environ | place_in_order(str(note), name, outlives),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_signalled_at_once_they_end_one_after_another(tmp_path):
    note = tmp_path / "note"
    running = [
        start(note, "twin", ("policy", "arms"), 0.0),
        start(note, "arms", ("policy",), 0.0),
        start(note, "policy", (), 0.3),
    ]
    try:
        for process in running:
            process.send_signal(signal.SIGINT)
        assert [process.wait(20) for process in running] == [0, 0, 0]
    finally:
        for process in running:
            process.kill()
    assert note.read_text().split() == ["policy", "arms", "twin"]


def test_one_that_hangs_keeps_nobody_for_ever(tmp_path, monkeypatch):
    hanging = start(tmp_path, "policy", (), 60.0)
    try:
        for key, value in place_in_order(str(tmp_path), "arms", ["policy", "nobody"]).items():
            monkeypatch.setenv(key, value)
        looks: list[float] = []
        began = time.monotonic()
        assert wait_for_others(lambda s: looks.append(s) or time.sleep(s), patience_s=0.2) == ["policy"]
        assert 0.2 <= time.monotonic() - began < 5
        assert looks
        hanging.kill()
        hanging.wait()
        assert wait_for_others() == []
    finally:
        hanging.kill()


@pytest.mark.parametrize("variables", [{}, place_in_order("run", "", [])])
def test_outside_a_run_nothing_waits(monkeypatch, variables):
    for key in place_in_order("", "", []):
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with in_place():
        assert wait_for_others() == []

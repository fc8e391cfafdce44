"""Asking for priority: granted or refused, never an error."""

import os
import subprocess
import sys

import pytest

REAL_TIME = """
import os, sys
from robot_bridge.priority import ask_for_real_time, in_real_time
if sys.argv[1] == "nobody":
    os.setuid(65534)
print(ask_for_real_time(), in_real_time(), os.sched_getparam(0).sched_priority)
"""
ASK = """
import os, sys
from robot_bridge.priority import ask_for_priority
if sys.argv[1] == "nobody":
    os.setuid(65534)
before = os.nice(0)
granted = ask_for_priority(3)
print(granted, before - os.nice(0))
"""


@pytest.mark.parametrize("user", ["self", "nobody"])
def test_the_answer_says_what_happened(user: str) -> None:
    if user == "nobody" and os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    done = subprocess.run([sys.executable, "-c", ASK, user], capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["True", "3"], ["False", "0"])
    if user == "nobody":
        assert done.stdout.startswith("False")


@pytest.mark.parametrize("user", ["self", "nobody"])
def test_real_time_is_granted_or_nothing_changes(user: str) -> None:
    if user == "nobody" and os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    done = subprocess.run(
        [sys.executable, "-c", REAL_TIME, user], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() in (["True", "True", "10"], ["False", "False", "0"])
    if user == "nobody":
        assert done.stdout.startswith("False")

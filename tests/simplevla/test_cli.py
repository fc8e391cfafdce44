"""The command line: what it lists, and how it ends."""

import argparse
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from simplevla.cli import GROUP, Command, choice_or_only, main, require_choice, whole_number
from simplevla.errors import ConfigError
from simplevla.files import share_dir

COMMANDS = [
    "bench", "calibrate", "compile", "doctor", "estop", "evaluate", "inspect", "keys", "observe",
    "recording", "serve", "train", "train-report", "trial", "twin", "up",
]  # fmt: skip


def run(capsys, *argv):
    """Return (exit status, standard output, standard error) of one call."""
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    out = capsys.readouterr()
    return status, out.out, out.err


def test_help_lists_every_command_and_the_three_ways_to_use_it(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for name in COMMANDS:
        assert f"\n    {name}" in out
    for place in ("laptop", "training server", "robot PC"):
        assert place in out


def test_every_declared_command_is_one_that_is_documented():
    assert sorted(point.name for point in entry_points(group=GROUP)) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(capsys, name):
    status, out, _ = run(capsys, name, "--help")
    assert status == 0
    assert "example" in out
    assert f"simplevla {name} " in out.split("example", 1)[1]


def test_the_command_itself_starts():
    done = subprocess.run(
        [sys.executable, "-c", "from simplevla.cli import main; raise SystemExit(main(['--version']))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("simplevla 0.")


@pytest.mark.parametrize("argv", [["dance"], [], ["--log-level", "loud", "doctor"]])
def test_a_call_it_does_not_know_ends_with_usage_and_status_2(capsys, argv):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert "usage: simplevla" in err


def test_an_error_is_one_line_that_says_what_to_do(capsys, tmp_path):
    status, out, err = run(capsys, "calibrate", "show", str(tmp_path / "none.json"))
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("simplevla calibrate: ")
    assert " -> run: " in err


def test_an_interrupt_is_no_traceback(capsys, monkeypatch):
    def interrupted(_point):
        def raise_interrupt(_args):
            raise KeyboardInterrupt

        return Command("interrupt itself", lambda _parser: None, raise_interrupt)

    monkeypatch.setattr("importlib.metadata.EntryPoint.load", interrupted)
    status, _, err = run(capsys, "doctor")
    assert status == 130
    assert err == "simplevla doctor: interrupted\n"


def test_a_reader_that_has_heard_enough_is_no_traceback():
    words = ["train", "--plan", "--config", str(share_dir() / "config/training/move_can_pot.yaml")]
    code = f"from simplevla.cli import main; raise SystemExit(main({words}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 141
    assert err == ""


def test_whole_number_takes_the_range_alone():
    parse = whole_number(1, 5)
    assert [parse("1"), parse("5")] == [1, 5]
    for text in ("0", "6", "1.5", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_the_only_choice_needs_no_name():
    assert choice_or_only("task", None, ["a"]) == "a"
    assert choice_or_only("task", "b", ["a", "b"]) == "b"
    with pytest.raises(ConfigError, match="unknown task 'c'"):
        choice_or_only("task", "c", ["a"])
    with pytest.raises(ConfigError, match="more than one task") as raised:
        choice_or_only("task", None, ["a", "b"])
    assert "a, b" in raised.value.remedy


def test_require_choice_names_what_is_allowed():
    assert require_choice("task", "a", ["a", "b"]) == "a"
    with pytest.raises(ConfigError, match=r"unknown task 'c' -> choose one of: a, b"):
        require_choice("task", "c", ["a", "b"])

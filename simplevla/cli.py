"""The ``simplevla`` command: finds the commands that the rooms declare, and runs one.

A room declares a command as an entry point in the group ``simplevla.commands`` that names a
:class:`Command`. The command line knows nothing else of the rooms, so the walls between them hold.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

from simplevla import __version__
from simplevla.errors import ConfigError, SimplevlaError

GROUP = "simplevla.commands"
_EPILOG = """\
three ways to use it:
  on a laptop           simplevla trial --twin      the whole stack, no robot, ROS or GPU needed
  on a training server  simplevla train --config config/training/move_can_pot.yaml
  on the robot PC       simplevla calibrate, then: ros2 launch simplevla bringup.launch.py
start with: simplevla doctor
"""


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        help: one line for ``simplevla --help``.
        configure: adds the arguments, descriptions and examples to its parser.
        run: does the work; returns the exit status. Heavy libraries are imported in here.
    """

    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    0: done, 1: a failed run, 2: a usable error, 130: interrupted, 141: nobody hears the rest.
    """
    commands = {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)}
    parser = argparse.ArgumentParser(
        prog="simplevla",
        description="Vision-language-action policies from simulation to real Piper arms.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"simplevla {__version__}")
    parser.add_argument(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error"],
        help="how much to log to standard error (default: info)",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, point in commands.items():
        command: Command = point.load()
        sub = subparsers.add_parser(
            name,
            help=command.help,
            description=command.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.configure(sub)
        sub.set_defaults(invoke=command.run)  # a name that no command gives an argument
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=args.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        status = int(args.invoke(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read our words has heard enough, as "| head" has
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at exit
        return 128 + signal.SIGPIPE
    except SimplevlaError as error:
        print(f"simplevla {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"simplevla {args.command}: interrupted", file=sys.stderr)
        return 130


def _reader_is_gone() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type for integers in ``[low, high]``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low}..{high}")
        return value

    return parse


def require_choice(kind: str, name: str, allowed: Sequence[str]) -> str:
    """Return ``name`` if it is one of ``allowed``.

    Raises:
        ConfigError: it is not; the message lists what is allowed.
    """
    if name not in allowed:
        raise ConfigError(f"unknown {kind} {name!r}", f"choose one of: {', '.join(allowed)}")
    return name


def choice_or_only(kind: str, name: str | None, allowed: Sequence[str]) -> str:
    """Return ``name`` as :func:`require_choice` does; without one, what is allowed if that is one alone.

    Raises:
        ConfigError: it is not allowed, or there is more than one to choose from.
    """
    if name is not None:
        return require_choice(kind, name, allowed)
    if len(allowed) != 1:
        raise ConfigError(f"there is more than one {kind}", f"choose one of: {', '.join(allowed)}")
    return allowed[0]

"""The faults' node: makes things go wrong on the twin, for whoever speaks ROS.

=========================  ==================================================================
parameters                 ``kind``, ``part``, ``joint``, ``amount`` and ``seconds`` say what;
                           0 for the last three where the kind has none (and: until cleared)
services, std_srvs/Trigger  ``~/inject`` lets that begin, ``~/clear`` ends every fault
diagnostics                what is wrong now, once a second
=========================  ==================================================================

A lifecycle node (:mod:`robot_bridge.nodes.managed`). It speaks to the twin's control endpoint as
``simplevla twin fault`` does, and never runs on metal: a rig without a twin is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diagnostic_msgs.msg import DiagnosticStatus

from robot_bridge.nodes.managed import ManagedNode
from robot_bridge.nodes.process import run_node, status, trigger
from robot_bridge.rig import load_rig
from robot_bridge.twin.control import TwinControl
from robot_bridge.twin.faults import AMOUNTS, EXPLAINED, SERVER_KINDS, Fault, FaultKind
from simplevla.errors import ConfigError, SimplevlaError, UnavailableError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node until it is asked to end; return the exit status."""
    return run_node("faults", FaultsNode, sys.argv if argv is None else argv)


class FaultsNode(ManagedNode):
    """ROS's view of what is wrong on the twin."""

    def __init__(self) -> None:
        super().__init__("faults")
        kinds = ", ".join(kind.value for kind in EXPLAINED if kind not in SERVER_KINDS)
        self.declare("rig", "twin", "name of a twin's rig, or a path to a .yaml file")
        self.declare("kind", FaultKind.CAN_SILENCE.value, f"what goes wrong: {kinds}", changing=True)
        self.declare("part", "left", "the arm or the camera that it befalls", changing=True)
        self.declare("joint", 0, "from 1, for the kinds that befall one", low=0, high=6, changing=True)
        self.declare("amount", 0.0, "for the kinds that have one", low=-3600, high=3600, changing=True)
        self.declare("seconds", 0.0, "for how long; 0: until cleared", low=0, high=3600, changing=True)
        self._control: TwinControl | None = None
        trigger(self, "~/inject", self.inject, at_once=True)
        trigger(self, "~/clear", self.clear, at_once=True)

    @contextmanager
    def configured(self) -> Iterator[None]:
        """Hold the way to the twin's control endpoint."""
        rig = load_rig(self.value("rig"))
        if rig.twin is None:
            raise ConfigError(f"rig {rig.name!r} is not a twin's", "faults are injected on the twin alone")
        self._embodiment = rig.load_embodiment()
        with TwinControl(rig.twin.control) as control:
            self._control = control
            try:
                yield
            finally:
                self._control = None

    def inject(self) -> str:
        """Let what the parameters say go wrong; return what is wrong then."""
        try:
            kind = FaultKind(self.value("kind"))
        except ValueError as error:
            raise ConfigError(
                f"unknown kind {self.value('kind')!r}", "ros2 param describe /faults kind names them"
            ) from error
        fault = Fault(
            kind=kind,
            part=self.value("part"),
            joint=self.value("joint"),
            amount=self.value("amount") if kind in AMOUNTS else None,
            seconds=self.value("seconds") or None,
        )
        fault.check(self._embodiment)
        return "; ".join(str(each) for each in self._twin().inject(fault).faults)

    def clear(self) -> str:
        """End every fault."""
        self._twin().clear_faults()
        return "cleared; a stop that was pressed is ended by a reset alone"

    def diagnose(self) -> list[DiagnosticStatus]:
        """Return what is wrong now."""
        try:
            found = [str(fault) for fault in self._twin().faults().faults]
        except SimplevlaError as error:
            found = [str(error)]
        text = "; ".join(found) or "nothing is wrong"
        return [status("twin: faults", text, {}, level="warn" if found else "ok")]

    def _twin(self) -> TwinControl:
        if self._control is None:
            raise UnavailableError(
                "the faults' node is not configured", "ros2 lifecycle set /faults configure"
            )
        return self._control


if __name__ == "__main__":
    sys.exit(main())

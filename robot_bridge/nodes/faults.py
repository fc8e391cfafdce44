"""The faults' node: makes things go wrong on the twin, for whoever speaks ROS.

=========================  ==================================================================
parameters                 ``kind``, ``part``, ``joint``, ``amount`` and ``seconds`` say what;
                           0 for the last three where the kind has none (and: until cleared)
services, std_srvs/Trigger  ``~/inject`` lets that begin, ``~/clear`` ends every fault
publishes                  ``diagnostics`` at 1 Hz: what is wrong now
=========================  ==================================================================

The node speaks to the twin's control endpoint as ``simplevla twin fault`` does. It never runs on metal:
a rig without a twin is refused.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.context import Context
from rclpy.node import Node

from robot_bridge.nodes.process import declare, destroying, diagnostics, run_node, status, trigger
from robot_bridge.rig import load_rig
from robot_bridge.twin.control import TwinControl
from robot_bridge.twin.faults import AMOUNTS, EXPLAINED, SERVER_KINDS, Fault, FaultKind
from simplevla.errors import ConfigError, SimplevlaError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node until it is asked to end; return the exit status."""
    return run_node("faults", open_faults, sys.argv if argv is None else argv)


@contextmanager
def open_faults() -> Iterator[FaultsNode]:
    """Yield the node; parameters come from ROS."""
    node = FaultsNode()
    with destroying(node), node.control:
        yield node


class FaultsNode(Node):
    """ROS's view of what is wrong on the twin."""

    def __init__(self, context: Context | None = None) -> None:
        super().__init__("faults", context=context)
        rig = load_rig(declare(self, "rig", "twin", "name of a twin's rig, or a path to a .yaml file"))
        if rig.twin is None:
            raise ConfigError(f"rig {rig.name!r} is not a twin's", "faults are injected on the twin alone")
        self._embodiment = rig.load_embodiment()
        self.control = TwinControl(rig.twin.control)
        kinds = ", ".join(kind.value for kind in EXPLAINED if kind not in SERVER_KINDS)
        declare(self, "kind", FaultKind.CAN_SILENCE.value, f"what goes wrong: {kinds}", changing=True)
        declare(self, "part", self._embodiment.arms[0].name, "the arm or the camera", changing=True)
        declare(self, "joint", 0, "joint from 1, for the kinds that have one", low=0, high=6, changing=True)
        declare(
            self, "amount", 0.0, "how much, for the kinds that have it", low=-3600, high=3600, changing=True
        )
        declare(self, "seconds", 0.0, "for how long; 0: until cleared", low=0, high=3600, changing=True)
        self._diagnostics = self.create_publisher(DiagnosticArray, "diagnostics", 10)
        self.create_timer(1.0, self._diagnose)
        trigger(self, "~/inject", self._inject, at_once=True)
        trigger(self, "~/clear", self._clear, at_once=True)

    def _inject(self) -> str:
        value = {name: self.get_parameter(name).value for name in ("kind", "part", "joint", "amount")}
        try:
            kind = FaultKind(value["kind"])
        except ValueError as error:
            raise ConfigError(f"unknown kind {value['kind']!r}", "see: ros2 param describe") from error
        seconds = self.get_parameter("seconds").value
        fault = Fault(
            kind=kind,
            part=value["part"],
            joint=value["joint"],
            amount=value["amount"] if kind in AMOUNTS else None,
            seconds=seconds or None,
        )
        fault.check(self._embodiment)
        return "; ".join(str(each) for each in self.control.inject(fault).faults)

    def _clear(self) -> str:
        self.control.clear_faults()
        return "cleared; a stop that was pressed is ended by a reset alone"

    def _diagnose(self) -> None:
        try:
            found = [str(fault) for fault in self.control.faults().faults]
        except SimplevlaError as error:
            found = [str(error)]
        text = "; ".join(found) or "nothing is wrong"
        level = "warn" if found else "ok"
        self._diagnostics.publish(
            diagnostics(time.time_ns(), status("twin: faults", text, {}, level=level))
        )


if __name__ == "__main__":
    sys.exit(main())

"""What goes wrong, what must come of it, and how that is shown: one function a fault.

Each makes something go wrong while the arms move, finds out when the bridge noticed, checks what the arms
did and how it goes on, and returns a row of the table in ``docs/faults.md``. Each raises
:class:`~benchmarks.fault_scenarios.cell.FaultError` where the bridge did not do what the row says.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.fault_scenarios import arms, buses, cameras, policies
from benchmarks.fault_scenarios.row import Row

Scenario = Callable[[], Row]


def scenarios() -> dict[str, Scenario]:
    """Return every scenario by name, in the table's order."""
    return {
        name: value
        for module in (buses, arms, policies, cameras)
        for name, value in vars(module).items()
        if name.startswith("fault_")
    }

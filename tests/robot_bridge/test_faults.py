"""Every fault of docs/faults.md: the bridge does what the table says, and nothing unsafe reaches a bus."""

from __future__ import annotations

import pytest

from benchmarks.fault_scenarios import scenarios
from benchmarks.fault_scenarios.cell import Cell
from benchmarks.faults import DOCS

SCENARIOS = scenarios()


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_bridge_does_what_the_table_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cell, "feedback_age_s", 0.3)  # longer than a busy machine pauses a thread
    row = SCENARIOS[name]()
    assert f"| {row.fault} |" in DOCS.read_text(), "write the table: python -m benchmarks.faults --write"


def test_the_table_has_a_row_for_each_fault() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == len(SCENARIOS) >= 20

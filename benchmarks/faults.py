"""Make everything go wrong on emulated arms, see what the bridge does, write ``docs/faults.md``'s table.

    python -m benchmarks.faults                       run all, print the table
    python -m benchmarks.faults --write               and put it into docs/faults.md
    python -m benchmarks.faults silence teach         only faults whose names contain one of these

Exits with 1 if the bridge did not do what it promises, or if a setpoint outside the limits was put on a
bus. Times in the table are of the machine it ran on.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from benchmarks.fault_scenarios import Row, scenarios
from benchmarks.fault_scenarios.cell import FaultError
from simplevla.files import write_atomic

DOCS = Path(__file__).resolve().parents[1] / "docs/faults.md"
BEGIN, END = "<!-- table: python -m benchmarks.faults --write -->", "<!-- end of table -->"


def main() -> int:
    """Run the faults that are asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of faults' names (default: all)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    args = parser.parse_args()
    if args.write and args.names:
        parser.error("--write takes all faults")
    logging.disable(logging.CRITICAL)
    rows, failed = [], 0
    for name, run in scenarios().items():
        if args.names and not any(part in name for part in args.names):
            continue
        began_s = time.monotonic()
        try:
            rows.append(run())
            print(f"{name}: as promised, {time.monotonic() - began_s:.1f} s", file=sys.stderr, flush=True)
        except FaultError as error:
            failed += 1
            print(f"{name}: NOT as promised: {error}", file=sys.stderr, flush=True)
    print(table(rows))
    if args.write and not failed:
        write_table(rows, DOCS)
    return 1 if failed else 0


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = ["", "fault", "detected within", "what the arms did", "recovery", "what was recorded"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for number, row in enumerate(rows, start=1):
        cells = (str(number), row.fault, row.within, row.did, row.recovery, row.recorded)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def write_table(rows: list[Row], path: Path) -> None:
    """Put the table between its two marks in ``path``."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomic(path, f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}".encode())


if __name__ == "__main__":
    sys.exit(main())

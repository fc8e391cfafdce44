"""The report of a training run: one page that needs nothing else, made from what the run left.

Figures and videos are inside the page. It can be made at any time: while a run is under way, when it
is finished, and from what was kept of it under ``results/``.
"""

from __future__ import annotations

import base64
import datetime
import io
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sim_training import figures, run_folder
from sim_training.evaluation import Report, Share, rate
from sim_training.run_record import RunRecord, configuration_text, read_run
from simplevla.errors import MissingExtraError
from simplevla.files import write_atomic
from simplevla.intervals import Rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 110


class Judged(NamedTuple):
    """One evaluation as the page shows it."""

    name: str
    rate: Rate
    pushcuts: Rate
    seeds: str
    strategies: dict[str, int]
    failures: dict[str, int]
    mean_actions: float | None


class Region(NamedTuple):
    """Success in one region that the object starts in."""

    name: str
    before: Rate | None
    after: Rate | None


def make_report(folder: Path) -> Path:
    """Write the report of the run in ``folder``, and its learning curve as a picture; return the page.

    Raises:
        RecordError: there is no run, or a file of it is damaged.
        MissingExtraError: a library of the ``train`` extra is not installed.
    """
    record = read_run(folder)
    drawn = _draw(record)
    if "curve" in drawn:
        write_atomic(folder / run_folder.CURVE, drawn["curve"])
    path = folder / run_folder.REPORT
    write_atomic(path, _render(record, drawn).encode())
    return path


def _draw(record: RunRecord) -> dict[str, bytes]:
    """Return the figures that the run has data for, as PNG."""
    drawn: dict[str, Figure] = {}
    if record.fine_tuning:
        drawn["fine_tuning"] = figures.fine_tuning(record.fine_tuning)
    if record.history:
        drawn["curve"] = figures.learning_curve(record.history, record.before, record.after)
        drawn["diagnostics"] = figures.diagnostics(record.history)
        drawn["time"] = figures.time_split(record.history)
        drawn["strategies"] = figures.strategy_shares(
            record.demonstrations, record.before, record.history, record.after
        )
        if any(iteration.regions for iteration in record.history):
            drawn["regions"] = figures.regions_over_time(record.history)
    return {name: _png(figure) for name, figure in drawn.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _render(record: RunRecord, drawn: dict[str, bytes]) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "train") from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    pairs = (("before reinforcement learning", record.before), ("final", record.after))
    return environment.get_template("training_report.html.j2").render(
        record=record,
        judged=[_judged(name, report) for name, report in pairs if report is not None],
        gain=_gain(record.before, record.after),
        regions=_regions(record.before, record.after),
        scenes=_scenes(record),
        figures={name: _inline(data, "image/png") for name, data in drawn.items()},
        videos={name: _inline(p.read_bytes(), "image/webp") for name, p in record.videos.items()},
        configuration=configuration_text(record),
        sampled=sum(iteration.sampled.episodes for iteration in record.history),
        started=_date(record.origin.started_ns) if record.origin else "",
    )


def _judged(name: str, report: Report) -> Judged:
    first, count = report.seed, len(report.episodes)
    return Judged(
        name,
        rate(report.success),
        rate(report.pushcuts),
        f"{first} to {first + count - 1}",
        figures.of_successes(report),
        report.failures,
        report.mean_actions,
    )


def _regions(before: Report | None, after: Report | None) -> list[Region]:
    def of(report: Report | None) -> dict[str, Share]:
        return report.regions if report is not None else {}

    old, new = of(before), of(after)
    return [
        Region(name, *(rate(shares[name]) if name in shares else None for shares in (old, new)))
        for name in sorted(old.keys() | new.keys())
    ]


def _scenes(record: RunRecord) -> dict[str, Rate]:
    """Return success on the scenes that training may have seen, and on each kind of unseen ones."""
    found = record.generalisation
    if found is None:
        return {}
    unseen = {f"unseen, {name}": rate(report.success) for name, report in found.unseen.items()}
    return {"seen": rate(found.seen.success), **unseen}


def _gain(before: Report | None, after: Report | None) -> str:
    """Say in words what reinforcement learning changed, as far as these episodes can tell."""
    if before is None or after is None:
        return ""
    old, new = rate(before.success), rate(after.success)
    points = 100 * (new.rate - old.rate)
    apart = new.low > old.high or old.low > new.high
    verdict = "the intervals do not overlap" if apart else "the intervals overlap, so this may be chance"
    factor = f", {new.rate / old.rate:.1f} times as often" if old.successes and points > 0 else ""
    return f"{points:+.1f} points by reinforcement learning{factor}; {verdict}."


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _inline(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _date(stamp_ns: int) -> str:
    when = datetime.datetime.fromtimestamp(stamp_ns / 1e9, tz=datetime.timezone.utc)
    return when.strftime("%Y-%m-%d %H:%M UTC")

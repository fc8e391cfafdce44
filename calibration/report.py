"""What calibration found over the sessions, as one HTML file: the last record, and how things drift."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simplevla.errors import MissingExtraError, RecordError
from simplevla.files import write_atomic
from simplevla.session_record import SessionRecord, load_history, load_session_record, to_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATES = Path(__file__).parent / "templates"
_LINE = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5ea2", "#b8860b", "#555555")


@dataclass(frozen=True)
class Series:
    """One line of a plot: {session's time, ns: value}."""

    name: str
    values: dict[int, float]


@dataclass(frozen=True)
class Plot:
    """A plot over the sessions.

    Attributes:
        title, unit: what is shown.
        series: its lines.
        limit: what none shall exceed; None if there is none.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    limit: float | None = None


def write_report(path: Path, out: Path) -> None:
    """Write the report of the record at ``path`` and of its history to ``out``.

    Raises:
        RecordError: there is no readable record.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "calibration") from error
    last = load_session_record(path)
    same = [one for one in load_history(path) if one.serials == last.serials]
    if not same:
        raise RecordError(f"{path} has no history", "run: simplevla calibrate session")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        record=last,
        when=_when(last.created_ns),
        sessions=[(_when(one.created_ns), one.passed, len(one.checks)) for one in reversed(same)],
        plots=[(plot.title, _as_data(_figure(plot))) for plot in drifts(same) if plot.series],
        kinds=(("camera", last.camera_in_world), ("base", last.base_in_world)),
        deviations={name: _deviations(values) for name, values in last.covariances.items()},
    )
    write_atomic(out, page.encode())


def drifts(records: Sequence[SessionRecord]) -> list[Plot]:
    """Return how cameras, zeros, delays and figures changed over ``records``, the oldest first."""
    cameras = sorted({name for one in records for name in one.camera_in_world})
    arms = sorted({name for one in records for name in one.joint_zeros_rad})
    delays = sorted({name for one in records for name in one.delays_s})
    plots = [
        Plot(
            "cameras: moved since the first session",
            "mm",
            tuple(Series(name, _moved_mm(records, name)) for name in cameras),
        ),
        Plot(
            "joints: zero",
            "deg",
            tuple(
                Series(f"{arm} joint {joint + 1}", _of(records, _zero_deg(arm, joint)))
                for arm in arms
                for joint in range(1, 5)
            ),
        ),
        Plot("delays", "ms", tuple(Series(name, _of(records, _delay_ms(name))) for name in delays)),
    ]
    figures = sorted(
        {(check.name, figure) for one in records for check in one.checks for figure in check.limits}
    )
    for name, figure in figures:
        values = _of(records, _figure_of(name, figure))
        limits = [
            check.limits[figure]
            for check in records[-1].checks
            if figure in check.limits and check.name == name
        ]
        plots.append(
            Plot(f"{name}: {figure}", "", (Series(figure, values),), limits[-1] if limits else None)
        )
    return plots


def _moved_mm(records: Sequence[SessionRecord], camera: str) -> dict[int, float]:
    places = {
        one.created_ns: to_matrix(one.camera_in_world[camera])[:3, 3]
        for one in records
        if camera in one.camera_in_world
    }
    first = next(iter(places.values()))
    return {stamp: 1e3 * float(np.linalg.norm(place - first)) for stamp, place in places.items()}


def _of(
    records: Sequence[SessionRecord], pick: Callable[[SessionRecord], float | None]
) -> dict[int, float]:
    found = {one.created_ns: pick(one) for one in records}
    return {stamp: value for stamp, value in found.items() if value is not None}


def _zero_deg(arm: str, joint: int) -> Callable[[SessionRecord], float | None]:
    def pick(record: SessionRecord) -> float | None:
        zeros = record.joint_zeros_rad.get(arm)
        return None if zeros is None or joint >= len(zeros) else float(np.degrees(zeros[joint]))

    return pick


def _delay_ms(name: str) -> Callable[[SessionRecord], float | None]:
    return lambda record: 1e3 * record.delays_s[name] if name in record.delays_s else None


def _figure_of(name: str, figure: str) -> Callable[[SessionRecord], float | None]:
    return lambda record: next(
        (
            check.figures[figure]
            for check in record.checks
            if check.name == name and figure in check.figures
        ),
        None,
    )


def _figure(plot: Plot) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "calibration") from error
    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for series, colour in zip(plot.series, (_LINE * len(plot.series)), strict=False):
        times = [datetime.fromtimestamp(stamp / 1e9, timezone.utc) for stamp in series.values]
        axes.plot(times, list(series.values.values()), "o-", color=colour, label=series.name, markersize=3)  # type: ignore[arg-type]
    if plot.limit is not None:
        axes.axhline(plot.limit, color="#b00020", linewidth=0.8, linestyle="--", label="limit")
    axes.set_ylabel(plot.unit)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="x", rotation=20)
    axes.legend(fontsize=6, ncols=2)
    return figure


def _as_data(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return base64.b64encode(data.getvalue()).decode()


def _deviations(covariance: Sequence[float]) -> tuple[float, float]:
    """Return the largest standard deviations of a 6x6 covariance: position, mm, and turn, deg."""
    deviations = np.sqrt(np.diag(np.array(covariance).reshape(6, 6)))
    return 1e3 * float(deviations[:3].max()), float(np.degrees(deviations[3:].max()))


def _when(stamp_ns: int) -> str:
    return datetime.fromtimestamp(stamp_ns / 1e9, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")

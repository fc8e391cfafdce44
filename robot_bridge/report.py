"""The report of a run: what happened in each trial, how often it worked, and where the time went.

Reads ``index.json`` and the recordings of a run's folder, and writes ``media/`` and one
``report.html`` there. It needs no robot, no ROS and no network, and can be made again at any time.
"""

from __future__ import annotations

import datetime
import io
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from robot_bridge.latency import LEGS, ChunkTrace, Leg, legs_ms, read_traces, summarise
from robot_bridge.recording import Frame, JointSeries, Recording, read_recording
from simplevla.errors import MissingExtraError, RecordError
from simplevla.files import write_atomic
from simplevla.intervals import Rate, wilson
from simplevla.trial import Outcome, Trial, TrialIndex, load_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

REPORT_NAME = "report.html"
REAL_TIME = 0.95

_MEDIA = "media"
_SHEET_COLUMNS, _SHEET_ROWS = 5, 2
_VIDEO_FRAMES = 240
_MIN_SPAN_RAD, _MIN_SPAN_MM = 0.1, 8.0
_INK, _COMMANDED, _MEASURED = "#1c2733", "#d9730d", "#1f6feb"
_LEG_COLOURS = ("#8fb8de", "#c9b6e4", "#f2a65a", "#6bbf8a")
_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10, "fontweight": "bold"}
_LEGEND: dict[str, Any] = {"fontsize": 8, "frameon": False}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialView:
    """One trial as the page shows it; links are relative to the page and quoted, or empty.

    Attributes:
        sheets: a contact sheet for each camera.
        mcap: the recording.
        dropped: images that the recording lacks.
        missing: why there is no recording to show, or empty.
    """

    trial: Trial
    sheets: tuple[str, ...] = ()
    video: str = ""
    joints: str = ""
    latency: str = ""
    mcap: str = ""
    dropped: int = 0
    missing: str = ""


def make_report(folder: Path) -> Path:
    """Write the report of the run in ``folder`` and return the page.

    A trial whose recording is missing or damaged is shown without pictures, and says why.

    Raises:
        RecordError: the folder holds no index of trials.
        MissingExtraError: a library of the ``robot`` extra is not installed.
    """
    index = load_index(folder)
    views: list[TrialView] = []
    traces: list[ChunkTrace] = []
    for number, trial in enumerate(index.trials):
        view, own = _view(folder, f"trial_{number:03d}", trial)
        views.append(view)
        traces += own
    latency = ""
    if len(legs_ms(traces)):
        latency = _save_figure(folder, "latency.png", latency_figure(traces, "All chunks of the run"))
    page = _render(index, views, summarise(traces), latency)
    path = folder / REPORT_NAME
    write_atomic(path, page.encode())
    return path


def _view(folder: Path, name: str, trial: Trial) -> tuple[TrialView, list[ChunkTrace]]:
    try:
        path = _recording_path(folder, trial)
        recording = read_recording(path)
    except RecordError as error:
        return TrialView(trial, missing=error.message), []
    traces = read_traces(recording)
    has_joints = len(recording.measured.stamp_ns) > 0
    view = TrialView(
        trial=trial,
        sheets=tuple(
            _save_image(folder, f"{name}_{number}_sheet.jpg", sheet)
            for number, sheet in enumerate(contact_sheets(recording))
        ),
        video=_save_video(folder, f"{name}.webp", recording),
        joints=_save_figure(folder, f"{name}_joints.png", joints_figure(recording)) if has_joints else "",
        latency=_save_figure(folder, f"{name}_latency.png", latency_figure(traces, "Chunks of this trial"))
        if len(legs_ms(traces))
        else "",
        mcap="".join(quote(str(p.relative_to(folder))) for p in sorted(path.glob("*.mcap"))[:1]),
        dropped=sum(recording.dropped.values()),
    )
    return view, list(traces)


def _recording_path(folder: Path, trial: Trial) -> Path:
    path = folder / trial.recording
    if not trial.recording or not path.resolve().is_relative_to(folder.resolve()):
        raise RecordError("this trial has no recording")
    return path


def contact_sheets(recording: Recording) -> list[Image]:
    """Return one sheet of evenly spaced pictures for each camera that was heard."""
    from PIL import Image, ImageDraw, ImageFont

    sheets = []
    for frames in recording.frames.values():
        if not frames:
            continue
        wanted = np.linspace(0, len(frames) - 1, _SHEET_COLUMNS * _SHEET_ROWS).round().astype(int)
        pictures = [_decode(frames[i]) for i in wanted]
        width, height = pictures[0].size
        sheet = Image.new(
            "RGB", (_SHEET_COLUMNS * (width + 4) + 4, _SHEET_ROWS * (height + 4) + 4), "white"
        )
        font = ImageFont.load_default(size=max(12, height // 11))
        for place, (i, picture) in enumerate(zip(wanted, pictures, strict=True)):
            row, column = divmod(place, _SHEET_COLUMNS)
            x, y = 4 + column * (width + 4), 4 + row * (height + 4)
            sheet.paste(picture.resize((width, height)), (x, y))
            seconds = (frames[i].stamp_ns - frames[0].stamp_ns) / 1e9
            draw = ImageDraw.Draw(sheet)
            draw.text(
                (x + 6, y + 4),
                f"{seconds:.1f} s",
                font=font,
                fill="white",
                stroke_width=2,
                stroke_fill=_INK,
            )
        sheets.append(sheet)
    return sheets


def joints_figure(recording: Recording) -> Figure:
    """Return commanded and measured positions over time: a column for each arm, a row for each joint."""
    measured, commanded = recording.measured, recording.commanded
    arms: dict[str, list[str]] = {}
    for name in measured.names:
        arms.setdefault(name.rpartition("_")[0] or "arm", []).append(name)
    rows = max(map(len, arms.values()))
    figure, panels = _panels(rows, len(arms), 5.2 * len(arms) + 0.6, 1.25 * rows + 0.9)
    origin_ns = int(measured.stamp_ns[0])
    for column, (arm, names) in enumerate(arms.items()):
        for row, name in enumerate(names):
            panel = panels[row, column]
            joint = name.rpartition("_")[2]
            scale, unit = (1000.0, "mm") if joint == "gripper" else (1.0, "rad")
            for series, colour, width, label in (
                (commanded, _COMMANDED, 1.6, "commanded (sent on the bus)"),
                (measured, _MEASURED, 1.0, "measured"),
            ):
                _plot_series(panel, series, name, origin_ns, scale, colour=colour, width=width, label=label)
            panel.set_ylabel(f"{joint}\n{unit}")
            panel.margins(x=0.01, y=0.15)
            _widen(panel, _MIN_SPAN_MM if joint == "gripper" else _MIN_SPAN_RAD)
        panels[0, column].set_title(f"{arm} arm", **_TITLE)
        panels[rows - 1, column].set_xlabel("time, s")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, **_LEGEND)
    return figure


def latency_figure(traces: Sequence[ChunkTrace], title: str) -> Figure:
    """Return the legs of every chunk that reached the bus, stacked, with medians and p95 beside them."""
    legs = legs_ms(traces)
    figure, ((panel,),) = _panels(1, 1, 9.5, 3.0)
    bottom = np.zeros(len(legs))
    for (name, colour), values in zip(zip(LEGS, _LEG_COLOURS, strict=True), legs.T, strict=True):
        label = f"{name}: {np.median(values):.1f} / {np.percentile(values, 95):.1f} ms"
        panel.bar(np.arange(len(legs)), values, bottom=bottom, width=0.85, color=colour, label=label)
        bottom += values
    total = legs.sum(axis=1)
    panel.axhline(
        float(np.median(total)),
        color=_INK,
        linewidth=1,
        linestyle="--",
        label=f"total: {np.median(total):.1f} / {np.percentile(total, 95):.1f} ms",
    )
    panel.set_title(f"{title} (median / p95)", **_TITLE)
    panel.set_xlabel("chunk")
    panel.set_ylabel("ms from exposure to bus")
    panel.margins(x=0.01)
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), **_LEGEND)
    return figure


def _plot_series(
    panel: Axes,
    series: JointSeries,
    name: str,
    origin_ns: int,
    scale: float,
    *,
    colour: str,
    width: float,
    label: str,
) -> None:
    if name in series.names:
        column = series.position[:, series.names.index(name)]
        seconds = (series.stamp_ns - origin_ns) / 1e9
        panel.plot(seconds, scale * column, color=colour, linewidth=width, label=label)


def _widen(panel: Axes, span: float) -> None:
    """Let the vertical axis span at least ``span``, so that the noise of an arm at rest looks small."""
    low, high = panel.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        panel.set_ylim(middle - span / 2, middle + span / 2)


def _panels(rows: int, columns: int, width_in: float, height_in: float) -> tuple[Figure, NDArray[Any]]:
    """Return a new figure with its (rows, columns) panels, in this report's style."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "robot") from error
    style: dict[Any, Any] = {
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a94a0",
        "axes.grid": True, "grid.color": "#e6eaee", "axes.axisbelow": True,
        "axes.labelsize": 8, "axes.labelcolor": _INK, "text.color": _INK,
        "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.color": "#5c6976", "ytick.color": "#5c6976",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        return figure, figure.subplots(rows, columns, sharex=True, squeeze=False)


def _save_figure(folder: Path, name: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _save(folder, name, buffer.getvalue())


def _save_image(folder: Path, name: str, image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return _save(folder, name, buffer.getvalue())


def _save_video(folder: Path, name: str, recording: Recording) -> str:
    """Save the first camera's pictures as an animated WebP at the pace of the trial."""
    frames = next((frames for frames in recording.frames.values() if len(frames) > 1), ())
    if not frames:
        return ""
    kept = frames[:: max(1, -(-len(frames) // _VIDEO_FRAMES))]
    stamps_ms = [frame.stamp_ns // 1_000_000 for frame in kept]
    durations = [max(1, after - before) for before, after in itertools.pairwise(stamps_ms)]
    pictures = [_decode(frame) for frame in kept]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=[*durations, 1500],
        loop=0,
        quality=70,
        method=2,
    )
    return _save(folder, name, buffer.getvalue())


def _save(folder: Path, name: str, data: bytes) -> str:
    write_atomic(folder / _MEDIA / name, data)
    return f"{_MEDIA}/{quote(name)}"


def _decode(frame: Frame) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(frame.jpeg)).convert("RGB")
    except (UnidentifiedImageError, OSError):
        return Image.new("RGB", (320, 240), "#555555")


def _render(index: TrialIndex, views: Sequence[TrialView], legs: Sequence[Leg], latency: str) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "robot") from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rate = index.success()
    simulated = simulated_rate(index.run.evaluation if index.run else {})
    factors = [t.real_time_factor for t in index.trials if t.real_time_factor is not None]
    slowest = min(factors, default=None)
    outcomes = [trial.outcome for trial in index.trials]
    strategies = [trial.strategy.value for trial in index.trials if trial.outcome is Outcome.SUCCESS]
    return environment.get_template("report.html.j2").render(
        run=index.run,
        started=_date(index.run.started_ns if index.run else 0),
        rate=rate,
        simulated=simulated,
        loss=_loss(rate, simulated),
        counts={outcome.value: outcomes.count(outcome) for outcome in Outcome if outcome in outcomes},
        strategies={name: strategies.count(name) for name in sorted(set(strategies))},
        views=views,
        legs=legs,
        latency=latency,
        factor=float(np.median(factors)) if factors else None,
        slowest=slowest,
        slow=slowest is not None and is_slow(slowest),
        real_time=REAL_TIME,
    )


def simulated_rate(evaluation: dict[str, Any]) -> Rate | None:
    """Return the success rate in a bundle's evaluation, or None if it holds none."""
    share = evaluation.get("success")
    if not isinstance(share, dict):
        return None
    wins, episodes = share.get("successes"), share.get("trials")
    if isinstance(wins, int) and isinstance(episodes, int) and 0 <= wins <= episodes and episodes > 0:
        return wilson(wins, episodes)
    return None


def is_slow(factor: float) -> bool:
    """Return whether a real-time factor, as it is shown, is below what counts as real time."""
    return round(factor, 2) < REAL_TIME


def _loss(rate: Rate, simulated: Rate | None) -> str:
    """Say in words what the way through the real stack cost, as far as these trials can tell."""
    if simulated is None or not rate.trials:
        return ""
    points = 100 * (simulated.rate - rate.rate)
    direction = "lower" if points > 0 else "higher"
    apart = simulated.low > rate.high or rate.low > simulated.high
    size = f"{abs(points):.1f} points {direction} than" if abs(points) >= 0.05 else "equal to"
    verdict = (
        "the intervals do not overlap, so the stack itself makes a difference"
        if apart
        else f"the intervals overlap, so {rate.trials} trials cannot tell this from chance"
    )
    return f"Success through the whole stack is {size} success in simulation alone; {verdict}."


def _date(stamp_ns: int) -> str:
    when = datetime.datetime.fromtimestamp(stamp_ns / 1e9, tz=datetime.timezone.utc)
    return when.strftime("%Y-%m-%d %H:%M UTC")

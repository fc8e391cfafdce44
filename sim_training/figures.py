"""The figures of a training report: each function takes what was read and returns a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sim_training.evaluation import Report, rate
from sim_training.history import DRIVER_STEPS, Iteration, sampled_rates
from simplevla.errors import MissingExtraError
from simplevla.intervals import Rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _QUIET = "#1c2733", "#8a94a0"
_SAMPLED, _GREEDY, _FINAL = "#8fb8de", "#1f6feb", "#1a7f4b"
_PALETTE = ("#1f6feb", "#d9730d", "#1a7f4b", "#8250df", "#b3361f", "#5c6976", "#bf8700", "#0a7ea4")
_STRATEGIES = {"grasp": "#6bbf8a", "push": "#f2a65a", "touch": "#8fb8de", "none": "#c9ced4"}
_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10, "fontweight": "bold"}
_LEGEND: dict[str, Any] = {"fontsize": 8, "frameon": False}
_SMOOTH = 5


def learning_curve(history: Sequence[Iteration], before: Report | None, after: Report | None) -> Figure:
    """Return success over iterations: sampled, greedy with intervals, and the two evaluations."""
    figure, ((panel,),) = panels(1, 1, 9.5, 3.8)
    steps = np.array([it.iteration for it in history])
    sampled = np.array(sampled_rates(history))
    panel.plot(steps, 100 * sampled, color=_SAMPLED, linewidth=1, alpha=0.6)
    panel.plot(
        steps,
        100 * _running_mean(sampled, _SMOOTH),
        color=_SAMPLED,
        linewidth=2,
        label=f"sampled in training, mean of {_SMOOTH} iterations",
    )
    greedy = [(it.iteration, it.greedy.rate) for it in history if it.greedy is not None]
    if greedy:
        _points(
            panel, greedy, _GREEDY, f"greedy while training, {greedy[-1][1].trials} episodes", line=True
        )
    last = int(steps[-1]) if len(steps) else 0
    ends = [(-1, before, "before"), (last + 1, after, "final")]
    for place, report, name in ends:
        if report is not None:
            label = f"{name} evaluation, {report.success.trials} episodes"
            _points(panel, [(place, rate(report.success))], _FINAL, label, "D")
    panel.set_ylim(-2, 102)
    panel.set_xlabel("iteration")
    panel.set_ylabel("success, %")
    panel.set_title("Success (bars: 95 % Wilson intervals)", **_TITLE)
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1), **_LEGEND)
    return figure


def curves_of_runs(runs: Mapping[str, Sequence[Sequence[Iteration]]]) -> Figure:
    """Return sampled success over iterations of several variants: the mean of its runs and their range."""
    figure, ((panel,),) = panels(1, 1, 9.5, 3.8)
    for (name, histories), colour in zip(runs.items(), _PALETTE, strict=False):
        shortest = min((len(history) for history in histories), default=0)
        if not shortest:
            continue
        rates = np.array(
            [_running_mean(np.array(sampled_rates(history[:shortest])), _SMOOTH) for history in histories]
        )
        steps = np.arange(shortest)
        panel.plot(
            steps,
            100 * rates.mean(axis=0),
            color=colour,
            linewidth=1.8,
            label=f"{name}, {len(rates)} seeds",
        )
        if len(rates) > 1:
            panel.fill_between(
                steps,
                100 * rates.min(axis=0),
                100 * rates.max(axis=0),
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
    panel.set_ylim(-2, 102)
    panel.set_xlabel("iteration")
    panel.set_ylabel("sampled success, %")
    panel.set_title(f"Sampled success, mean of {_SMOOTH} iterations (bands: range over seeds)", **_TITLE)
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1), **_LEGEND)
    return figure


def strategy_shares(
    demonstrations: Mapping[str, int],
    before: Report | None,
    history: Sequence[Iteration],
    after: Report | None,
) -> Figure:
    """Return how successes were done: in demonstrations, before, over the iterations, and at the end."""
    columns = [("demonstrations", dict(demonstrations))]
    columns += [(n, of_successes(r)) for n, r in (("before", before), ("final", after)) if r is not None]
    seen = {name for it in history for name in it.sampled.strategies}
    seen.update(*(counts for _, counts in columns))
    names = [*(name for name in _STRATEGIES if name in seen), *sorted(seen - _STRATEGIES.keys())]
    colours = [_STRATEGIES.get(name, _QUIET) for name in names]
    figure, row = panels(1, 2, 9.5, 3.2, share=False, widths=(1, 2.4))
    bars, area = row[0]
    for place, (_, counts) in enumerate(columns):
        bottom, total = 0.0, sum(counts.values())
        for name, colour in zip(names, colours, strict=True):
            share = 100 * counts.get(name, 0) / total if total else 0.0
            bars.bar(place, share, bottom=bottom, color=colour, width=0.7)
            bottom += share
        bars.annotate(f"{total}", (place, 101), ha="center", fontsize=8, color=_QUIET)
    bars.set_xticks(range(len(columns)), [name for name, _ in columns])
    bars.set_ylim(0, 108)
    bars.set_ylabel("of the successes, %")
    bars.set_title("Successes by strategy", **_TITLE)
    steps = [it.iteration for it in history]
    counted = np.array([[it.sampled.strategies.get(n, 0) for n in names] for it in history], dtype=float)
    counted = counted.reshape(len(steps), len(names))
    smooth = np.array([_running_mean(column, _SMOOTH) for column in counted.T]).reshape(len(names), -1)
    shares = 100 * smooth / np.maximum(smooth.sum(axis=0), 1e-9)
    area.stackplot(steps, *shares, colors=colours, labels=names, linewidth=0)
    area.set_ylim(0, 100)
    area.margins(x=0)
    area.set_xlabel("iteration")
    area.set_title(f"Sampled successes, mean of {_SMOOTH} iterations", **_TITLE)
    area.legend(loc="upper left", bbox_to_anchor=(1.01, 1), **_LEGEND)
    return figure


def regions_over_time(history: Sequence[Iteration]) -> Figure:
    """Return sampled success over iterations for each region that the object started in."""
    figure, ((panel,),) = panels(1, 1, 9.5, 3.2)
    names = sorted({name for it in history for name in it.regions})
    for name, colour in zip(names, _PALETTE, strict=False):
        heard = [(it.iteration, it.regions[name].rate.rate) for it in history if name in it.regions]
        steps, rates = np.array(heard).T
        panel.plot(steps, 100 * _running_mean(rates, _SMOOTH), color=colour, linewidth=1.6, label=name)
    panel.set_ylim(-2, 102)
    panel.set_xlabel("iteration")
    panel.set_ylabel("sampled success, %")
    panel.set_title(f"By the region of the start, mean of {_SMOOTH} iterations", **_TITLE)
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1), **_LEGEND)
    return figure


def diagnostics(history: Sequence[Iteration]) -> Figure:
    """Return what tells whether learning is healthy, over the iterations."""
    series: tuple[tuple[str, list[float]], ...] = (
        ("entropy, nats a token", [it.entropy for it in history]),
        ("groups kept, %", [100 * it.kept_groups / max(it.groups, 1) for it in history]),
        ("mean |ratio - 1|", [it.ratio for it in history]),
        ("clipped tokens, %", [100 * it.clip_fraction for it in history]),
        ("gradient norm", [it.gradient_norm for it in history]),
        ("learning rate", [it.learning_rate for it in history]),
    )
    figure, grid = panels(2, 3, 9.5, 4.2)
    steps = [it.iteration for it in history]
    for panel, (name, values) in zip(grid.flat, series, strict=True):
        panel.plot(steps, values, color=_GREEDY, linewidth=1.3)
        panel.set_title(name, **_TITLE)
        panel.set_ylim(bottom=min(0.0, *values) if values else 0.0)
    for panel in grid[-1]:
        panel.set_xlabel("iteration")
    return figure


def time_split(history: Sequence[Iteration]) -> Figure:
    """Return where the seconds of each iteration went: by the clock, and within what simulates."""
    figure, rows = panels(2, 1, 9.5, 5.0)
    known = {name for it in history for name in it.seconds}
    parts = {
        "Time of an iteration": sorted(known & DRIVER_STEPS),
        "Within its rollouts, summed over processes": sorted(known - DRIVER_STEPS),
    }
    steps = [it.iteration for it in history]
    for (panel,), (title, names) in zip(rows, parts.items(), strict=True):
        totals = {name: sum(it.seconds.get(name, 0.0) for it in history) for name in names}
        whole = sum(totals.values()) or 1.0
        values = [[it.seconds.get(name, 0.0) for it in history] for name in names]
        labels = [f"{name}: {100 * totals[name] / whole:.0f} %" for name in names]
        panel.set_title(title, **_TITLE)
        panel.set_ylabel("s")
        if names:
            panel.stackplot(
                steps, *values, labels=labels, colors=_PALETTE[: len(names)], alpha=0.75, linewidth=0
            )
            panel.margins(x=0)
            panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1), **_LEGEND)
    rows[-1][0].set_xlabel("iteration")
    return figure


def fine_tuning(log: Sequence[Mapping[str, float]]) -> Figure:
    """Return the loss of supervised fine-tuning over its steps."""
    figure, ((panel,),) = panels(1, 1, 9.5, 2.6)
    steps = [entry["step"] for entry in log]
    panel.plot(steps, [entry["loss"] for entry in log], color=_GREEDY, linewidth=1.5)
    panel.set_yscale("log")
    panel.set_xlabel("step")
    panel.set_ylabel("loss")
    panel.set_title("Supervised fine-tuning", **_TITLE)
    return figure


def of_successes(report: Report) -> dict[str, int]:
    """Return {strategy: successes} of an evaluation."""
    counts: dict[str, int] = {}
    for episode in report.episodes:
        if episode.success:
            counts[episode.strategy.value] = counts.get(episode.strategy.value, 0) + 1
    return counts


def panels(
    rows: int,
    columns: int,
    width_in: float,
    height_in: float,
    *,
    share: bool = True,
    widths: tuple[float, ...] | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """Return a new figure and its (rows, columns) panels, in this report's style.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error
    style: dict[Any, Any] = {
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _QUIET,
        "axes.grid": True, "grid.color": "#e6eaee", "axes.axisbelow": True,
        "axes.labelsize": 8, "axes.labelcolor": _INK, "text.color": _INK,
        "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.color": "#5c6976", "ytick.color": "#5c6976",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        return figure, figure.subplots(
            rows, columns, sharex=share, squeeze=False, width_ratios=widths or (1,) * columns
        )


def _points(
    panel: Axes,
    points: Sequence[tuple[int, Rate]],
    colour: str,
    label: str,
    marker: str = "o",
    *,
    line: bool = False,
) -> None:
    """Draw rates with their intervals as error bars, in per cent."""
    steps = [step for step, _ in points]
    rates = np.array([share.rate for _, share in points])
    below = rates - np.array([share.low for _, share in points])
    above = np.array([share.high for _, share in points]) - rates
    panel.errorbar(
        steps,
        100 * rates,
        yerr=100 * np.clip([below, above], 0, None),
        color=colour,
        marker=marker,
        markersize=4,
        capsize=2,
        linewidth=1.4 if line else 0,
        elinewidth=1,
        label=label,
    )


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the mean of each value and up to ``width - 1`` before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return np.asarray((sums[ends] - sums[starts]) / np.maximum(ends - starts, 1))

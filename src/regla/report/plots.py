"""Plots as PNG files. matplotlib loads here alone, and without its global state: no window, no backend to choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers, too
_MARKERS = ("o", "s", "^", "D", "v", "P")
_SMOOTHING_STEPS = 20
_DPI = 150

Curve = Sequence[tuple[float, float]]


def plot_losses(curves: Mapping[str, Curve], file: str | Path, *, smoothing: int = _SMOOTHING_STEPS) -> None:
    """Training loss against tokens. curves: (tokens, loss in nats per token), by the model's name.

    A thick line is the mean of `smoothing` points.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
        tokens, losses = zip(*curve, strict=True)
        axes.plot(tokens, losses, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(tokens, moving_mean(losses, smoothing), color=colour, linewidth=1.8, label=name)
    title = f"Training loss (thick: mean of {smoothing} steps)" if smoothing > 1 else "Training loss"
    axes.set(title=title, xlabel="tokens seen", ylabel="nats per token")
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    _finish(axes)
    figure.savefig(file)


def plot_decoding(
    milliseconds: Mapping[str, Curve], kibibytes: Mapping[str, Curve], file: str | Path, *, title: str
) -> None:
    """Two panels over the context length: time per generated token, and cache size, each by the model's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=_DPI, layout="constrained")
    figure.suptitle(title, wrap=True)
    time_axes, memory_axes = figure.subplots(1, 2)
    _contexts(time_axes, milliseconds, title="Time per generated token", unit="milliseconds")
    _contexts(memory_axes, kibibytes, title="Memory: cache of one sequence", unit="KiB")
    time_axes.set_ylim(bottom=0)
    memory_axes.set_yscale("log", base=2)
    memory_axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.savefig(file)


def plot_lengths(
    panels: Mapping[str, Mapping[str, Curve]],
    file: str | Path,
    *,
    title: str,
    along: str,
    unit: str,
    least_ratio: float = 1.0,
) -> None:
    """Panels side by side, by title: values in `unit` over the length, a curve by its name; logarithmic.

    At most six curves in a panel. Values that differ by less than the factor `least_ratio` do not fill its height, so
    that noise does not look like a cliff.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(1 + 4.6 * len(panels), 4.4), dpi=_DPI, layout="constrained")
    figure.suptitle(title, wrap=True)
    for axes, (name, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _contexts(axes, curves, title=name, unit=unit, along=along)
        axes.set_yscale("log")
        values = [value for curve in curves.values() for _, value in curve]
        if max(values) < least_ratio * min(values):
            axes.set_ylim(min(values) / least_ratio, max(values) * least_ratio)
        elif max(values) < 10 * min(values):  # labels such as 4 x 10^1 say less than 40
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:,g}"))
    figure.savefig(file)


def plot_histograms(
    panels: Mapping[str, Mapping[str, Sequence[float]]], file: str | Path, *, title: str, along: str, unit: str
) -> None:
    """Panels in rows of three, by title: histograms over 0 to 1, a curve by its name; shares are logarithmic."""
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 3.8 * columns, 0.6 + 3 * lines), dpi=_DPI, layout="constrained")
    figure.suptitle(title, wrap=True)
    grid = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axes, (name, curves) in zip(grid, panels.items(), strict=False):
        for (label, shares), colour in zip(curves.items(), _COLOURS, strict=False):
            edges = [bin_ / len(shares) for bin_ in range(len(shares) + 1)]
            axes.stairs(shares, edges, color=colour, linewidth=1.6, label=label)
        axes.set(title=name, xlabel=along, ylabel=unit, yscale="log")
        _finish(axes)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.savefig(file)


def plot_shares(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]],
    file: str | Path,
    *,
    title: str,
    unit: str = "share of right answers",
    lines: Mapping[str, Mapping[str, float]] | None = None,
    legend_beside: bool = False,
) -> None:
    """Panels side by side, by title: shares from 0 to 1 with their standard errors, a curve by its name.

    panels: (x, share, standard error). lines: vertical lines by their name, by the panel's title. legend_beside: one
    legend for all panels, at the right.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4.2 * len(panels), 4.2), dpi=_DPI, layout="constrained")
    figure.suptitle(title, wrap=True)
    for axes, (name, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for index, (label, curve) in enumerate(curves.items()):
            xs, shares, errors = zip(*curve, strict=True)
            style: dict[str, Any] = {
                "color": _COLOURS[index % len(_COLOURS)],
                "marker": _MARKERS[index % len(_MARKERS)],
                "linestyle": "-" if index < len(_COLOURS) else "--",
            }
            axes.errorbar(xs, shares, yerr=errors, markersize=5, linewidth=1.6, capsize=2, label=label, **style)
        for label, x in (lines or {}).get(name, {}).items():
            axes.axvline(x, color="black", linewidth=0.8, linestyle=":")
            axes.annotate(label, (x, 1.02), fontsize=8, ha="center")
        axes.set(xlabel=name.rpartition("by ")[2], ylabel=unit, ylim=(-0.03, 1.08))
        axes.set_title(name, pad=12)
        _finish(axes)
        if legend_beside:
            axes.get_legend().remove()
    if legend_beside:
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.savefig(file)


def plot_trials(trials: Mapping[str, Sequence[tuple[float, float | None]]], file: str | Path, *, title: str) -> None:
    """Validation loss of every trial, a line per variant, the first on top; learning rates differ in colour and shape.

    trials: (learning rate, loss) by the variant's name; a loss of None is a trial that diverged, a cross at the right.
    """
    from matplotlib.figure import Figure

    names = list(trials)
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(names)), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    rates = sorted({lr for points in trials.values() for lr, _ in points})
    for index, rate in enumerate(rates):
        points = [(loss, y) for y, name in enumerate(names) for lr, loss in trials[name] if lr == rate]
        style: dict[str, Any] = {"color": _COLOURS[index % len(_COLOURS)], "linestyle": ""}
        good = [(loss, y) for loss, y in points if loss is not None]
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot([x for x, _ in good], [y for _, y in good], marker=marker, alpha=0.8, label=f"lr {rate:g}", **style)
        lost = [y for loss, y in points if loss is None]
        axes.plot([0.99] * len(lost), lost, marker="x", transform=axes.get_yaxis_transform(), **style)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    lost_any = any(loss is None for points in trials.values() for _, loss in points)
    axes.set(
        title=title, xlabel="validation loss, nats per token" + (" (x at the right: diverged)" if lost_any else "")
    )
    _finish(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the dots, which it looks like
    figure.savefig(file)


def plot_scores(panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]], file: str | Path) -> None:
    """Bars with standard errors, a panel per kind of metric, a colour per model.

    panels: (value, standard error) by the panel's title, the model's name and the task's.
    """
    from matplotlib.figure import Figure

    tasks = {
        title: list(dict.fromkeys(task for bars in models.values() for task in bars))
        for title, models in panels.items()
    }
    heights = [len(names) * (0.3 + 0.2 * len(panels[title])) for title, names in tasks.items()]
    figure = Figure(figsize=(8, 1.5 + sum(heights)), dpi=_DPI, layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, models) in zip(grid, panels.items(), strict=True):
        thickness = 0.8 / len(models)
        for index, (model, bars) in enumerate(models.items()):
            places = [tasks[title].index(task) + (index + 0.5) * thickness - 0.4 for task in bars]
            values, errors = zip(*bars.values(), strict=True)
            colour = _COLOURS[index % len(_COLOURS)]
            axes.barh(places, values, thickness, xerr=errors, color=colour, alpha=0.8, label=model)
        axes.set_yticks(range(len(tasks[title])), tasks[title])
        axes.invert_yaxis()
        axes.set(title=f"{title} (± standard error)")
        _finish(axes)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.08), fontsize="small")
    figure.savefig(file)


def _count(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1000:,.0f}k" if value else "0"


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and the `width - 1` before it, of fewer at the start."""
    means = []
    for index in range(len(values)):
        window = values[max(0, index + 1 - width) : index + 1]
        means.append(sum(window) / len(window))
    return means


def _contexts(
    axes: Axes, curves: Mapping[str, Curve], *, title: str, unit: str, along: str = "tokens of context"
) -> None:
    for (name, curve), colour, marker in zip(curves.items(), _COLOURS, _MARKERS, strict=False):
        lengths, values = zip(*curve, strict=True)
        axes.plot(lengths, values, color=colour, marker=marker, markersize=5, linewidth=1.8, label=name)
    axes.set_xscale("log", base=2)
    axes.set(title=title, xlabel=along, ylabel=unit)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    _finish(axes)


def _finish(axes: Axes, *, legend: bool = True) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False)

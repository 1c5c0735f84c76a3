"""Figures of a conversion's page, each as the text of an <svg> element that needs nothing else."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regla.report.plots import _COLOURS, _MARKERS, Curve, _count, _finish, moving_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEACHER, STUDENT = _COLOURS[:2]
_SMOOTHING = 20  # steps
_MODELS = (("teacher", TEACHER, "o"), ("student", STUDENT, "s"))


def _figure(panels: int) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * max(panels, 1.35), 3.4), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element. Its text stays text, and only names that it refers to stay."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def calibration_figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """KL of softmax attention to linear attention, and effective key features, layer by layer."""
    figure, (kl, features) = _figure(2)
    numbers = [int(row["layer"]) for row in rows]
    for key, name, colour, marker in (
        ("kl_before", "before", _COLOURS[1], "s"),
        ("kl_after", "calibrated", _COLOURS[0], "o"),
        ("kl_uniform", "uniform attention", "grey", "_"),
    ):
        kl.plot(numbers, [row[key] for row in rows], marker=marker, color=colour, label=name, linewidth=1)
    for key, name, colour, marker in (
        ("features_before", "before", _COLOURS[1], "s"),
        ("features_after", "calibrated", _COLOURS[0], "o"),
    ):
        features.plot(numbers, [row[key] for row in rows], marker=marker, color=colour, label=name, linewidth=1)
    features.axhline(rows[0]["channels"] / 4, color="grey", linewidth=0.8, linestyle=":", label="a quarter")
    kl.set(title="KL to the original's attention", ylabel="nats")
    features.set(title="Key features in use, worst head", ylabel=f"of {rows[0]['channels']}")
    _from_zero(kl, features)
    for axes in (kl, features):
        _by_layer(axes)
    return _svg(figure, "Calibration by layer")


def alignment_figure(errors: Mapping[int, float]) -> str:
    figure, (axes,) = _figure(1)
    axes.bar(list(errors), list(errors.values()), color=STUDENT, width=0.7)
    axes.set(title="Error of each linear layer on the teacher's inputs", ylabel="share of |y|²")
    _from_zero(axes)
    _by_layer(axes, legend=False)
    return _svg(figure, "Relative error by layer")


def training_figure(stages: Mapping[str, Curve]) -> str:
    """Loss by step, a panel for each stage."""
    from matplotlib.ticker import MaxNLocator

    figure, panels = _figure(len(stages))
    for axes, (name, curve), colour in zip(panels, stages.items(), _COLOURS * 2, strict=False):
        steps, losses = zip(*curve, strict=True)
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, moving_mean(losses, _SMOOTHING), color=colour, linewidth=1.8, label=f"mean of {_SMOOTHING}")
        unit = "share of |y|²" if name == "attention transfer" else "nats per token"
        axes.set(title=name[:1].upper() + name[1:], xlabel="step of the conversion", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if min(losses) > 0 and max(losses) > 20 * min(losses):
            axes.set_yscale("log")
        _finish(axes)
    return _svg(figure, "Loss by step")


def position_figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity of both models, and KL, by the position of the token."""
    figure, (perplexity, kl) = _figure(2)
    places = [row["last"] + 1 for row in rows]
    for name, colour, marker in _MODELS:
        values = [math.exp(min(row[f"{name}_loss"], 700.0)) for row in rows]
        perplexity.plot(places, values, color=colour, marker=marker, label=name)
    kl.plot(places, [row["kl"] for row in rows], color=STUDENT, marker="s", label="KL(teacher || student)")
    perplexity.set(title="Perplexity", ylabel="perplexity")
    kl.set(title="KL to the teacher", ylabel="nats per token")
    _from_zero(perplexity, kl)
    for axes in (perplexity, kl):
        _by_context(axes, places, "position of the token, up to")
    return _svg(figure, "Perplexity and KL by position")


def gates_figure(layers: Sequence[Mapping[str, Any]]) -> str:
    """Half-lives of heads, and the share of saturated gates, layer by layer."""
    figure, (half_lives, shares) = _figure(2)
    axes_of_gates = list(dict.fromkeys(axis for layer in layers for axis in layer["half_lives"]))
    for index, axis in enumerate(axes_of_gates):
        points = [(layer["layer"], value) for layer in layers for value in layer["half_lives"].get(axis, [])]
        xs, ys = zip(*points, strict=True)
        half_lives.plot(xs, ys, _MARKERS[index], color=_COLOURS[index], alpha=0.7, label=f"heads, {axis} axis")
        numbers = [layer["layer"] for layer in layers if axis in layer["saturated_low"]]
        for key, colour, name in (
            ("saturated_low", _COLOURS[4], "F < 0.01"),
            ("saturated_high", _COLOURS[2], "F > 0.99"),
        ):
            values = [layer[key][axis] for layer in layers if axis in layer[key]]
            shares.plot(numbers, values, _MARKERS[index], color=colour, label=f"{name}, {axis} axis")
    half_lives.set(title="Half-lives of the forget gates", ylabel="tokens")
    shares.set(title="Saturated gates", ylabel="share", ylim=(-0.03, 1.03))
    _plain_logarithm(half_lives)
    for axes in (half_lives, shares):
        _by_layer(axes)
    return _svg(figure, "Forget gates by layer")


def decoding_figure(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Time of a token and size of the cache over the context."""
    figure, (seconds, memory) = _figure(2)
    for name, colour, marker in _MODELS:
        contexts = [row["context"] for row in rows[name]]
        seconds.plot(contexts, [row["milliseconds"] for row in rows[name]], color=colour, marker=marker, label=name)
        kibibytes = [row["cache_bytes"] / 1024 for row in rows[name]]
        memory.plot(contexts, kibibytes, color=colour, marker=marker, label=name)
    seconds.set(title="Time of one more token", ylabel="milliseconds")
    memory.set(title="Cache of one sequence", ylabel="KiB")
    _plain_logarithm(memory)
    _from_zero(seconds)
    for axes in (seconds, memory):
        _by_context(axes, contexts, "tokens of context")
    return _svg(figure, "Cost of a token by context")


def choice_figure(rows: Sequence[Mapping[str, Any]], kept: Sequence[int]) -> str:
    """What each layer wins as softmax attention: KL, with twice its standard error."""
    figure, (axes,) = _figure(1)
    rows = sorted(rows, key=lambda row: row["layer"])
    colours = [TEACHER if row["layer"] in kept else "lightgrey" for row in rows]
    axes.bar(
        [row["layer"] for row in rows],
        [row["kl_gain"] for row in rows],
        yerr=[2 * row["kl_gain_se"] for row in rows],
        color=colours,
        capsize=2,
    )
    axes.set(title="KL that a layer wins as softmax attention (blue: kept)", ylabel="nats per token")
    _by_layer(axes, legend=False)
    return _svg(figure, "Gain of each layer")


def _from_zero(*panels: Any) -> None:
    for axes in panels:
        top = max([*axes.dataLim.intervaly, 1e-9])
        axes.set_ylim(0, 1.08 * top if math.isfinite(top) else 1.0)


def _by_layer(axes: Any, *, legend: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, legend=legend)


def _plain_logarithm(axes: Any) -> None:
    """A logarithmic y axis from a power of two to one, so that there are at least two labels, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.dataLim.intervaly
    if 0 < low <= high < math.inf:
        axes.set_ylim(2 ** math.floor(math.log2(low) - 0.1), 2 ** math.ceil(math.log2(high) + 0.1))
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def _by_context(axes: Any, places: Sequence[int], label: str) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(list(places), [_count(x) if x >= 10_000 else f"{x:,}" for x in places], rotation=30)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    _finish(axes)

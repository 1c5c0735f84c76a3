"""The page and the plots of `regla inspect`, from its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regla.report.tables import markdown

_DPI = 150
_BRANCH = "Window branch: its share in the output of a head.\n"


def inspection_page(found: dict[str, Any], *, plot: str | None = None) -> str:
    """Markdown: a line for each linear layer and axis of its gate, then the definitions."""
    header = [
        "layer",
        "axis",
        "F < 0.01",
        "F > 0.99",
        "half-life of heads",
        "effective features of heads",
        "state norm",
    ]
    branch = any(layer.get("window_shares") for layer in found["layers"])
    if branch:
        header.append("window branch")
    body = []
    for layer in found["layers"]:
        features = _ends(layer["effective_features"], f" of {layer['key_dim']}")
        first, last = layer["state_norms"][0], layer["state_norms"][-1]
        norms = f"{first[1]:.3g} at {first[0]:,}, {last[1]:.3g} at {last[0]:,}"
        for axis in layer["half_lives"] or {"-": []}:
            low, high = (layer[name].get(axis) for name in ("saturated_low", "saturated_high"))
            shares = ["-" if share is None else f"{share:.1%}" for share in (low, high)]
            half_lives = _ends(layer["half_lives"].get(axis, []), " tokens")
            body.append([str(layer["layer"]), axis, *shares, half_lives, features, norms])
            if branch:
                body[-1].append(_ends(layer.get("window_shares", []), ""))
    picture = f"![Gates, half-lives, features and states]({plot})\n\n" if plot else ""
    return f"""\
# Inside {Path(found["model"]).name}

{len(found["layers"])} linear layers over {found["tokens"]:,} tokens of text.

{markdown(header, body, numbers_from=len(header))}

{picture}F is the forget gate. The half-life of a channel is log 2 over its mean -log F, that of a head the median
of its channels; ranges are from the smallest to the largest head. Effective features are the exponential of the entropy
of the mean feature distribution of the keys. The state norm is that of a layer's whole state after so many tokens.
{_BRANCH if branch else ""}"""


def _ends(values: Sequence[float], unit: str) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:.3g}{unit}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}{unit}"


def plot_inspection(found: dict[str, Any], file: str | Path) -> None:
    """Four panels: histogram of F, half-lives and effective features of every head by layer, state norm by token."""
    import matplotlib
    from matplotlib.figure import Figure

    layers = found["layers"]
    figure = Figure(figsize=(11, 8), dpi=_DPI, layout="constrained")
    gates, half_lives, features, states = figure.subplots(2, 2).flat
    colours = matplotlib.colormaps["viridis"].resampled(max(2, len(layers)))
    for index, layer in enumerate(layers):
        colour, name = colours(index), f"layer {layer['layer']}"
        for axis, shares in layer["histogram"].items():
            style = "-" if axis == "key" else "--"
            centres = [(bin_ + 0.5) / len(shares) for bin_ in range(len(shares))]
            gates.plot(centres, shares, style, color=colour, label=f"{name}, {axis}")
        for axis, values in layer["half_lives"].items():
            half_lives.plot([layer["layer"]] * len(values), values, "o" if axis == "key" else "x", color=colour)
        own = layer["effective_features"]
        features.plot([layer["layer"]] * len(own), own, "o", color=colour)
        tokens, norms = zip(*layer["state_norms"], strict=True)
        states.plot(tokens, norms, marker=".", color=colour, label=name)
    gates.set(title="Forget gates F", xlabel="F", ylabel="share", yscale="log")
    half_lives.set(title="Half-lives of heads", xlabel="layer", ylabel="tokens", yscale="log")
    features.set(title="Effective features of heads", xlabel="layer", ylabel=f"of {layers[0]['key_dim']}")
    features.set_ylim(0, layers[0]["key_dim"] * 1.05)
    states.set(title="Norm of the state", xlabel="tokens read", ylabel="Frobenius norm", yscale="log")
    for axes in (gates, half_lives, features, states):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(layers) <= 8:
        gates.legend(frameon=False, fontsize=7)
        states.legend(frameon=False, fontsize=7)
    figure.savefig(file)

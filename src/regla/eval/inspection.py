"""What a model does inside: gates, memory, features and states of its linear layers, on one page.

Everything is observed from outside, by hooks on public parts: the gate module of each layer gives log-decays log F_t
[B, T, H, channels], the cache the states, and the last part before the feature map the keys: calibration, norm or
projection (before RoPE, and in the last case before the convolution). Shape legend: B = 1, T tokens, H state heads, K
features of a head.

    saturated          share of F below 0.01 or above 0.99
    slope              mean of dF/da, a = W x + b the logit of a sigmoid gate: what its gradients pass through
    half-life          log 2 / -mean_t log F_t of a channel; of a head, the median over its channels
    effective features exp(entropy of the mean over t of softmax_K(k_t)): of K features, how many are in use
    state norm         Frobenius norm of S exp(m) after every chunk of the text
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regla.data.records import TEXT_FIELD
from regla.data.selection import read_sources, split_validation
from regla.data.sources import encode_source
from regla.data.tokenizer import first_id, load_tokenizer
from regla.eval.streaming import stream
from regla.layers.attention import ReGLAAttention
from regla.layers.feature_maps import SafeExp, UnitSafeExp
from regla.models.cache import ReGLACacheLayer
from regla.models.folders import check_ids, load_model
from regla.ops.call import Gates
from regla.report.inspection import inspection_page, plot_inspection
from regla.runtime.device import pick_device
from regla.runtime.errors import check_count
from regla.runtime.files import new_folder, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BINS = 50  # of the histogram of F, from 0 to 1
LOW, HIGH = 0.01, 0.99
CHUNK = 512
PAGE, SUMMARY, PLOT = "inspection.md", "inspection.json", "inspection.png"


@dataclass
class LayerReport:
    """One linear layer. `axes` are those of the state that its gate decays."""

    layer: int
    heads: int
    key_dim: int
    histogram: dict[str, list[float]]
    """Share of F in each of BINS bins, by axis."""
    saturated_low: dict[str, float]
    saturated_high: dict[str, float]
    slopes: dict[str, float]
    """Of gates that are a sigmoid, refined or not; none of others."""
    half_lives: dict[str, list[float]]
    """Of every head, tokens."""
    effective_features: list[float]
    """Of every head, of key_dim; none of feature maps that are no exponential."""
    state_norms: list[tuple[int, float]] = field(default_factory=list)
    """(tokens read, norm)."""
    window_shares: list[float] = field(default_factory=list)
    """Of every query head, the share of the window branch in its output; none where there is no branch."""


@dataclass
class Inspection:
    model: str
    tokens: int
    layers: list[LayerReport]


def inspect_model(
    model: str,
    *,
    data: Sequence[str] = (),
    text_field: str = TEXT_FIELD,
    tokens: int = 8192,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> Inspection:
    """Read the first `tokens` of a text, print a table, and write OUT/inspection.md, .json and .png.

    Args:
        model: a folder, a .gguf file or a name on the hub, with linear layers of ReGLA: pure, hybrid or converted.
        data: text; by default the held-out tenth of the embedded text.

    Raises:
        ValueError: whatever can be wrong with the input; a model without linear layers.
    """
    check_count("tokens", tokens, least=2)
    where = pick_device(device)
    sources = read_sources(data, text_field) if data else split_validation(read_sources([]))[1]
    loaded, tokenizer = load_model(model, where), load_tokenizer(model)
    layers = linear_layers(loaded)
    if not layers:
        raise ValueError(f"{model} has no linear layers to look into; give a model with ReGLA layers, or convert it.")
    ids_N = np.concatenate([encode_source(source, tokenizer).ids for source in sources])[: tokens - 1]
    check_ids(loaded, [int(ids_N.max())], "The tokens of the text")
    folder = None if out is None else new_folder(out)
    ids_1T = torch.from_numpy(np.concatenate([[first_id(tokenizer)], ids_N]).astype(np.int64))[None]
    found = Inspection(model=str(model), tokens=ids_1T.shape[1], layers=look_inside(loaded, ids_1T, dtype=dtype))
    rows = asdict(found)
    print(inspection_page(rows).partition("\n\n")[2])
    if folder is not None:
        write_text(folder / PAGE, inspection_page(rows, plot=PLOT))
        write_json(folder / SUMMARY, json.loads(json.dumps(rows)))
        plot_inspection(rows, folder / PLOT)
        print(f"Written to {folder}: {PAGE}, {SUMMARY}, {PLOT}.")
    return found


def linear_layers(model: PreTrainedModel) -> dict[int, ReGLAAttention]:
    """The mixers of ReGLA by the number of their layer."""
    found: dict[int, ReGLAAttention] = {}
    for module in model.modules():
        if isinstance(module, ReGLAAttention):
            found[len(found) if module.layer_idx is None else module.layer_idx] = module
    return found


@torch.no_grad()
def look_inside(
    model: PreTrainedModel, ids_1T: Tensor, *, dtype: str = "float32", chunk: int = CHUNK
) -> list[LayerReport]:
    """Read `ids_1T` in chunks through the cache, as `regla.eval.streaming` does, and sum up what the layers did."""
    layers = linear_layers(model)
    sums = {number: _Sums(mixer) for number, mixer in layers.items()}
    norms: dict[int, list[tuple[int, float]]] = {number: [] for number in layers}
    read = 0
    with ExitStack() as hooks:
        for number, mixer in layers.items():
            hooks.enter_context(_observed(mixer, sums[number]))
        for logits_1CV, cache in stream(model, ids_1T, chunk=chunk, dtype=dtype):
            read += logits_1CV.shape[1]
            for number in layers:
                norms[number].append((read, _state_norm(cache.layers[number], layers[number])))
    return [sums[number].report(number, norms[number]) for number in layers]


def layer_figures(model: PreTrainedModel, ids_1T: Tensor, *, dtype: str = "float32") -> dict[str, dict[str, Any]]:
    """For the log of a training, by number of linear layer: shares of saturated gates by axis of the state, and
    the norm of the state (None: not finite) at the end of `ids_1T`."""
    found = {}
    for report in look_inside(model, ids_1T, dtype=dtype):
        norm = report.state_norms[-1][1]
        found[str(report.layer)] = {
            "saturated_low": report.saturated_low,
            "saturated_high": report.saturated_high,
            "state_norm": norm if math.isfinite(norm) else None,
        }
    return found


class _Sums:
    """Running sums of one layer."""

    def __init__(self, mixer: ReGLAAttention) -> None:
        self.mixer = mixer
        self.K = mixer.head_dim
        self.is_exponential = isinstance(mixer.feature_map, SafeExp | UnitSafeExp)
        self.T = 0
        self.histogram: dict[str, Tensor] = {}
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self.log_F: dict[str, Tensor] = {}
        self.F: dict[str, int] = {}
        self.slopes: dict[str, float] = {}
        self.features = torch.zeros((), dtype=torch.float64, device="cpu")

    def slope(self, gates: Gates) -> None:
        """Of what the gate module gives: log-decays, or logits of a refined gate."""
        gate = self.mixer.gate
        if gate.starts_itself:
            return
        for axis, a, c in (("key", gates.gk, gates.rk), ("value", gates.gv, gates.rv)):
            if a is None:
                continue
            a = a.double()
            if c is None:  # F = g^(1/root)
                dF_da = a.exp() * -torch.expm1(gate.root * a) / gate.root
            else:
                g, r = a.sigmoid(), c.double().sigmoid()
                dF_da = g * (1 - g) * (2 * (1 - r) * g + 2 * r * (1 - g))
            self.slopes[axis] = self.slopes.get(axis, 0.0) + float(dF_da.sum())

    def gates(self, log_F_by_axis: dict[str, Tensor]) -> None:
        """log F [1, C, H, channels] of an axis."""
        for axis, log_F in log_F_by_axis.items():
            F = log_F.double().exp().cpu()
            self.histogram[axis] = self.histogram.get(axis, 0) + torch.histc(F, BINS, 0, 1)
            self.low[axis] = self.low.get(axis, 0) + int((F < LOW).sum())
            self.high[axis] = self.high.get(axis, 0) + int((F > HIGH).sum())
            self.log_F[axis] = self.log_F.get(axis, 0) + log_F.double().cpu().sum((0, 1))
            self.F[axis] = self.F.get(axis, 0) + F.numel()

    def keys(self, k: Tensor) -> None:
        """[1, C, H, K], what the feature map reads."""
        self.T += k.shape[1]
        self.features = self.features + k.double().softmax(-1).cpu().sum((0, 1))

    def report(self, number: int, norms: list[tuple[int, float]]) -> LayerReport:
        p_HK = self.features / self.T
        window = self.mixer.window
        entropy_H = -(p_HK * p_HK.clamp(min=1e-300).log()).sum(-1)
        return LayerReport(
            layer=number,
            heads=self.mixer.num_kv_heads,
            key_dim=self.K,
            histogram={axis: (counts / counts.sum()).tolist() for axis, counts in self.histogram.items()},
            saturated_low={axis: self.low[axis] / self.F[axis] for axis in self.F},
            saturated_high={axis: self.high[axis] / self.F[axis] for axis in self.F},
            slopes={axis: total / self.F[axis] for axis, total in self.slopes.items()},
            half_lives={axis: _half_lives(total / self.T) for axis, total in self.log_F.items()},
            effective_features=entropy_H.exp().tolist() if self.is_exponential else [],
            state_norms=norms,
            window_shares=[] if window is None else torch.sigmoid(window.logit.detach().double()).tolist(),
        )


def _half_lives(log_F_HC: Tensor) -> list[float]:
    """Of the mean log-decay of a channel; the median over the channels of each head."""
    return (math.log(2) / (-log_F_HC).clamp(min=1e-12)).median(-1).values.tolist()


@contextmanager
def _observed(mixer: ReGLAAttention, sums: _Sums) -> Iterator[None]:
    """Hooks that fill `sums` while the layer runs."""

    def gate(module: Any, args: Any, output: Gates) -> None:
        sums.slope(output)
        sums.gates({axis: g for axis, g in zip(("key", "value"), output.logarithms(), strict=True) if g is not None})

    def keys(module: Any, args: Any, output: Any) -> None:
        k = output[1] if isinstance(output, tuple) else output
        sums.keys(k.unflatten(-1, (-1, mixer.head_dim)) if k.ndim == 3 else k)

    reads = next(part for part in (mixer.qk_calibration, mixer.k_norm, mixer.k_proj) if part is not None)
    handles = [mixer.gate.register_forward_hook(gate), reads.register_forward_hook(keys)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _state_norm(layer: Any, mixer: ReGLAAttention) -> float:
    assert isinstance(layer, ReGLACacheLayer)
    state = layer.read()
    assert state is not None
    log_unit_BH = 0.0 if mixer.feature_map.key_max is None else state.m.double()
    log_norm_BH = state.S.double().flatten(2).norm(dim=-1).log() + log_unit_BH
    return math.exp(min(0.5 * float((2 * log_norm_BH).logsumexp((0, 1))), 700.0))  # beyond lies no float64

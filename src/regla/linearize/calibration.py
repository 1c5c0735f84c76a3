"""Fits the feature map and the output norm of converted layers to what the pretrained attention does.

Pretrained queries and keys enter the safe exponential badly as they are: a few channels of a key carry large constants,
which softmax forgets and an exponential of the channels does not. A layer then has one key feature instead of K.

    q' = (q - mean q) * q_scale,  k' = (k - mean k) * k_scale        behind RoPE, per channel and per head
    q_scale, k_scale = argmin KL(softmax attention || linear attention, ungated, sum-normalised)    on a small grid
    half-life of the gates = that of HALF_LIVES with the least squared error of the output, per key head
    weight of the output norm = sum softmax's output * ours / sum ours^2, per head and channel: least squares

Shape legend: B sequences, T tokens, R queries sampled of each sequence, H key heads, G query heads to each, K channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from regla.layers.attention import ReGLAAttention
from regla.layers.feature_maps import UnitSafeExp
from regla.layers.gates import half_life_logit
from regla.linearize.config import DISTANCE
from regla.linearize.observe import Attention, observed_attention
from regla.linearize.transfer import projected
from regla.models.student import StudentAttention, linear_attention
from regla.report.tables import plain
from regla.runtime.device import float32_products
from regla.runtime.errors import OptionError

#: What scales are chosen from.
SCALES = (0.0625, 0.125, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)

#: Least effective number of key features, as a share of the head's channels: 16 of 64.
LEAST_FEATURES = 0.25

MAPS = ("safe_exp", "unit_safe_exp")
"""The feature maps that calibration is for."""

HALF_LIVES = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)
"""What the half-lives of gates are chosen from, in tokens."""

_NEAR = 0.05  # nats: attention that is nearly uniform is met well enough

_LEAST_GAIN = 0.1

_LEAST_ATTENTION = 1e-3  # in all, to tokens but the first

_QUERIES = 32  # R: of each sequence, spread evenly; all its keys are looked at


@dataclass(frozen=True)
class LayerCalibration:
    """The figures of one layer, on sequences that its calibration did not see."""

    layer: int
    channels: int
    features_before: float
    """Effective key features of the worst head: exp of the entropy of the mean over tokens of phi(k) / sum phi(k)."""
    features_after: float
    kl_before: float
    """KL(softmax attention || linear attention), nats per query, mean over heads."""
    kl_after: float
    kl_uniform: float
    """The same for attention that looks at every past token alike."""
    distances: list[float]
    """Tokens that softmax attention looks back, mean, by key head; looks at the first token do not count."""
    half_lives: list[float] | None
    """Of the forget gates as they start, by key head; None: they were not set."""

    @property
    def holds(self) -> bool:
        """Whether the contract holds, see `failure`."""
        return self.failure is None

    @property
    def failure(self) -> str | None:
        """What is wrong with a layer, if anything: fewer than a quarter of the features are effective, or it is further
        from softmax attention than uniform attention is (unless that is near, too)."""
        least = LEAST_FEATURES * self.channels
        if self.features_after < least:
            return f"{self.features_after:.1f} of {self.channels} key features are effective, expected {least:g}"
        if self.kl_after >= max(self.kl_uniform, _NEAR):
            return (
                f"its KL from softmax attention is {self.kl_after:.2f} nats, expected less than the "
                f"{self.kl_uniform:.2f} of uniform attention"
            )
        return None


@torch.no_grad()
@float32_products()
def calibrate(
    original: PreTrainedModel,
    converted: PreTrainedModel,
    tokens_BT: Tensor,
    *,
    layers: Iterable[int] | None = None,
    gates: str | None = None,
) -> list[LayerCalibration]:
    """Set `qk_calibration` and the output norm's weight of linear layers of `converted`, in place.

    Args:
        original: the model that was converted.
        converted: what `regla.linearize.convert` made of it, with its weights as they were transferred.
        tokens_BT: [B, T] token ids, a few thousand, B at least 2. The first half of the sequences sets the numbers,
            the other half gives the figures that are returned.
        layers: the linear layers to calibrate; None: all.
        gates: set the biases of the forget gates, too (`start_gates`): "teacher", to the half-life whose output is
            nearest to the original's; "distance", to the mean distance that its attention looks back.

    Raises:
        ValueError: fewer than two sequences; a feature map, norm or calibration that is not there to be set.
    """
    config = converted.config.linear_config
    for name, expected in (("feature_map", MAPS), ("attention_norm", ("rmsnorm",)), ("qk_calibration", (True,))):
        if getattr(config, name) not in expected:
            raise OptionError(
                "{name} is {value!r}, and calibration is for {expected}; go without it ({calibration_tokens} 0)",
                name=name,
                value=getattr(config, name),
                expected=" or ".join(map(repr, expected)),
            )
    if len(tokens_BT) < 2:
        raise ValueError(f"{len(tokens_BT)} sequence given; calibration needs at least 2: half of them to check it on")
    linear = linear_attention(converted)
    rows: list[LayerCalibration] = []

    def see(number: int, attention: Attention) -> None:
        rows.append(_calibrate_layer(number, linear[number], attention, gates))

    training = original.training
    original.eval()
    try:
        with observed_attention(original, linear if layers is None else layers, see):
            original.base_model(tokens_BT.to(original.device), use_cache=False)
    finally:
        original.train(training)
    return rows


def calibration_table(rows: Sequence[LayerCalibration]) -> str:
    """One line per layer; the last column says where the contract fails."""
    header = ["layer", "features before", "after", "KL before", "after", "uniform", ""]
    body = [
        [
            str(row.layer),
            *(f"{value:.1f}" for value in (row.features_before, row.features_after)),
            *(f"{value:.2f}" for value in (row.kl_before, row.kl_after, row.kl_uniform)),
            "" if row.holds else "FAILS",
        ]
        for row in rows
    ]
    return "Effective features, and KL divergence from softmax attention:\n" + plain(header, body, numbers_from=0)


def _calibrate_layer(number: int, ours: StudentAttention, attention: Attention, gates: str | None) -> LayerCalibration:
    x, rotary = attention.x, attention.rotary
    B = len(x)
    q, k, v = projected(ours, x, rotary)
    seen = slice(0, B // 2), slice(B // 2, B)
    fit, check = (_Softmax(q[part], k[part], ours) for part in seen)

    calibration = ours.mixer.qk_calibration
    assert calibration is not None
    calibration.q_mean.copy_(q[seen[0]].mean((0, 1)))
    calibration.k_mean.copy_(k[seen[0]].mean((0, 1)))
    q_scale, k_scale = _best_scales(fit, q[seen[0]] - calibration.q_mean, k[seen[0]] - calibration.k_mean)
    calibration.q_scale.copy_(q_scale)
    calibration.k_scale.copy_(k_scale)
    part = Attention(x[seen[0]], rotary, attention.y[seen[0]])
    teacher = _softmax_output(ours, q[seen[0]], k[seen[0]], v[seen[0]])
    distance_H = fit.mean_distance().mean(1)
    half_life_H = None
    if gates is not None and not ours.mixer.gate.starts_itself:
        half_life_H = distance_H if gates == DISTANCE else _best_half_lives(ours, part, teacher)
        start_gates(ours.mixer, half_life_H)
    cast(Tensor, ours.mixer.norm.weight).copy_(output_gains(teacher, _unit_output(ours, part)))

    before = q[seen[1]], k[seen[1]]
    after = calibration(*before)
    return LayerCalibration(
        layer=number,
        channels=ours.mixer.head_dim,
        features_before=effective_features(before[1]).min().item(),
        features_after=effective_features(after[1]).min().item(),
        kl_before=check.divergence(before[0].double(), before[1].double()).mean().item(),
        kl_after=check.divergence(after[0].double(), after[1].double()).mean().item(),
        kl_uniform=check.divergence_of_uniform().mean().item(),
        distances=distance_H.tolist(),
        half_lives=None if half_life_H is None else half_life_H.tolist(),
    )


class _Softmax:
    """The original's attention of q [B, T, H*G, K] over k [B, T, H, K], at R of the T queries of each sequence."""

    def __init__(self, q: Tensor, k: Tensor, layer: StudentAttention):
        T = q.shape[1]
        step = max(1, T // _QUERIES)
        self.rows_R = torch.arange(step - 1, T, step, device=q.device)
        self.past_RT = _seen(self.rows_R, T, None)
        seen_RT = _seen(self.rows_R, T, layer.window)
        log_p = (self.scores(q, k) * layer.scaling).masked_fill(~seen_RT, -torch.inf).log_softmax(-1)
        self.p_BHGRT = log_p.exp()
        self.is_unit = isinstance(layer.mixer.feature_map, UnitSafeExp)  # keys of unit length
        self.negative_entropy_BHGR = torch.where(seen_RT, self.p_BHGRT * log_p, 0.0).sum(-1)

    def mean_distance(self) -> Tensor:
        """Tokens that the queries look back, mean under their attention, [H, G]; from 1 on, the first token left out.

        A head that looks at nothing but the first token counts as looking at all alike.
        """
        T = self.past_RT.shape[1]
        others_RT = self.past_RT & (torch.arange(T, device=self.rows_R.device) > 0)
        p = torch.where(others_RT, self.p_BHGRT, 0.0) + others_RT * _LEAST_ATTENTION / T
        distance_RT = self.rows_R[:, None] - torch.arange(T, device=self.rows_R.device)
        return ((p * distance_RT).sum((0, 3, 4)) / p.sum((0, 3, 4))).clamp_min(1.0)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q_t . k_s [B, H, G, R, T]."""
        q = q[:, self.rows_R].unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
        return q @ k.permute(0, 2, 3, 1)[:, :, None]

    def divergence(self, q: Tensor, k: Tensor) -> Tensor:
        """KL to the linear attention with weights phi(q_t) . phi(k_s) / sum over s <= t, [H, G]."""
        phi_k = torch.exp(k - k.amax((1, 3), keepdim=True))
        if self.is_unit:
            phi_k = torch.nn.functional.normalize(torch.exp(k - k.amax(-1, keepdim=True)), dim=-1)
        a = self.scores(torch.exp(q - q.amax(-1, keepdim=True)), phi_k)
        a = torch.where(self.past_RT, a.clamp_min(torch.finfo(a.dtype).tiny), 0.0)
        log_a = torch.where(self.past_RT, a, 1.0).log()
        cross = a.sum(-1).log() - (self.p_BHGRT * log_a).sum(-1)
        return (self.negative_entropy_BHGR + cross).mean((0, 3))

    def divergence_of_uniform(self) -> Tensor:
        return (self.negative_entropy_BHGR + (self.rows_R + 1).log()).mean((0, 3))


def _seen(rows_R: Tensor, T: int, window: int | None) -> Tensor:
    """[R, T], True where a query looks at a key."""
    distance = rows_R[:, None] - torch.arange(T, device=rows_R.device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def effective_features(k: Tensor) -> Tensor:
    """exp of the entropy of p, p the mean over tokens of phi(k) / sum_i phi(k)_i; k [B, T, H, K] -> [H]."""
    p = k.double().softmax(-1).mean((0, 1))
    return torch.exp(-torch.xlogy(p, p).sum(-1))


def _best_scales(softmax: _Softmax, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The scales [H*G] and [H] of least KL, the keys' among those that leave enough features (if none: the least)."""
    H, K = k.shape[2:]
    kl = []  # of [scale of k][scale of q]: [H, G]
    for k_scale in SCALES:
        kl.append(torch.stack([softmax.divergence(q * q_scale, k * k_scale) for q_scale in SCALES]))
    best_of_q = torch.stack(kl).min(1)  # [scale of k, H, G]
    features = torch.stack([effective_features(k * k_scale) for k_scale in SCALES])
    allowed = features >= LEAST_FEATURES * K
    allowed[0] = True
    chosen_H = torch.where(allowed, best_of_q.values.mean(-1), torch.inf).argmin(0)
    q_choice = best_of_q.indices[chosen_H, torch.arange(H, device=k.device)]  # [H, G]
    scales = torch.tensor(SCALES, device=k.device)
    return scales[q_choice].flatten(), scales[chosen_H]


@torch.no_grad()
def start_gates(mixer: ReGLAAttention, half_life_H: Tensor) -> None:
    """Start the forget gates of each key head with this half-life in tokens, in place: F = 2^(-1/n), whatever the
    input, since the weights on the input start at zero and learn from there.

    Gates without biases to start, and those with a start of their own, stay.
    """
    gate = mixer.gate
    if gate.starts_itself:
        return
    for name, module in gate.named_modules():
        if not isinstance(module, nn.Linear) or module.bias is None:
            continue
        refines = name == "refine_proj"  # r = 1/2: the refined gate equals the plain one
        bias = torch.zeros_like(module.bias)
        if not refines:
            logit_H = half_life_logit(half_life_H.double(), gate.root)
            parts = [logit_H.repeat_interleave(channels) for channels in gate.axes(name)]
            bias = torch.cat(parts).to(bias)
        module.bias.copy_(bias)
        module.weight.zero_()


def _best_half_lives(layer: StudentAttention, attention: Attention, teacher: Tensor) -> Tensor:
    """Of HALF_LIVES, per key head: where the output, scaled at best, is nearest to the teacher's."""
    H = layer.mixer.num_kv_heads
    errors = []
    for half_life in HALF_LIVES:
        start_gates(layer.mixer, torch.full((H,), half_life, device=teacher.device))
        ours = _unit_output(layer, attention)
        error_heads = (ours * output_gains(teacher, ours) - teacher).square().sum((0, 1, 3)) / teacher.square().sum(
            (0, 1, 3)
        )
        errors.append(error_heads.view(H, -1).mean(1))
    return torch.tensor(HALF_LIVES, device=teacher.device)[torch.stack(errors).argmin(0)]


def _softmax_output(layer: StudentAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the original's heads give before its output projection, [B, T, heads, V]."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    T = q.shape[2]
    mask_TT = _seen(torch.arange(T, device=q.device), T, layer.window)
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask_TT, scale=layer.scaling, enable_gqa=True)
    return o.transpose(1, 2).float()


def _unit_output(layer: StudentAttention, attention: Attention) -> Tensor:
    """What the mixer's heads give behind a norm of weight 1, [B, T, heads, V]."""
    ours: list[Tensor] = []
    norm = layer.mixer.norm
    cast(Tensor, norm.weight).fill_(1.0)
    with norm.register_forward_hook(lambda module, args, output: ours.append(output)):
        layer.mix(attention.x, attention.rotary)
    return ours[0].float()


def output_gains(teacher: Tensor, ours: Tensor) -> Tensor:
    """The least-squares gain of each head and channel; at least a tenth of that with which both have equal power, so
    that no channel starts dead."""
    power = ours.square().mean((0, 1)).clamp_min(torch.finfo(torch.float32).tiny)
    equal = (teacher.square().mean((0, 1)) / power).sqrt()
    return torch.maximum((teacher * ours).mean((0, 1)) / power, _LEAST_GAIN * equal)

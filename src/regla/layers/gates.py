"""Forget gates, from hidden states to log-decays of the state, one class each; `GATES` names them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from regla.layers.plain import has_hooks
from regla.layers.projection import project, split_heads
from regla.ops.call import Gates, Packed

HalfLife = float | Sequence[float]  # tokens until half is forgotten: of all channels, or (shortest, longest)
SPACINGS = ("channels", "heads")  # what such a pair is spaced over


class Gate(nn.Module):
    """x [B, T, hidden] -> `Gates` of the state; logarithms in float32.

    A linear map that `build` makes is named `proj`, `down` or `*_proj`: `regla.layers.init` knows it by that.
    """

    root = 1  # what decays is sigmoid(a)^(1/root)
    has_axis = False  # whether the option `axis` has a meaning: one of GATE_AXES
    starts_itself = False  # whether the gate has a start of its own, `start`, in place of a bias or half-life

    def __init__(self, hidden_size: int, num_heads: int, K: int, V: int, axis: str, low_rank_dim: int):
        super().__init__()
        self.num_heads, self.K, self.V, self.axis = num_heads, K, V, axis
        self.build(hidden_size, low_rank_dim)

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        """Make the parameters."""

    def axes(self, projection: str) -> tuple[int, ...]:
        """Channels of a head that the linear map of this name gives, one number for each axis of the state. The
        channels of all heads for the first axis come before those for the second."""
        return {"value": (self.V,), "key": (self.K,), "both": (self.K, self.V), "head": (1,)}[self.axis]

    def half_life_bias(self, projection: str, half_life: HalfLife, over: str = "channels") -> Tensor:
        """Bias of that linear map at which each axis forgets half in `half_life` tokens; a pair is log-spaced over
        the channels of each head or over the heads, the shortest first."""
        ends, H = half_life_ends(half_life), self.num_heads
        half_lives = [
            log_spaced(ends, D).repeat(H) if over == "channels" else log_spaced(ends, H).repeat_interleave(D)
            for D in self.axes(projection)
        ]
        return torch.cat([half_life_logit(one, self.root) for one in half_lives])

    def start(self, name: str) -> Tensor:
        """The start of the parameter of this name, of a gate that `starts_itself`."""
        raise NotImplementedError

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, H*D] -> [B, T, H, D] float32."""
        return _wide(x).unflatten(-1, (self.num_heads, -1))

    def heads_of_axes(self) -> list[tuple[int, int]]:
        """(heads, channels of each) for every axis that the gate decays."""
        return [(self.num_heads, D) for D in self.axes("proj")]

    def on_axes(self, parts: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What there is for each axis, in the order of `axes`, as (of the key axis, of the value axis) or None."""
        if self.axis == "both":
            return parts[0], parts[1]
        return (None, parts[0]) if self.axis == "value" else (parts[0], None)


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_spaced(ends: tuple[float, float], size: int) -> Tensor:
    """`size` numbers from the first of `ends` to the last, evenly spaced in their logarithm."""
    low, high = (math.log2(end) for end in ends)
    return torch.logspace(low, high, size, base=2.0, dtype=torch.float64, device="cpu")


def half_life_logit(half_life: Tensor, root: int = 1) -> Tensor:
    """The b at which sigmoid(b)^(1/root) = F = 2^(-1/half_life): logit(F^root) = -log(2^(root/half_life) - 1)."""
    y = root * math.log(2) / half_life
    return -(y + torch.log(-torch.expm1(-y)))  # log(exp(y) - 1), which a half-life far below 1 would overflow


def default_rank(hidden_size: int) -> int:
    """Of low-rank gates: an eighth of the width, with which they always have fewer parameters than full ones."""
    return max(1, hidden_size // 8)


def half_life_ends(half_life: HalfLife) -> tuple[float, float]:
    """(shortest, longest); ValueError unless it is a number or an ascending pair of numbers, above 0 and finite."""
    ends = tuple(half_life) if isinstance(half_life, Sequence) else (half_life, half_life)
    if len(ends) != 2 or not 0 < ends[0] <= ends[1] < math.inf:
        raise ValueError(
            f"gate_half_life is {half_life}; expected a number of tokens above 0 or a pair [shortest, longest] of them"
        )
    return float(ends[0]), float(ends[1])


def check_gate_start(
    gate: type[Gate],
    *,
    gate_axis: str = "key",
    gate_bias: float = 0.0,
    refine_bias: float = 0.0,
    gate_half_life: HalfLife | None = None,
    gate_half_life_over: str = "channels",
) -> None:
    """Raise a ValueError if a gate cannot start with this half-life, or is told to start in two ways."""
    if gate.starts_itself:
        for name, value, neutral in (("gate_bias", gate_bias, 0), ("gate_half_life", gate_half_life, None)):
            if value != neutral:
                raise ValueError(
                    f"{name} is {value}, but a {gate.__name__} has a start of its own: leave it out ({name}={neutral})"
                )
    if gate_half_life is None:
        return
    shortest, longest = half_life_ends(gate_half_life)
    for name, bias in (("gate_bias", gate_bias), ("refine_bias", refine_bias)):
        if bias != 0:
            raise ValueError(
                f"{name} is {bias} and gate_half_life {gate_half_life}, which sets the start itself: leave one out "
                "(gate_half_life=None)"
            )
    if issubclass(gate, NoGate):
        raise ValueError(
            f"gate_half_life is {gate_half_life}, but without a gate nothing is forgotten: leave it out "
            "(gate_half_life=None)"
        )
    one_channel = issubclass(gate, ScalarGate) or (gate.has_axis and gate_axis == "head")
    if one_channel and shortest < longest and gate_half_life_over == "channels":
        raise ValueError(
            f"gate_half_life is {gate_half_life}, but a scalar gate has one channel a head: give one number of tokens, "
            "or gate_half_life_over='heads'"
        )


class NoGate(Gate):
    """Nothing is forgotten (paper equations 3-5)."""

    def forward(self, x: Tensor) -> Gates:
        return Gates()


class ScalarGate(Gate):
    """S_t = g_t S_{t-1} + (1 - g_t) k_t v_t^T, g_t = sigmoid(W x + b), one number a head (paper equations 6-7)."""

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.proj = nn.Linear(hidden_size, self.num_heads)

    def axes(self, projection: str) -> tuple[int, ...]:
        return (1,)

    def forward(self, x: Tensor) -> Gates:
        a = self.heads(self.proj(x))
        return Gates(gk=logsigmoid(a), write=torch.sigmoid(-a))


class FastDecayGate(Gate):
    """Decay on both axes: f_t = sigmoid(W_f x + b_f), z_t = sigmoid(W_z x + b_z) (paper equations 9-10; Mao 2022)."""

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.key_proj = nn.Linear(hidden_size, self.num_heads * self.K)
        self.value_proj = nn.Linear(hidden_size, self.num_heads * self.V)

    def axes(self, projection: str) -> tuple[int, ...]:
        return (self.K if projection == "key_proj" else self.V,)

    def forward(self, x: Tensor) -> Gates:
        gk, gv = logsigmoid(self.heads(self.key_proj(x))), logsigmoid(self.heads(self.value_proj(x)))
        return Gates(gk=gk, gv=gv)


class GLAGate(Gate):
    """Key-axis decay sigmoid(W_2 W_1 x + b)^(1/16) with a low-rank W_2 W_1 (Yang et al. 2024, arXiv 2312.06635)."""

    root = 16

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.down = nn.Linear(hidden_size, low_rank_dim, bias=False)
        self.proj = nn.Linear(low_rank_dim, self.num_heads * self.K)

    def axes(self, projection: str) -> tuple[int, ...]:
        return (self.K,)

    def forward(self, x: Tensor) -> Gates:
        return Gates(gk=logsigmoid(self.heads(self.proj(self.down(x)))) / self.root)


class Mamba2Gate(Gate):
    """log F_t = -A softplus(w x_t + b), one number a head, of the key axis; A = exp(A_log) (Dao and Gu 2024, arXiv
    2405.21060).

    It starts as Mamba-2 does: A uniform in [1, 16], softplus(b) log-uniform in [0.001, 0.1], that is with half-lives
    from half a token to 700 tokens. A_log and b take no weight decay.
    """

    starts_itself = True

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.proj = nn.Linear(hidden_size, self.num_heads, bias=False)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(self.num_heads)), nn.Parameter(torch.zeros(self.num_heads))
        with torch.no_grad():
            self.A_log.copy_(self.start("A_log"))
            self.dt_bias.copy_(self.start("dt_bias"))

    def axes(self, projection: str) -> tuple[int, ...]:
        return (1,)

    def start(self, name: str) -> Tensor:
        drawn = torch.rand(self.num_heads, dtype=torch.float64, device="cpu")
        if name == "A_log":
            return (1 + 15 * drawn).log()
        dt = 1e-3 * 100**drawn
        return dt + torch.log(-torch.expm1(-dt))  # softplus of it is dt

    def forward(self, x: Tensor) -> Gates:
        dt = torch.nn.functional.softplus(_wide(self.proj(x)) + _wide(self.dt_bias))
        return Gates(gk=-(dt * _wide(self.A_log).exp())[..., None])


class SigmoidGate(Gate):
    """F_t = sigmoid(W_g x + b_g) on the chosen axis: the refining gate's baseline."""

    has_axis = True

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.proj = nn.Linear(hidden_size, self.num_heads * sum(self.axes("proj")))

    def forward(self, x: Tensor) -> Gates:
        gk, gv = self.on_axes(split_heads(logsigmoid(_wide(self.proj(x))), self.heads_of_axes()))
        return Gates(gk=gk, gv=gv)


class RefinedGate(Gate):
    """F_t = (1 - r) g^2 + r (1 - (1 - g)^2), g = sigmoid(W_g x + b_g), r = sigmoid(W_r x + b_r) (equations 11-13)."""

    has_axis = True

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.proj = nn.Linear(hidden_size, self.num_heads * sum(self.axes("proj")))
        self.refine_proj = nn.Linear(hidden_size, self.num_heads * sum(self.axes("refine_proj")))

    def forward(self, x: Tensor) -> Gates:
        (gate, refine), whole = project(x, self.proj, self.refine_proj)
        heads = self.heads_of_axes()
        packed = None if whole is None or has_hooks(self) else Packed(whole, heads + heads)
        parts = packed.parts if packed else [*split_heads(gate, heads), *split_heads(refine, heads)]
        (gk, gv), (rk, rv) = self.on_axes(parts[: len(heads)]), self.on_axes(parts[len(heads) :])
        return Gates(gk, rk, gv, rv, packed=packed)


class LowRankRefinedGate(RefinedGate):
    """`RefinedGate` with W_g = W_g' D and W_r = W_r' D, D of low rank: its parameters go back to the MLP."""

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.down = nn.Linear(hidden_size, low_rank_dim, bias=False)
        super().build(low_rank_dim, low_rank_dim)

    def forward(self, x: Tensor) -> Gates:
        return super().forward(self.down(x))


GATES: dict[str, type[Gate]] = {
    "none": NoGate,
    "scalar": ScalarGate,
    "fast_decay": FastDecayGate,
    "gla": GLAGate,
    "sigmoid": SigmoidGate,
    "refined": RefinedGate,
    "refined_low_rank": LowRankRefinedGate,
    "mamba2": Mamba2Gate,
}
GATE_AXES = ("value", "key", "both", "head")  # "head": one number a head, which decays the whole of its state

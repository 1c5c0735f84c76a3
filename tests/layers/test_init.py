"""Where a mixer starts: the forget gate in tokens, the spread of q and k."""

import math

import pytest
import torch

from regla.layers import ReGLAAttention, init_linear_attention
from regla.layers.defaults import ADDITIVE

HIDDEN, H, K, V = 32, 4, 6, 5

GATES = [
    ("scalar", "value", [1]),
    ("fast_decay", "value", [K, V]),
    ("gla", "value", [K]),
    *((gate, *axis) for gate in ("sigmoid", "refined") for axis in (("value", [V]), ("key", [K]), ("both", [K, V]))),
    *((gate, "head", [1]) for gate in ("sigmoid", "refined_low_rank")),
]
SPREADABLE = [row for row in GATES if row[-1] != [1]]


def additive(hidden_size: int, heads: int, **options) -> ReGLAAttention:
    return ReGLAAttention(hidden_size, heads, **ADDITIVE.of_layer() | options)


def log_decays(gate: str, axis: str, **start) -> list[torch.Tensor]:
    """The log-decays [T, H, D] that a mixer starts with where inputs do not matter, axis by axis."""
    layer = additive(HIDDEN, H, head_dim=K, value_head_dim=V, gate=gate, gate_axis=axis)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    init_linear_attention(layer, std=0.0, **start)
    with torch.no_grad():
        decays = layer.gate(torch.randn(1, 3, HIDDEN))
    return [decay[0] for decay in decays.logarithms() if decay is not None]


@pytest.mark.parametrize("half_life", [0.01, 0.3, 1, 2.5, 64, 1e5])
@pytest.mark.parametrize(("gate", "axis", "sizes"), GATES)
def test_half_is_forgotten_in_a_half_life(gate, axis, sizes, half_life):
    decays = log_decays(gate, axis, gate_half_life=half_life)
    assert [decay.shape[-1] for decay in decays] == sizes
    for decay in decays:
        torch.testing.assert_close(half_life * decay, torch.full_like(decay, -math.log(2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("gate", "axis", "sizes"), SPREADABLE)
def test_a_pair_is_spaced_over_the_channels_of_each_head(gate, axis, sizes):
    decays = log_decays(gate, axis, gate_half_life=[2, 512])
    for decay, size in zip(decays, sizes, strict=True):
        expected = torch.tensor([2 * 256 ** (channel / (size - 1)) for channel in range(size)])
        torch.testing.assert_close(-math.log(2) / decay, expected.expand(3, H, size), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("gate", "axis", "sizes"), GATES)
def test_a_pair_is_spaced_over_heads(gate, axis, sizes):
    decays = log_decays(gate, axis, gate_half_life=[2, 512], gate_half_life_over="heads")
    expected = torch.tensor([2 * 256 ** (head / (H - 1)) for head in range(H)])[:, None]
    for decay, size in zip(decays, sizes, strict=True):
        torch.testing.assert_close(-math.log(2) / decay, expected.expand(3, H, size), rtol=1e-4, atol=0)


def test_the_gate_of_mamba2_starts_as_mamba2_does():
    """A uniform in [1, 16], dt log-uniform in [0.001, 0.1]; one number a head."""
    layer = additive(HIDDEN, 4000, head_dim=2, gate="mamba2")
    for parameter in layer.gate.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    init_linear_attention(layer, std=0.0)
    with torch.no_grad():
        gk = layer.gate(torch.randn(1, 2, HIDDEN)).gk
        A, dt = layer.gate.A_log.exp(), torch.nn.functional.softplus(layer.gate.dt_bias)
    torch.testing.assert_close(gk, -(A * dt)[:, None].expand(1, 2, 4000, 1))
    for drawn, low, high in ((A, 1, 16), (dt.log(), math.log(1e-3), math.log(1e-1))):
        assert low - 1e-3 <= drawn.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < drawn.max() <= high + 1e-3
        assert drawn.mean().item() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


@pytest.mark.parametrize(
    ("gate", "half_life"), [("scalar", 1), ("fast_decay", 1), ("sigmoid", 1), ("refined", 1), ("gla", 16)]
)
def test_a_bias_of_zero_as_a_half_life(gate, half_life):
    """sigmoid(0) = 1/2, of which GLA takes the 16th root."""
    expected, actual = (log_decays(gate, "value", **start) for start in ({}, {"gate_half_life": half_life}))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_q_and_k_have_a_spread_of_their_own():
    layer = additive(256, 4, gate="gla")
    init_linear_attention(layer, std=0.02, qk_std=256**-0.5)
    with torch.no_grad():
        x = torch.randn(1, 500, 256)
        for projection in (layer.q_proj, layer.k_proj):
            assert projection(x).std().item() == pytest.approx(1, rel=0.05)
        for other in (layer.v_proj, layer.o_proj, layer.output_gate, layer.gate.down, layer.gate.proj):
            assert other.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("gate", "start", "sentence"),
    [
        ("refined", {"gate_half_life": 0}, "gate_half_life is 0; expected a number of tokens above 0 or a pair"),
        ("refined", {"gate_half_life": [4]}, "gate_half_life is [4]; expected a number of tokens above 0 or a pair"),
        ("refined", {"gate_half_life": [8, 4]}, "gate_half_life is [8, 4]; expected a number of tokens above 0"),
        ("refined", {"gate_half_life": math.inf}, "gate_half_life is inf; expected a number of tokens above 0"),
        (
            "refined",
            {"gate_half_life": 4, "gate_bias": 1.5},
            "gate_bias is 1.5 and gate_half_life 4, which sets the start itself: leave one out",
        ),
        (
            "refined",
            {"gate_half_life": 4, "refine_bias": -2.0},
            "refine_bias is -2.0 and gate_half_life 4, which sets the start itself: leave one out",
        ),
        ("none", {"gate_half_life": 4}, "gate_half_life is 4, but without a gate nothing is forgotten: leave it out"),
        ("scalar", {"gate_half_life": [4, 8]}, "gate_half_life is [4, 8], but a scalar gate has one channel a head"),
        ("mamba2", {"gate_half_life": 4}, "gate_half_life is 4, but a Mamba2Gate has a start of its own: leave it out"),
        ("mamba2", {"gate_bias": 1.0}, "gate_bias is 1.0, but a Mamba2Gate has a start of its own: leave it out"),
    ],
)
def test_starts_that_do_not_fit(gate, start, sentence):
    with pytest.raises(ValueError) as error:
        init_linear_attention(additive(HIDDEN, H, gate=gate), std=0.02, **start)
    assert str(error.value).startswith(sentence)


def test_a_pair_over_the_channels_of_a_gate_with_one():
    layer = additive(HIDDEN, H, gate="sigmoid", gate_axis="head")
    with pytest.raises(
        ValueError, match=r"one channel a head: give one number of tokens, or gate_half_life_over='heads'"
    ):
        init_linear_attention(layer, std=0.02, gate_half_life=[4, 8])


@pytest.mark.parametrize(("hidden", "rank"), [(64, 8), (4, 1)])
def test_low_rank_gates_have_a_rank_of_an_eighth_of_the_width(hidden, rank):
    assert additive(hidden, 1, gate="refined_low_rank").gate.down.weight.shape == (rank, hidden)
    assert additive(hidden, 1, gate="refined_low_rank", gate_low_rank_dim=3).gate.down.weight.shape == (3, hidden)

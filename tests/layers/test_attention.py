"""The mixer in all its combinations: streaming equals the whole, padding and packing leave no trace."""

import itertools

import pytest
import torch

from regla.layers import FEATURE_MAPS, GATES, NORMS, ReGLAAttention, init_linear_attention
from regla.layers.defaults import ADDITIVE, DELTA
from regla.layers.gates import GATE_AXES
from regla.layers.norms import HeadLayerNorm, HeadRMSNorm, prescale
from regla.layers.positions import apply_rotary
from regla.ops import regla_attention
from regla.ops.dispatch import why_not_triton

HIDDEN = 48
COMBINATIONS = [
    (feature_map, gate, axis, norm)
    for feature_map, gate, norm in itertools.product(FEATURE_MAPS, GATES, NORMS)
    for axis in (GATE_AXES if gate in ("refined", "sigmoid") else ("value",))
    # The sum normaliser divides by what these maps let pass through zero: no tolerance holds there.
    if not (norm == "sum" and feature_map in ("identity", "relu"))
    # Features of unit length are for the delta rule; beside the additive one a few combinations will do.
    if not feature_map.startswith("unit_") or (gate == "refined_low_rank" and norm == "rmsnorm")
    # test_feature_maps.py has those of other papers, each with the gates and norms that make a difference to it.
    if feature_map in ("safe_exp", "identity", "relu", "one_plus_elu") or feature_map.startswith("unit_")
]


STEPS = [
    {"norm": "layernorm", "conv_size": 3, "output_gate": "silu"},
    {"gate_axis": "key", "qk_calibration": True},
    {"gate_axis": "both", "norm": "none"},
    {"gate": "scalar", "norm": "sum"},
    {"gate": "fast_decay", "key_max": "running"},
    {"gate": "none"},
    {
        "update_rule": "delta", "feature_map": "unit_safe_exp", "gate_axis": "key", "qk_norm": True, "beta_max": 2.0,
        "output_gate": "silu",
    },
    {"update_rule": "delta", "feature_map": "unit_silu", "gate_axis": "key", "norm": "layernorm"},
]  # fmt: skip


def mixer(**options) -> ReGLAAttention:
    plain = {"num_kv_heads": 2, "value_head_dim": 12, "qk_norm": False, "output_gate": None}
    layer = ReGLAAttention(HIDDEN, 6, **ADDITIVE.of_layer() | plain | options)
    init_linear_attention(layer, std=0.4)
    return layer


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize(
    ("gate", "options"),
    [
        ("none", {}),
        ("gla", {}),
        ("refined", {}),
        ("refined_low_rank", {}),
        ("sigmoid", {"gate_axis": "head", "beta_max": 2}),
        ("mamba2", {"beta_max": 2}),
    ],
)
@pytest.mark.parametrize("feature_map", ["unit_safe_exp", "unit_identity", "unit_silu"])
def test_the_delta_rule_streams_and_ignores_padding(feature_map, gate, options):
    options = {"update_rule": "delta", "feature_map": feature_map, "gate": gate, "gate_axis": "key"} | options
    layer = mixer(**options, conv_size=3, conv_activation="silu", qk_norm=True, output_gate="silu").double()
    x, mask = torch.randn(2, 23, HIDDEN).double(), torch.rand(2, 23) < 0.7
    whole, _ = layer(x, mask=mask)
    parts, state = [], None
    for lo, hi in itertools.pairwise([0, 1, 2, 15, 23]):
        y, state = layer(x[:, lo:hi], mask=mask[:, lo:hi], state=state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask])
    for b in range(2):
        alone, _ = layer(x[b : b + 1, mask[b]])
        torch.testing.assert_close(whole[b, mask[b]], alone[0])


def test_the_delta_rule_says_what_it_needs():
    with pytest.raises(ValueError, match="expected features of unit length: use feature_map='unit_safe_exp'"):
        ReGLAAttention(HIDDEN, 6, **ADDITIVE.of_layer() | {"update_rule": "delta"})
    delta = DELTA.of_layer()
    for axis in ("value", "both"):
        with pytest.raises(ValueError, match="which decays the key axis alone: use gate_axis='key' or"):
            ReGLAAttention(HIDDEN, 6, **delta | {"gate_axis": axis})
    for gate in ("scalar", "fast_decay"):
        with pytest.raises(ValueError, match=r"update_rule is 'delta', to which a .*Gate does not belong: use another"):
            ReGLAAttention(HIDDEN, 6, **delta | {"gate": gate})
    for beta_max in (0.0, -1.0, 2.5, float("nan")):
        with pytest.raises(ValueError, match=f"beta_max is {beta_max}; expected a number above 0 and up to 2"):
            ReGLAAttention(HIDDEN, 6, **delta | {"beta_max": beta_max})
    with pytest.raises(ValueError, match=r"beta_max is 2.0 and update_rule 'additive', which has no beta"):
        ReGLAAttention(HIDDEN, 6, **ADDITIVE.of_layer() | {"beta_max": 2.0})


@torch.no_grad()
@pytest.mark.parametrize("beta_max", [1.0, 2.0])
@pytest.mark.parametrize("gate", ["sigmoid", "mamba2"])
def test_the_layer_of_the_delta_rule_is_the_equation(gate, beta_max):
    """S' = F S, S = S' + beta phi(k) (v - S'^T phi(k))^T with one decay F a head, read at phi(q), normalised."""
    options = {"update_rule": "delta", "feature_map": "unit_safe_exp", "gate": gate, "gate_axis": "head"}
    layer = mixer(num_kv_heads=6, value_head_dim=8, beta_max=beta_max, **options).double()
    x = torch.randn(1, 9, HIDDEN, dtype=torch.float64)
    q, k, v = (projection(x).unflatten(-1, (6, 8))[0] for projection in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (features.exp() / features.exp().norm(dim=-1, keepdim=True) for features in (q, k))
    beta = (beta_max / (1 + (-layer.rule.beta_proj(x)).exp()))[0]
    logits = layer.gate.proj(x)[0]
    if gate == "sigmoid":
        F = 1 / (1 + (-logits).exp())
    else:
        F = (-layer.gate.A_log.exp() * (1 + (logits + layer.gate.dt_bias).exp()).log()).exp()
    S, h = torch.zeros(6, 8, 8, dtype=torch.float64), []
    for t in range(9):
        S = F[t, :, None, None] * S
        S = S + (beta[t, :, None] * k[t])[:, :, None] * (v[t] - (S * k[t, :, :, None]).sum(1))[:, None]
        h.append((S * q[t, :, :, None]).sum(1))
    h = torch.stack(h)[None]
    expected = layer.o_proj((h / h.square().mean(-1, keepdim=True).sqrt()).flatten(2))
    assert error(layer(x)[0], expected) < 1e-5
    assert not (beta < 1).all() or beta_max == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("gate", "norm"), [("sigmoid", "sum"), ("refined", "rmsnorm"), ("refined_low_rank", "rmsnorm")]
)
def test_a_gate_of_one_number_a_head_is_one_of_equal_channels(gate, norm):
    head, key = (mixer(gate=gate, gate_axis=axis, norm=norm) for axis in ("head", "key"))
    for one, other in zip(head.parameters(), key.parameters(), strict=True):
        other.copy_(one if one.shape == other.shape else one.repeat_interleave(key.head_dim, 0))
    x = torch.randn(2, 20, HIDDEN)
    assert head.gate(x).gk.shape[-1] == 1
    assert error(head(x)[0], key(x)[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("feature_map", "gate", "axis", "norm"), COMBINATIONS)
def test_every_combination_streams_and_ignores_padding(feature_map, gate, axis, norm):
    layer = mixer(
        feature_map=feature_map,
        gate=gate,
        gate_axis=axis,
        norm=norm,
        conv_size=3,
        qk_norm=True,
        qk_calibration=True,
        output_gate="silu",
    ).double()
    x = torch.randn(2, 37, HIDDEN, dtype=torch.float64)  # some combinations let sums cancel: digits to spare
    whole, _ = layer(x)
    state, parts = None, []
    for lo, hi in itertools.pairwise([0, 1, 9, 10, 37]):
        part, state = layer(x[:, lo:hi], state=state, return_state=True)
        parts.append(part)
    assert error(torch.cat(parts, 1), whole) < 1e-9
    mask = torch.ones(2, 42, dtype=torch.bool)
    mask[:, :5] = False
    padded, _ = layer(torch.cat([torch.full((2, 5, HIDDEN), torch.nan, dtype=x.dtype), x], 1), mask=mask)
    assert error(padded[:, 5:], whole) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("feature_map", ["safe_exp", "one_plus_elu"])
def test_packing_equals_separate_sequences(feature_map, norm):
    layer = mixer(feature_map=feature_map, norm=norm, conv_size=4)
    bounds = [0, 1, 3, 40, 70]
    x = torch.randn(1, 70, HIDDEN)
    packed, _ = layer(x, cu_seqlens=torch.tensor(bounds))
    separate = torch.cat([layer(x[:, lo:hi])[0] for lo, hi in itertools.pairwise(bounds)], 1)
    assert error(packed, separate) < 1e-5


def test_padding_gives_no_gradient_and_takes_none():
    layer = mixer(conv_size=4, output_gate="sigmoid")
    x = torch.randn(1, 20, HIDDEN)
    x[:, :6] = torch.nan
    mask = torch.arange(20)[None] >= 6
    x.requires_grad_()
    y, _ = layer(x, mask=mask)
    y[:, 6:].square().sum().backward()
    assert (x.grad[:, :6] == 0).all() and x.grad[:, 6:].isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("axis", ["key", "both"])
@torch.no_grad()
def test_the_layer_is_the_equation(axis):
    """A mixer without optional parts is W_o Norm(regla_attention(W_q x, W_k x, W_v x, W_g x + b_g, W_r x + b_r))."""
    layer = mixer(num_kv_heads=6, value_head_dim=8, gate_axis=axis)
    x = torch.randn(2, 20, HIDDEN)
    q, k, v = (projection(x).unflatten(-1, (6, -1)) for projection in (layer.q_proj, layer.k_proj, layer.v_proj))
    gate, refine = (
        torch.cat([part.unflatten(-1, (6, 8)) for part in projection(x).split(6 * 8, -1)], -1)  # K and V are 8
        for projection in (layer.gate.proj, layer.gate.refine_proj)
    )
    h, _ = regla_attention(q, k, v, gate, refine, gate_axis=axis)
    normalised = h / h.square().mean(-1, keepdim=True).sqrt()
    y, _ = layer(x)
    assert error(y, layer.o_proj(normalised.flatten(2))) < 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("norm", [HeadRMSNorm, HeadLayerNorm])
def test_norms_forget_any_factor(norm, scale):
    h = torch.randn(2, 3, 4, 16)
    module = norm(4, 16, 1e-6)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    assert torch.allclose(module(h * scale), module(h), rtol=1e-5, atol=1e-5)


def test_norms_of_nothing_are_finite():
    h = torch.zeros(1, 2, 3, 8, requires_grad=True)
    for norm in (HeadRMSNorm, HeadLayerNorm):
        y = norm(3, 8, 1e-6)(h)
        assert (y == 0).all()
        assert torch.autograd.grad(y.sum(), h)[0].isfinite().all()
    assert (prescale(h) == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("axis", ["value", "key", "both"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("feature_map", ["safe_exp", "one_plus_elu"])
def test_sum_norm_is_a_weighted_mean(feature_map, gate, axis):
    """o_t = sum_s w_ts v_s / sum_s w_ts: for constant values, these values. In one pass, and token by token."""
    layer = mixer(norm="sum", gate=gate, gate_axis=axis, feature_map=feature_map, num_kv_heads=6, value_head_dim=8)
    layer.v_proj = torch.nn.Linear(HIDDEN, 48)
    layer.v_proj.weight.zero_()
    layer.v_proj.bias.copy_(torch.linspace(-2, 2, 48))
    layer.o_proj = torch.nn.Identity()
    x = torch.randn(1, 30, HIDDEN)
    y, state = layer(x, return_state=True)
    steps = [layer(torch.randn(1, 1, HIDDEN), state=state, return_state=True, overwrite_state=True)[0] for _ in "ab"]
    for o in (y, *steps):
        assert torch.allclose(o, layer.v_proj.bias.expand_as(o), rtol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("options", STEPS, ids=str)
def test_steps_may_overwrite_the_state(options):
    """With the decode kernel: the outputs are those of the whole, and S and m stay where they are."""
    layer = mixer(num_kv_heads=3, backend="triton", **options)
    for parameter in layer.norm.parameters():
        parameter.normal_()
    x = torch.randn(1, 6, HIDDEN)
    reason = why_not_triton(x[..., None], x[..., None])
    if reason is not None:
        pytest.skip(reason)
    layer.rule.backend = "chunked"
    whole, _ = layer(x)
    _, state = layer(x[:, :2], return_state=True)
    layer.rule.backend = "triton"
    S, m = state.S, state.m
    kept = S.clone()
    layer(x[:, 2:3], state=state, return_state=True)
    assert torch.equal(S, kept)  # nobody allowed it
    for t in range(2, 6):
        y, state = layer(x[:, t : t + 1], state=state, return_state=True, overwrite_state=True)
        assert state.S is S and state.m is m
        assert error(y, whole[:, t : t + 1]) < 1e-5
    assert not torch.equal(S, kept)


@torch.no_grad()
@pytest.mark.parametrize("feature_map", ["unit_safe_exp", "unit_silu"])
@pytest.mark.parametrize("name", ["feature_map", "rule.beta_proj", "q_norm"])
def test_what_the_delta_rule_forms_itself_still_obeys_hooks(name, feature_map):
    layer = mixer(update_rule="delta", feature_map=feature_map, gate_axis="key", qk_norm=True)
    x = torch.randn(1, 5, HIDDEN)
    before, _ = layer(x)
    hook = layer.get_submodule(name).register_forward_hook(
        lambda module, inputs, y: (y[0], y[1].flip(-1)) if isinstance(y, tuple) else 2 * y - 1
    )
    changed, _ = layer(x)
    hook.remove()
    assert not torch.allclose(before, changed)
    assert torch.equal(before, layer(x)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_state_that_gradients_need_is_not_overwritten():
    layer = mixer()
    x = torch.randn(1, 3, HIDDEN)
    reason = why_not_triton(x[..., None], x[..., None])
    if reason is not None:
        pytest.skip(reason)
    _, state = layer(x[:, :2], return_state=True)
    kept = state.S.detach().clone()
    layer.rule.backend = "triton"
    with torch.no_grad():
        layer(x[:, 2:], state=state, return_state=True, overwrite_state=True)
    y, after = layer(x[:, 2:], state=state, return_state=True, overwrite_state=True)
    assert torch.equal(state.S, kept) and after.S is not state.S
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [layer.v_proj.weight, state.S]))


def test_rotary_is_llamas_and_partial():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, angles = torch.randn(2, 5, 3, 8), torch.randn(1, 5, 4)
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    assert torch.allclose(apply_rotary(x, cos, sin), expected)
    wide = torch.cat([x, x], -1)
    turned = apply_rotary(wide, cos, sin)
    assert torch.allclose(turned[..., :8], expected) and torch.equal(turned[..., 8:], x)


def test_errors():
    for options, message in (
        ({"gate": "forget"}, "gate is 'forget'; expected one of 'none', 'scalar'"),
        ({"feature_map": "exp"}, "feature_map is 'exp'; expected one of 'safe_exp'"),
        ({"norm": "batch"}, "norm is 'batch'; expected one of 'rmsnorm'"),
        ({"gate_axis": "row"}, "gate_axis is 'row'; expected one of 'value', 'key', 'both'"),
        ({"output_gate": "tanh"}, "output_gate is 'tanh'; expected one of None, 'silu', 'sigmoid'"),
        ({"num_kv_heads": 4}, "num_heads is 6; expected a multiple of num_kv_heads = 4"),
        ({"conv_size": 1}, r"conv_size is 1; expected 0 \(none\) or at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            mixer(**options)
    with pytest.raises(ValueError, match="hidden_size 50 is no multiple of num_heads = 6: give head_dim"):
        ReGLAAttention(50, 6)
    with pytest.raises(ValueError, match="cu_seqlens is given with a state"):
        mixer()(torch.randn(1, 4, HIDDEN), cu_seqlens=torch.tensor([0, 4]), return_state=True)

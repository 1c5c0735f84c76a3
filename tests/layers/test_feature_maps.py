"""Feature maps of other papers: each paper's formula, written out token by token against all earlier ones."""

import itertools
import math

import pytest
import torch

from regla.layers import FEATURE_MAPS, ReGLAAttention, init_linear_attention
from regla.layers.defaults import PAPER
from regla.layers.feature_maps import DPFP
from regla.layers.map_base import MapOptions
from regla.ops.dispatch import why_not_native, why_not_triton

HIDDEN, HQ, H, K, V, T = 24, 4, 2, 6, 8, 21
HORIZON = 40
MAPS = ["t2r", "hedgehog", "dpfp", "sum_dpfp", "favor_plus", "rfa", "cosformer", "focused", "polaformer"]
WIDER = [("t2r", 9), ("dpfp", 6 * K), ("sum_dpfp", 4 * K), ("favor_plus", 8), ("rfa", 10)]
CASES = [*((name, None) for name in MAPS), *WIDER]


def mixer(feature_map: str, **options) -> ReGLAAttention:
    plain = PAPER.of_layer() | {"gate": "none", "backend": "chunked", "horizon": HORIZON}
    sizes = {"num_kv_heads": H, "head_dim": K, "value_head_dim": V}
    layer = ReGLAAttention(HIDDEN, HQ, **plain | sizes | {"feature_map": feature_map} | options)
    init_linear_attention(layer, std=0.3)
    with torch.no_grad():
        for parameter in layer.feature_map.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer.double()


def weights(layer: ReGLAAttention, q: torch.Tensor, k: torch.Tensor, i: int, j: int, h: int) -> list[torch.Tensor]:
    """What query head h at i gives the value at j, by each paper's formula: one weight, or one for each half of V."""
    phi, group = layer.feature_map, h // (HQ // H)
    x, y = q[i, h], k[j, group]
    kind = next(name for name, cls in FEATURE_MAPS.items() if type(phi) is cls)
    if kind == "t2r":
        W, b = phi.weight[group], phi.bias[group]
        return [(W @ x + b).clamp(min=0) @ (W @ y + b).clamp(min=0)]
    if kind == "hedgehog":
        a, c = phi.q_weight[h] @ x + phi.q_bias[h], phi.k_weight[group] @ y + phi.k_bias[group]
        halves = [(s * a).exp() / (s * a).exp().sum() @ ((s * c).exp() / (s * c).exp().sum()) for s in (1, -1)]
        return [halves[0] + halves[1]]
    if kind in ("dpfp", "sum_dpfp"):
        features = []
        for z in (x, y):
            r = [*z.clamp(min=0), *(-z).clamp(min=0)]
            own = torch.stack([r[a] * r[(a + n) % (2 * K)] for n in range(1, phi.nu + 1) for a in range(2 * K)])
            features.append(own / own.sum() if kind == "sum_dpfp" else own)
        return [features[0] @ features[1]]
    if kind == "favor_plus":
        W = phi.projection[group]
        a, c = x / K**0.25, y / K**0.25
        return [((W @ a - a @ a / 2).exp() * (W @ c - c @ c / 2).exp()).mean()]
    if kind == "rfa":
        W = phi.projection[group] * phi.sigma[group]
        return [(W @ (x / x.norm() - y / y.norm())).cos().mean()]
    if kind == "cosformer":
        return [x.clamp(min=0) @ y.clamp(min=0) * math.cos(math.pi / 2 * (i - j) / HORIZON)]
    if kind == "focused":
        a, c = (z.clamp(min=0) for z in (x, y))
        if not (a.any() and c.any()):
            return [torch.zeros(()).double()]
        return [(a**3 @ c**3) * a.norm() / (a**3).norm() * c.norm() / (c**3).norm()]
    p = 1 + 4 * phi.power[group].sigmoid()
    x_plus, x_minus, y_plus, y_minus = (z.clamp(min=0) ** p for z in (x, -x, y, -y))
    return [x_plus @ y_plus + x_minus @ y_minus, x_plus @ y_minus + x_minus @ y_plus]


@torch.no_grad()
@pytest.mark.parametrize("norm", ["sum", "layernorm"])
@pytest.mark.parametrize(("name", "feature_dim"), CASES)
def test_the_papers_formula_over_all_pairs_of_tokens(name, feature_dim, norm):
    """o_i = sum_j w_ij v_j, divided by sum_j w_ij or normalised, w_ij = phi(q_i) phi(k_j), in O(T^2)."""
    layer = mixer(name, feature_dim=feature_dim, norm=norm)
    x = torch.randn(1, T, HIDDEN, dtype=torch.float64)
    q, k, v = (
        projection(x)[0].unflatten(-1, (heads, -1))
        for projection, heads in ((layer.q_proj, HQ), (layer.k_proj, H), (layer.v_proj, H))
    )
    o, holds = torch.zeros(T, HQ, V, dtype=torch.float64), torch.ones(T, dtype=torch.bool)
    for i, h in itertools.product(range(T), range(HQ)):
        rows = torch.stack([torch.stack(weights(layer, q, k, i, j, h)) for j in range(i + 1)])  # [i + 1, 1 or 2]
        if (rows.sum(0).abs() < 1e-2 * rows.abs().max()).any() or rows.abs().max() == 0:
            holds[i] = False  # weights that are, or add up to, nothing
        if norm == "sum":
            rows = rows / rows.sum(0)
        read = rows.repeat_interleave(V // rows.shape[1], 1) * v[: i + 1, h // (HQ // H)]
        o[i, h] = read.sum(0)
    if norm == "layernorm":
        o = (o - o.mean(-1, keepdim=True)) / o.std(-1, keepdim=True, correction=0)
    expected = layer.o_proj(o.flatten(1))
    error = (layer(x)[0][0] - expected)[holds].abs().max() / expected[holds].abs().max()
    assert holds.sum() > T / 2 and error < 1e-5  # eps of the norm


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "feature_dim", "gate"),
    [
        *((name, None, gate) for name in MAPS for gate in ("refined", "fast_decay")),
        *((name, feature_dim, "none") for name, feature_dim in WIDER),
        ("hedgehog", None, "scalar"),
    ],
)
def test_every_form_is_one_function(name, feature_dim, gate):
    """Recurrent = chunked = in pieces = token by token = behind padding; and nothing looks ahead."""
    options = {"gate_axis": "key"} if gate == "refined" else {}
    layer = mixer(name, feature_dim=feature_dim, gate=gate, qk_norm=True, norm="rmsnorm", conv_size=3, **options)
    x = torch.randn(2, T, HIDDEN, dtype=torch.float64)
    whole, last = layer(x, return_state=True)
    assert last.S.shape == (2, H, FEATURE_MAPS[name].features(K, feature_dim), V)
    layer.rule.backend = "recurrent"
    torch.testing.assert_close(layer(x)[0], whole)
    layer.rule.backend = "auto"
    for lengths in ([1] * T, [5, 1, 15]):
        state, parts = None, []
        for piece in x.split(lengths, 1):
            y, state = layer(piece, state=state, return_state=True, overwrite_state=True)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(state.S, last.S)
        torch.testing.assert_close(state.m, last.m)
    mask = torch.ones(2, T + 7, dtype=torch.bool)
    mask[:, 2:4] = mask[:, 9:14] = False
    padded = torch.full((2, T + 7, HIDDEN), torch.nan, dtype=torch.float64)
    padded[mask] = x.flatten(0, 1)
    half = 12
    first, state = layer(padded[:, :half], mask=mask[:, :half], return_state=True)
    second, _ = layer(padded[:, half:], mask=mask[:, half:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 1)[mask].view_as(whole), whole)
    later = x.clone()
    later[:, 12:] *= 5
    torch.testing.assert_close(layer(later)[0][:, :12], whole[:, :12])
    assert not torch.allclose(layer(later)[0][:, 12:], whole[:, 12:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "native") for name in MAPS), *((name, "triton") for name in ("favor_plus", "dpfp", "polaformer"))],
)
def test_kernels_take_the_features_as_they_are(name, backend):
    layer = mixer(name, gate="refined", gate_axis="key", norm="rmsnorm").float()
    x = torch.randn(1, T, HIDDEN)
    why_not = why_not_native if backend == "native" else why_not_triton
    if (reason := why_not(x[..., None], x[..., None])) is not None:
        pytest.skip(reason)
    expected, state = layer(x, return_state=True)
    layer.rule.backend = backend
    y, after = layer(x, return_state=True)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y, _ = layer(x[:, :1], state=after, return_state=True, overwrite_state=True)
    layer.rule.backend = "recurrent"
    torch.testing.assert_close(y, layer(x[:, :1], state=state)[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", MAPS)
def test_packed_texts_are_texts_by_themselves(name):
    layer = mixer(name, gate="refined", norm="rmsnorm")
    x, bounds = torch.randn(1, T, HIDDEN, dtype=torch.float64), [0, 1, 8, 8, T]
    packed, _ = layer(x, cu_seqlens=torch.tensor(bounds))
    parts = [layer(x[:, lo:hi])[0] for lo, hi in itertools.pairwise(bounds) if lo < hi]
    torch.testing.assert_close(packed, torch.cat(parts, 1))


@pytest.mark.parametrize("name", MAPS)
def test_gradients_are_finite_also_at_padding_and_zero(name):
    layer = mixer(name, gate="refined", norm="rmsnorm").float()
    x = torch.randn(2, T, HIDDEN)
    x[0, :5] = 0
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, :4] = False
    y, _ = layer(x.requires_grad_(), mask=mask)
    y.square().sum().backward()
    assert x.grad.isfinite().all() and not (x.grad == 0).all()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
    assert all((parameter.grad != 0).any() for parameter in layer.feature_map.parameters())


@torch.no_grad()
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("name", ["sum_dpfp", "rfa"])
def test_the_delta_rule_over_these_features(name, gate):
    """S_t = S_{t-1} + beta_t phi(k_t) (v_t - S_{t-1}^T phi(k_t))^T (paper equation 8), here with a decay, too; keys are
    at most 1 long, so nothing grows."""
    layer = mixer(name, update_rule="delta", gate=gate, gate_axis="head", norm="rmsnorm", num_kv_heads=HQ)
    x = torch.randn(1, T, HIDDEN, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (HQ, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = layer.feature_map(q, k)
    assert (k.norm(dim=-1) <= 1 + 1e-12).all()
    beta = torch.sigmoid(layer.rule.beta_proj(x))[0]
    decay = torch.sigmoid(layer.gate.proj(x))[0] if gate == "sigmoid" else torch.ones(T, HQ)
    S, outputs = torch.zeros(HQ, k.shape[-1], V, dtype=torch.float64), []
    for t in range(T):
        S = decay[t, :, None, None] * S
        identity = torch.eye(k.shape[-1]).double()
        erase = identity - beta[t, :, None, None] * k[0, t, :, :, None] * k[0, t, :, None]
        S = erase @ S + beta[t, :, None, None] * k[0, t, :, :, None] * v[0, t, :, None]
        outputs.append((S * q[0, t, :, :, None]).sum(1))
    h = torch.stack(outputs)
    expected = layer.o_proj((h / h.square().mean(-1, keepdim=True).sqrt()).flatten(1))
    holds = expected.isfinite().all(-1)  # DPFP of one key may have nothing in common with that of a query
    assert holds.sum() > T / 2
    for backend in ("chunked", "recurrent"):
        layer.rule.backend = backend
        torch.testing.assert_close(layer(x)[0][0][holds], expected[holds], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_random_features_are_softmax_attention_on_average():
    """RFA: exp(-|x - y|^2 / 2) of unit vectors; FAVOR+: exp(x y / K^1/2), by orthogonal projections."""
    x, y = torch.randn(2, 1, 50, 1, K, dtype=torch.float64)
    many = MapOptions(1, 1, K, 60_000)
    rfa = FEATURE_MAPS["rfa"](many).double()
    phi_x, phi_y = rfa(x, y)
    unit_x, unit_y = (torch.nn.functional.normalize(z, dim=-1) for z in (x, y))
    expected = (-(unit_x - unit_y).square().sum(-1) / 2).exp()
    torch.testing.assert_close((phi_x * phi_y).sum(-1), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(phi_x.square().sum(-1), torch.ones(1, 50, 1).double())
    favor = FEATURE_MAPS["favor_plus"](many).double()
    a, b = favor(0.5 * x, 0.5 * y)
    torch.testing.assert_close((a + b).exp().mean(-1), (0.25 * x * y).sum(-1).div(K**0.5).exp(), rtol=0.05, atol=0)
    W = favor.projection[0].unflatten(0, (-1, K))
    off_diagonal = (W @ W.mT) * (1 - torch.eye(K).double())
    assert off_diagonal.abs().max() < 1e-5
    assert W.square().sum(-1).mean().item() == pytest.approx(K, rel=0.02)


@torch.no_grad()
def test_maps_start_where_their_papers_say():
    layer = mixer("hedgehog")
    init_linear_attention(layer, std=0.3)
    x = torch.randn(1, 3, H, K).double()
    expected = torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
    torch.testing.assert_close(layer.feature_map(x.repeat_interleave(2, 2), x)[1], expected)
    layer = mixer("polaformer")
    init_linear_attention(layer, std=0.3)
    torch.testing.assert_close(layer.feature_map(x, x)[1][..., :K], x.clamp(min=0) ** 3)
    layer = mixer("rfa")
    layer.feature_map.projection.fill_(torch.nan)
    init_linear_attention(layer, std=0.3)
    assert (layer.feature_map.sigma == 1).all()
    assert layer.feature_map.projection.std().item() == pytest.approx(1, rel=0.3)
    torch.manual_seed(3)
    init_linear_attention(layer, std=0.3)
    drawn = layer.feature_map.projection.clone()
    torch.manual_seed(3)
    init_linear_attention(layer, std=0.3)
    assert torch.equal(drawn, layer.feature_map.projection)


@torch.no_grad()
def test_the_variance_factor_shows_without_a_norm_alone():
    """1 / (e (K (e^2 - 1))^1/2) of the paper's section 3.1, which makes the product of features vary by 1."""
    x = torch.randn(1, T, HIDDEN, dtype=torch.float64)
    for norm in ("none", "layernorm", "sum"):
        outputs = []
        for name in ("safe_exp", "safe_exp_unscaled"):
            torch.manual_seed(1)
            outputs.append(mixer(name, norm=norm)(x)[0])
        scale = 1 / (math.e * (K * (math.e**2 - 1)) ** 0.5) if norm == "none" else 1.0
        torch.testing.assert_close(outputs[0], scale * outputs[1], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_cosformer_far_from_the_beginning():
    """Only distances count: a text that begins at place 10,000,000 is the text that begins at 0, in float32."""
    layer = mixer("cosformer", norm="rmsnorm").float()
    x = torch.randn(1, T, HIDDEN)
    expected, state = layer(x, return_state=True)
    assert (state.m == T).all()
    far = state._replace(S=torch.zeros_like(state.S), m=torch.full_like(state.m, 1e7))
    torch.testing.assert_close(layer(x, state=far)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"feature_map": "relu", "feature_dim": 9}, "feature_dim is 9, but this feature map gives 6 of a head"),
        ({"feature_map": "hedgehog", "feature_dim": 9}, "feature_dim is 9, but this feature map gives 12 of a head"),
        ({"feature_map": "dpfp", "feature_dim": 18}, "feature_dim is 18; expected a multiple of 12 for this"),
        ({"feature_map": "rfa", "feature_dim": 7}, "feature_dim is 7; expected a multiple of 2 for this"),
        ({"feature_map": "t2r", "feature_dim": 0}, "feature_dim is 0; expected a multiple of 1 for this"),
        ({"feature_map": "polaformer", "value_head_dim": 7}, "value_head_dim is 7; the feature map 'polaformer' "),
        ({"feature_map": "cosformer", "horizon": 0}, "horizon is 0; expected the tokens of the longest text"),
        (
            {"feature_map": "dpfp", "update_rule": "delta", "gate_axis": "key"},
            "update_rule is 'delta' and feature_map 'dpfp', whose keys have no fixed length; expected features of unit",
        ),
    ],
)
def test_what_does_not_fit(options, sentence):
    with pytest.raises(ValueError) as error:
        mixer(**options)
    assert str(error.value).startswith(sentence)


def test_a_map_of_ones_own_with_a_parameter_says_where_it_starts(monkeypatch):
    class Scaled(DPFP):
        def __init__(self, options):
            super().__init__(options)
            self.scale = torch.nn.Parameter(torch.ones(()))

    monkeypatch.setitem(FEATURE_MAPS, "scaled", Scaled)
    with pytest.raises(ValueError, match="parameter scale of Scaled has no initial distribution: give it a `start`"):
        mixer("scaled")


def test_no_map_is_left_out_here():
    """The others are in test_attention.py."""
    of_regla = {"safe_exp", "safe_exp_unscaled", "unit_safe_exp", "unit_identity", "unit_silu"}
    assert FEATURE_MAPS.keys() == {*MAPS, *of_regla, "identity", "relu", "one_plus_elu"}

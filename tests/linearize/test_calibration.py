"""Calibration: the contract holds behind it and not before; its figures equal plain loops."""

import math
from dataclasses import replace

import pytest
import torch

from regla.layers.positions import apply_rotary
from regla.linearize import convert
from regla.linearize.calibration import HALF_LIVES, calibrate, calibration_table, effective_features, output_gains
from regla.linearize.observe import observed_attention
from tests.linearize.models import collapsed, llama

TOKENS = (4, 64)


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    original = collapsed()
    tokens = torch.randint(97, TOKENS)
    converted = convert(original, "none")
    return original, converted, tokens, calibrate(original, converted, tokens)


def test_contract(calibrated):
    *_, rows = calibrated
    assert [row.layer for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row.features_before < 2  # planted
        assert row.features_after >= 4  # a quarter of 16 channels
        assert row.kl_after < row.kl_uniform
        assert row.kl_after < row.kl_before
        assert row.holds


def test_the_contract_fails_without_calibration(calibrated):
    *_, rows = calibrated
    raw = [replace(row, features_after=row.features_before, kl_after=row.kl_before) for row in rows]
    assert not any(row.holds for row in raw)
    assert calibration_table(raw).count("FAILS") == 4
    assert "FAILS" not in calibration_table(rows)
    few = replace(rows[0], features_after=3.9)
    far = replace(rows[0], kl_after=rows[0].kl_uniform)
    assert not few.holds and not far.holds  # either half of it alone


def test_figures_equal_plain_loops(calibrated):
    """KL and features of one layer, on the second half of the sequences, from the definition in float64."""
    original, converted, tokens, rows = calibrated
    number, found = 2, []
    with torch.no_grad(), observed_attention(original, [number], lambda _, attention: found.append(attention)):
        original.model(tokens)
    mixer, (x, rotary, _) = converted.model.layers[number].self_attn.mixer, found[0]
    with torch.no_grad():
        q0, k0 = mixer.q_proj(x).view(4, 64, 4, 16), mixer.k_proj(x).view(4, 64, 2, 16)
        q0, k0 = apply_rotary(q0, *rotary), apply_rotary(k0, *rotary)
        q1, k1 = mixer.qk_calibration(q0, k0)
    q0, k0, q1, k1 = (y[2:].double() for y in (q0, k0, q1, k1))
    kl = {"before": [], "after": [], "uniform": []}
    for b in range(2):
        for head in range(4):
            for t in range(1, 64, 2):  # 32 queries of 64
                past = slice(0, t + 1)
                p = (k0[b, past, head // 2] @ q0[b, t, head] / 4).softmax(0)
                for name, q, k in (("before", q0, k0), ("after", q1, k1)):
                    a = (q[b, t, head] + k[b, past, head // 2]).exp().sum(-1)
                    kl[name].append((p * (p / (a / a.sum())).log()).sum())
                kl["uniform"].append((p * (p * (t + 1)).log()).sum())
    row = rows[number]
    for name, values in kl.items():
        assert math.isclose(getattr(row, f"kl_{name}"), sum(values).item() / len(values), rel_tol=1e-4), name
    features = []
    for head in range(2):
        p = (k1[:, :, head].exp() / k1[:, :, head].exp().sum(-1, keepdim=True)).mean((0, 1))
        features.append((-(p * p.log()).sum()).exp().item())
    assert math.isclose(row.features_after, min(features), rel_tol=1e-4)


def test_effective_features_of_known_distributions():
    even = torch.zeros(1, 5, 1, 8)
    one = even.clone()
    one[..., 3] = 200.0
    two = even.clone()
    two[:, ::2, :, 1] = 200.0  # a token has one feature, but not all tokens the same
    two[:, 1::2, :, 2] = 200.0
    shares = torch.tensor([0.6, 0.4])
    expected = [8.0, 1.0, (-(shares * shares.log()).sum()).exp().item()]
    found = [effective_features(k).item() for k in (even, one, two)]
    assert found == pytest.approx(expected, rel=1e-6)


def heads(original, converted, tokens, number=1):
    """Outputs of one layer's heads before the output projection, on the tokens that set the numbers: ours with the
    norm's weight and without, and softmax's; each [B, T, 4, 16]."""
    found, ours, theirs = [], [], []
    mixer = converted.model.layers[number].self_attn.mixer
    hooks = [
        mixer.norm.register_forward_hook(lambda module, args, output: ours.append(output)),
        original.model.layers[number].self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: theirs.append(args[0])
        ),
    ]
    with torch.no_grad(), observed_attention(original, [number], lambda _, attention: found.append(attention)):
        original.model(tokens)
        mixer(found[0].x[:2], rotary=found[0].rotary)
    for hook in hooks:
        hook.remove()
    return ours[0], ours[0] / mixer.norm.weight, theirs[0][:2].unflatten(-1, (4, 16)), mixer.norm.weight


def test_output_norm_is_the_least_squares_gain(calibrated):
    """Of every head and channel."""
    _, plain, theirs, weight = heads(*calibrated[:3])
    gain = (theirs * plain).mean((0, 1)) / plain.square().mean((0, 1))
    torch.testing.assert_close(weight.detach(), gain, rtol=1e-3, atol=1e-6)


def test_no_channel_starts_dead():
    """Where ours and the original's have nothing in common: a tenth of the gain of equal power."""
    ours = torch.ones(1, 4, 1, 2)
    theirs = torch.tensor([[3.0, -3.0], [-3.0, -3.0]])[None, [0, 1, 0, 1], None]
    torch.testing.assert_close(output_gains(theirs, ours), torch.tensor([[0.3, 0.3]]))


def gate_half_lives(mixer):
    """As the gates say them for any input, by key head [2, 16]."""
    with torch.no_grad():
        gates = mixer.gate(torch.randn(1, 3, 64))
        g, r = gates.gk.sigmoid(), gates.rk.sigmoid()
        decay = (1 - r) * g**2 + r * (1 - (1 - g) ** 2)
    torch.testing.assert_close(decay[0, 0], decay[0, 2])
    return -math.log(2) / decay[0, 0].log()


def test_gates_start_at_the_mean_distance():
    """By a plain loop over all queries; each channel of a key head forgets half of it in that time."""
    torch.manual_seed(0)
    original = llama(num_hidden_layers=1, initializer_range=0.5)
    converted = convert(original, "none")
    tokens = torch.randint(97, (2, 32))
    (row,) = calibrate(original, converted, tokens, gates="distance")
    attention = original.model.layers[0].self_attn
    original.set_attn_implementation("eager")
    seen = []
    attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    with torch.no_grad():
        original.model(tokens)
    total, weights = torch.zeros(4), torch.zeros(4)
    for t in range(32):
        for s in range(1, t + 1):  # the first token does not count
            p = seen[0][0, :, t, s] + 1e-3 / 32
            total, weights = total + p * (t - s), weights + p
    expected = (total / weights).clamp_min(1).view(2, 2).mean(1)
    assert row.distances == pytest.approx(expected.tolist(), rel=1e-3)
    assert row.half_lives == row.distances
    found = gate_half_lives(converted.model.layers[0].self_attn.mixer)
    torch.testing.assert_close(found, expected[:, None].expand(2, 16), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rule", ["additive", "delta"])
def test_gates_start_where_the_output_is_nearest(rule):
    """No other half-life of the grid, the same for all heads, comes nearer to the original's heads."""
    torch.manual_seed(0)
    options = {"additive": {}, "delta": {"update_rule": "delta", "feature_map": "unit_safe_exp"}}[rule]
    original = llama(num_hidden_layers=1, initializer_range=0.5)
    tokens = torch.randint(97, (4, 48))

    def error(gates, number=None):
        torch.manual_seed(1)
        converted = convert(original, "none", **options, **({} if number is None else {"gate_half_life": number}))
        mixer = converted.model.layers[0].self_attn.mixer
        if number is not None:
            with torch.no_grad():
                for module in (mixer.gate.proj, mixer.gate.refine_proj):
                    module.weight.zero_()
        rows = calibrate(original, converted, tokens, gates=gates)
        ours, _, theirs, _ = heads(original, converted, tokens, 0)
        return (((ours - theirs).square().sum((0, 1, 3)) / theirs.square().sum((0, 1, 3))).mean().item(), rows[0])

    best, row = error("teacher")
    others = {number: error(None, number)[0] for number in (4.0, 16.0, 64.0, 1024.0)}
    assert all(best <= other + 1e-5 for other in others.values()), (best, others)
    assert max(others.values()) > 1.01 * best
    assert set(row.half_lives) <= set(HALF_LIVES)


def test_the_delta_rule_is_calibrated_too():
    """Keys of unit length: KL by the definition, and the contract holds."""
    torch.manual_seed(0)
    original = collapsed()
    converted = convert(original, "none", update_rule="delta", feature_map="unit_safe_exp")
    tokens = torch.randint(97, TOKENS)
    rows = calibrate(original, converted, tokens, gates="teacher")
    assert all(row.holds for row in rows)
    found = []
    with torch.no_grad(), observed_attention(original, [2], lambda _, attention: found.append(attention)):
        original.model(tokens)
    mixer, (x, rotary, _) = converted.model.layers[2].self_attn.mixer, found[0]
    with torch.no_grad():
        q0, k0 = mixer.q_proj(x).view(4, 64, 4, 16), mixer.k_proj(x).view(4, 64, 2, 16)
        q0, k0 = apply_rotary(q0, *rotary), apply_rotary(k0, *rotary)
        phi_q, phi_k = (y[2:].double().exp() for y in mixer.qk_calibration(q0, k0))
    phi_k = phi_k / phi_k.norm(dim=-1, keepdim=True)
    values = []
    for b in range(2):
        for head in range(4):
            for t in range(1, 64, 2):
                past = slice(0, t + 1)
                p = (k0[2 + b, past, head // 2] @ q0[2 + b, t, head] / 4).softmax(0).double()
                a = phi_k[b, past, head // 2] @ phi_q[b, t, head]
                values.append((p * (p / (a / a.sum())).log()).sum())
    assert math.isclose(rows[2].kl_after, sum(values).item() / len(values), rel_tol=1e-4)


def test_nothing_else_changes(calibrated):
    original, converted, _, _ = calibrated
    fresh = dict(convert(original, "none").named_parameters())
    changed = {
        name.split("self_attn.mixer.")[-1]
        for name, p in converted.named_parameters()
        if not torch.equal(p, fresh[name])
    }
    gates = {name for name in changed if name.startswith("gate.")}  # drawn anew for each model
    scales = {f"qk_calibration.{letter}_{kind}" for letter in "qk" for kind in ("mean", "scale")}
    assert changed - gates == scales | {"norm.weight"}


def test_the_first_half_sets_the_numbers(calibrated):
    """Other tokens in the second half change the figures alone."""
    original, converted, tokens, rows = calibrated
    other = convert(original, "none")
    changed = calibrate(original, other, torch.cat([tokens[:2], torch.randint(97, (2, 64))]))
    assert changed[0].kl_after != rows[0].kl_after
    parts = [model.model.layers[0].self_attn.mixer.qk_calibration.state_dict() for model in (converted, other)]
    for name, value in parts[0].items():
        torch.testing.assert_close(parts[1][name], value)


@pytest.mark.parametrize(
    ("own", "sequences", "message"),
    [
        ({}, 1, "1 sequence given; calibration needs at least 2"),
        ({"feature_map": "relu"}, 2, "feature_map is 'relu', and calibration is for 'safe_exp' or"),
        ({"attention_norm": "sum"}, 2, "attention_norm is 'sum', and calibration is for 'rmsnorm'"),
        ({"qk_calibration": False}, 2, "qk_calibration is False, and calibration is for True"),
    ],
)
def test_errors(own, sequences, message):
    original = llama()
    with pytest.raises(ValueError, match=message):
        calibrate(original, convert(original, **own), torch.zeros(sequences, 8, dtype=torch.long))

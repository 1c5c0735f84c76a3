"""The window branch against its definition: softmax over all pairs of tokens behind a dense mask."""

import pytest
import torch

from regla.layers import ReGLAAttention, ReGLAState, init_linear_attention
from regla.layers.window import WindowBranch

HQ, H, K, V = 4, 2, 6, 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_qkv(B, T, dtype=torch.float32):
    return [torch.randn(B, T, heads, size, dtype=dtype) for heads, size in ((HQ, K), (H, K), (H, V))]


def defined(q, k, v, size, sinks, scale, text=None):
    """One row, [T, ...], its tokens all real; text [T]: the number of each token's text."""
    T = len(q)
    text = torch.zeros(T, dtype=torch.long) if text is None else text
    out = torch.empty(T, HQ, V, dtype=q.dtype)
    for t in range(T):
        past = [s for s in range(t + 1) if text[s] == text[t]]
        sees = sorted({*past[:sinks], *past[-size:]})
        for head in range(HQ):
            group = head // (HQ // H)
            p = torch.softmax(scale * (k[sees, group] @ q[t, head]), 0)
            out[t, head] = p @ v[sees, group]
    return out


@pytest.mark.parametrize("T", [1, 2, 7, 64, 65, 150])
@pytest.mark.parametrize(("size", "sinks"), [(1, 0), (1, 3), (5, 0), (8, 4), (70, 2)])
def test_equals_the_softmax_of_its_definition(T, size, sinks):
    q, k, v = random_qkv(2, T)
    near, _ = WindowBranch(HQ, size, sinks, 0.7, 0.0)(q, k, v, None, None, None)
    for row in range(2):
        torch.testing.assert_close(near[row], defined(q[row], k[row], v[row], size, sinks, 0.7), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "sinks"), [(1, 3), (5, 0), (8, 4)])
def test_padding_anywhere_is_passed_over(size, sinks):
    T = 90
    q, k, v = random_qkv(3, T)
    mask = torch.rand(3, T) > 0.4
    mask[0, :20], mask[0, 20:] = False, True
    mask[2] = False
    branch = WindowBranch(HQ, size, sinks, 0.7, 0.0)
    near, (kept, seen) = branch(q, k, v, mask, None, None)
    assert seen.tolist() == mask.sum(1).tolist()
    assert not near[~mask].any()
    assert not kept[2].any()
    for row in range(2):
        real = mask[row]
        expected = defined(q[row, real], k[row, real], v[row, real], size, sinks, 0.7)
        torch.testing.assert_close(near[row, real], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[1, 2, 3], [100, 0, 1, 64, 65], [130]])
@pytest.mark.parametrize(("size", "sinks"), [(1, 3), (5, 0), (8, 4)])
def test_packed_texts_see_nothing_of_each_other(lengths, size, sinks):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    q, k, v = random_qkv(1, sum(lengths))
    near, _ = WindowBranch(HQ, size, sinks, 0.7, 0.0)(q, k, v, None, cu_seqlens, None)
    torch.testing.assert_close(near[0], defined(q[0], k[0], v[0], size, sinks, 0.7, text), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[1] * 80, [1, 79], [3, 1, 70, 6], [66, 14]])
@pytest.mark.parametrize(("size", "sinks"), [(1, 3), (5, 0), (8, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_any_split_into_calls_equals_the_whole(cuts, size, sinks, padded):
    q, k, v = random_qkv(2, 80)
    mask = torch.rand(2, 80) > 0.3 if padded else None
    branch = WindowBranch(HQ, size, sinks, 0.7, 0.0)
    whole, after = branch(q, k, v, mask, None, None)
    kept, parts, start = None, [], 0
    for length in cuts:
        now = slice(start, start + length)
        part, kept = branch(q[:, now], k[:, now], v[:, now], None if mask is None else mask[:, now], None, kept)
        parts.append(part)
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(kept, after, strict=True):
        assert torch.equal(ours, theirs)
    assert kept[0].shape == (2, sinks + size - 1, H, K + V)
    for given in (kept, after):  # storage, not shape: a view would keep more alive than it shows
        assert given[0].untyped_storage().nbytes() == 4 * given[0].numel()


def test_gradients():
    branch = WindowBranch(HQ, 3, 2, 0.7, 0.0).double()
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 7, torch.float64))
    mask = torch.tensor([[False, False, True, True, True, True, True], [True] * 7])
    kept = tuple(branch(*random_qkv(2, 3, torch.float64), None, None, None)[1])
    held = kept[0].detach().requires_grad_()

    def outputs(q, k, v, held):
        near, after = branch(q, k, v, mask, None, (held, kept[1]))
        return near, after[0]

    assert torch.autograd.gradcheck(outputs, (q, k, v, held))
    packed = [x[:1].detach().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: branch(*qkv, None, torch.tensor([0, 3, 4, 7]), None)[0], packed)


def test_no_bit_of_the_past_changes():
    q, k, v = random_qkv(2, 150)
    branch = WindowBranch(HQ, 8, 4, 0.7, 0.0)
    near, _ = branch(q, k, v, None, None, None)
    for x in (q, k, v):
        x[:, 97:] = 100 * torch.randn_like(x[:, 97:])
    again, _ = branch(q, k, v, None, None, None)
    assert torch.equal(near[:, :97], again[:, :97])
    assert not torch.equal(near[:, 97:], again[:, 97:])


def layer(**options):
    made = ReGLAAttention(
        16, HQ, num_kv_heads=H, head_dim=K, value_head_dim=V, **{"window_branch": 5, "window_sinks": 2} | options
    )
    init_linear_attention(made, std=0.2)
    return made


def rotary(T):
    angle = torch.arange(T)[None, :, None] * torch.tensor([0.1, 1.0, 0.5]).repeat(2)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_rule": "delta", "feature_map": "unit_safe_exp", "conv_size": 3},
        {"output_gate": None, "qk_norm": False, "qk_calibration": True, "norm": "layernorm"},
        {"feature_map": "relu", "norm": "sum", "gate_axis": "value"},
    ],
    ids=["default", "delta", "converted", "sum"],
)
@pytest.mark.parametrize("rope", [False, True])
def test_a_layer_mixes_both_by_the_share_of_each_head(options, rope):
    made, x = layer(**options), torch.randn(2, 30, 16)
    turned = rotary(30) if rope else None
    alone = layer(**options, window_branch=0, window_sinks=0)
    alone.load_state_dict({name: value for name, value in made.state_dict().items() if name != "window.logit"})
    outputs = {}
    made.o_proj = alone.o_proj = torch.nn.Identity()
    for share, logit in {"none": -1e4, "all": 1e4, "some": 0.3}.items():
        torch.nn.init.constant_(made.window.logit, logit)
        outputs[share] = made(x, rotary=turned)[0]
    # The same bits where both normalise q and k before the recurrence, and not one of them in the kernel that runs it.
    exact = {"rtol": 0, "atol": 0} if rope or made.q_norm is None else {}
    torch.testing.assert_close(outputs["none"], alone(x, rotary=turned)[0], **exact)
    a = torch.sigmoid(torch.tensor(0.3))
    torch.testing.assert_close(outputs["some"], (1 - a) * outputs["none"] + a * outputs["all"])
    # The rotation of the branch can be another than that of the recurrence.
    torch.nn.init.constant_(made.window.logit, 1e4)
    other = made(x, window_rotary=rotary(30))[0]
    assert torch.allclose(other, outputs["all"], atol=1e-6) == rope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_of_a_layer_is_in_the_dtype_of_its_activations(dtype):
    made, x = layer().to(dtype), torch.randn(2, 9, 16, dtype=dtype)
    y, state = made(x, return_state=True)
    assert y.dtype == state.window.dtype == dtype
    assert state.window.shape == (2, 6, H, K + V)
    assert state.seen.tolist() == [9, 9]


def test_a_layer_without_the_branch_has_none_of_it():
    made = ReGLAAttention(16, HQ)
    _, state = made(torch.randn(1, 4, 16), return_state=True)
    assert state.window is None
    assert state.seen is None
    assert not [name for name in made.state_dict() if "window" in name]


def test_dropout_leaves_the_branch_out_of_whole_texts_in_training():
    made, x = layer(window_dropout=0.5), torch.randn(64, 6, 16)
    torch.nn.init.normal_(made.window.logit)
    with_branch = made.eval()(x)[0]
    assert torch.equal(with_branch, made(x)[0])
    never = layer()
    never.load_state_dict(made.state_dict() | {"window.logit": torch.full((HQ,), -1e4)})
    without = never(x)[0]
    y = made.train()(x)[0]
    left_out = (y == without).flatten(1).all(1)
    assert torch.equal(y[~left_out], with_branch[~left_out])
    assert 16 < left_out.sum() < 48
    # Packed texts are texts of their own.
    packed = made(x[:, :3].reshape(1, -1, 16), cu_seqlens=torch.arange(65) * 3)[0].view(64, 3, 16)
    near = torch.isclose(packed, without[:, :3], rtol=1e-4, atol=1e-5).flatten(1).all(1)
    assert 16 < near.sum() < 48
    assert torch.allclose(packed[~near], with_branch[~near, :3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_branch": -1}, "window_branch is -1; expected 0"),
        ({"window_sinks": -2}, "window_sinks is -2; expected a number of tokens from 0 on"),
        ({"window_dropout": 1.0}, "window_dropout is 1.0; expected a probability from 0 to below 1"),
        ({"window_branch": 0}, "window_sinks is 2, but window_branch is 0"),
        ({"window_branch": 0, "window_sinks": 0, "window_dropout": 0.1}, "window_dropout is 0.1, but window_branch is"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_states_and_masks_that_do_not_fit():
    made, x = layer(), torch.randn(1, 4, 16)
    _, state = made(x, return_state=True)
    with pytest.raises(ValueError, match="state is of a layer without a window branch"):
        made(x, state=ReGLAState(state.S, state.m))
    with pytest.raises(ValueError, match="mask is given with cu_seqlens"):
        made(x, mask=torch.ones(1, 4, dtype=torch.bool), cu_seqlens=torch.tensor([0, 4]))

"""The short convolution sees the last real tokens, wherever padding lies."""

import pytest
import torch

from regla.layers.positions import ShortConvolution

MASKS = {  # of rows of 12 tokens
    "left": ["000011111111", "111111111111"],
    "middle": ["111001011011", "110111111110"],
    "right": ["111111100000", "111111111111"],
    "none real": ["000000000000", "011111111110"],
    "few": ["000010000000", "100000000001"],
}


def masked(name):
    return torch.tensor([[int(x) for x in row] for row in MASKS[name]]).bool()


def convolution(size=4, channels=3):
    conv = ShortConvolution(channels, size)
    torch.nn.init.normal_(conv.weight)
    return conv


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("cut", [None, 1, 5, 11])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_padding_is_passed_over(name, with_state, cut, size):
    """As without it: outputs of real tokens, the state, gradients; in one call, in two and token by token."""
    conv, mask = convolution(size), masked(name)
    x, state = torch.randn(2, 12, 3), torch.randn(2, size - 1, 3) if with_state else None
    x = torch.where(mask[..., None], x, torch.nan)
    x.requires_grad_()
    pieces = [(0, 12)] if cut is None else [(0, cut), (cut, 12)]
    pieces = [(t, t + 1) for t in range(12)] if cut == 1 else pieces
    after, outputs = state, []
    for lo, hi in pieces:
        y, after = conv(x[:, lo:hi], mask[:, lo:hi], None, after)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    for row in range(2):
        real = x.detach()[row : row + 1, mask[row]]
        before = None if state is None else state[row : row + 1]
        expected, state_expected = conv(real, None, None, before)
        torch.testing.assert_close(y[row : row + 1, mask[row]], expected)
        torch.testing.assert_close(after[row : row + 1], state_expected)
    (grad,) = torch.autograd.grad(y[mask].sum() + after.sum(), x)
    assert grad[mask].isfinite().all() and (grad[~mask] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", MASKS)
def test_masked_it_is_causal(name):
    """To the last bit: a token, or whether a token is real, changes nothing before it."""
    conv, mask = convolution(), masked(name)
    x = torch.randn(2, 12, 3)
    before, _ = conv(x, mask, None, None)
    for t in range(12):
        changed, other = x.clone(), mask.clone()
        changed[:, t] += 1
        other[:, t] = ~other[:, t]
        for after, _ in (conv(changed, mask, None, None), conv(x, other, None, None)):
            assert torch.equal(after[:, :t], before[:, :t])


@torch.no_grad()
def test_a_mask_of_real_tokens_alone_changes_nothing():
    conv, x, state = convolution(), torch.randn(2, 12, 3), torch.randn(2, 3, 3)
    for a, b in zip(conv(x, None, None, state), conv(x, torch.ones(2, 12).bool(), None, state), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_packed_sequences_start_afresh():
    conv, x = convolution(), torch.randn(1, 9, 3)
    y, _ = conv(x, None, torch.tensor([0, 2, 2, 3, 9]), None)
    expected = torch.cat([conv(x[:, lo:hi], None, None, None)[0] for lo, hi in ((0, 2), (2, 3), (3, 9))], 1)
    torch.testing.assert_close(y, expected)

"""Masked padding leaves no trace in models with short convolutions, in linear and in softmax layers."""

import pytest
import torch

VARIANTS = ["hybrid", "hybrid, sum", "softmax, extras", "hybrid, extras"]
MASKS = {
    "left": [0] * 4 + [1] * 10,
    "middle": [1] * 5 + [0] * 3 + [1] * 2 + [0] + [1] * 3,
    "right": [1] * 9 + [0] * 5,
}


def padded(ids, mask):
    """ids [1, n] where the mask [T] is 1, the token 0 elsewhere."""
    row = torch.zeros(1, len(mask), dtype=torch.long)
    row[0, mask.bool()] = ids[0]
    return row


@torch.no_grad()
@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_real_tokens_are_as_without_padding(build, assert_same, variant, where):
    """And so is what follows from the cache, in one call and token by token."""
    model, mask = build(variant), torch.tensor(MASKS[where])
    ids = torch.randint(1, 97, (1, int(mask.sum()) + 4))
    prompt, rest = ids[:, :-4], ids[:, -4:]
    expected = model(ids).logits
    out = model(padded(prompt, mask), attention_mask=mask[None], use_cache=True)
    assert_same(out.logits[:, mask.bool()], expected[:, :-4])
    whole = torch.cat([mask, torch.ones(4, dtype=torch.long)])[None]
    for cuts in ([4], [1, 1, 1, 1]):
        cache, seen, parts = (
            model(padded(prompt, mask), attention_mask=mask[None], use_cache=True).past_key_values,
            0,
            [],
        )
        for n in cuts:
            now = model(
                rest[:, seen : seen + n],
                attention_mask=whole[:, : len(mask) + seen + n],
                past_key_values=cache,
            )
            parts.append(now.logits)
            seen += n
        assert_same(torch.cat(parts, 1), expected[:, -4:])

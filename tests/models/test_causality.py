"""Changing future tokens changes no past logit by a single bit."""

import pytest
import torch


@torch.no_grad()
@pytest.mark.parametrize("T", [21, 130])
def test_the_future_does_not_reach_the_past(model, T):
    ids = torch.randint(3, 97, (2, T))
    logits = model(ids).logits
    for cut in (1, T // 3, 64, T - 1):
        if cut >= T:
            continue
        other = ids.clone()
        other[:, cut:] = torch.randint(3, 97, (2, T - cut))
        changed = model(other).logits
        assert torch.equal(changed[:, :cut], logits[:, :cut])
        assert not torch.equal(changed[:, cut:], logits[:, cut:])


@torch.no_grad()
def test_the_papers_sequence_maximum_is_not_causal(build):
    """The same change of the future shows in the past with the one setting that is not causal."""
    model = build("pure", key_max="sequence")
    ids = torch.randint(3, 97, (2, 21))
    other = ids.clone()
    other[:, 7:] = torch.randint(3, 97, (2, 14))
    assert not torch.equal(model(other).logits[:, :7], model(ids).logits[:, :7])

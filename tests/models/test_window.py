"""A sliding window: what lies beyond it cannot matter, what lies within it does, and the cache keeps no more."""

import pytest
import torch

from regla.models import ReGLAConfig
from regla.models.cache import cache_bytes

W = "sliding_attention"
WINDOW = 8


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_token_reaches_exactly_the_window_times_the_layers(build, layers):
    """Each layer passes a token on by at most window - 1 positions."""
    model = build("window", num_hidden_layers=layers, layer_types=[W] * layers, sliding_window=WINDOW)
    ids = torch.randint(3, 97, (1, 40))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 7) % 90 + 3
    changed = (model(other).logits != model(ids).logits).any(-1)[0].nonzero().flatten().tolist()
    assert changed[0] == 5
    assert changed[-1] == 5 + layers * (WINDOW - 1)


@torch.no_grad()
def test_full_attention_reaches_further(build):
    """The test above can fail."""
    model = build("softmax, extras", softmax_conv_kernel_dim=0)
    ids = torch.randint(3, 97, (1, 40))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 7) % 90 + 3
    assert (model(other).logits != model(ids).logits).any(-1)[0, -1]


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_full_attention(build):
    ids = torch.randint(3, 97, (2, 21))
    window = build("window", sliding_window=21)
    full = build("window", layer_types=["full_attention"] * 2)
    full.load_state_dict(window.state_dict())
    torch.testing.assert_close(window(ids).logits, full(ids).logits)


@torch.no_grad()
def test_the_cache_keeps_the_window_alone(build):
    model = build("window")
    cache = model(torch.randint(3, 97, (2, 5)), use_cache=True).past_key_values
    sizes = []
    for _ in range(6):
        cache = model(torch.randint(3, 97, (2, 10)), past_key_values=cache).past_key_values
        sizes.append(cache_bytes(cache))
    config = model.config
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert sizes == [(config.sliding_window - 1) * per_token] * 6
    assert cache.get_seq_length() == 65


@torch.no_grad()
def test_a_reset_cache_forgets(build):
    model = build("window")
    ids = torch.randint(3, 97, (1, 12))
    cache = model(torch.randint(3, 97, (1, 12)), use_cache=True).past_key_values
    cache.reset()
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids, use_cache=True).logits)


@pytest.mark.parametrize("window", [None, 1, 0, -3])
def test_a_window_that_is_none(window):
    with pytest.raises(ValueError, match=f"sliding_window is {window}, but layer_types has 'sliding_attention'"):
        ReGLAConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, layer_types=[W], sliding_window=window)


def test_a_cache_of_another_window(build):
    cache = build("window").model(torch.randint(3, 97, (1, 3)), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="does not keep a window of 5 tokens"):
        build("window", sliding_window=5)(torch.randint(3, 97, (1, 3)), past_key_values=cache)

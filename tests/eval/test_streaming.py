"""A sequence in chunks: the same logits as at once, from a cache that does not grow."""

import pytest
import torch

from regla.eval.streaming import stream
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.cache import cache_bytes


def make_model(layer_types: list[str]) -> ReGLAForCausalLM:
    config = ReGLAConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        layer_types=layer_types,
    )
    return ReGLAForCausalLM(config).double().eval()


@pytest.mark.parametrize("chunk", [1, 13, 100])
@pytest.mark.parametrize("second", ["linear_attention", "full_attention"])
def test_equals_the_full_forward(chunk: int, second: str) -> None:
    model = make_model(["linear_attention", second])
    ids = torch.randint(50, (1, 60))
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
    streamed = torch.cat([logits for logits, _ in stream(model, ids, chunk=chunk)], dim=1)
    torch.testing.assert_close(streamed, full, rtol=1e-9, atol=1e-9)


def test_the_cache_of_linear_layers_does_not_grow_and_that_of_softmax_does() -> None:
    ids = torch.randint(50, (1, 60))
    linear, hybrid = (
        [cache_bytes(cache) for _, cache in stream(make_model(["linear_attention", second]), ids, chunk=20)]
        for second in ("linear_attention", "full_attention")
    )
    assert len(linear) == 3 and linear[0] == linear[1] == linear[2] > 0
    keys_and_values = 2 * 32 * 8 * 20  # of 20 tokens: hidden size, bytes of float64
    assert hybrid[1] - hybrid[0] == hybrid[2] - hybrid[1] == keys_and_values


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk is 0"):
        next(stream(make_model(["linear_attention"] * 2), torch.zeros(1, 5, dtype=torch.long), chunk=0))

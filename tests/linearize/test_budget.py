"""The plan's figures equal what models really hold."""

import pytest
import torch
from transformers import DynamicCache

from regla.linearize import convert
from regla.linearize.budget import budget, parameter_counts
from regla.linearize.config import StagePlan
from regla.linearize.convert import converted_config
from regla.models.cache import expected_cache_bytes
from tests.linearize.models import llama, qwen2


@pytest.mark.parametrize("keep", ["none", "every-2", [0, 1, 2, 3]])
def test_cache_bytes(keep):
    converted = convert(llama(), keep)
    cache = DynamicCache(config=converted.config)
    with torch.no_grad():
        converted(torch.randint(97, (1, 40)), past_key_values=cache, use_cache=True)
    held = 0
    for layer in cache.layers:
        tensors = {id(value): value for value in vars(layer).values() if isinstance(value, torch.Tensor)}
        for value in vars(layer).values():
            for item in value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else []:
                if isinstance(item, torch.Tensor):
                    tensors[id(item)] = item
        held += sum(value.numel() * value.element_size() for value in tensors.values() if value.is_floating_point())
    assert expected_cache_bytes(converted.config.linear_config, 40, element_bytes=4) == held


@pytest.mark.parametrize("original", [llama(), qwen2(tie_word_embeddings=True)])
def test_parameters(original):
    converted = convert(original)
    counts = tuple(sum(p.numel() for p in model.parameters()) for model in (original, converted))
    assert parameter_counts(original.config, converted_config(original.config)) == counts


def test_text():
    original = llama().config
    stages = [StagePlan("distillation", 10, 2, 32)]
    text = budget(original, converted_config(original), stages, batch_size=2, seq_len=32)
    assert "4, 2 of them to become ReGLA" in text and "640 (10 steps of 2 x 32)" in text
    # 4 layers x 2 (keys, values) x 2 heads x 16 channels x 2 bytes x 1024; half of it, and 2 x 2 x 4 x (16 x 16 + 1)
    row = next(line for line in text.splitlines() if line.strip().startswith("1k tokens"))
    assert row.split()[2:] == ["524", "kB", "266", "kB"]

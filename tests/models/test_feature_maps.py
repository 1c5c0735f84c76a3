"""Models with the feature maps of other papers: folders, caches of their sizes, generation behind padding."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from regla.models import ReGLAForCausalLM
from regla.models.cache import cache_bytes, expected_cache_bytes

WIDE = {"t2r": None, "hedgehog": 24, "dpfp": 48, "favor_plus": 20, "rfa": 16, "cosformer": 24, "polaformer": 24}
MAPS = sorted(WIDE.keys() | {"focused"})


@pytest.fixture(params=MAPS)
def model(request, build) -> ReGLAForCausalLM:
    size = WIDE.get(request.param)
    return build("pure", feature_map=request.param, feature_dim=size, gate="sigmoid", max_position_embeddings=64)


@torch.no_grad()
def test_a_folder_holds_the_map(model, tmp_path):
    """Projections that do not train included, which would be drawn anew."""
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = ReGLAForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, 97, (2, 30))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.feature_map == model.config.feature_map


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_any_split_into_calls(model, kind, assert_same):
    ids = torch.randint(3, 97, (2, 30))
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=40)
    )
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([7, 1, 1, 21], 1)]
    assert_same(torch.cat(pieces, 1), model(ids, use_cache=False).logits)
    assert cache.layers[0].read().S.shape == (2, 2, model.config.num_features, 12)
    assert cache_bytes(cache) == 2 * expected_cache_bytes(model.config, 30)
    if kind == "static":
        cache.reset()
        again = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([20, 10], 1)]
        assert_same(torch.cat(again, 1), torch.cat(pieces, 1))


@torch.no_grad()
def test_generation_behind_padding(model):
    short, long = torch.randint(3, 97, (1, 5)), torch.randint(3, 97, (1, 9))
    batch = torch.cat([torch.nn.functional.pad(short, (4, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)
    alone = [model.generate(ids, attention_mask=torch.ones_like(ids), **options) for ids in (short, long)]
    assert torch.equal(together[0, 9:], alone[0][0, 5:]) and torch.equal(together[1, 9:], alone[1][0, 9:])
    beams = model.generate(long, attention_mask=torch.ones_like(long), num_beams=3, **options)
    assert beams.shape == (1, 15)

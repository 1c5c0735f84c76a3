"""Compiled decoding: one graph without a break, compiled once, and no wait for a GPU."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

from regla.ops.dispatch import why_not_triton

BRANCH = pytest.param("pure, branch", marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    "variant", ["pure", BRANCH, pytest.param("hybrid, sum", marks=pytest.mark.slow), "hybrid, extras"]
)
@pytest.mark.parametrize(("make", "graphs"), [(StaticCache, 1), (DynamicCache, 2)], ids=["static", "dynamic"])
def test_decoding_compiles_once(model, make, graphs, assert_same):
    """A token count in Python compiles once more, when it is seen to change; one in a tensor does not."""
    ids = torch.randint(3, 97, (2, 15))
    cache = make(config=model.config, **({"max_cache_len": 20} if make is StaticCache else {}))
    expected = model(ids).logits
    model(ids[:, :4], past_key_values=cache)
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True)
    logits = [step(ids[:, t : t + 1], past_key_values=cache).logits for t in range(4, 15)]
    assert counter.frame_count == graphs
    assert_same(torch.cat(logits, 1), expected[:, 4:])
    assert int(cache.get_seq_length()) == 15


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_decoding_compiles_around_the_kernel(build, backend, assert_same):
    """It is opaque to the compiler, which is told that it overwrites the state, and copies nothing."""
    x = torch.ones(1, 1, 1, 16)
    reason = why_not_triton(x, x)
    if reason is not None:
        pytest.skip(reason)
    model, kernel = build("pure"), build("pure", backend="triton")
    ids = torch.randint(3, 97, (2, 7))
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(ids[:, :4], past_key_values=cache)
    places = [layer.read().S.data_ptr() for layer in cache.layers]
    step = torch.compile(kernel, backend=backend, fullgraph=True)
    logits = [step(ids[:, t : t + 1], past_key_values=cache).logits for t in range(4, 7)]
    assert_same(torch.cat(logits, 1), expected[:, 4:])
    assert [layer.read().S.data_ptr() for layer in cache.layers] == places


@torch.no_grad()
@pytest.mark.parametrize("variant", ["pure, 3 heads, both axes", BRANCH, "hybrid", "softmax, extras"])
def test_the_whole_forward_compiles(model, assert_same):
    ids = torch.randint(3, 97, (2, 70))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    step = torch.compile(model, backend="eager", fullgraph=True)
    actual = step(ids, attention_mask=mask, use_cache=False).logits
    assert_same(actual[mask.bool()], model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()])


@torch.no_grad()
def test_packing_by_positions_alone_is_loud_when_compiled(build):
    """The boundaries cannot be read while compiling; they must not be ignored."""
    model = build("pure")
    step = torch.compile(model, backend="eager", fullgraph=True)
    ids = torch.randint(3, 97, (1, 6))
    step(ids, position_ids=torch.arange(6)[None], use_cache=False)
    with pytest.raises(RuntimeError, match="pass cu_seq_lens_q as well"):
        step(ids, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]), use_cache=False)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("make", [StaticCache, DynamicCache])
def test_decoding_never_waits_for_the_gpu(model, make):
    if make is StaticCache and "sliding_attention" in model.config.layer_types:
        pytest.skip("transformers' static cache of a window copies an index from the host")
    model = model.cuda()
    ids = torch.randint(3, 97, (2, 15), device="cuda")
    cache = make(config=model.config, **({"max_cache_len": 20} if make is StaticCache else {}))
    model(ids[:, :4], past_key_values=cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(4, 15):
            model(ids[:, t : t + 1], past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")

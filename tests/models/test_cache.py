"""The cache layers: what they hold, what they can be asked for, and that they leave other models alone."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3NextConfig, StaticCache
from transformers.cache_utils import LinearAttentionLayer

from regla.models import ReGLAConfig
from regla.models.cache import (
    ConvCacheLayer,
    ReGLACacheLayer,
    ReGLAStaticCacheLayer,
    SoftmaxConvCacheLayer,
    SoftmaxConvStaticCacheLayer,
    adopt_cache,
    fork_cache,
)
from regla.ops.dispatch import why_not_triton


def skip_without_triton():
    x = torch.ones(1, 1, 1, 16)
    reason = why_not_triton(x, x)
    if reason is not None:
        pytest.skip(reason)


def linear_layers(cache):
    return [layer for layer in cache.layers if isinstance(layer, ReGLACacheLayer)]


def states(cache):
    """All tensors of the linear layers."""
    return [part for layer in linear_layers(cache) for part in layer.read() if part is not None]


def states_of_convolutions(cache):
    """Those of the softmax layers."""
    return [layer.conv_state for layer in cache.layers if isinstance(layer, ConvCacheLayer)]


def filled(model, length=9, static=False, rows=2):
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, 97, (rows, length)), past_key_values=cache)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_float32_and_their_size_is_constant(model, dtype):
    model = model.to(dtype)
    sizes = set()
    for length in (1, 9, 200):
        cache = filled(model, length)
        for layer in linear_layers(cache):
            assert layer.read().S.dtype == layer.read().m.dtype == torch.float32
        # Storage, not shape: a view would keep more alive than it shows.
        sizes.add(sum(part.untyped_storage().nbytes() for part in states(cache)))
    assert len(sizes) == 1


def test_tokens_are_counted(model):
    cache = filled(model, 9)
    assert cache.get_seq_length() == 9
    assert [layer.get_seq_length() for layer in cache.layers] == [9] * len(cache.layers)
    if linear_layers(cache):
        assert cache.has_previous_state()
    model(torch.tensor([[4], [5]]), past_key_values=cache)
    assert cache.get_seq_length() == 10


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_rows_can_be_reordered_selected_and_repeated(model, static, assert_same):
    ids = torch.randint(3, 97, (3, 9))
    follow = torch.randint(3, 97, (3, 4))

    def after(change, rows):
        cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        change(cache)
        actual = model(follow[: len(rows)], past_key_values=cache).logits
        assert_same(actual, model(torch.cat([ids[rows], follow[: len(rows)]], 1)).logits[:, 9:])

    after(lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0])
    if not static:  # softmax layers of static caches have neither
        after(lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0])
        ids = ids[:1]
        after(lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0])


def test_gradients_flow_through_calls(model, assert_same):
    """Three calls through one cache have the gradients of one call: no state is overwritten behind autograd's back."""
    ids = torch.randint(3, 97, (2, 17))
    probe = torch.randn(2, 17, 97)
    parameters = list(model.parameters())
    expected = torch.autograd.grad((model(ids, use_cache=False).logits * probe).sum(), parameters)
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([7, 1, 9], 1)]
    for one, other in zip(torch.autograd.grad((torch.cat(pieces, 1) * probe).sum(), parameters), expected, strict=True):
        assert_same(one, other)


def test_gradients_flow_through_calls_with_a_static_cache(build, assert_same):
    model = build("pure, rope")  # transformers' own static layers write in place, so no hybrid here
    ids = torch.randint(3, 97, (2, 17))
    expected = torch.autograd.grad(model(ids, use_cache=False).logits.square().sum(), list(model.parameters()))
    cache = StaticCache(config=model.config, max_cache_len=32)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([7, 1, 9], 1)]
    actual = torch.autograd.grad(torch.cat(pieces, 1).square().sum(), list(model.parameters()))
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


@torch.no_grad()
def test_a_static_cache_stays_where_it_is(model):
    cache = filled(model, 9, static=True)
    places = [part.data_ptr() for part in states(cache)]
    assert all(isinstance(layer, ReGLAStaticCacheLayer) for layer in linear_layers(cache))
    model(torch.tensor([[4], [5]]), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    assert [part.data_ptr() for part in states(cache)] == places
    assert all(part.count_nonzero() == 0 for part in states(cache))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("variant", ["pure", "hybrid, sum", "hybrid, extras"])
def test_the_decode_kernel_overwrites_states(build, variant, static, assert_same):
    skip_without_triton()
    model = build(variant)
    ids = torch.randint(3, 97, (2, 9))
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    model(ids[:, :6], past_key_values=cache)
    before = states(cache) + states_of_convolutions(cache)
    kernel = build(variant, backend="triton")
    logits = [kernel(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6, 9)]
    assert_same(torch.cat(logits, 1), expected[:, 6:])
    assert all(x is y for x, y in zip(states(cache) + states_of_convolutions(cache), before, strict=True))
    assert int(cache.get_seq_length()) == 9


def test_other_models_keep_their_cache_layers(build):
    filled(build("pure"))
    qwen = Qwen3NextConfig(
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], hidden_size=32, num_attention_heads=2
    )
    assert type(DynamicCache(config=qwen).layers[0]) is LinearAttentionLayer
    assert type(StaticCache(config=qwen, max_cache_len=8).layers[0]) is LinearAttentionLayer


def test_foreign_caches_are_refused(build):
    model = build("hybrid")
    ids = torch.tensor([[4, 5]])
    with pytest.raises(ValueError, match=r"past_key_values is a tuple; expected a cache of transformers"):
        model(ids, past_key_values=((), ()))
    with pytest.raises(ValueError, match=r"past_key_values has 2 layers and the model 4"):
        model(ids, past_key_values=filled(build("pure")))
    used = DynamicCache(config=LlamaConfig(num_hidden_layers=4))
    used.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    with pytest.raises(ValueError, match=r"layer 0 of past_key_values, a DynamicLayer, already holds another model's"):
        model(ids, past_key_values=used)


def test_a_state_cannot_be_cropped(build):
    cache = filled(build("pure"))
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"crop\(-1\) was asked of a linear layer's cache"):
        cache.crop(-1)
    with pytest.raises(ValueError, match=r"keys and values were given to a linear layer's cache"):
        cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)


def test_adopting_twice_changes_nothing(build):
    model = build("hybrid")
    cache = filled(model)
    before = list(cache.layers)
    adopt_cache(cache, model.config)
    assert all(one is other for one, other in zip(before, cache.layers, strict=True))


def test_a_state_without_convolution_or_with_sum_normaliser(build):
    S = linear_layers(filled(build("hybrid, sum")))[0].read().S
    assert S.shape[-1] > ReGLAConfig(hidden_size=48, num_attention_heads=4, head_dim=12).value_head_dim
    assert linear_layers(filled(build("pure, rope")))[0].read().conv is None


CONVOLVED = ["hybrid, extras", "softmax, extras"]


def conv_states(cache):
    """The convolution states of the softmax layers."""
    return [layer.conv_state for layer in cache.layers if isinstance(layer, ConvCacheLayer)]


@pytest.mark.parametrize("variant", CONVOLVED)
def test_softmax_layers_keep_the_last_inputs_of_their_convolution(model):
    taps = model.config.softmax_conv_kernel_dim
    count = model.config.layer_types.count("full_attention")
    for length in (1, 9, 200):
        states = conv_states(filled(model, length))
        assert [state.shape for state in states] == [(2, taps - 1, (4 + 2 * 2) * 12)] * count
        # Storage, not shape: a view would keep the inputs of the whole call alive.
        assert all(state.untyped_storage().nbytes() == state.nbytes for state in states)


@torch.no_grad()
@pytest.mark.parametrize("variant", CONVOLVED)
def test_a_static_convolution_state_stays_where_it_is(model):
    cache = filled(model, 9, static=True)
    softmax = [layer for layer in cache.layers if isinstance(layer, ConvCacheLayer)]
    assert {type(layer) for layer in softmax} == {SoftmaxConvStaticCacheLayer}
    places = [state.data_ptr() for state in conv_states(cache)]
    model(torch.tensor([[4], [5]]), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(state.count_nonzero() > 0 for state in conv_states(cache))
    cache.reset()
    assert [state.data_ptr() for state in conv_states(cache)] == places
    assert all(state.count_nonzero() == 0 for state in conv_states(cache))


@torch.no_grad()
def test_a_static_cache_allocated_early_is_adopted(build, assert_same):
    model = build("softmax, extras")
    ids = torch.randint(3, 97, (2, 9))
    cache = StaticCache(config=model.config, max_cache_len=16)
    cache.early_initialization(2, 2, 12, torch.float32, torch.device("cpu"))
    assert_same(model(ids, past_key_values=cache).logits, model(ids).logits)
    assert all(layer.keys.shape == (2, 2, 16, 12) for layer in cache.layers)


def test_a_convolution_needs_a_cache_that_holds_its_state(build):
    model = build("softmax, extras")
    adopted = DynamicCache(config=model.config)
    adopt_cache(adopted, model.config)
    assert {type(layer) for layer in adopted.layers} == {SoftmaxConvCacheLayer}
    used = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    used.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 1)
    with pytest.raises(ValueError, match=r"layer 1 of past_key_values, a DynamicLayer, cannot hold the state of a"):
        model(torch.tensor([[3, 4]]), past_key_values=used)


def test_a_convolution_cannot_be_cropped(build):
    cache = filled(build("softmax, extras"))
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"crop\(-1\) was asked of the cache of a softmax layer with a convolution"):
        cache.crop(-1)


def everything(cache):
    """Copies of all tensors that a cache holds."""
    parts = states(cache) + [state for state in conv_states(cache) if state is not None]
    parts += [part for layer in cache.layers for part in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return [part.clone() for part in parts if part is not None]


@torch.no_grad()
def test_a_fork_continues_its_rows_and_leaves_the_cache_alone(model, assert_same):
    """Rows repeat, change places and are left out; two forks of one cache, and the cache itself, know nothing of each
    other, with a token at a time as well, which may be written in place."""
    ids, follow = torch.randint(3, 97, (3, 9)), torch.randint(3, 97, (4, 5))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    before = everything(cache)
    for rows in ([2, 0, 0, 1], [1, 1, 1], torch.tensor([2])):
        fork = fork_cache(cache, rows)
        part = follow[: len(rows)]
        expected = model(torch.cat([ids[rows], part], 1)).logits[:, 9:]
        assert_same(model(part[:, :3], past_key_values=fork).logits, expected[:, :3])
        for t in (3, 4):
            assert_same(model(part[:, t : t + 1], past_key_values=fork).logits, expected[:, t : t + 1])
        assert fork.get_seq_length() == 14 and cache.get_seq_length() == 9
    assert all(torch.equal(one, other) for one, other in zip(everything(cache), before, strict=True))


@torch.no_grad()
def test_a_fork_copies_exactly(model):
    cache = filled(model, 9, rows=3)
    fork = fork_cache(cache, [2, 2, 0])
    assert type(fork) is type(cache) and [type(layer) for layer in fork.layers] == [type(x) for x in cache.layers]
    for part, of in zip(everything(fork), everything(cache), strict=True):
        assert torch.equal(part, of[[2, 2, 0]])


@torch.no_grad()
def test_a_softmax_models_cache_forks(assert_same):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    ids, follow = torch.randint(3, 97, (2, 6)), torch.randint(3, 97, (3, 4))
    cache = model(ids, use_cache=True).past_key_values
    fork = fork_cache(cache, [1, 0, 1])
    expected = model(torch.cat([ids[[1, 0, 1]], follow], 1)).logits[:, 6:]
    assert_same(model(follow, past_key_values=fork).logits, expected)
    assert cache.get_seq_length() == 6


def test_what_cannot_be_forked_is_refused(build):
    model = build("hybrid")
    with pytest.raises(ValueError, match=r"cache is a StaticCache, which cannot be forked; expected a DynamicCache"):
        fork_cache(filled(model, static=True), [0])
    for rows in ([0, 2], [-1], [], [[0]]):
        with pytest.raises(ValueError, match=r"rows is .*; expected a list of batch rows .*, each from 0 to 1"):
            fork_cache(filled(model), rows)
    with pytest.raises(ValueError, match=r"cache is empty, so it has no rows to fork"):
        fork_cache(DynamicCache(config=model.config), [0])


@torch.no_grad()
def test_the_cache_has_two_names(build):
    """transformers 5.24 calls `cache` what was `past_key_values`; a name that is not known would be passed over."""
    model = build("hybrid")
    ids = torch.randint(3, 97, (1, 9))
    for body in (model, model.model):
        cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for piece in ids.split([5, 1, 3], 1):
            assert torch.equal(body(piece, cache=cache)[0], body(piece, past_key_values=other)[0])
        assert cache.get_seq_length() == 9
        assert body(ids, cache=DynamicCache(config=model.config)).past_key_values.get_seq_length() == 9
        with pytest.raises(ValueError, match="cache and past_key_values are both given"):
            body(ids, cache=cache, past_key_values=other)

"""The model is one function, whatever the split into calls, padding, packing, batch and kind of cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

SPLITS = {
    "token by token": [1] * 21,
    "one token first": [1, 20],
    "one token last": [20, 1],
    "odd chunks": [7, 1, 13],
    "across the operation's chunks": [33, 1, 70],
}


def tokens(*shape):
    return torch.randint(3, 97, shape)


def in_pieces(model, ids, lengths, cache, mask=None, mask_length=None):
    """Logits of `ids` [B, T] fed in pieces of the given lengths; the mask grows along, or is `mask_length` long."""
    logits, start = [], 0
    for length in lengths:
        stop = start + length
        piece_mask = None if mask is None else mask[:, : mask_length or stop]
        out = model(ids[:, start:stop], attention_mask=piece_mask, past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        logits.append(out.logits)
        start = stop
    assert start == ids.shape[1]
    return torch.cat(logits, 1)


def make_cache(kind, model, length):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "without a config":
        return DynamicCache()
    return StaticCache(config=model.config, max_cache_len=length + 3)


@torch.no_grad()
@pytest.mark.parametrize("split", SPLITS)
def test_any_split_into_calls(model, split, assert_same):
    lengths = SPLITS[split]
    ids = tokens(3, sum(lengths))
    assert_same(in_pieces(model, ids, lengths, DynamicCache(config=model.config)), model(ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static", "without a config"])
def test_any_kind_of_cache(model, kind, assert_same):
    ids = tokens(3, 21)
    cache = make_cache(kind, model, 21)
    assert_same(in_pieces(model, ids, [7, 1, 13], cache), model(ids, use_cache=False).logits)
    assert int(cache.get_seq_length()) == 21


@torch.no_grad()
def test_what_is_compared_can_differ(model):
    """Without its past, or with another position, a token gets other logits: the tests above are not vacuous."""
    ids = tokens(1, 21)
    logits = model(ids).logits
    largest = logits.abs().max()
    assert (model(ids[:, 7:]).logits - logits[:, 7:]).abs().max() > 0.05 * largest
    if model.config.uses_rope:
        stretched = model(ids, position_ids=3 * torch.arange(21)[None], attention_mask=torch.ones_like(ids)).logits
        assert (stretched - logits).abs().max() > 0.01 * largest


def left_padded(lengths, junk_seed):
    """Rows of the given lengths behind padding of random content: ids [B, T], mask [B, T]."""
    rows = [tokens(length) for length in lengths]
    T = max(lengths)
    junk = torch.randint(0, 97, (len(rows), T), generator=torch.Generator().manual_seed(junk_seed))
    mask = torch.zeros(len(rows), T, dtype=torch.long)
    for row, real in enumerate(rows):
        junk[row, T - len(real) :] = real
        mask[row, T - len(real) :] = 1
    return rows, junk, mask


@torch.no_grad()
@pytest.mark.parametrize("kind", ["no cache", "dynamic", "static", "static, long mask"])
def test_left_padding_does_nothing(model, kind, assert_same):
    rows, ids, mask = left_padded([21, 9, 1, 14], junk_seed=1)
    if kind == "no cache":
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    else:
        cache = make_cache(kind.split(",")[0], model, 21)
        long = kind == "static, long mask"
        padded = torch.cat([mask, torch.zeros(4, 3, dtype=torch.long)], 1) if long else mask
        # The first calls hold nothing but padding in some rows.
        logits = in_pieces(model, ids, [1, 1, 5, 1, 13], cache, padded, padded.shape[1] if long else None)
    for row, real in enumerate(rows):
        assert_same(logits[row : row + 1, 21 - len(real) :], model(real[None], use_cache=False).logits)


@torch.no_grad()
def test_content_of_padding_is_irrelevant_to_the_last_bit(model):
    logits = []
    for seed in (1, 2):
        torch.manual_seed(0)
        _, ids, mask = left_padded([21, 9, 14], junk_seed=seed)
        logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
    assert torch.equal(*logits)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["pure", "pure, rope", "pure, 3 heads, both axes"])
def test_padding_may_hold_nan(model):
    _, ids, mask = left_padded([21, 9, 14], junk_seed=1)
    embeds = model.get_input_embeddings()(ids)
    expected = model(inputs_embeds=embeds, attention_mask=mask).logits
    embeds[mask == 0] = torch.nan
    actual = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(actual[mask.bool()], expected[mask.bool()])


DOCUMENTS = [5, 1, 17, 80, 2]


@torch.no_grad()
@pytest.mark.parametrize("given", ["cu_seq_lens_q", "position_ids", "both", "cu_seq_lens_q and plain position_ids"])
def test_packed_documents_do_not_see_each_other(model, given, assert_same):
    documents = [tokens(length) for length in DOCUMENTS]
    cu = torch.tensor([0, *DOCUMENTS]).cumsum(0).int()
    restarting = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    kwargs = {}
    if given != "position_ids":
        kwargs["cu_seq_lens_q"] = cu
    if given in ("position_ids", "both"):
        kwargs["position_ids"] = restarting
    if given == "cu_seq_lens_q and plain position_ids":
        if model.config.uses_rope:  # rotations are then other ones on purpose; boundaries must still hold
            first = torch.cat(documents)[None].clone()
            other = first.clone()
            other[0, :5] = tokens(5)
            plain = torch.arange(sum(DOCUMENTS))[None]
            a, b = (model(ids, cu_seq_lens_q=cu, position_ids=plain).logits[:, 5:] for ids in (first, other))
            assert torch.equal(a, b)
            return
        kwargs["position_ids"] = torch.arange(sum(DOCUMENTS))[None]
    out = model(torch.cat(documents)[None], **kwargs)
    assert out.past_key_values is None
    for document, logits in zip(documents, out.logits[0].split(DOCUMENTS), strict=True):
        assert_same(logits[None], model(document[None]).logits)


def test_packing_gradients(model, assert_same):
    documents = [tokens(length) for length in DOCUMENTS]
    probes = [torch.randn(length, 97) for length in DOCUMENTS]
    packed = model(torch.cat(documents)[None], cu_seq_lens_q=torch.tensor([0, *DOCUMENTS]).cumsum(0)).logits[0]
    parameters = list(model.parameters())
    actual = torch.autograd.grad((packed * torch.cat(probes)).sum(), parameters)
    separate = sum((model(d[None]).logits[0] * p).sum() for d, p in zip(documents, probes, strict=True))
    for one, other in zip(actual, torch.autograd.grad(separate, parameters), strict=True):
        assert_same(one, other)


@torch.no_grad()
def test_batch_equals_single_rows(model, assert_same):
    ids = tokens(4, 21)
    logits = model(ids).logits
    for row in range(4):
        assert_same(logits[row : row + 1], model(ids[row : row + 1]).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_reset_cache_is_a_new_cache(model, kind, assert_same):
    cache = make_cache(kind, model, 21)
    in_pieces(model, tokens(3, 21), [7, 14], cache)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    ids = tokens(3, 21)
    assert_same(in_pieces(model, ids, [1, 7, 13], cache), model(ids, use_cache=False).logits)


@torch.no_grad()
def test_continuing_a_conversation_with_padding_inside(build, assert_same):
    """Rows of unequal length, right-padded, then continued: without a convolution padding leaves no trace at all."""
    model = build("pure, rope")
    long, short, more = tokens(9), tokens(4), tokens(2, 5)
    ids = torch.stack([long, torch.cat([short, tokens(5)])])
    mask = torch.tensor([[1] * 14, [1] * 4 + [0] * 5 + [1] * 5])
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask[:, :9], past_key_values=cache)
    logits = model(more, attention_mask=mask, past_key_values=cache).logits
    for row, start in enumerate((long, short)):
        assert_same(logits[row : row + 1], model(torch.cat([start, more[row]])[None]).logits[:, -5:])


@torch.no_grad()
def test_logits_to_keep(model):
    ids = tokens(2, 21)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, logits[:, [2, 5]])


@torch.no_grad()
def test_softmax_layers_are_llamas():
    """With no linear layer the model is Llama, parameter for parameter and bit by bit: Llama's weights load by name,
    and the same seed makes the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from regla.models import ReGLAConfig, ReGLAForCausalLM

    shape = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    torch.manual_seed(5)
    llama = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.25)).eval()
    torch.manual_seed(5)
    ours = ReGLAForCausalLM(ReGLAConfig(**shape, initializer_range=0.25, layer_types=["full_attention"] * 2)).eval()
    weights = ours.state_dict()
    assert list(weights) == list(llama.state_dict())
    assert all(torch.equal(weights[name], weight) for name, weight in llama.state_dict().items())
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    for kwargs in ({}, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}):
        assert torch.equal(ours(ids, **kwargs).logits, llama(ids, **kwargs).logits)


@torch.no_grad()
def test_softmax_extras_are_the_equations(build, assert_same):
    """W_o (norm(attention(RoPE(norm(q)), RoPE(norm(k)), v)) * gate(W x)), q, k, v behind a convolution."""
    layer = build("softmax, extras").model.layers[0].self_attn
    assert "norm.weight" in layer.state_dict() and "conv.weight" in layer.state_dict()
    x = torch.randn(2, 11, 48)
    angles = torch.randn(1, 11, 6).repeat(1, 1, 2)
    projected = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], -1)
    padded = torch.cat([torch.zeros(2, 3, 96), projected], 1)
    projected = projected + sum(layer.conv.weight[j] * padded[:, 3 - j : 14 - j] for j in range(4))

    def rms(y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turn(y):
        first, second = y.chunk(2, -1)
        return y * angles.cos()[:, :, None] + torch.cat([-second, first], -1) * angles.sin()[:, :, None]

    q, k, v = (part.unflatten(-1, (-1, 12)) for part in projected.split([48, 24, 24], -1))
    q, k = turn(rms(q) * layer.q_norm.weight), turn(rms(k) * layer.k_norm.weight)
    k, v = (y.repeat_interleave(2, dim=2) for y in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 12**0.5
    scores = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf)
    o = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    o = (rms(o) * layer.norm.weight).flatten(2) * torch.sigmoid(layer.output_gate(x))
    actual, _ = layer(x, position_embeddings=(angles.cos(), angles.sin()))
    assert_same(actual, layer.o_proj(o))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["hybrid", "hybrid, rope", "softmax, extras"])
def test_eager_softmax_attention_equals_sdpa(model, assert_same):
    _, ids, mask = left_padded([21, 9], junk_seed=1)
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation("eager")
    assert_same(model(ids, attention_mask=mask).logits[mask.bool()], expected)

"""Loss, gradients, packing by transformers' own collator, and bad input."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, DynamicCache


def tokens(*shape):
    return torch.randint(3, 97, shape)


def test_loss_is_the_mean_cross_entropy_of_the_next_token(model):
    ids = tokens(2, 17)
    labels = ids.clone()
    labels[0, 3:7] = -100
    out = model(ids, labels=labels)
    shifted = labels[:, 1:].reshape(-1)
    terms = cross_entropy(out.logits[:, :-1].reshape(-1, 97), shifted, reduction="none", ignore_index=-100)
    torch.testing.assert_close(out.loss, terms.sum() / (shifted != -100).sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss, terms.sum() / 50)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_every_parameter_learns(model):
    for name, gradient in gradients(model, tokens(2, 33)).items():
        assert gradient.isfinite().all(), name
        assert gradient.count_nonzero() > 0, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, reentrant):
    ids = tokens(2, 33)
    expected = gradients(model, ids)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients(model, ids)
    assert len(calls) == 2  # once more in the backward pass
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)


def test_training_makes_no_cache_unless_asked(build):
    model = build("hybrid").train()
    ids = tokens(2, 5)
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 5
    assert model.eval()(ids).past_key_values.get_seq_length() == 5
    assert model.eval()(ids, use_cache=False).past_key_values is None
    model.train().gradient_checkpointing_enable()
    assert model(ids, use_cache=True).past_key_values is None  # an empty one would look like a full one


def test_learning_by_heart(build):
    model = build("hybrid", initializer_range=0.02).train()
    model.init_weights()
    ids = tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_bfloat16(model):
    ids = tokens(2, 33)
    expected = model(ids).logits
    low = model.to(torch.bfloat16)
    out = low(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    error = (out.logits.float() - expected).norm() / expected.norm()
    assert error < 0.1, error  # eight bits in every product of a few layers
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in low.parameters())


def test_autocast(model):
    ids = tokens(2, 33)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    error = (out.logits.float() - expected).norm() / expected.norm()
    assert error < 0.1, error
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_hidden_states_and_attentions(build):
    model = build("hybrid")
    ids = tokens(2, 5)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert not torch.equal(out.hidden_states[1], out.hidden_states[2])
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(2, 4, 5, 5)] * 2  # of the two softmax layers
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 4, 5))
    logits, _ = model(ids, return_dict=False)
    torch.testing.assert_close(logits, out.logits)


@pytest.mark.parametrize("boundaries", [True, False])
def test_transformers_collator_packs_for_us(model, boundaries, assert_same):
    documents = [tokens(length).tolist() for length in (5, 1, 17, 9)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=boundaries, return_seq_idx=boundaries)
    batch = dict(collate([{"input_ids": document} for document in documents], return_tensors="pt"))
    assert ("cu_seq_lens_q" in batch) == boundaries
    out = model(**batch)
    start, total, count = 0, 0.0, 0
    for document in documents:
        ids = torch.tensor(document)[None]
        alone = model(ids).logits
        assert_same(out.logits[:, start : start + len(document)], alone)
        start += len(document)
        total = total + cross_entropy(alone[0, :-1], ids[0, 1:], reduction="sum")
        count += len(document) - 1
    torch.testing.assert_close(out.loss, total / count)


def test_bad_input(build):
    model = build("hybrid")
    ids = tokens(1, 6)
    cu = torch.tensor([0, 2, 6])
    cases = [
        (
            {"cu_seq_lens_q": cu, "past_key_values": DynamicCache(config=model.config)},
            "documents are packed and a cache",
        ),
        ({"cu_seq_lens_q": cu, "use_cache": True}, "documents are packed and a cache is asked for"),
        ({"cu_seq_lens_q": cu, "attention_mask": torch.ones_like(ids)}, "documents are packed and attention_mask"),
        ({"input_ids": tokens(2, 6), "cu_seq_lens_q": cu}, "documents are packed into a batch of 2 rows"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, "cu_seqlens"),
        (
            {"input_ids": tokens(2, 4), "position_ids": torch.tensor([[0, 1, 0, 1]] * 2)},
            "position_ids restart inside a row of a batch of 2",
        ),
        ({"attention_mask": torch.ones(1, 5)}, "attention_mask has 5 columns; expected 6"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "attention_mask has 4 dimensions"),
        ({"attention_mask": {"linear_attention": torch.ones(1, 6).bool()}}, "attention_mask is a dict of masks"),
        ({"inputs_embeds": torch.ones(1, 6, 48)}, "input_ids and inputs_embeds are both given"),
        ({"input_ids": None}, "input_ids and inputs_embeds are both given or both missing"),
    ]
    for kwargs, sentence in cases:
        with pytest.raises(ValueError) as error:
            model(**{"input_ids": ids, **kwargs})
        assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("token", [0, 5])
def test_the_padding_token_trains_where_it_occurs_in_text(build, token, tied):
    """It is often the separator, too: `regla train` makes the end of a text both."""
    model = build("hybrid", pad_token_id=token, eos_token_id=token, tie_word_embeddings=tied)
    ids = torch.tensor([[5, 6, 0, 7, 8]])
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[token].count_nonzero() == 48


def test_padding_itself_trains_nothing(build):
    model = build("hybrid", tie_word_embeddings=False)
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 5, 6, 7, 8, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    grad = model.get_input_embeddings().weight.grad
    assert grad[0].count_nonzero() == 0 and grad[5].count_nonzero() > 0


def test_an_embedding_of_zeros_from_an_old_folder_trains(build, tmp_path):
    model = build("hybrid")
    model.get_input_embeddings().weight.data[0] = 0.0  # what versions with a fixed row of zeros have saved
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 0, 7, 8]])
    model(ids, labels=ids).loss.backward()
    for parameter, resized in ((model.get_input_embeddings().weight, False), (None, True)):
        if resized:
            model.zero_grad()
            model.resize_token_embeddings(101)
            model(ids, labels=ids).loss.backward()
            parameter = model.get_input_embeddings().weight
        assert parameter.grad[0].count_nonzero() == 48


@pytest.mark.parametrize("of", ["the model", "one layer"])
def test_a_cache_in_training_with_checkpointing_is_refused(build, of):
    model = build("hybrid").train()
    model.gradient_checkpointing_enable()
    if of == "one layer":
        model.gradient_checkpointing_disable()
        model.model.layers[1].gradient_checkpointing = True
    ids, cache = tokens(1, 5), DynamicCache(config=model.config)
    with pytest.raises(ValueError, match=r"past_key_values is given in training with activation checkpointing"):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    model.eval()(ids, past_key_values=cache)
    assert cache.get_seq_length() == 5


@torch.no_grad()
def test_text_generated_within_training_keeps_its_cache(build):
    """Without gradients nothing is recomputed, so the cache is as good as ever."""
    model = build("hybrid").train()
    ids = tokens(1, 5)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **kwargs)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, **kwargs), expected)
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 5


def test_float16(model):
    """Weights and activations of 11 bits, states and outputs before their norm of 24: large values overflow nowhere."""
    ids = tokens(2, 33)
    with torch.no_grad():
        expected = model(ids).logits
        low = model.half()
        logits = low(ids).logits
        assert logits.dtype == torch.float16
        error = (logits.float() - expected).norm() / expected.norm()
        assert error < 0.015, error
        cache = DynamicCache(config=low.config)
        pieces = [low(piece, past_key_values=cache).logits for piece in ids.split([20, 1, 1, 11], 1)]
        error = (torch.cat(pieces, 1).float() - expected).norm() / expected.norm()
        assert error < 0.015, error
    low(ids, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in low.parameters())


def test_values_beyond_float16_between_the_projection_and_the_norm(build):
    """A sum over tokens of values near the largest float16 is none."""
    model = build("pure", gate="none", feature_map="relu").half()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(2000)
        logits = model(tokens(1, 200)).logits
    assert logits.isfinite().all()

"""`generate` in all its modes gives what recomputing everything at every token gives."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache, pipeline, set_seed

from regla.ops.dispatch import why_not_triton

NEW = 9


def prompts(padded=True):
    """Three rows, two of them left-padded."""
    ids = torch.randint(3, 97, (3, 13))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :6] = 0
        mask[2, :12] = 0
        ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [True, False], ids=["left-padded", "full rows"])
def test_greedy(model, kwargs, padded):
    inputs = prompts(padded)
    assert torch.equal(generate(model, inputs, **kwargs), generate(model, inputs, use_cache=False))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_with_the_kernels(build, kwargs):
    x = torch.ones(1, 1, 1, 16)
    reason = why_not_triton(x, x)
    if reason is not None:
        pytest.skip(reason)
    model, kernel = build("hybrid, rope"), build("hybrid, rope", backend="triton")
    inputs = prompts()
    assert torch.equal(generate(kernel, inputs, **kwargs), generate(model, inputs, use_cache=False, **kwargs))


def test_a_padded_row_generates_what_it_does_alone(model):
    inputs = prompts()
    batch = generate(model, inputs)[:, 13:]
    assert len({tuple(row) for row in batch.tolist()}) > 1  # else nothing would be compared
    for row in range(3):
        alone = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        assert torch.equal(generate(model, {"input_ids": alone})[0, -NEW:], batch[row])


@pytest.mark.parametrize("make", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_a_cache_of_the_users(model, make):
    inputs = prompts()
    cache = make(config=model.config, **({"max_cache_len": 40} if make is StaticCache else {}))
    assert torch.equal(generate(model, inputs, past_key_values=cache), generate(model, inputs, use_cache=False))
    assert int(cache.get_seq_length()) == 13 + NEW - 1  # the last token has not been read


def test_a_conversation_goes_on(model):
    """The second turn reads only what is new."""
    cache = DynamicCache(config=model.config)
    inputs = prompts()
    first = generate(model, inputs, past_key_values=cache)
    ids = torch.cat([first, torch.randint(3, 97, (3, 4))], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW + 4, dtype=torch.long)], 1)
    second = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
    assert torch.equal(second, generate(model, {"input_ids": ids, "attention_mask": mask}, use_cache=False))


def test_beams(model):
    inputs = prompts()
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    recomputed = generate(model, inputs, use_cache=False, **kwargs)
    greedy = generate(model, inputs)
    assert not torch.equal(recomputed.sequences[::2], greedy)  # the beams differ from the greedy path
    for cached in (generate(model, inputs, **kwargs), generate(model, inputs, cache_implementation="static", **kwargs)):
        assert torch.equal(cached.sequences, recomputed.sequences)
        torch.testing.assert_close(cached.sequences_scores, recomputed.sequences_scores)


def test_sampling(model):
    drawn = []
    for kwargs in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        set_seed(3)
        drawn.append(generate(model, prompts_of_seed(1), do_sample=True, top_k=20, num_return_sequences=2, **kwargs))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (6, 13 + NEW)


def prompts_of_seed(seed):
    torch.manual_seed(seed)
    inputs = prompts()
    set_seed(3)
    return inputs


def test_from_embeddings(model):
    inputs = prompts()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    kwargs = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(generate(model, kwargs), generate(model, inputs)[:, 13:])


def test_assisted_generation_is_refused(build):
    model = build("hybrid")
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, {"input_ids": torch.tensor([[4, 5, 6]])}, assistant_model=build("hybrid"))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, {"input_ids": torch.tensor([[4, 5, 6]])}, prompt_lookup_num_tokens=2)


@pytest.fixture
def tokenizer():
    words = {f"w{index}": index for index in range(97)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="w0", pad_token="w0", bos_token="w1", eos_token="w2", padding_side="left"
    )


@pytest.mark.parametrize("variant", ["pure, rope", "hybrid"])
def test_pipeline(model, tokenizer):
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    texts = ["w5 w6 w7 w8", "w9"]
    outputs = writer(texts, max_new_tokens=5, do_sample=False, return_full_text=False)
    for text, output in zip(texts, outputs, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = generate(model, {"input_ids": ids}, max_new_tokens=5)[0, ids.shape[1] :]
        assert output[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)

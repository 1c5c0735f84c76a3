"""Students of every family behave as models of transformers do: caches, padding, packing, generation, gradients, and
folders."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    StaticCache,
    pipeline,
)

from regla.data.tokenizer import train_tokenizer
from regla.linearize import convert
from regla.models.cache import fork_cache
from regla.models.student import linear_attention
from tests.linearize.originals import FIRST, original
from tests.same import assert_same_model

#: Those whose classes differ most; what does not depend on where a family keeps its projections is slow for the others.
DIFFERENT = ("llama", "gpt2", "gpt_neox", "gemma3_text", "qwen3_moe")
WINDOWS = ["mistral, windows", "phi3, windows", "qwen2, windows"]


def slow_unless(fast, names):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


EVERY = pytest.mark.parametrize("name", FIRST)
EVERY_SLOWLY = pytest.mark.parametrize("name", slow_unless(DIFFERENT, FIRST))
WITH_WINDOWS = pytest.mark.parametrize("name", [*FIRST, *WINDOWS])
WITH_WINDOWS_SLOWLY = pytest.mark.parametrize("name", slow_unless((*DIFFERENT, WINDOWS[0]), [*FIRST, *WINDOWS]))
SOME = pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma3_text", "mistral, windows"])


def student(name, keep=(1,), **mixer):
    torch.manual_seed(0)
    return convert(original(name), keep, check=False, **mixer).eval()


def close(value, expected):
    """To rounding of float32, which the norms behind a sum of exponentials enlarge."""
    assert (value - expected).abs().max() <= 2e-4 * expected.abs().max()


@torch.no_grad()
@WITH_WINDOWS
@pytest.mark.parametrize("keep", [(), (1,)], ids=["pure", "hybrid"])
def test_cached_is_full(name, keep):
    """Token by token, in pieces and by `generate`, longer than a window."""
    model, ids = student(name, keep), torch.randint(97, (2, 24))
    full = model(ids, use_cache=False)
    cache, logits = None, []
    for piece in (ids[:, :18], ids[:, 18:19], ids[:, 19:22], ids[:, 22:23], ids[:, 23:]):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    close(torch.cat(logits, 1), full.logits)
    assert cache.get_seq_length() == 24
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(found.sequences, plain.sequences)
    close(torch.stack(found.logits), torch.stack(plain.logits))


@torch.no_grad()
@WITH_WINDOWS
def test_padding(name):
    """A batch of two lengths, padded left or right, gives what each row gives alone; so does `generate`."""
    model, ids = student(name), torch.randint(97, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    short, long = ids[:1, 7:], ids[1:]
    logits = model(ids, attention_mask=mask).logits
    close(logits[0, 7:], model(short).logits[0])
    close(logits[1], model(long).logits[0])
    right = model(torch.cat([short, ids[:1, :7]], 1), attention_mask=mask[:1].flip(1)).logits
    close(right[0, :13], logits[0, 7:])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, **options)
    for row, alone in ((0, short), (1, long)):
        text = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(found[row, 20:], text[0, alone.shape[1] :])


@torch.no_grad()
@EVERY_SLOWLY
def test_embeddings_for_tokens(name):
    """What they hold at padding has no influence."""
    model, ids = student(name), torch.randint(97, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = model(ids, attention_mask=mask).logits
    embeddings = model.get_input_embeddings()(ids)
    embeddings[0, :5] = float("nan")
    found = model(inputs_embeds=embeddings, attention_mask=mask).logits
    close(found[0, 5:], expected[0, 5:])
    close(found[1], expected[1])
    with pytest.raises(ValueError, match=r"(?i)specify (exactly one|either)"):
        model()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_mask_of_four_dimensions(name, dtype):
    """Padding is read off a causal mask; one that is more than causal is refused."""
    model, ids = student(name), torch.randint(97, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    sees = torch.ones(12, 12, dtype=torch.bool).tril() & mask.bool()[:, None]
    four = sees[:, None]
    if dtype != torch.bool:
        four = torch.where(four, 0.0, torch.finfo(dtype).min)
    found, expected = model(ids, attention_mask=four).logits, model(ids, attention_mask=mask).logits
    close(found[0, 5:], expected[0, 5:])
    close(found[1], expected[1])
    blocks = torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)).tril().bool()[None, None]
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions and more in it than causality and padding"):
        model(ids[:1], attention_mask=blocks)


@torch.no_grad()
@EVERY_SLOWLY
def test_packed_documents(name):
    """Each gives what it gives alone, by restarting positions and by boundaries."""
    model, ids = student(name), torch.randint(97, (1, 20))
    alone = torch.cat([model(ids[:, :8]).logits, model(ids[:, 8:]).logits], 1)
    restarting = torch.cat([torch.arange(8), torch.arange(12)])[None]
    close(model(ids, position_ids=restarting).logits, alone)
    boundaries = torch.tensor([0, 8, 20], dtype=torch.int32)
    close(model(ids, cu_seq_lens_q=boundaries).logits, alone)
    with pytest.raises(ValueError, match="documents are packed and a cache is asked for"):
        model(ids, position_ids=restarting, use_cache=True)


@torch.no_grad()
@EVERY_SLOWLY
def test_beams(name):
    """The cache's rows follow the beams."""
    model, ids = student(name), torch.randint(1, 97, (2, 9))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@torch.no_grad()
@WITH_WINDOWS_SLOWLY
def test_static_cache(name):
    """`generate` with tensors of fixed size, left padding included."""
    model, ids = student(name), torch.randint(97, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


@torch.no_grad()
@SOME
def test_forked_cache(name):
    model, ids = student(name), torch.randint(97, (1, 12))
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], past_key_values=cache)
    ends = torch.randint(97, (3, 4))
    found = model(ends, past_key_values=fork_cache(cache, [0, 0, 0])).logits
    for row in range(3):
        close(found[row], model(torch.cat([ids[:, :8], ends[row : row + 1]], 1)).logits[0, 8:])


@EVERY_SLOWLY
def test_gradient_checkpointing(name):
    """The same gradients; text generated in between keeps its cache; a cache in training is refused."""
    model, ids = student(name).train(), torch.randint(1, 97, (2, 10))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}

    expected = gradients()
    assert all(any(f".{letter}_proj.weight" in key for key in expected) for letter in "qkvo")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    text = model.eval().generate(ids, **options)
    model.train().gradient_checkpointing_enable()
    found = gradients()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
    assert torch.equal(model.generate(ids, **options), text)
    with pytest.raises(ValueError, match="past_key_values is given in training with activation checkpointing"):
        model(ids, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("name", slow_unless(DIFFERENT, [name for name in FIRST if name != "gpt2"]))
def test_frequencies_stay_float32(name, tmp_path):
    model = student(name)
    expected = frequencies(model)
    assert expected
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for low in (model.to(torch.bfloat16), loaded, convert(original(name).bfloat16(), [1])):
        assert low.dtype == torch.bfloat16
        assert all(torch.equal(buffer, expected[path]) for path, buffer in frequencies(low).items())


def frequencies(model):
    return {path: buffer.clone() for path, buffer in model.named_buffers() if path.endswith("inv_freq")}


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text"])
@pytest.mark.parametrize(("make", "graphs"), [(StaticCache, 1), (DynamicCache, 2)], ids=["static", "dynamic"])
def test_decoding_compiles_once(name, make, graphs):
    """As ReGLAForCausalLM: one graph, and one more where a token count in Python is seen to change."""
    torch._dynamo.reset()
    model, ids = student(name), torch.randint(97, (2, 12))
    cache = make(config=model.config, **({"max_cache_len": 20} if make is StaticCache else {}))
    model(ids[:, :4], past_key_values=cache)
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True)
    logits = [step(ids[:, t : t + 1], past_key_values=cache).logits for t in range(4, 12)]
    assert counter.frame_count == graphs
    close(torch.cat(logits, 1), model(ids).logits[:, 4:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neox", "gemma3_text"])
def test_export_of_any_length(name):
    model, ids = student(name), torch.randint(97, (1, 21))
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}, "use_cache": None}
    inputs = {"input_ids": ids[:, :8], "use_cache": False}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    with torch.no_grad():
        close(program.module()(input_ids=ids, use_cache=False).logits, model(ids).logits)


@torch.no_grad()
@EVERY
def test_saved_and_loaded(name, tmp_path):
    model, ids = student(name, gate_bias=1.5), torch.randint(97, (2, 9))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and type(loaded).__name__.startswith("ReGLA")
    assert loaded.config.linear_layers == [0, 2] and loaded.config.mixer["gate_bias"] == 1.5
    assert_same_model(loaded, model, ids)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_model(copied, model, ids)


@EVERY_SLOWLY
def test_the_originals_class_refuses_the_folder(name, tmp_path):
    """It never becomes the softmax model, nor a model with attention drawn at random."""
    torch.manual_seed(0)
    model = original(name)
    convert(model, [1], check=False).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="needs the package regla"):
        type(model).from_pretrained(tmp_path)
    with pytest.raises(Exception, match="needs the package regla"):
        type(model.config).from_pretrained(tmp_path)


@torch.no_grad()
@EVERY_SLOWLY
def test_implementation_of_attention(name):
    """It can be changed, as the original's can; kept layers give their weights, and all blocks their hidden states."""
    model, ids = student(name), torch.randint(97, (2, 9))
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True, output_hidden_states=True)
    close(output.logits, expected)
    assert len(output.attentions) == 1 and len(output.hidden_states) == 4
    if name == "qwen3_moe":
        model.set_experts_implementation("eager")
        close(model(ids).logits, expected)


def test_other_heads():
    """The Auto classes of the original's family make students, too."""
    config = student("llama").config
    model = AutoModelForSequenceClassification.from_config(config)
    assert type(model).__name__ == "ReGLALlamaForSequenceClassification"
    assert sorted(linear_attention(model)) == [0, 2]
    config.pad_token_id = 0
    assert model(torch.randint(1, 97, (2, 7))).logits.shape == (2, 2)


@EVERY_SLOWLY
def test_drawn_weights_start_as_mixers_do(name):
    """From a configuration alone: gates at their bias, and the original's norms as its class starts them."""
    config = student(name, gate_bias=2.5).config
    model = AutoModelForCausalLM.from_config(config)
    fresh = AutoModelForCausalLM.from_config(config.original_config())
    for attention in linear_attention(model).values():
        assert (attention.mixer.gate.proj.bias == 2.5).all() and (attention.mixer.norm.weight == 1).all()
        if attention.mixer.q_norm is not None:
            theirs = next(module for path, module in fresh.named_modules() if path.endswith(".q_norm"))
            assert torch.equal(attention.mixer.q_norm.original.weight, theirs.weight)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_pipeline(tmp_path):
    tokenizer = train_tokenizer(["some words to make a tokenizer of"] * 3, 300)
    for name in FIRST:
        folder = tmp_path / name
        convert(original(name, vocab_size=len(tokenizer)), [1], check=False).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        generator = pipeline("text-generation", model=str(folder), device="cpu")
        texts = generator(["some words", "some"], max_new_tokens=3, do_sample=False, batch_size=2)
        assert len(texts) == 2, name


LOADING = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
for name, folder in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids, logits = torch.load(f"{folder}/expected.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
    print(name, type(model).__name__, model.generate(ids, max_new_tokens=2, do_sample=False).shape[1])
"""

#: The same where regla cannot be imported.
ABSENT = """
import json, sys
import transformers
from transformers import AutoModelForCausalLM, AutoConfig
sys.modules["regla"] = None
for name, (folder, plain) in json.loads(sys.argv[1]).items():
    for load in (AutoModelForCausalLM.from_pretrained, getattr(transformers, plain).from_pretrained):
        for trust in ({"trust_remote_code": True}, {"trust_remote_code": False}):
            try:
                model = load(folder, **trust)
            except Exception as error:
                says = "package regla" in str(error) or "trust_remote_code" in str(error)
                print("refused" if says else f"unclear: {name} {error}")
            else:
                print("loaded", name, type(model).__name__)
"""


@pytest.mark.slow
def test_fresh_processes(tmp_path):
    """All families: a program that never imported regla loads and runs them; one that has no regla refuses them."""
    folders, plain = {}, {}
    for name in FIRST:
        torch.manual_seed(0)
        model = original(name)
        made, ids = convert(model, [1], check=False).eval(), torch.randint(97, (2, 9))
        made.save_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.save((ids, made(ids).logits), tmp_path / name / "expected.pt")
        folders[name], plain[name] = str(tmp_path / name), type(model).__name__

    def printed(program, argument):
        environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", program, json.dumps(argument)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert len(printed(LOADING, folders)) == len(FIRST)
    refused = printed(ABSENT, {name: (folder, plain[name]) for name, folder in folders.items()})
    assert refused == ["refused"] * (4 * len(FIRST))


def test_a_newer_format_is_refused(tmp_path):
    student("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version is 99, and this regla reads models up to version"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_layers": [3]}, "linear_layers names layer 3; the model has layers 0 to 2"),
        ({"mixer": {"gate_exis": "key"}}, "gate_exis is no option of a mixer; expected "),
        ({"mixer": {"gate": "none at all"}}, "gate is 'none at all'; expected one of"),
    ],
)
def test_bad_configurations(changes, message):
    config = student("llama").config
    with pytest.raises(ValueError, match=message):
        type(config).from_dict(config.to_dict() | changes)

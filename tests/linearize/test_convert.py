"""Conversion of Llama models: weights in the right places, proven by softmax; what comes out works and saves."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from regla.cli import main
from regla.data.tokenizer import train_tokenizer
from regla.linearize import check_transfer, convert, layer_types
from regla.models import ReGLAConfig
from tests.same import assert_same_model


def llama(**changes) -> LlamaForCausalLM:
    arguments = {
        "vocab_size": 97,
        "hidden_size": 72,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(arguments | changes)))


FAMILY = {
    "grouped heads": {},
    "all heads": {"num_attention_heads": 12, "num_key_value_heads": 12},
    "one key head, own head size": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY)
@pytest.mark.parametrize("keep", ["every-2", "none", [0, 3]])
def test_softmax_through_the_weights_gives_the_originals_logits(keep, changes):
    original = llama(**changes)
    for parameter in original.parameters():  # biases and norms start at constants, which would hide a mix-up
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    converted = convert(original, keep, check=False)
    assert check_transfer(original, converted) <= 1e-4
    assert converted.config.linear_config.layer_types == layer_types(4, keep)


def test_kept_layers_are_untouched():
    """With every layer kept, the converted model is the original."""
    original = llama()
    converted = convert(original, range(4))
    tokens = torch.randint(97, (2, 20))
    assert torch.equal(converted(tokens).logits, original(tokens).logits)


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_the_check_finds_a_wrong_layer(projection):
    original = llama()
    converted = convert(original, "none")
    weight = getattr(converted.model.layers[2].self_attn.mixer, projection).weight
    weight.data = weight.data.roll(8, 0)  # whole heads in another order
    with pytest.raises(ValueError, match=r"misses the original's logits .*layer 2 is the first to differ"):
        check_transfer(original, converted)


def test_rows_instead_of_heads_are_found():
    """Grouped keys repeated row by row, a known slip of conversions, do not pass as heads."""
    original = llama()
    converted = convert(original, "none")
    for name in ("k_proj", "v_proj"):
        weight = getattr(converted.model.layers[0].self_attn.mixer, name).weight
        weight.data = weight.data.view(3, 8, -1).transpose(0, 1).reshape(24, -1)
    with pytest.raises(ValueError, match="layer 0 is the first to differ"):
        check_transfer(original, converted)


def test_the_original_is_left_alone_and_the_copy_is_its_own():
    original = llama(tie_word_embeddings=True)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    converted = convert(original)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in original.state_dict().items())
    assert converted.lm_head.weight is converted.model.embed_tokens.weight


def test_saves_loads_and_generates(tmp_path):
    converted = convert(llama(eos_token_id=None), gate_axis="key").eval()
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.mixer["gate_axis"] == "key" and loaded.config.rope_parameters["rope_theta"] == 1e5
    tokens = torch.randint(97, (2, 7))
    assert_same_model(loaded, converted, tokens)
    assert loaded.generate(tokens, max_new_tokens=5, do_sample=False).shape == (2, 12)


@torch.no_grad()
def test_the_delta_rule_in_converted_layers(tmp_path):
    """What its cache gives is what the whole gives, and it saves and loads."""
    original, delta = llama(), {"update_rule": "delta", "feature_map": "unit_safe_exp", "gate": "refined_low_rank"}
    converted = convert(original, "every-2", **delta).eval()
    tokens = torch.randint(97, (2, 20))
    grown = converted.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(converted(grown, use_cache=False).logits[:, 19:-1].argmax(-1), grown[:, 20:])
    converted.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.mixer == converted.config.mixer and again.config.mixer["update_rule"] == "delta"
    assert_same_model(again, converted, tokens)


def test_from_folder_to_folder(tmp_path):
    """What the command does: folder in, folder out with the tokenizer, loadable by a program that never saw regla."""
    original = llama()
    tokenizer = train_tokenizer(["some words to make a tokenizer of"] * 3, 300)
    original.resize_token_embeddings(len(tokenizer))
    original.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    assert (
        main(
            [
                "linearize",
                str(tmp_path / "in"),
                "--out",
                str(tmp_path / "out"),
                "--keep",
                "none",
                "--valid-tokens",
                "500",
            ]
        )
        == 0
    )
    program = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer, logging\n"
        "logging.set_verbosity_error(); folder = sys.argv[1]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "tokens = AutoTokenizer.from_pretrained(folder)('some words', return_tensors='pt')\n"
        "print(len(model.config.linear_layers), model.generate(**tokens, max_new_tokens=3).shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, length = map(int, done.stdout.split()[-2:])
    assert count == 4 and length == len(tokenizer("some words")["input_ids"]) + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.gguf", "--out", "new"], "There is no file missing.gguf"),
        (["missing-folder", "--out", "new"], "There is no model folder missing-folder, and the hub has no such model"),
        (["missing.gguf", "--out", "."], "is not empty"),
    ],
)
def test_command_line_errors(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["linearize", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_layer_types():
    assert layer_types(4, "every-2") == ["linear_attention", "full_attention"] * 2
    assert layer_types(3, "none") == ["linear_attention"] * 3
    assert layer_types(3, "0") == ["full_attention", "linear_attention", "linear_attention"]
    assert layer_types(3, "2, 0") == layer_types(3, [0, 2]) == ["full_attention", "linear_attention", "full_attention"]
    window = ["sliding_attention", "full_attention"] * 2
    assert layer_types(window, "sliding") == ["sliding_attention", "linear_attention"] * 2
    assert layer_types(window, [0, 1]) == ["sliding_attention", "full_attention"] + ["linear_attention"] * 2
    assert layer_types(3, [0]) == ["full_attention", "linear_attention", "linear_attention"]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("every-1", "keep is 'every-1'; expected 'none', 'every-N' with N of at least 2, 'sliding', 'auto:N'"),
        ("some", "keep is 'some'; expected"),
        ([4], "keep names layer 4; the model has layers 0 to 3"),
    ],
)
def test_bad_keep(keep, message):
    with pytest.raises(ValueError, match=message):
        convert(llama(), keep)


def test_the_gate_decays_the_axis_of_every_other_model():
    assert convert(llama()).config.mixer["gate_axis"] == ReGLAConfig().gate_axis == "key"


def test_bad_models_and_arguments():
    opt = OPTForCausalLM(OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="the model is of type 'opt'; conversion supports 'llama'"):
        convert(opt)
    with pytest.raises(ValueError, match="hidden_size is the original's"):
        convert(llama(), hidden_size=64)
    with pytest.raises(ValueError, match="gate_axis is 'row'; expected one of 'value', 'key', 'both'"):
        convert(llama(), gate_axis="row")
    odd = llama()
    odd.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"parameter extra.weight is in one model and not in the other"):
        convert(odd)


GREEDY_FLAGS = {
    "a temperature": {"temperature": 0.6},
    "temperature 0": {"temperature": 0.0},
    "temperature 0, sampling": {"temperature": 0.0, "do_sample": True},
    "top_k 0": {"top_k": 0},
    "top_p": {"top_p": 0.9, "min_p": 0.1, "typical_p": 0.5},
    "cutoffs": {"epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    "not to sample": {"do_sample": False, "temperature": 0.0, "top_k": 0, "top_p": 0.5},
    "early stopping": {"early_stopping": True},
    "length penalty": {"length_penalty": 0.5},
    "one beam": {"num_beams": 1, "early_stopping": "never", "length_penalty": 2.0},
    "no padding token": {"pad_token_id": -1},
    "several sequences": {"num_return_sequences": 2},
    "scores of no dict": {"output_scores": True, "output_logits": True},
    "a cache that is off": {"use_cache": False, "cache_implementation": "static"},
    "another cache": {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "an argument of generate": {"streamer": "no"},
}


@pytest.mark.parametrize("flags", GREEDY_FLAGS.values(), ids=GREEDY_FLAGS)
def test_flags_of_generation_without_effect_are_dropped(flags, tmp_path):
    """Of the original whatever its flags: converted, saved and loaded, and as greedy as a greedy original."""
    original = llama(eos_token_id=None, pad_token_id=None)
    for name, value in flags.items():
        setattr(original.generation_config, name, value)
    converted = convert(original, range(4)).eval()
    converted.save_pretrained(tmp_path)
    tokens = torch.randint(97, (1, 7))
    plain = llama(eos_token_id=None, pad_token_id=None)
    plain.load_state_dict(original.state_dict())
    expected = plain.eval().generate(tokens, max_new_tokens=5, do_sample=False)
    for model in (converted, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert not model.generation_config.do_sample
        assert torch.equal(model.generate(tokens, max_new_tokens=5), expected)


def test_flags_of_generation_with_effect_are_kept(tmp_path):
    flags = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.1, "num_beams": 2}
    flags |= {"early_stopping": True, "length_penalty": 0.5, "eos_token_id": [3, 4], "pad_token_id": 5}
    original = llama()
    for name, value in flags.items():
        setattr(original.generation_config, name, value)
    convert(original).save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert {name: getattr(saved, name) for name in flags} == flags


def test_a_negative_padding_token_is_none():
    assert convert(llama(pad_token_id=-1)).config.pad_token_id is None


@pytest.mark.parametrize("how", ["loaded", "moved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits(dtype, how, tmp_path):
    """The transfer is proven in float32, and RoPE's frequencies stay so, whatever the original did to its own."""
    original = llama(max_position_embeddings=8192)
    frequencies = original.model.rotary_emb.inv_freq.clone()
    if how == "loaded":
        original.save_pretrained(tmp_path)
        original = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    else:
        original = original.to(dtype)
    before = {name: value.clone() for name, value in original.named_buffers()}
    converted = convert(original)
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    assert torch.equal(converted.model.rotary_emb.inv_freq, frequencies)
    assert all(torch.equal(before[name], value) for name, value in original.named_buffers())
    assert check_transfer(original, converted) <= 1e-4
    weight = converted.model.layers[0].self_attn.mixer.k_proj.weight
    weight.data = weight.data.roll(8, 0)
    with pytest.raises(ValueError, match="layer 0 is the first to differ"):
        check_transfer(original, converted)

"""Conversions with a window branch: the original's softmax over the last tokens and the first few."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from regla.cli import main
from regla.linearize import convert, linearize
from regla.models import SavedState, load_state, save_state, stack_states
from regla.models.cache import cache_bytes, expected_cache_bytes
from regla.models.student import linear_attention
from tests.linearize.models import command
from tests.linearize.originals import FIRST, original


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def student(name, **mixer):
    return convert(original(name), "none", check=False, **mixer).eval()


def share(model, logit):
    for attention in linear_attention(model).values():
        torch.nn.init.constant_(attention.mixer.window.logit, logit)


def close(value, expected):
    assert (value - expected).abs().max() <= 2e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", [*FIRST, "gpt2, 9 heads, scaled by layer", "phi3, partial rotary, one key head"])
@pytest.mark.parametrize("rope", [True, False])
def test_alone_and_as_long_as_the_text_it_is_the_original(name, rope):
    """With its norms of q and k, RoPE and scaling, whatever the recurrence has."""
    teacher, ids = original(name), torch.randint(97, (2, 14))
    model = convert(teacher, "none", check=False, window_branch=14, linear_rope=rope)
    share(model, 1e4)
    close(model(ids).logits, teacher(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_in_pieces_padded_forked_and_from_a_file(name, tmp_path):
    model, ids = student(name, window_branch=5), torch.randint(97, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    close(expected[0, 7:], model(ids[:1, 7:]).logits[0])
    cache = DynamicCache(config=model.config)
    parts = []
    for start, end in ((0, 11), (11, 12), (12, 17), (17, 18), (18, 19)):
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        parts.append(out.logits)
    close(torch.cat(parts, 1)[1], expected[1, :19])
    close(torch.cat(parts, 1)[0, 7:], expected[0, 7:19])
    save_state(tmp_path / "both", model, cache, ids, mask)
    loaded = load_state(tmp_path / "both", model)
    states = []
    for row in (0, 1):
        alone = DynamicCache(config=model.config)
        text = ids[row : row + 1, mask[row].bool()]
        model(text[:, :-1], past_key_values=alone)
        states.append(SavedState(alone, text, torch.ones_like(text)))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    fresh = model.generate(ids, attention_mask=mask, **options)
    for state in (loaded, stack_states(states, model)):
        assert torch.equal(model.generate(**state.arguments(), **options)[:, -6:], fresh[:, -6:])


@torch.no_grad()
def test_the_state_has_the_size_of_its_formula_at_any_length():
    model = student("qwen3", window_branch=5)
    for length in (1, 3, 70):
        cache = DynamicCache(config=model.config)
        model(torch.randint(97, (1, length)), past_key_values=cache)
        assert cache_bytes(cache) == expected_cache_bytes(model.config.linear_config, length, element_bytes=4)
        held = [part for layer in cache.layers for part in layer.read() if part is not None]
        assert cache_bytes(cache) == sum(part.untyped_storage().nbytes() for part in held)


def test_it_has_four_sinks_and_some_dropout_unless_given(tmp_path):
    model = student("llama", window_branch=5)
    assert (model.config.mixer["window_sinks"], model.config.mixer["window_dropout"]) == (4, 0.1)
    other = student("llama", window_branch=5, window_sinks=0, window_dropout=0.0).config.mixer
    assert (other["window_sinks"], other["window_dropout"]) == (0, 0)
    with torch.no_grad():
        share(model, 0.4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(97, (1, 12))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_conversions_without_it_are_as_they_were(tmp_path):
    model = student("llama")
    assert not [name for name in model.state_dict() if "window" in name]
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for name in ("window_branch", "window_sinks", "window_dropout"):
        assert config["mixer"].pop(name) == 0
    file.write_text(json.dumps(config))  # as a folder from before
    ids = torch.randint(97, (1, 12))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    branch = ["--window-branch", "4", "--window-dropout", "0.5"]
    assert main(command(folder, out, "--keep", "none", "--tokens", "2560", "--lr", "3e-3", *branch)) == 0
    summary = json.loads((out / "linearize.json").read_text())
    card = (out / "README.md").read_text()
    assert "--window-branch 4 --window-dropout 0.5" in card
    assert "softmax attention over the last 4 tokens and the first few beside it" in card
    assert set(summary["stages"]) == {"attention transfer", "distillation"}
    model = AutoModelForCausalLM.from_pretrained(out)
    logits = [attention.mixer.window.logit for attention in linear_attention(model).values()]
    assert all(logit.all() for logit in logits)  # they were trained: each has left zero
    assert model.config.mixer["window_sinks"] == 4
    assert main(["inspect", str(out), "--tokens", "64"]) == 0
    table = capsys.readouterr().out
    assert "| window branch |" in table and "| 0.5" in table  # where it started, and it has hardly moved
    assert main(["report", str(out), "--skip-measurements"]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "softmax over the last 4 tokens and the first 4, dropout 0.5" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_branch": 0}, "window_branch is 0, expected a number above 0"),
        ({"window_sinks": 2}, "window_sinks is given without window_branch; say how many tokens it has"),
        ({"window_dropout": 0.5}, "window_dropout is given without window_branch"),
        ({"window_branch": 4, "window_sinks": -1}, "window_sinks is -1, expected 0 or more"),
        ({"window_branch": 4, "window_dropout": 1.5}, "window_dropout is 1.5, expected a share below 1"),
        ({"window_branch": 4, "mixer": "window"}, "mixer window is not trained, but window_branch is given"),
        ({"window_branch": 4, "init": "x", "tokens": 65536}, "Both init and window_branch are given"),
    ],
)
def test_options_that_do_not_fit(options, message, folder):
    with pytest.raises(ValueError, match=message):
        linearize(str(folder / "model"), dry_run=True, **options)

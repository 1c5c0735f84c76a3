"""The baseline without training: softmax attention over the last tokens and the first, of every family."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from regla.cli import main
from regla.linearize.convert import make_student_of, windowed_config
from regla.models.window_attention import window_mask
from tests.linearize.models import command
from tests.linearize.originals import FIRST, original

WINDOW, SINKS = 3, 4


def cut(name, keep="none", window=WINDOW, **changes):
    teacher = original(name, **changes)
    return teacher, make_student_of(teacher, windowed_config(teacher.config, keep, window))


def by_definition(T):
    return torch.tensor([[s <= t and (t - s < WINDOW or s < SINKS) for s in range(T)] for t in range(T)])


def test_mask_by_definition():
    expected = by_definition(11)
    assert torch.equal(window_mask(None, 0, 11, WINDOW, SINKS, torch.device("cpu"))[0, 0], expected)
    causal = torch.ones(11, 11).tril().bool()[None, None]
    assert torch.equal(window_mask(causal, 0, 11, WINDOW, SINKS, torch.device("cpu"))[0, 0], expected)
    assert torch.equal(window_mask(None, 8, 3, WINDOW, SINKS, torch.device("cpu"))[0, 0], expected[8:])
    padded = causal & (torch.arange(11) >= 2)
    found = window_mask(padded, 0, 11, WINDOW, SINKS, torch.device("cpu"))[0, 0]
    assert torch.equal(found[2:, 2:], by_definition(9)) and not found[:, :2].any()


@pytest.mark.parametrize("name", [name for name in FIRST if name != "gemma3_text"])
def test_it_is_the_original_under_that_mask(name):
    """And cached generation, padding on the left and a whole pass agree."""
    teacher, model = cut(name)
    ids = torch.randint(97, (2, 12))
    with torch.no_grad():
        expected = teacher(ids, attention_mask=by_definition(12).expand(2, 1, 12, 12)).logits
        found = model(ids).logits
        assert not torch.allclose(teacher(ids).logits, expected, atol=1e-3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        step, cache = model(ids[:, :7], use_cache=True), None
        cache, logits = step.past_key_values, [step.logits]
        for t in range(7, 12):
            step = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            logits.append(step.logits)
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], expected, rtol=1e-4, atol=1e-4)


def test_eager_and_sdpa_agree():
    _, model = cut("llama")
    ids = torch.randint(97, (1, 12))
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_are_kept_and_those_with_a_window_of_their_own_stay():
    _, model = cut("gemma3_text")
    assert model.config.windowed["layers"] == [1]  # the others have a window of 16
    _, model = cut("llama", keep="0,2")
    assert model.config.windowed["layers"] == [1]


def test_the_command_writes_a_folder_that_loads_as_it_is(folder, tmp_path):
    out = tmp_path / "out"
    words = command(folder, out, "--mixer", "window", "--keep", "none", "--window", "4")
    del words[words.index("--calibration-tokens") : words.index("--calibration-tokens") + 2]
    assert main(words) == 0
    summary = json.loads((out / "linearize.json").read_text())
    assert summary["divergence"]["converted"]["mean"] > 0
    assert summary["scores"]["converted"][0]["loss"] > summary["scores"]["original"][0]["loss"]
    assert "last 4 tokens and the first 4 alone" in (out / "README.md").read_text()
    ids = torch.randint(97, (1, 30))
    expected = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    whole = AutoModelForCausalLM.from_pretrained(folder / "model")(ids).logits
    assert not torch.allclose(expected, whole, atol=1e-3)
    torch.save(ids, tmp_path / "ids.pt")
    script = (
        "import sys, torch, regla.models; from transformers import AutoModelForCausalLM as A;"
        "torch.save(A.from_pretrained(sys.argv[1])(torch.load(sys.argv[2])).logits, sys.argv[3])"
    )
    moved = tmp_path / "moved"
    shutil.move(out, moved)
    arguments = [str(moved), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)

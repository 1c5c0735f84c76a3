"""The pretrained model that ships with the package."""

import inspect
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from regla.data.embedded import embedded_text
from regla.data.sources import HELD_OUT, encode_source
from regla.data.tokenizer import load_tokenizer
from regla.eval.perplexity import score
from regla.models.folders import load_model
from regla.quickstart import quickstart
from regla.quickstart.pretrained import PRETRAINED, linearize_pretrained

ROOT = Path(__file__).parents[1]
_LARGEST = 6_000_000  # bytes


def test_it_loads_with_transformers_alone() -> None:
    script = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(PRETRAINED)!r})
tokenizer = AutoTokenizer.from_pretrained({str(PRETRAINED)!r})
ids = tokenizer("It was the best of times", return_tensors="pt").input_ids
text = model.generate(ids, max_new_tokens=4, do_sample=False)
assert not any(name.split(".")[0] == "regla" for name in sys.modules)
print(type(model).__name__, tokenizer.decode(text[0]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("GPTNeoXForCausalLM It was the best of times")


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in PRETRAINED.iterdir()) <= _LARGEST


def test_its_figures_are_those_of_its_card() -> None:
    """On the last tenth of the embedded text, which depends a little on the version of Python."""
    model, tokenizer = load_model(PRETRAINED, torch.device("cpu")), load_tokenizer(PRETRAINED)
    figures = json.loads((PRETRAINED / "training.json").read_text(encoding="utf-8"))
    stated = figures["validation"][-1]["perplexity"]
    assert f"{stated:.2f}" in (PRETRAINED / "README.md").read_text(encoding="utf-8")
    unseen = encode_source(embedded_text().hold_out(HELD_OUT)[1], tokenizer)
    found = score(model, unseen, first=tokenizer.bos_token_id, seq_len=512, batch_size=8, dtype="float32")
    assert found.perplexity == pytest.approx(stated, rel=0.1)


def test_a_wheel_holds_it(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    script = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / run.stdout.split()[-1]) as wheel:
        held = {name.rpartition("/")[2] for name in wheel.namelist() if "/tiny-neox/" in name}
    assert held == {file.name for file in PRETRAINED.iterdir()}


@pytest.mark.slow
def test_all_of_its_layers_become_linear_and_its_perplexity_comes_back(tmp_path: Path) -> None:
    """With the steps that `regla quickstart` takes."""
    summary = linearize_pretrained(tmp_path / "linear", steps=inspect.signature(quickstart).parameters["steps"].default)
    original, converted, trained = (
        summary["scores"][state][0]["perplexity"] for state in ("original", "converted", "trained")
    )
    assert summary["linear_layers"] == list(range(6)) and summary["transfer_error"] < 1e-4
    assert converted > 1.2 * original and trained <= 1.10 * original

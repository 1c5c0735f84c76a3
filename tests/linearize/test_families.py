"""Each supported architecture: its weights in the right places, and what of it is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from regla.linearize import FAMILIES, check_transfer, convert
from regla.linearize.load import load_config
from tests.linearize.models import llama, mistral, qwen2, stir

ORIGINALS = {
    "llama": lambda: llama(),
    "mistral": lambda: mistral(),
    "mistral, window as long as any text": lambda: mistral(sliding_window=256),
    "mistral, own head size": lambda: mistral(head_dim=24),
    "qwen2": lambda: qwen2(),
    "qwen2, tied": lambda: qwen2(tie_word_embeddings=True),
}


def test_every_family_is_tested():
    assert {name.partition(",")[0] for name in ORIGINALS} == set(FAMILIES)


@pytest.mark.parametrize("make", ORIGINALS.values(), ids=ORIGINALS)
def test_transfer(make, tmp_path):
    original = stir(make())
    tokens = torch.randint(97, (2, 30))
    assert check_transfer(original, convert(original, "none", check=False)) <= 1e-4
    kept = convert(original, range(4))
    expected = original(tokens).logits
    assert (kept(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    convert(original).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits.isfinite().all()


def test_biases_of_qwen2_lie_where_they_were():
    converted = convert(qwen2())
    for layer in converted.model.layers:  # ReGLA and softmax in turn
        biased = {name for name in "qkvo" if getattr(layer.self_attn, f"{name}_proj").bias is not None}
        assert biased == {"q", "k", "v"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: mistral(sliding_window=64),
        lambda: qwen2(use_sliding_window=True, sliding_window=64, max_window_layers=2),
    ],
)
def test_windows_are_refused(make, tmp_path):
    original = make()
    message = "sliding_window is 64, shorter than max_position_embeddings = 256"
    with pytest.raises(ValueError, match=message):
        convert(original)
    original.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):  # before any weights are looked for
        load_config(str(tmp_path))

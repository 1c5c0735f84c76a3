"""The plug-in in vLLM itself, which has to be installed: its answers are those of `generate`."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regla.layers.defaults import ADDITIVE, DELTA
from regla.linearize.convert import convert
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.configuration import mixer_arguments
from tests.linearize.originals import FIRST, original

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's attention on CPUs takes no smaller heads
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": None,
}
L, F, W = "linear_attention", "full_attention", "sliding_attention"
MODELS = {
    "pure": [L, L],
    "hybrid": [L, F, L, F],
    "windows, tied": [W, L, F],
    "delta": [L, L],
}
OPTIONS = {
    "hybrid": {"linear_conv_kernel_dim": 4, "linear_rope": True},
    "windows, tied": {"sliding_window": 8, "linear_rope": True, "tie_word_embeddings": True},
    "delta": mixer_arguments(DELTA) | {"gate_low_rank_dim": 4},
}
SERVING = {
    "plain": {},
    "in parts, with prefix caching": {"max_num_batched_tokens": 32, "enable_prefix_caching": True},
}


def answers(model, folder, tmp_path, **options):
    """Asserts that vLLM's greedy answers to prompts of many lengths are those of `generate`."""
    model.save_pretrained(folder)
    prompts = [torch.randint(3, 97, (length,)).tolist() for length in (1, 5, 60, 17, 90, 2, 33)]
    (tmp_path / "prompts").write_text(json.dumps(prompts))
    out, log = tmp_path / "answers", tmp_path / "log"
    command = [sys.executable, Path(__file__).with_name("engine.py"), folder, tmp_path / "prompts", out]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log.open("w") as file:
        code = subprocess.run(
            [*map(str, command), json.dumps(options)], stdout=file, stderr=file, env=environment, timeout=300
        ).returncode
    assert code == 0, log.read_text()[-4000:]
    for found in json.loads(out.read_text()):
        for prompt, ids in zip(prompts, found, strict=True):
            whole = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
            assert ids == whole[len(prompt) :].tolist()


def test_vllm_finds_the_plug_in():
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert "regla.serving:register_vllm" in [point.value for point in found]


@pytest.mark.parametrize("serving", SERVING.values(), ids=SERVING)
@pytest.mark.parametrize("name", MODELS)
def test_vllm_answers_as_generate_does(name, serving, tmp_path):
    options = mixer_arguments(ADDITIVE) | SHAPE | OPTIONS.get(name, {})
    layers = {"layer_types": MODELS[name], "num_hidden_layers": len(MODELS[name])}
    model = ReGLAForCausalLM(ReGLAConfig(intermediate_size=128, **options, **layers)).eval()
    answers(model, tmp_path / "model", tmp_path, **serving)


@pytest.mark.parametrize("family", FIRST)
def test_vllm_answers_as_a_converted_model_does(family, tmp_path):
    shape = dict(SHAPE)
    if family in ("gpt_neox", "gpt2"):  # no shared key heads
        del shape["num_key_value_heads"], shape["head_dim"]
    answers(convert(original(family, **shape), keep=[1]).eval(), tmp_path / "model", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enforce_eager": False}, "add --enforce-eager"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "cannot take tokens back"),
    ],
)
def test_what_the_plug_in_cannot_do_is_refused(options, message, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    ReGLAForCausalLM(ReGLAConfig(intermediate_size=128, num_hidden_layers=2, **SHAPE)).save_pretrained(tmp_path)
    arguments = {"enforce_eager": True, "skip_tokenizer_init": True, "dtype": "float32"} | options
    with pytest.raises(ValueError, match=message):
        EngineArgs(str(tmp_path), **arguments).create_engine_config()

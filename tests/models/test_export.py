"""Exporters: one dynamic length, AOTInductor, generation over a padded prompt, and a sentence for those that cannot."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, StaticCache

from regla.layers.defaults import ADDITIVE, DELTA
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.cache import adopt_cache
from regla.models.configuration import mixer_arguments

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "eos_token_id": None}
HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


def small(**arguments):
    torch.manual_seed(0)
    return ReGLAForCausalLM(ReGLAConfig(**SMALL, **{"num_hidden_layers": 1, **arguments})).eval()


def exported(model):
    """A program of any length from 2 to 128, traced at one of 8 tokens."""
    length = torch.export.Dim("length", min=2, max=128)
    ids = torch.zeros(1, 8, dtype=torch.long)
    shapes = {"input_ids": {1: length}, "use_cache": None}
    return torch.export.export(model, (ids,), {"use_cache": False}, dynamic_shapes=shapes)


def assert_equal_at_every_length(run, model):
    for length in (2, 7, 64, 65, 128):
        ids = torch.randint(64, (1, length))
        torch.testing.assert_close(run(ids), model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-6)


LOAD = """
import sys, torch, regla.ops
ids, expected = torch.load(sys.argv[2])
logits = torch.export.load(sys.argv[1]).module()(ids)
torch.testing.assert_close(logits, expected)
"""


@pytest.mark.parametrize("mixer", [ADDITIVE, DELTA], ids=["additive", "delta"])
def test_one_dynamic_length(mixer):
    model = small(**mixer_arguments(mixer))
    program = exported(model)
    run = program.module()
    assert_equal_at_every_length(lambda ids: run(ids, use_cache=False).logits, model)


def test_a_window_branch_is_exported_for_one_length():
    model, ids = small(window_branch=4, window_sinks=2), torch.randint(64, (1, 70))
    program = torch.export.export(model, (ids,), {"use_cache": False}).module()
    torch.testing.assert_close(program(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    with pytest.raises(ValueError, match="export it for one length: leave the tokens out of dynamic_shapes"):
        exported(model)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def of_logits(model):
    """A program from tokens to logits, of any length from 2 to 128."""
    length = torch.export.Dim("length", min=2, max=128)
    return torch.export.export(Logits(model), (torch.zeros(1, 70, dtype=torch.long),), dynamic_shapes=({1: length},))


@pytest.mark.slow
def test_a_saved_program_loads_where_the_operations_are_known(tmp_path):
    model, ids = small(**HYBRID), torch.randint(64, (1, 70))
    torch.export.save(of_logits(model), tmp_path / "program.pt2")
    torch.save((ids, model(ids).logits.detach()), tmp_path / "case.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "program.pt2", tmp_path / "case.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="torch 2.11 beside a GPU crashed when it loaded this package, though for the CPU"
)
def test_aot_inductor(tmp_path):
    model = small(**HYBRID)
    package = torch._inductor.aoti_compile_and_package(of_logits(model), package_path=str(tmp_path / "compiled.pt2"))
    assert_equal_at_every_length(torch._inductor.aoti_load_package(package), model)


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="transformers runs what it exported from 5.23 on"
)
@pytest.mark.parametrize("second", ["linear_attention", "full_attention"])
def test_generation_over_a_padded_prompt(second):
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter
    from transformers.exporters.utils import decompose_for_generation

    model = small(num_hidden_layers=2, layer_types=["linear_attention", second], pad_token_id=0)
    ids = torch.randint(3, 64, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, 0] = 0
    options = {
        "generation_config": GenerationConfig(cache_implementation="static", pad_token_id=0),
        "multi_token_decode": True,
    }
    program = DynamoExporter().export_for_generation(model, inputs, DynamoConfig(dynamic=True), **options)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, 7:]
    found = []
    for name, (component, kwargs) in decompose_for_generation(model, inputs, **options).items():
        taken = {name: value for name, value in kwargs.items() if name not in ("use_cache", "return_dict")}
        actual = program.runners[name](**copy.deepcopy(taken)).logits
        torch.testing.assert_close(actual, component(**copy.deepcopy(kwargs)).logits, rtol=1e-5, atol=1e-6)
        found.append(actual[:, -2 if kwargs["input_ids"].shape[1] == 2 else -1 :].argmax(-1))
    assert torch.equal(torch.cat(found, 1), tokens)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["pure", "pure, delta", "hybrid"])
def test_a_padded_prompt_token_by_token_through_the_masks_of_generate(build, variant, assert_same):
    """These masks hold which tokens are real, at T = 1, too, in the four dimensions that exporters put together."""
    model = build(variant)
    ids = torch.randint(3, 97, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    expected = model(ids, attention_mask=mask).logits
    cache = StaticCache(config=model.config, max_cache_len=8)
    adopt_cache(cache, model.config)
    for t in range(6):
        masks = model.create_masks_for_generate(
            config=model.config,
            inputs_embeds=model.get_input_embeddings()(ids[:, t : t + 1]),
            attention_mask=mask[:, : t + 1],
            past_key_values=cache,
        )
        assert masks["linear_attention"].shape == (2, 1, 1, 1)
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, t : t + 1]
        logits = model(ids[:, t : t + 1], attention_mask=masks, position_ids=places, past_key_values=cache).logits
        real = mask[:, t].bool()
        assert_same(logits[real], expected[real, t : t + 1])


def test_exporters_that_cannot_are_refused_in_a_sentence(monkeypatch):
    model = small(return_dict=False)
    with pytest.raises(ValueError, match=r"torch\.jit\.trace cannot record .*; use torch\.export\.export"):
        torch.jit.trace(model, (torch.zeros(1, 8, dtype=torch.long),))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(ValueError, match=r"ONNX has no form of the operations .*; use torch\.export\.export"):
        model(torch.zeros(1, 8, dtype=torch.long))

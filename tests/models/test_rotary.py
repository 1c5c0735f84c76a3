"""Frequencies of RoPE are float32 in every way to a model of another dtype."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from regla.models import ReGLAForCausalLM


def from_folder(model, dtype, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def made_on_meta(model, dtype, folder):
    with torch.device("meta"):
        other = ReGLAForCausalLM(model.config)
    other = other.to(dtype)
    assert other.model.rotary_emb.inv_freq.is_meta
    return model.to(dtype)


PATHS = {
    "to": lambda model, dtype, _: model.to(dtype),
    "named method": lambda model, dtype, _: model.bfloat16() if dtype == torch.bfloat16 else model.half(),
    "device and dtype": lambda model, dtype, _: model.to("cpu", dtype),
    "and back": lambda model, dtype, _: model.to(dtype).float().to(dtype),
    "from_pretrained": from_folder,
    "from config": lambda model, dtype, _: AutoModelForCausalLM.from_config(model.config, dtype=dtype),
    "on meta": made_on_meta,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}])
def test_frequencies_stay_float32(build, path, dtype, rope, tmp_path):
    model = build("hybrid, rope", rope_parameters={"rope_theta": 1e4, **rope})
    expected = model.model.rotary_emb.inv_freq.clone()
    low = PATHS[path](model, dtype, tmp_path)
    assert low.dtype == dtype
    for name in ("inv_freq", "original_inv_freq"):
        assert torch.equal(getattr(low.model.rotary_emb, name), expected), name
    cos, sin = low.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.tensor([[8000]]))
    angle = 8000 * torch.cat([expected, expected])
    assert torch.equal(cos[0, 0].float(), angle.cos()) and torch.equal(sin[0, 0].float(), angle.sin())

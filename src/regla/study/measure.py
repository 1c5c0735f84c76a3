"""What a study measures of a trained model, besides its loss: its gates, and the cost of generation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from regla.bench.generation import generation
from regla.data.selection import read_sources
from regla.data.sources import encode_source
from regla.data.tokenizer import load_tokenizer
from regla.eval.inspection import look_inside
from regla.models.modeling import ReGLAForCausalLM
from regla.runtime.device import pick_device
from regla.train.config import TrainConfig


def measure(config: TrainConfig, row: dict[str, Any]) -> dict[str, Any]:
    """By what the row of a run asks for:

    inspect: N       "gates": {"start": layers, "end": layers}, what `regla.eval.inspection` says of the gates of the
                     model before and after its training on the first N tokens of the validation text
    generate: [N]    "generation": rows of `regla.bench.generation.generation`
    """
    found: dict[str, Any] = {}
    if not {"inspect", "generate"} & row.keys():
        return found
    model = ReGLAForCausalLM.from_pretrained(config.out)
    device = pick_device(config.device)
    if "inspect" in row:
        tokenizer = load_tokenizer(config.out)
        texts = [encode_source(source, tokenizer).ids for source in read_sources(config.valid)]
        ids_N = np.concatenate(texts)[: row["inspect"]]
        ids_1N = torch.from_numpy(ids_N.astype(np.int64))[None]
        torch.manual_seed(config.seed)
        models = {"start": ReGLAForCausalLM(model.config), "end": model}
        found["gates"] = {when: _gates(one.to(device), ids_1N, config.dtype) for when, one in models.items()}
    if "generate" in row:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        found["generation"] = generation(model.to(device, dtype), row["generate"])
    return found


def _gates(model: ReGLAForCausalLM, ids_1N: torch.Tensor, dtype: str) -> list[dict[str, Any]]:
    kept = ("layer", "histogram", "saturated_low", "saturated_high", "slopes")
    return [{name: asdict(layer)[name] for name in kept} for layer in look_inside(model, ids_1N, dtype=dtype)]

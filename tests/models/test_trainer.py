"""Hugging Face's own training: the Trainer in two processes, and `accelerate launch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from regla.models import ReGLAConfig, ReGLAForCausalLM

from ..ranks import in_processes

LAYERS = {"linear": ["linear_attention"] * 2, "hybrid": ["linear_attention", "full_attention"]}


def fit(out: Path, layer_types: list[str], batch_size: int, **options) -> None:
    """Five steps over the same four texts, whose lengths differ."""
    config = ReGLAConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        layer_types=layer_types,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ReGLAForCausalLM(config)
    ids = torch.randint(64, (4, 20))
    labels = ids.masked_fill(torch.arange(20) >= torch.tensor([[20], [12], [7], [3]]), -100)
    data = [{"input_ids": one, "labels": label} for one, label in zip(ids, labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=batch_size, max_steps=5, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
        **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    assert trainer.args.world_size * batch_size == 4
    trainer.train()
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        (out / "log.json").write_text(json.dumps([record["loss"] for record in trainer.state.log_history[:-1]]))


@pytest.mark.parametrize("layers", LAYERS)
def test_trainer_in_two_processes(layers: str, tmp_path: Path) -> None:
    """Steps as in one process with batches twice as large, also where processes have different numbers of tokens."""
    fit(tmp_path / "one", LAYERS[layers], 4)
    ended = in_processes(2, lambda: fit(tmp_path / "two", LAYERS[layers], 2), tmp_path / "written")
    assert [one.code for one in ended] == [0, 0], ended
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-4, rtol=1e-4)
    ours, theirs = (json.loads((tmp_path / name / "log.json").read_text()) for name in ("two", "one"))
    assert ours == pytest.approx(theirs, abs=1e-4) and theirs[-1] < theirs[0]


@pytest.mark.slow
def test_accelerate_launches_regla_train(tmp_path: Path) -> None:
    launch = [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
    ]
    train = ["regla", "train", "--out", str(tmp_path / "run"), "--vocab-size", "280", "--hidden-size", "16"]
    train += ["--layers", "1", "--heads", "2", "--seq-len", "16", "--batch-size", "2", "--steps", "3"]
    ended = subprocess.run(
        [sys.executable, "-m", *launch, "no", "-m", *train, "--device", "cpu"], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "2 processes (ddp)" in ended.stdout
    assert json.loads((tmp_path / "run" / "training.json").read_text())["complete"]

"""`regla bench distributed`: several processes beside one, on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from regla.bench import distributed
from regla.cli import main
from regla.models import ReGLAConfig
from regla.runtime.distributed import ALONE

from ..ranks import in_processes


def bench(folder: Path, *only: str, seconds: float = 100) -> list[dict]:
    out = folder / "rows.jsonl"
    line = ["bench", "distributed", "--quick", "--device", "cpu", "--out", str(out), "--only", *only]
    ended = in_processes(2, lambda: main(line), folder / "written", seconds=seconds)
    assert [one.code for one in ended] == [0, 0], ended
    assert ended[1].out == "" and ended[0].out.count("\n") == len(out.read_text().splitlines())
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rows(tmp_path: Path) -> None:
    """Each case once; the figures that a CPU has."""
    ddp, fsdp, length = bench(tmp_path, "losses/ddp", "throughput/fsdp", "length/*")
    assert ddp["subject"] == "ddp" and 0 <= ddp["largest_difference"] < 1e-5
    assert ddp["setting"]["steps"] == 10 and ddp["last_loss"] < ddp["first_loss"]
    assert ddp["state_bytes"] == pytest.approx(ddp["formula_state_bytes"], rel=0.01) and ddp["wire_bytes_of_a_step"] > 0
    assert fsdp["tokens_per_second"] == pytest.approx(fsdp["times_one"] * fsdp["tokens_per_second_of_one"])
    assert length["step_seconds_of_one"] == pytest.approx(length["times_one"] * length["step_seconds"])
    assert length["sent_bytes_of_a_layer"] == length["formula_bytes_of_a_layer"]
    assert length["largest_difference"] < 1e-5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_models_of_full_size(device: str) -> None:
    bench = distributed.Bench(ALONE, torch.device(device), "bfloat16", True, False)
    for measure in ("losses", "throughput"):
        model, config = distributed._of(measure, bench, processes=2)
        assert model.num_hidden_layers == len(model.layer_types) and config.seq_len <= model.max_position_embeddings
    assert distributed.long_model(bench, 4096).num_hidden_layers > 1


def test_bytes_of_the_formula() -> None:
    """B3 H2 K4 V4: S has 96 numbers and m 6; a convolution of 4 tokens keeps 3 of them, in 32 channels."""
    config = ReGLAConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        linear_conv_kernel_dim=4,
    )  # fmt: skip
    channels = 4 * 4 + 2 * 4 + 2 * 4
    halo = 3 * 3 * channels
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        found = distributed.sent_bytes(config, batch_size=3, dtype=dtype)
        assert found == 2 * (96 * 4 + halo * size) + 6 * 4


@pytest.mark.slow
def test_a_killed_run(tmp_path: Path) -> None:
    """Under torchrun itself."""
    (row,) = bench(tmp_path, "kill/*", seconds=300)
    assert row["exit_code"] == 1 and row["seconds_to_end"] < 60
    assert any("has lost another process, which ended. --resume goes on from" in line for line in row["says"])
    assert row["records"] == row["setting"]["steps"] and row["largest_difference"] < 1e-5


def test_one_process_is_none_to_compare(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "distributed", "--device", "cpu", "--quick"]) == 2
    assert "start it with `torchrun --nproc-per-node 2 -m regla bench distributed`." in capsys.readouterr().err


def test_where_one_process_has_not_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The long sequence is tried again with activation checkpointing, in one process and in all."""
    tried = []

    def run(self, kind, model, config, *, wait=False):
        tried.append((kind, config.activation_checkpointing))
        return distributed.Ran([1.0], [1.0], 1.0, 0, None, 0, None) if config.activation_checkpointing else None

    monkeypatch.setattr(distributed.Bench, "run", run)
    bench = distributed.Bench(ALONE, torch.device("cpu"), "float32", False, True)
    monkeypatch.setattr(distributed, "_exchanges", lambda *_: 1)
    remark, row = distributed._length(bench)
    assert tried == [(None, False), (None, True), ("sequence", True)]
    assert "out of memory" in remark and row["setting"]["activation_checkpointing"]

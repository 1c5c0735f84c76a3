"""What is computed on the CPU is so whatever the default device is (`torch.set_default_device`)."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regla.bench.evaluation import _pairs
from regla.bench.generation import generation
from regla.data.sources import Encoded
from regla.eval.context import effective_context
from regla.eval.inspection import layer_figures
from regla.eval.perplexity import score, score_stream
from regla.eval.probes.score import answer_text, answer_tokens, share
from regla.eval.probes.tokens import mqar
from regla.linearize import convert
from regla.linearize.choice import rank_layers
from regla.linearize.transfer import check_transfer
from regla.page.measure import compare
from regla.quickstart.decoding import decoding_costs
from regla.runtime.checkpoint import Checkpoints
from regla.runtime.progress import Progress

from .linearize.models import llama

TEXT = Encoded("text", np.random.default_rng(0).integers(97, size=520, dtype=np.int32), bytes=None)
IDS_BT = torch.from_numpy(TEXT.ids.astype(np.int64)).view(4, 130)
OPTIONS: dict[str, Any] = {"batch_size": 2, "dtype": "float32"}


def recalled(model: Any) -> Any:
    asked = mqar(np.random.default_rng(0), rows=3, length=40, vocab_size=97, cells=[(4, 8)])
    answers = answer_tokens(model, asked, **OPTIONS)
    return share(answers.nats_N, answers.row_N)


def said(model: Any) -> Any:
    answers = answer_text(model, IDS_BT[:2, :9], [[[1, 2], [3]], [[4], [5, 6]]], dtype="float32")
    return share(answers.nats_N, answers.row_N + answers.distance_N)


CASES: dict[str, Callable[[Any, Any], Any]] = {
    "windows": lambda model, _: score(model, TEXT, first=0, seq_len=100, by_position=True, **OPTIONS),
    "stream": lambda model, _: score_stream(model, TEXT, first=0, chunk=64, dtype="float32", by_position=True),
    "context": lambda model, _: effective_context(model, [TEXT], first=0, seq_len=130, samples=9, **OPTIONS),
    "inspection": lambda model, _: layer_figures(model, IDS_BT[:1]),
    "recall": lambda model, _: recalled(model),
    "answers": lambda model, _: said(model),
    "page": lambda model, teacher: compare(teacher, model, IDS_BT),
    "transfer": lambda model, teacher: check_transfer(teacher, model),
    "choice": lambda model, teacher: [asdict(x) for x in rank_layers(teacher, model, IDS_BT, seed=0, **OPTIONS)],
    "decoding": lambda model, _: [x.cache_bytes for x in decoding_costs(model, [8, 16], repeats=1)],
    "bench eval": lambda model, _: _pairs(97, 2, 5),
    "bench generation": lambda model, _: [row["cache_bytes"] for row in generation(model, [2, 4])],
}


@pytest.fixture(scope="module")
def teacher() -> Any:
    torch.manual_seed(0)
    return llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(teacher: Any) -> Any:
    return convert(teacher, [1])


@pytest.mark.parametrize("case", CASES)
def test_figures(case: str, model: Any, teacher: Any) -> None:
    expected = CASES[case](model, teacher)
    with torch.device("meta"):
        assert CASES[case](model, teacher) == expected


def test_a_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    progress = Progress()
    progress.steps = 1
    Checkpoints(tmp_path, {}).save(model, optimizer, progress)
    with torch.device("meta"):
        Checkpoints(tmp_path, {}, resume="latest").restore(model, optimizer, progress)
    assert [state["step"].item() for state in optimizer.state.values()] == [1, 1]

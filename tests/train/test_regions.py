"""Compiled training: the numbers of eager training, and one compilation for all layers that are alike.

The compiler's tracing and its autograd run, its code generation does not (test_loop has a slow test with it).
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from regla.linearize.convert import convert
from regla.linearize.losses import distillation_loss
from regla.runtime.progress import Progress
from regla.train.loop import optimise
from regla.train.regions import compiled_blocks
from tests.linearize.models import llama
from tests.train.test_loop import TOKENS_N, run, tiny_model

AROUND = 3  # graphs beside the blocks': what goes into the model, the final norm, the loss of the logits


@pytest.fixture(autouse=True)
def only_traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"mixer": "regla", "layers": 3, "accumulate": 2}, 1),
        ({"mixer": "softmax", "layers": 3}, 1),
        ({"mixer": "hybrid", "layers": 4, "activation_checkpointing": True}, 2),
    ],
)
def test_equal_blocks_are_compiled_once(options: dict, kinds: int) -> None:
    _, eager = run(steps=2, **options)
    assert counters["stats"]["unique_graphs"] == 0
    _, compiled = run(steps=2, compile=True, **options)
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == kinds + AROUND


def test_distillation_compiles_the_original_too() -> None:
    original = llama()
    losses = {}
    for compile in (False, True):
        _, config = tiny_model(steps=2, compile=compile)
        torch.manual_seed(0)
        model, progress = convert(original, "every-2", check=False), Progress()
        with compiled_blocks(original) if compile else nullcontext():
            loss = distillation_loss(original)
            optimise(model, TOKENS_N, config, progress=progress, stop=lambda: False, loss=loss)
        losses[compile] = progress.losses
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    blocks, norms, around = 1 + 2, 2, 1  # around: before the original; the divergence makes its gradients eagerly
    assert counters["stats"]["unique_graphs"] == blocks + norms + around


def test_validation_on_the_way_compiles_nothing() -> None:
    """Its shapes are others."""
    model, config = tiny_model(steps=2, layers=1, mixer="softmax", compile=True, eval_every=1)
    ids_BT, seen = torch.randint(16, (3, 11)), []

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            seen.append(model(ids_BT, use_cache=False).logits)
        return 0.0

    optimise(model, TOKENS_N, config, progress=Progress(), stop=lambda: False, evaluate=validate)
    assert len(seen) == 2 and counters["stats"]["unique_graphs"] == 1 + AROUND
    with torch.no_grad():
        assert torch.equal(model(ids_BT, use_cache=False).logits, seen[-1])


def test_the_model_is_left_as_it_was() -> None:
    model, _ = tiny_model(layers=1)
    with pytest.raises(KeyError), compiled_blocks(model):
        assert "forward" in model.model.layers[0].__dict__
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())

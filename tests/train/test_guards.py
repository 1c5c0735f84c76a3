"""Steps that are not finite are skipped, counted and named; losses that jump are noted."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from regla.models import ReGLAForCausalLM
from regla.runtime.distributed import ALONE
from regla.runtime.log import TrainingLog, read_log
from regla.runtime.progress import WINDOW, Progress
from regla.train import run
from regla.train.config import TrainConfig
from regla.train.guards import Guards, figures, first_not_finite
from regla.train.loop import crops, next_token_loss, optimise
from tests.train.test_loop import TOKENS_N, tiny_model

SPOILT = 3
DELTA_OF_THE_TEST = {"update_rule": "delta", "feature_map": "unit_safe_exp", "gate": "refined_low_rank"}
Spoil = Callable[[ReGLAForCausalLM, Tensor], Tensor]


def gradient_of(layer: int) -> Spoil:
    """A loss whose gradient of one parameter in `layer` is not a number."""

    def loss(model: ReGLAForCausalLM, crop_BL: Tensor) -> Tensor:
        weight = model.model.layers[layer].mlp.up_proj.weight
        return next_token_loss(model, crop_BL) + 0 * torch.sqrt(0 * weight.square().sum())  # slope 0 * inf

    return loss


def backward_through(layer: int) -> Spoil:
    """One whose backward pass breaks at the output of `layer`, and so for every layer before."""

    def loss(model: ReGLAForCausalLM, crop_BL: Tensor) -> Tensor:
        handle = model.model.layers[layer].register_forward_hook(lambda block, args, x: x + 0 * torch.sqrt(0 * x))
        try:
            return next_token_loss(model, crop_BL)
        finally:
            handle.remove()

    return loss


def forward_through(layer: int) -> Spoil:
    """One whose forward pass breaks in front of the MLP of `layer`, whose gate_proj is the first to show it."""

    def loss(model: ReGLAForCausalLM, crop_BL: Tensor) -> Tensor:
        handle = model.model.layers[layer].mlp.register_forward_pre_hook(lambda mlp, args: args[0] * math.inf)
        try:
            return next_token_loss(model, crop_BL)
        finally:
            handle.remove()

    return loss


def skipping_run(spoil: Spoil, *, steps: int = 6, **options: Any) -> tuple[ReGLAForCausalLM, Progress, list[dict]]:
    """A run in whose step SPOILT the loss is `spoil`, as its crops are."""
    model, config = tiny_model(steps=steps, layers=3, **({"max_skipped_steps": 1} | options))
    of_step = [
        crops(TOKENS_N, seed=0, batch=(SPOILT - 1) * config.accumulate + micro, batch_size=4, length=17)
        for micro in range(config.accumulate)
    ]

    def loss(model: nn.Module, crop_BL: Tensor) -> Tensor:
        spoilt = any(torch.equal(crop_BL, one) for one in of_step[-1:])
        return (spoil if spoilt else next_token_loss)(model, crop_BL)

    progress, records = Progress(), []
    optimise(model, TOKENS_N, config, progress=progress, stop=lambda: False, loss=loss, log=records.append)
    return model, progress, records


def expected_without_the_step(**options: Any) -> dict[str, Tensor]:
    """Weights of a run whose optimiser is not called in step SPOILT."""
    model, config = tiny_model(steps=6, layers=3, **options)
    progress, step = Progress(), torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: None if progress.steps == SPOILT - 1 else step(self))
        optimise(model, TOKENS_N, config, progress=progress, stop=lambda: False)
    return model.state_dict()


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"dtype": "bfloat16"}, {"mixer": "hybrid"}])
@pytest.mark.parametrize("kind", [gradient_of, forward_through])
def test_a_step_that_is_not_finite_is_passed_over(kind: Callable[[int], Spoil], options: dict[str, Any]) -> None:
    """Weights end as if the optimiser had not been called: neither it nor the schedule notices."""
    model, progress, records = skipping_run(kind(1), **options)
    for name, weight in expected_without_the_step(**options).items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert progress.skipped == 1 and progress.skipped_lately == [SPOILT] and len(progress.losses) == 5
    assert [record["step"] for record in records if "skipped" in record] == [SPOILT]
    (found,) = records[SPOILT - 1]["skipped"]
    assert found["step"] == SPOILT and records[SPOILT - 1]["loss"] is None
    assert records[SPOILT - 1]["gradient_norm"] is None
    assert all(record["loss"] > 0 and record["gradient_norm"] > 0 for record in records if "skipped" not in record)
    json.dumps(records, allow_nan=False)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_layer_is_named(layer: int) -> None:
    up = f"model.layers.{layer}.mlp.up_proj.weight"
    (found,) = skipping_run(gradient_of(layer))[2][SPOILT - 1]["skipped"]
    assert (found["first"], found["last"], found["parameters"]) == (up, up, 1) and found["loss"] > 0

    (found,) = skipping_run(backward_through(layer))[2][SPOILT - 1]["skipped"]
    assert found["first"] == "model.embed_tokens.weight"  # the gradients before it are spoilt by it
    assert found["last"].startswith(f"model.layers.{layer}.") and found["loss"] > 0

    (found,) = skipping_run(forward_through(layer))[2][SPOILT - 1]["skipped"]
    assert found["loss"] is None and found["layer"] == f"model.layers.{layer}.mlp.gate_proj"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            gradient_of,
            r"The gradient of step 3 is not finite, in model\.layers\.1\.mlp\.up_proj\.weight; with it 1 of ",
        ),
        (backward_through, r"The gradient of step 3 .*, in model\.embed_tokens\.weight to model\.layers\.1\..*; with "),
        (
            forward_through,
            r"The loss of step 3 is not finite, first in the output of model\.layers\.1\.mlp\.gate_proj; with",
        ),
    ],
)
def test_one_too_many_ends_the_run(kind: Callable[[int], Spoil], said: str) -> None:
    with pytest.raises(FloatingPointError, match=said + r".*at most 0 may be; lower --lr or lengthen --warmup\.$"):
        skipping_run(kind(1), max_skipped_steps=0)


def test_a_compiled_run_skips_and_names_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model, config = tiny_model(steps=4, max_skipped_steps=1, compile=True)
    records: list[dict] = []

    def break_a_layer() -> bool:
        model.model.layers[1].mlp.up_proj.weight.data.fill_(math.inf)
        return False

    with pytest.raises(
        FloatingPointError, match=r"step 3 is not finite, first in the output of model\.layers\.1\.mlp\."
    ):
        optimise(model, TOKENS_N, config, progress=Progress(), stop=break_a_layer, log=records.append)
    torch._dynamo.reset()
    assert records[0]["loss"] > 0 and records[1]["loss"] is None
    assert records[1]["skipped"][0]["layer"] == "model.layers.1.mlp.up_proj"


def test_the_fused_kernel_skips_what_is_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose steps are read ten at a time."""
    from regla.train import loop

    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **options: plain(*args, **options | {"fused": True}))
    weights, _, records = skipping_run(gradient_of(1))
    assert [one["first"] for record in records for one in record.get("skipped", ())] == [
        "model.layers.1.mlp.up_proj.weight"
    ]
    assert all(weight.isfinite().all() for weight in weights.parameters()) and loop.READ_EVERY == 10


def test_skipped_steps_count_among_the_last_hundred() -> None:
    progress = Progress()
    guards = Guards(["a", "b"], progress, limit=2)

    def take(loss: float) -> dict[str, Any]:
        progress.steps += 1
        record = guards.read([figures(torch.tensor(loss), torch.tensor(1.0), torch.tensor([1.0, 1.0]))])
        guards.check(record)
        return record

    for step in range(3 * WINDOW):
        take(math.nan if step % 60 == 0 else 1.0)  # never more than two of a hundred
    assert progress.skipped == 5 and progress.skipped_lately == [241]
    take(math.nan)
    with pytest.raises(
        FloatingPointError, match=r"The loss of step 302 is not finite; with it 3 of the last 100 steps"
    ):
        take(math.inf)


def test_a_norm_too_large_to_sum_names_the_largest() -> None:
    progress = Progress(steps=1)
    norms = torch.tensor([3e38, 3.1e38])
    record = Guards(["a", "b"], progress, limit=1).read([figures(torch.tensor(1.0), norms.norm(), norms)])
    assert record["skipped"] == [{"step": 1, "loss": 1.0, "first": "b", "last": "b", "parameters": 1}]


def test_losses_that_jump_are_spikes() -> None:
    progress, generator = Progress(), torch.Generator().manual_seed(0)
    guards = Guards(["a"], progress, limit=0)
    losses = (3 - torch.arange(400) / 400 + 0.05 * torch.randn(400, generator=generator)).tolist()
    losses[250], losses[300] = 4.0, 0.5  # up, and down, which is none
    spikes = []
    for step in range(0, 400, 10):  # as on a GPU
        progress.steps = step + 10
        read = [
            figures(torch.tensor(loss), torch.tensor(2.0), torch.tensor([2.0])) for loss in losses[step : step + 10]
        ]
        spikes += guards.read(read).get("spikes", [])
    assert progress.spikes == 1
    (spike,) = spikes
    assert spike["step"] == 251 and spike["loss"] == 4.0 and spike["gradient_norm"] == 2.0
    assert spike["usual"] == pytest.approx(3 - 200 / 400, abs=0.05)


def test_losses_that_hardly_differ_make_no_small_step_a_spike() -> None:
    progress = Progress(steps=2, losses=[2.0] * WINDOW)
    read = [figures(torch.tensor(loss), torch.tensor(1.0), torch.tensor([1.0])) for loss in (2.05, 2.2)]
    assert [one["step"] for one in Guards(["a"], progress, limit=0).read(read)["spikes"]] == [2]


def test_the_first_module_of_all_processes_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.fill_(math.inf)
    assert first_not_finite(model, lambda: model(torch.ones(1, 2)), ALONE) == "1"
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    assert first_not_finite(model, lambda: model(torch.ones(1, 2)), ALONE) is None


TINY = {"vocab_size": 300, "hidden_size": 16, "layers": 2, "heads": 2, "seq_len": 16, "batch_size": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("".join(f"Line {number} of the text says {number % 7}.\n" for number in range(300)))
    return file


def config(out: Path, corpus: Path, **arguments: Any) -> TrainConfig:
    return TrainConfig(**{"out": str(out), "data": (str(corpus),), "steps": 8, "save_every": 3} | TINY | arguments)


def spoil_steps(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the gradient of `steps` NaN, counted from 1 by the number of the batch."""
    from regla.train import loop, material

    draw, good, latest = loop.crops, loop.next_token_loss, [0]

    def drawing(*arguments: Any, batch: int, **options: Any) -> Tensor:
        latest[0] = batch + 1
        return draw(*arguments, batch=batch, **options)

    monkeypatch.setattr(loop, "crops", drawing)
    monkeypatch.setattr(
        material,
        "next_token_loss",
        lambda model, crop_BL: good(model, crop_BL) * (math.nan if latest[0] in steps else 1.0),
    )


def test_a_resumed_run_counts_as_one_that_nothing_disturbed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    spoil_steps({2, 5}, monkeypatch)
    whole = run.train(config(tmp_path / "whole", corpus, max_skipped_steps=2))
    assert whole["skipped_steps"] == 2 and whole["loss_spikes"] == 0
    assert "Steps skipped because a loss or gradient was not finite: 2." in capsys.readouterr().out
    with pytest.raises(FloatingPointError, match=r"step 5 .* 2 of the last 100 .* last checkpoint, .*step-000003\.$"):
        run.train(config(tmp_path / "run", corpus, max_skipped_steps=1))
    logged = read_log(tmp_path / "run")
    assert [record["step"] for record in logged if "skipped" in record] == [2, 5]  # the one that ended it, too
    resumed = run.train(config(tmp_path / "run", corpus, max_skipped_steps=2, resume="latest"))
    assert resumed["skipped_steps"] == 2 and resumed["train_loss"] == whole["train_loss"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.items())
    assert [line["step"] for line in read_log(tmp_path / "run")] == list(range(1, 9))


def test_events_are_counts_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TrainingLog(tmp_path, tensorboard=True) as log:
        log({"step": 4, "loss": None, "skipped": [{"step": 3}, {"step": 4}], "layers": {"0": {"state_norm": 2.0}}})
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {name: found.Scalars(name)[0] for name in found.Tags()["scalars"]}
    assert {name: (one.step, one.value) for name, one in scalars.items()} == {
        "skipped": (4, 2.0),
        "layers/0/state_norm": (4, 2.0),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"overrides": {"gate_bias": 30.0, "refine_bias": 0.0}},
        {"overrides": {"gate_bias": 30.0, "refine_bias": 0.0}, "mixer": "hybrid", "inspect_every": 1},
        {"task": "mqar", "pairs": (2,), "overrides": {"gate_bias": 30.0, "refine_bias": 0.0}},
        {"overrides": DELTA_OF_THE_TEST | {"gate_bias": 30.0, "refine_bias": 0.0}},
        {},
    ],
)
def test_saturated_gates_show_in_the_log(options: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    """Gates that a large bias holds open from the start, and those of a plain model, which are not saturated."""
    arguments = {"steps": 2, "eval_every": 2} | options | ({"data": ()} if "task" in options else {})
    run.train(config(tmp_path / "run", corpus, **arguments))
    records = read_log(tmp_path / "run")
    linear = {"0"} if options.get("mixer") == "hybrid" else {"0", "1"}
    assert [set(record.get("layers", ())) for record in records] == [
        linear if "inspect_every" in options else set(),
        linear,
    ]
    for layer in records[1]["layers"].values():
        assert layer["state_norm"] > 0 and layer["saturated_low"]["key"] < 0.5
        assert (layer["saturated_high"]["key"] > 0.99) == bool(options)


def test_a_model_without_gates_has_none_to_look_at(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^inspect_every is given, but the model has no linear layers to look into: "):
        run.train(config(tmp_path / "run", corpus, mixer="softmax", inspect_every=1))
    run.train(config(tmp_path / "run", corpus, mixer="softmax", eval_every=2, steps=2))
    assert all("layers" not in record for record in read_log(tmp_path / "run"))

"""Truncated backpropagation: states go on from crop to crop of a text, gradients do not."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regla.linearize.convert import convert
from regla.models import ReGLAForCausalLM
from regla.runtime.progress import Progress
from regla.train import run
from regla.train.carry import CarriedStates, check_carries, text_in_order
from regla.train.config import TrainConfig
from regla.train.loop import optimise
from tests.linearize.originals import original
from tests.train.test_loop import tiny_model

END = 15
T = 8
CONV = {"linear_conv_kernel_dim": 4}
DELTA = CONV | {"update_rule": "delta", "feature_map": "unit_safe_exp", "gate": "refined_low_rank"}
KINDS = [{}, CONV, DELTA, {"linear_rope": True}, {"key_max": "running", "gate_axis": "both"}]
KINDS += [CONV | {"linear_rope": True, "window_branch": 3, "window_sinks": 2}]


def text(*documents: int) -> Tensor:
    """Documents of so many tokens, the last of each END."""
    generator = torch.Generator().manual_seed(0)
    parts = [[*torch.randint(0, END, (size - 1,), generator=generator).tolist(), END] for size in documents]
    return torch.tensor(np.concatenate(parts), dtype=torch.int32)


def tiny(overrides: dict[str, Any], **arguments: Any) -> tuple[ReGLAForCausalLM, TrainConfig]:
    return tiny_model(**{"overrides": overrides, "seq_len": T, "batch_size": 3, "carry_state": True} | arguments)


def logits_of(model: ReGLAForCausalLM, carry: CarriedStates, crop_BL: Tensor) -> Tensor:
    with carry.open(0, crop_BL):
        return model(input_ids=crop_BL[:, :-1], use_cache=False).logits


def test_rows_read_the_text_in_order() -> None:
    tokens_N = torch.arange(101, dtype=torch.int32)
    _, config = tiny({}, accumulate=2)
    batch_of = text_in_order(tokens_N, config)
    starts = torch.cat([batch_of(0)[:, 0], batch_of(1)[:, 0]])
    gaps = (starts - starts.roll(1)) % 101
    assert set(gaps.tolist()) == {16, 17}  # six rows, evenly over the text
    for step in range(30):
        for micro in (0, 1):
            crop_BL = batch_of(2 * step + micro)
            assert crop_BL.dtype == torch.int64 and crop_BL.shape == (3, T + 1)
            expected = (starts[3 * micro : 3 * micro + 3, None] + step * T + torch.arange(T + 1)) % 101
            assert torch.equal(crop_BL, expected)
    other = text_in_order(tokens_N, TrainConfig(out="-", seed=1, seq_len=T, batch_size=3, accumulate=2))
    assert not torch.equal(other(0), batch_of(0)) and torch.equal(batch_of(7), text_in_order(tokens_N, config)(7))


@pytest.mark.parametrize("overrides", KINDS)
def test_two_crops_with_the_state_between_are_the_whole(overrides: dict[str, Any]) -> None:
    model, _ = tiny(overrides)
    ids_BL = torch.randint(0, END, (3, 2 * T + 1))
    carry = CarriedStates(model, end=END, rows=3)
    found = [logits_of(model, carry, ids_BL[:, :9]), logits_of(model, carry, ids_BL[:, 8:])]
    whole = model(input_ids=ids_BL[:, :-1], use_cache=False).logits
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-5)
    alone = model(input_ids=ids_BL[:, 8:-1], use_cache=False).logits
    assert not torch.allclose(found[1], alone, atol=1e-3)


@pytest.mark.parametrize("overrides", KINDS)
def test_a_document_that_ends_leaves_an_empty_state(overrides: dict[str, Any]) -> None:
    """Row 0 ends in the middle of the crop, row 1 with its last token read, row 2 not: its END is but predicted."""
    model, _ = tiny(overrides)
    ids_BL = torch.randint(0, END, (3, 2 * T + 1))
    ids_BL[0, 3] = ids_BL[1, 7] = ids_BL[2, 8] = END
    carry = CarriedStates(model, end=END, rows=3)
    logits_of(model, carry, ids_BL[:, :9])
    found = logits_of(model, carry, ids_BL[:, 8:])
    alone = model(input_ids=ids_BL[:2, 8:-1], use_cache=False).logits
    torch.testing.assert_close(found[:2], alone, atol=1e-5, rtol=1e-5)
    whole = model(input_ids=ids_BL[2:, :-1], use_cache=False).logits
    torch.testing.assert_close(found[2:], whole[:, T:], atol=1e-5, rtol=1e-5)


def gradients_of_a_run(model: ReGLAForCausalLM, config: TrainConfig, tokens_N: Tensor) -> list[dict[str, Tensor]]:
    """Of each step, before clipping; weights stay as they are."""
    seen: list[dict[str, Tensor]] = []

    def look(optimizer: torch.optim.AdamW) -> None:
        seen.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", look)
        patch.setattr("regla.train.loop._MAX_GRADIENT_NORM", math.inf)
        optimise(
            model,
            text_in_order(tokens_N, config),
            config,
            progress=Progress(),
            stop=lambda: False,
            carry=CarriedStates(model, end=END, rows=config.batch_size),
        )
    return seen


@pytest.mark.parametrize("overrides", KINDS[:4])
def test_gradients_are_those_of_a_constant_state(overrides: dict[str, Any]) -> None:
    """That of a cache which an earlier call without gradients has filled, row by row, from where its document began."""
    model, config = tiny(overrides, steps=3, accumulate=2)
    tokens_N = text(*range(11, 29, 2))
    seen = gradients_of_a_run(model, config, tokens_N)
    batch_of = text_in_order(tokens_N, config)
    ends = torch.cat([(batch_of(number)[:, :-1] == END).any(1) for number in range(4)])
    assert ends.any() and not ends.all()
    for step, gradients in enumerate(seen):
        losses = []
        for micro in (0, 1):
            crops = [batch_of(2 * earlier + micro) for earlier in range(step + 1)]
            for row in range(3):
                cache = None
                for crop_BL in crops[:-1]:
                    if (crop_BL[row, :-1] == END).any():
                        cache = None
                        continue
                    with torch.no_grad():
                        out = model(input_ids=crop_BL[row : row + 1, :-1], past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                crop_1L = crops[-1][row : row + 1]
                logits = model(input_ids=crop_1L[:, :-1], past_key_values=cache, use_cache=cache is not None).logits
                losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), crop_1L[:, 1:].flatten()))
        expected = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))
        for (name, found), gradient in zip(gradients.items(), expected, strict=True):
            torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def losses_of(**options: Any) -> list[float]:
    model, config = tiny(CONV, steps=4, accumulate=2, **options)
    progress, tokens_N = Progress(), text(150, 40, 60)
    carry = CarriedStates(model, end=END, rows=3)
    optimise(model, text_in_order(tokens_N, config), config, progress=progress, stop=lambda: False, carry=carry)
    return progress.losses


def test_activation_checkpointing_changes_no_loss() -> None:
    plain = losses_of()
    assert losses_of(activation_checkpointing=True) == plain
    assert losses_of(dtype="bfloat16") == pytest.approx(plain, rel=0.02)


@pytest.mark.slow
def test_compilation_changes_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    assert losses_of(compile=True, layers=1) == pytest.approx(losses_of(layers=1), rel=1e-5)
    torch._dynamo.reset()


def test_a_state_that_is_not_finite_is_not_carried() -> None:
    model, _ = tiny({})
    ids_BL = torch.randint(0, END, (3, 2 * T + 1))
    carry = CarriedStates(model, end=END, rows=3)
    spoil = model.model.embed_tokens.register_forward_hook(
        lambda module, args, x: x * torch.tensor([1.0, math.nan, 1.0])[:, None, None]
    )
    logits_of(model, carry, ids_BL[:, :9])
    spoil.remove()
    found = logits_of(model, carry, ids_BL[:, 8:])
    whole = model(input_ids=ids_BL[:, :-1], use_cache=False).logits[:, T:]
    torch.testing.assert_close(found[::2], whole[::2], atol=1e-5, rtol=1e-5)
    alone = model(input_ids=ids_BL[1:2, 8:-1], use_cache=False).logits
    torch.testing.assert_close(found[1:2], alone, atol=1e-5, rtol=1e-5)


def test_outside_of_training_a_model_begins_anew() -> None:
    model, _ = tiny({})
    ids_BL = torch.randint(0, END, (3, T + 1))
    before = model(input_ids=ids_BL).logits
    carry = CarriedStates(model, end=END, rows=3)
    logits_of(model, carry, ids_BL)
    assert torch.equal(model(input_ids=ids_BL).logits, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"mixer": "hybrid"},
            r"^carry_state takes .*, but layer 1 of the model is full_attention, whose keys and values",
        ),
        ({"mixer": "window"}, r"layer 0 of the model is sliding_attention"),
        ({"overrides": {"key_max": "sequence"}}, r"^carry_state cannot know the largest key of a whole text"),
    ],
)
def test_models_that_cannot_carry(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = TrainConfig(
        **{"out": str(tmp_path / "run"), "carry_state": True, "layers": 2, "device": "cpu"} | arguments
    )
    with pytest.raises(ValueError, match=message):
        run.train(config)
    assert not (tmp_path / "run").exists()


def test_converted_models_carry_unless_their_positions_end() -> None:
    check_carries(convert(original("llama"), keep="none", check=False))
    with pytest.raises(ValueError, match=r"but the model has learnt positions, which end; leave it out\.$"):
        check_carries(convert(original("gpt2"), keep="none", check=False))


def test_a_task_has_no_text_to_carry() -> None:
    with pytest.raises(ValueError, match=r"^Both task and carry_state are given"):
        TrainConfig(out="-", task="mqar", carry_state=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    documents = [
        "".join(f"Line {n} of text {d} says {n % 7}.\n" for n in range(size)) for d, size in enumerate((150, 9, 70))
    ]
    file.write_text("<|endoftext|>\n".join(documents))
    return file


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "overrides": CONV}])
def test_a_resumed_run_goes_on_with_the_states(options: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    """From a checkpoint in the middle, of which the states are a part: without them the weights are others."""
    tiny = {"vocab_size": 300, "hidden_size": 16, "layers": 2, "heads": 2, "seq_len": 16, "batch_size": 2, "lr": 1e-2}
    common = (
        {"data": (str(corpus),), "steps": 7, "save_every": 4, "device": "cpu", "carry_state": True} | tiny | options
    )

    def finish(name: str, **more: Any) -> dict[str, Tensor]:
        run.train(TrainConfig(out=str(tmp_path / name), **common | more))
        return load_file(tmp_path / name / "model.safetensors")

    whole = finish("whole")
    kept = tmp_path / "whole" / "checkpoints" / "step-000004"
    states = load_file(kept / "carried.safetensors")
    assert {name.split("/")[0] for name in states} == {str(micro) for micro in range(options.get("accumulate", 1))}
    assert any(bool(x.any()) for name, x in states.items() if name.endswith("/S"))
    resumed = finish("whole", resume="latest")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CarriedStates, "load", lambda self, tensors: None)
        forgetful = finish("whole", resume="latest")
    assert any(not torch.equal(weight, forgetful[name]) for name, weight in whole.items())
    with pytest.raises(ValueError, match="with --carry-state True, but this one has --carry-state False"):
        finish("whole", resume="latest", carry_state=False)

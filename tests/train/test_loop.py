"""The training loop: what it draws, what it minimises, and that it repeats."""

import math
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from regla.models import ReGLAForCausalLM
from regla.runtime.progress import Progress
from regla.train.config import TrainConfig
from regla.train.loop import crops, learning_rate, make_optimizer, next_token_loss, optimise
from regla.train.model import model_config

TINY = {
    "out": "unused",
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "seq_len": 16,
    "batch_size": 4,
    "lr": 1e-2,
    "warmup": 2,
    "device": "cpu",
}
TOKENS_N = torch.from_numpy((np.arange(600) * 7 % 13).astype(np.int32))  # a pattern to learn


def tiny_model(**arguments) -> tuple[ReGLAForCausalLM, TrainConfig]:
    config = TrainConfig(**TINY | arguments)
    torch.manual_seed(0)
    return ReGLAForCausalLM(model_config(config, vocab_size=16, end_of_text=0)), config


def run(**arguments) -> tuple[ReGLAForCausalLM, Progress]:
    model, config = tiny_model(**arguments)
    progress = Progress()
    optimise(model, TOKENS_N, config, progress=progress, stop=lambda: False)
    return model, progress


def test_crops_are_slices_that_depend_on_seed_and_number_alone() -> None:
    tokens_N = torch.arange(50, dtype=torch.int32) * 3
    crop_BL = crops(tokens_N, seed=1, batch=5, batch_size=8, length=10)
    assert crop_BL.dtype == torch.int64 and crop_BL.shape == (8, 10)
    for row in crop_BL:
        start = int(row[0]) // 3
        assert row.tolist() == tokens_N[start : start + 10].tolist()
    assert torch.equal(crop_BL, crops(tokens_N, seed=1, batch=5, batch_size=8, length=10))
    assert not torch.equal(crop_BL, crops(tokens_N, seed=1, batch=6, batch_size=8, length=10))
    assert not torch.equal(crop_BL, crops(tokens_N, seed=2, batch=5, batch_size=8, length=10))


def test_crops_reach_both_ends() -> None:
    starts = crops(torch.arange(12, dtype=torch.int32), seed=0, batch=0, batch_size=200, length=10)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


def test_learning_rate_rises_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, steps=21, warmup=4, peak=2.0) for step in range(21)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0 and rates[12] == pytest.approx(1.1) and rates[20] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert learning_rate(0, steps=1, warmup=0, peak=2.0) == 2.0


def test_vectors_do_not_decay() -> None:
    model, _ = tiny_model(mixer="hybrid")
    optimizer = make_optimizer(model, weight_decay=0.1, device=torch.device("cpu"))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0), name
    assert {0.0, 0.1} == set(decay.values())


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token() -> None:
    class Uneven(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> object:
            """Logits that make token (input + 1) likely."""
            logits = torch.zeros(*input_ids.shape, 8)
            logits.scatter_(-1, (input_ids + 1)[..., None], 2.0)
            return type("Output", (), {"logits": logits})

    likely, unlikely = (math.log(math.exp(2) + 7) - score for score in (2.0, 0.0))
    loss = next_token_loss(Uneven(), torch.tensor([[1, 2, 3, 3], [0, 1, 0, 6]]))
    assert loss.item() == pytest.approx((3 * likely + 3 * unlikely) / 6)


@pytest.mark.parametrize("mixer", ["regla", "hybrid", "softmax", "window"])
def test_the_loss_falls(mixer: str) -> None:
    _, progress = run(mixer=mixer, steps=40)
    assert progress.steps == len(progress.losses) == len(progress.seconds) == 40
    assert progress.losses[0] == pytest.approx(math.log(16), abs=0.3)
    assert progress.train_loss == pytest.approx(sum(progress.losses[-20:]) / 20)
    assert progress.losses[-1] < 0.5 * progress.losses[0]


def test_evaluations_do_not_count_as_training() -> None:
    """One follows step 11; the rate is of steps 11 and 12."""
    model, config = tiny_model(steps=12, eval_every=11)
    progress = Progress()

    def slow() -> float:
        time.sleep(1.0)
        return 0.0

    optimise(model, TOKENS_N, config, progress=progress, stop=lambda: False, evaluate=slow)
    assert progress.total_seconds > 1.0
    assert progress.tokens_per_second(config.tokens_per_step) > 2 * config.tokens_per_step / 1.0


def test_a_run_repeats_bit_for_bit() -> None:
    (first, first_progress), (second, second_progress), (other, _) = run(steps=4), run(steps=4), run(steps=4, seed=1)
    assert first_progress.losses == second_progress.losses
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    assert any(not torch.equal(weight, other.state_dict()[name]) for name, weight in first.state_dict().items())


def test_accumulation_averages_over_all_crops() -> None:
    model, config = tiny_model(steps=1, accumulate=3)
    with torch.no_grad():
        losses = [
            next_token_loss(model, crops(TOKENS_N, seed=0, batch=batch, batch_size=4, length=17)).item()
            for batch in range(3)
        ]
    progress = Progress()
    optimise(model, TOKENS_N, config, progress=progress, stop=lambda: False)
    assert progress.losses == pytest.approx([sum(losses) / 3], rel=1e-5)


def test_gradients_are_averaged_and_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that AdamW sees: the mean over all micro-batches, scaled to norm 1 if longer."""
    seen: dict[str, Tensor] = {}
    model, config = tiny_model(steps=1, accumulate=2)
    for parameter in model.parameters():
        parameter.data *= 3  # gradients beyond the clip
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for batch in range(2):
        loss = next_token_loss(model, crops(TOKENS_N, seed=0, batch=batch, batch_size=4, length=17))
        for total, part in zip(expected, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total += part / 2
    norm = torch.sqrt(sum(grad.square().sum() for grad in expected))
    assert norm > 1

    def look(optimizer: torch.optim.AdamW) -> None:
        seen.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    optimise(model, TOKENS_N, config, progress=Progress(), stop=lambda: False)
    for (name, grad), total in zip(seen.items(), expected, strict=True):
        torch.testing.assert_close(grad, total / norm, rtol=1e-3, atol=1e-6, msg=name)


def test_stop_ends_after_the_current_step() -> None:
    model, config = tiny_model(steps=50)
    progress = Progress()
    optimise(model, TOKENS_N, config, progress=progress, stop=lambda: progress.steps >= 3)
    assert progress.steps == len(progress.losses) == 3


@pytest.mark.parametrize("mixer", ["regla", "softmax"])
def test_numbers_that_are_not_finite_end_the_run(mixer: str) -> None:
    with pytest.raises(FloatingPointError, match=r"step \d+.*; lower --lr or lengthen --warmup\.$|Step \d+ failed"):
        run(steps=50, lr=1e30, mixer=mixer)


def test_a_model_that_cannot_run_is_bad_input() -> None:
    with pytest.raises(ValueError, match="triton"):
        run(steps=2, overrides={"backend": "triton", "key_max": "sequence"})


def test_bfloat16_products_train() -> None:
    model, progress = run(steps=20, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert progress.losses[-1] < 0.8 * progress.losses[0]


@pytest.mark.parametrize("mixer", ["regla", "hybrid", "softmax"])
def test_activation_checkpointing_changes_no_number(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = []
    plain_forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: forwards.append(0) or plain_forward(mlp, x))
    plain_model, plain = run(steps=3, mixer=mixer)
    assert len(forwards) == 3 * 2
    model, progress = run(steps=3, mixer=mixer, activation_checkpointing=True)
    assert len(forwards) == 3 * 2 + 3 * 2 * 2  # again in the backward pass
    assert progress.losses == plain.losses
    for name, weight in plain_model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_another_loss() -> None:
    """Twice the loss has twice the gradient, and the optimiser sees the crops that the default loss sees."""
    model, config = tiny_model(steps=2)
    seen = []

    def doubled(model: nn.Module, crop_BL: Tensor) -> Tensor:
        seen.append(crop_BL)
        return 2 * next_token_loss(model, crop_BL)

    progress = Progress()
    optimise(model, TOKENS_N, config, progress=progress, stop=lambda: False, loss=doubled)
    _, plain = run(steps=2)
    assert progress.losses[0] == pytest.approx(2 * plain.losses[0])
    for batch, crop_BL in enumerate(seen):
        assert torch.equal(crop_BL, crops(TOKENS_N, seed=0, batch=batch, batch_size=4, length=17))


def test_groups_train_at_their_own_rate_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_model(steps=3, mixer="hybrid", weight_decay=0.0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first, second = model.model.layers
    rates = []
    step = torch.optim.AdamW.step

    def look(optimizer: torch.optim.AdamW) -> None:
        rates.append({id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]})
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    groups = [{"params": first.parameters(), "lr_scale": 1.0}, {"params": second.parameters(), "lr_scale": 0.1}]
    optimise(model, TOKENS_N, config, progress=Progress(), stop=lambda: False, groups=groups)
    for number, seen in enumerate(rates):
        rate = learning_rate(number, steps=3, warmup=config.warmup_steps, peak=config.lr)
        assert all(seen[id(parameter)] == rate for parameter in first.parameters())
        assert all(seen[id(parameter)] == pytest.approx(rate / 10) for parameter in second.parameters())
        assert len(seen) == len([*first.parameters(), *second.parameters()])
    after = model.state_dict()
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["regla", "hybrid"])
def test_compiled_steps_equal_eager_ones(mixer: str) -> None:
    """With the code that the compiler generates, as `--compile` does."""
    _, eager = run(steps=5, mixer=mixer)
    _, compiled = run(steps=5, mixer=mixer, compile=True)
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["regla", "hybrid", "softmax"])
def test_a_gpu_trains_as_the_cpu_does(mixer: str) -> None:
    """The same crops and the same mathematics; in bfloat16, too, the loss falls."""
    _, on_cpu = run(steps=5, mixer=mixer)
    for dtype, steps in (("float32", 5), ("bfloat16", 40)):
        model, config = tiny_model(steps=steps, mixer=mixer, device="cuda", dtype=dtype)
        progress = Progress()
        optimise(model.cuda(), TOKENS_N.cuda(), config, progress=progress, stop=lambda: False)
        if dtype == "float32":
            assert progress.losses == pytest.approx(on_cpu.losses, rel=1e-2)
        else:
            assert progress.losses[-1] < 0.5 * progress.losses[0]

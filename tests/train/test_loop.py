"""The training loop: what it draws, what it minimises, and that it repeats."""

import math
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.llama.modeling_llama import LlamaMLP

from regla.models import ReGLAForCausalLM
from regla.runtime.device import float32_products
from regla.runtime.progress import Progress
from regla.train.config import TrainConfig
from regla.train.loop import crops, finite_step, learning_rate, make_optimizer, next_token_loss, optimise
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


def decay_of(model: nn.Module, **options) -> dict[str, float]:
    """The weight decay of each trained parameter by its name; each is in one group."""
    optimizer = make_optimizer(model, weight_decay=0.1, device=torch.device("cpu"), **options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay: dict[str, float] = {}
    for group in optimizer.param_groups:
        assert group["role"] == ("decays" if group["weight_decay"] else "constant")
        for parameter in group["params"]:
            assert names[id(parameter)] not in decay
            decay[names[id(parameter)]] = group["weight_decay"]
    assert decay.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return decay


EVERYTHING = {
    "overrides": {
        "gate": "gla",
        "attention_norm": "layernorm",
        "linear_conv_kernel_dim": 4,
        "softmax_conv_kernel_dim": 4,
        "softmax_qk_norm": True,
        "softmax_output_norm": True,
        "qk_calibration": True,
        "attention_bias": True,
    }
}


@pytest.mark.parametrize(
    "options", [{}, {"mixer": "hybrid"}, {"mixer": "hybrid"} | EVERYTHING, {"overrides": {"gate": "mamba2"}}]
)
def test_weights_decay_by_their_role_not_by_their_shape(options: dict) -> None:
    model, _ = tiny_model(**options)
    decay = decay_of(model)
    for name, value in decay.items():
        module, _, leaf = name.rpartition(".")
        kept = leaf != "weight" or "norm" in module
        assert value == (0.0 if kept else 0.1), name
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert any(shapes[name] == 2 and not value for name, value in decay.items())  # shape would tell nothing


def test_a_norm_gain_stays_where_gradients_are_zero() -> None:
    """At decay 0.1 and lr 3e-3 it would be 0.97 after 100 steps."""
    model, _ = tiny_model()
    optimizer = make_optimizer(model, weight_decay=0.1, device=torch.device("cpu"))
    gain = model.model.layers[0].self_attn.norm.weight
    up = model.model.layers[0].mlp.up_proj.weight
    before = up.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(100):
        optimizer.step()
    assert gain.ndim == 2 and torch.equal(gain, torch.ones_like(gain))
    torch.testing.assert_close(up, before * (1 - 3e-4) ** 100)


def test_tied_unknown_and_convolving_modules() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))
            self.temperature = nn.Parameter(torch.ones(2, 1))

    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 3),
            "head": nn.Linear(3, 5),
            "conv": nn.Conv1d(3, 3, 2),
            "norm": nn.LayerNorm([3, 3]),
            "unknown": Unknown(),
            "frozen": nn.Linear(3, 3).requires_grad_(False),
        }
    )
    model["head"].weight = model["embedding"].weight
    decaying = {name for name, value in decay_of(model).items() if value}
    assert decaying == {"embedding.weight", "conv.weight"}


def test_adapters_decay_as_the_linear_maps_they_are() -> None:
    peft = pytest.importorskip("peft")
    model, _ = tiny_model()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True, r=2))
    decay = decay_of(adapted)
    assert {name.rsplit(".", 3)[1] for name in decay} == {"lora_A", "lora_B", "lora_magnitude_vector"}
    for name, value in decay.items():
        assert value == (0.0 if "magnitude" in name else 0.1), name


def test_groups_with_a_parameter_twice_or_a_strange_one() -> None:
    model, _ = tiny_model()
    for parameters, message in (
        ([model.lm_head.weight] * 2, "is in two groups"),
        ([nn.Parameter(torch.ones(3))], r"of shape \(3,\) is none of the model's"),
    ):
        with pytest.raises(ValueError, match=message):
            decay_of(model, groups=[{"params": parameters, "lr_scale": 1.0}])


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
    with pytest.raises(FloatingPointError, match=r"step \d+ .*; lower --lr or lengthen --warmup\.$"):
        run(steps=50, lr=1e30, mixer=mixer)


def spoiled(number: int, kind: float, parameter: nn.Parameter):
    """A loss whose gradient of `parameter` holds one `kind` in step `number`; its value is the usual one."""
    calls: list[int] = []
    handles: list[RemovableHandle] = []

    def once(grad: Tensor) -> Tensor:
        handles.pop().remove()
        return grad.index_fill(0, torch.tensor(0), kind)

    def loss(model: nn.Module, crop_BL: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == number:
            handles.append(parameter.register_hook(once))
        return next_token_loss(model, crop_BL)

    return loss


@pytest.mark.parametrize("kind", [math.nan, math.inf])
@pytest.mark.parametrize("step", [2, 4])  # 4: the last
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(kind: float, step: int) -> None:
    model, config = tiny_model(steps=4)
    parameter = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        FloatingPointError,
        match=rf"^The gradient of step {step} is not finite, in model\.layers\.0\.mlp\.up_proj\.weight; with it 1 of",
    ):
        optimise(model, TOKENS_N, config, progress=Progress(), stop=lambda: False, loss=spoiled(step, kind, parameter))
    expected, config = tiny_model(steps=4)
    optimise(expected, TOKENS_N, config, progress=(done := Progress()), stop=lambda: done.steps == step - 1)
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_the_fused_kernel_makes_no_step_of_a_gradient_that_is_not_finite() -> None:
    """As on a GPU, where nothing waits for the norm."""
    for norm, changes in ((math.nan, False), (math.inf, False), (1.0, True)):
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        weight.grad = torch.full((3,), 1.0 if changes else math.nan)
        assert finite_step(optimizer, torch.tensor(norm))
        optimizer.step()
        assert torch.equal(weight, torch.ones(3)) != changes and bool(torch.isfinite(weight).all())
        assert all(torch.isfinite(value).all() for value in optimizer.state[weight].values())


def test_weights_that_are_not_finite_end_the_run_in_its_last_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_model(steps=3)
    step = torch.optim.AdamW.step
    progress = Progress()

    def spoil(optimizer: torch.optim.AdamW) -> None:
        step(optimizer)
        if progress.steps == 2:
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(FloatingPointError, match=r"^The weights are no longer finite \(by step 3\)"):
        optimise(model, TOKENS_N, config, progress=progress, stop=lambda: False)


@pytest.mark.parametrize(("dtype", "inside"), [("float32", "highest"), ("bfloat16", "high")])
def test_a_run_sets_its_precision_and_restores_it(dtype: str, inside: str) -> None:
    seen, evaluated = [], []
    model, config = tiny_model(steps=2, dtype=dtype, eval_every=1)

    def look(model: nn.Module, crop_BL: Tensor) -> Tensor:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return next_token_loss(model, crop_BL)

    def evaluate() -> float:
        evaluated.append(torch.get_float32_matmul_precision())
        return 0.0

    with float32_products(tf32=True):
        optimise(model, TOKENS_N, config, progress=Progress(), stop=lambda: False, loss=look, evaluate=evaluate)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    assert set(seen) == {(inside, inside == "high")} and evaluated == ["high"] * 2


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

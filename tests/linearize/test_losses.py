"""What a converted model learns from its original: values by hand, gradients where they belong, and it does learn."""

import pytest
import torch

from regla.linearize import convert, losses
from regla.linearize.losses import distillation_loss, head_of, hidden_states, transfer_loss
from tests.linearize.models import llama
from tests.linearize.originals import FIRST, original

CROP = (2, 33)


def test_distillation_equals_the_divergence_by_hand():
    original = llama()
    converted = convert(original)
    crop = torch.randint(97, CROP)
    with torch.no_grad():
        p, q = (model(crop[:, :-1]).logits.double().softmax(-1) for model in (original, converted))
        expected = (p * (p / q).log()).sum(-1).mean()
        found = distillation_loss(original)(converted, crop)
        assert distillation_loss(original)(convert(original, range(4)), crop).item() == pytest.approx(0, abs=1e-6)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_transfer_equals_the_error_by_hand():
    original = llama()
    converted = convert(original)
    crop = torch.randint(97, CROP)
    seen = {}
    for number in (0, 2):
        original.model.layers[number].self_attn.register_forward_hook(
            lambda module, args, kwargs, output, number=number: seen.update({number: (kwargs, output[0])}),
            with_kwargs=True,
        )
    found = transfer_loss(original)(converted, crop)
    with torch.no_grad():
        errors = []
        for number, (inputs, y) in seen.items():
            ours, _ = converted.model.layers[number].self_attn(
                inputs["hidden_states"], position_embeddings=inputs["position_embeddings"]
            )
            errors.append((ours - y).square().sum() / y.square().sum())
    assert found.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_transfer_reaches_mixers_alone():
    original = llama()
    converted = convert(original)
    transfer_loss(original)(converted, torch.randint(97, CROP)).backward()
    reached = {name for name, parameter in converted.named_parameters() if parameter.grad is not None}
    assert reached == {
        name for name, _ in converted.named_parameters() if ".0.self_attn" in name or ".2.self_attn" in name
    }
    assert all(parameter.grad is None for parameter in original.parameters())


@pytest.mark.parametrize("loss_of", [transfer_loss, distillation_loss])
def test_it_can_be_learnt(loss_of):
    original = llama()
    converted = convert(original, "none")
    loss, crop = loss_of(original), torch.randint(97, (4, 33))
    optimizer = torch.optim.Adam(converted.parameters(), 3e-3)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        value = loss(converted, crop)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("name", [*FIRST, "gemma3_text, soft-cap, one key head"])
def test_the_head_by_itself_is_that_of_the_model(name):
    """Scaling, soft-caps and biases of the family included."""
    model, ids = original(name), torch.randint(97, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(
            head_of(model)(hidden_states(model, ids)), model(ids).logits.flatten(0, 1), rtol=1e-6, atol=1e-6
        )


def test_gradients_in_parts_are_those_of_the_whole(monkeypatch):
    teacher = llama()
    student = convert(teacher)
    crop = torch.randint(97, CROP)

    def gradients(loss):
        student.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in student.named_parameters()}

    with torch.no_grad():
        target = teacher(crop[:, :-1]).logits.log_softmax(-1)
    ours = student(crop[:, :-1]).logits.log_softmax(-1)
    whole = torch.nn.functional.kl_div(ours, target, reduction="none", log_target=True).sum(-1).mean()
    expected = gradients(2 * whole)
    monkeypatch.setattr(losses, "LOGITS", 97 * 5)  # 5 tokens at a time, of 64
    rows = []
    student.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[-2]))
    found = gradients(2 * distillation_loss(teacher)(student, crop))
    assert max(rows) == 5 and sum(rows) == 64
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)

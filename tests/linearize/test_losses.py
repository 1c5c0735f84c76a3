"""What a converted model learns from its original: values by hand, gradients where they belong, and it does learn."""

import pytest
import torch

from regla.linearize import convert
from regla.linearize.losses import distillation_loss, transfer_loss
from tests.linearize.models import llama

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

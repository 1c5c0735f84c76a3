"""Training by adapters: pretrained weights once in memory, frozen, and whole again behind the merge."""

import pytest
import torch

from regla.linearize import convert
from regla.linearize.adapters import add_adapters, merge_adapters
from regla.linearize.convert import own_parameters
from regla.linearize.losses import distillation_loss
from tests.linearize.originals import FIRST, original


@pytest.mark.parametrize("name", FIRST)
def test_the_pretrained_weights_are_in_memory_once(name):
    """In every family: adapted or not, fused or not; the teacher's predictions do not move, the student's do."""
    torch.manual_seed(0)
    teacher = original(name)
    student = convert(teacher, "1")
    new = set(own_parameters(student))
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        before, expected = student(ids).logits, teacher(ids).logits
    add_adapters(teacher, student, seed=0)
    theirs = {parameter.untyped_storage().data_ptr() for parameter in teacher.parameters()}
    for parameter_name, parameter in student.named_parameters():
        shared = parameter.untyped_storage().data_ptr() in theirs
        trained = parameter_name in new or "lora_" in parameter_name
        assert parameter.requires_grad == trained
        # Rows of q, k and v that lie by head are no block that could be shared; norms of q and k are not worth it.
        copied = ("mixer.q_", "mixer.k_", "mixer.v_") if name == "gpt_neox" else ("_norm.original",)
        if not trained and not any(part in parameter_name for part in copied):
            assert shared, parameter_name
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, before)  # adapters start at nothing
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        distillation_loss(teacher)(student, ids).backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with torch.no_grad():
        adapted = student(ids).logits
        assert not torch.allclose(adapted, before, atol=1e-3)
        merge_adapters(student)
        torch.testing.assert_close(student(ids).logits, adapted, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(teacher(ids).logits, expected)
    fresh = convert(teacher, "1")
    assert student.state_dict().keys() == fresh.state_dict().keys()
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_weights_that_have_been_trained_are_not_given_back():
    """A second round starts from a student whose weights are no longer the teacher's."""
    torch.manual_seed(0)
    teacher = original("llama")
    student = convert(teacher, "1")
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.add_(0.1)
        student.model.layers[0].self_attn.mixer.q_proj.weight.add_(0.1)
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        before = student(ids).logits
        add_adapters(teacher, student, seed=0)
        torch.testing.assert_close(student(ids).logits, before)

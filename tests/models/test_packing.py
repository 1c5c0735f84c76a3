"""Documents of a sequence that see nothing of each other, in every kind of layer."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from regla.linearize import convert
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.packing import all_linear, document_boundaries, document_logits
from regla.train.loop import document_loss, next_token_loss

from ..linearize.originals import original

END = 0
KINDS = {
    "linear": {"linear_conv_kernel_dim": 4},
    "hybrid": {"layer_types": ["linear_attention", "full_attention"], "softmax_conv_kernel_dim": 4},
    "softmax": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
    "delta": {"update_rule": "delta", "feature_map": "unit_safe_exp", "gate": "refined_low_rank", "linear_rope": True},
}
CROP_BL = torch.tensor([[5, 6, END, 7, 8, 9, END, 4, 3], [END, 2, 3, 4, 5, END, END, 8, 9]])


def model(kind: str) -> ReGLAForCausalLM:
    torch.manual_seed(0)
    config = ReGLAConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, **KINDS[kind]
    )
    return ReGLAForCausalLM(config).eval()


def test_an_end_of_text_begins_the_next_document() -> None:
    assert document_boundaries(CROP_BL[:, :-1], END).tolist() == [0, 2, 6, 8, 13, 14, 16]
    assert document_boundaries(CROP_BL[:1, :2], END).tolist() == [0, 2]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_each_document_alone(kind: str, together: bool) -> None:
    found = model(kind)
    assert all_linear(found) == (kind in ("linear", "delta"))
    ids_BT = CROP_BL[:, :-1]
    with torch.no_grad():
        logits_BTV = document_logits(found, ids_BT, END, together=together)
        for row, logits_TV in zip(ids_BT, logits_BTV, strict=True):
            starts = [0, *(i for i in range(1, len(row)) if row[i] == END), len(row)]
            for start, end in pairwise(starts):
                alone = found(input_ids=row[None, start:end]).logits[0]
                torch.testing.assert_close(logits_TV[start:end], alone, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            document_loss(END, together=together)(found, CROP_BL),
            F.cross_entropy(logits_BTV.flatten(0, 1), CROP_BL[:, 1:].flatten()),
        )
        assert (document_loss(END, together=together)(found, CROP_BL) - next_token_loss(found, CROP_BL)).abs() > 1e-4


def test_gradients_do_not_pass_a_boundary() -> None:
    found = model("linear")
    embedded = found.get_input_embeddings()(CROP_BL[:1, :-1]).detach().requires_grad_()
    bounds = document_boundaries(CROP_BL[:1, :-1], END)
    found(inputs_embeds=embedded, cu_seq_lens_q=bounds, use_cache=False).logits[0, 2:6].sum().backward()
    moved = embedded.grad[0].abs().sum(-1) > 0
    assert moved.tolist() == [False, False, True, True, True, True, False, False]


@pytest.mark.parametrize(("family", "keep"), [("llama", "none"), ("llama", "every-2"), ("gpt2", "every-2")])
def test_students_reset_too(family: str, keep: str) -> None:
    student = convert(original(family), keep, check=False).eval()
    assert all_linear(student) == (keep == "none")
    ids_BT = torch.randint(1, 50, (2, 12))
    ids_BT[:, 5] = END
    with torch.no_grad():
        logits_BTV = document_logits(student, ids_BT, END, together=all_linear(student))
        alone = student(input_ids=ids_BT[:, 5:]).logits
    torch.testing.assert_close(logits_BTV[:, 5:], alone, atol=2e-5, rtol=1e-4)

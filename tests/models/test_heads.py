"""Classification and question answering: shapes, losses, padding, folders."""

import pytest
import torch
from tests.models.conftest import stir
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from regla.models import ReGLAForQuestionAnswering, ReGLAForSequenceClassification, ReGLAForTokenClassification

HEADS = {
    ReGLAForSequenceClassification: (AutoModelForSequenceClassification, {"labels": torch.tensor([2, 0])}),
    ReGLAForTokenClassification: (AutoModelForTokenClassification, {"labels": torch.randint(3, (2, 6))}),
    ReGLAForQuestionAnswering: (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 5])},
    ),
}


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("variant", ["pure", "hybrid"])
def test_heads_train_save_and_load(build, variant, head, tmp_path):
    auto, targets = HEADS[head]
    config = build(variant).config
    config.num_labels = 3
    model = stir(head(config)).eval()
    ids = torch.randint(3, 97, (2, 6))
    out = model(ids, **targets)
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).eval()
    assert type(again) is head
    for name, value in again(ids).items():
        if name.endswith("logits"):
            assert torch.equal(value, out[name]), name


def test_a_language_model_takes_a_head(build, tmp_path):
    """The body comes from the folder, the head is new."""
    model = build("hybrid")
    model.save_pretrained(tmp_path)
    classifier, report = ReGLAForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"score.weight"}
    ids = torch.randint(3, 97, (1, 6))
    hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(classifier(ids).logits, classifier.score(hidden[:, -1]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_label(build, side, assert_same):
    config = build("hybrid").config
    config.num_labels = 3
    model = stir(ReGLAForSequenceClassification(config)).eval()
    ids, padding = torch.randint(3, 97, (2, 6)), torch.zeros(2, 3, dtype=torch.long)
    parts = (padding, ids) if side == "left" else (ids, padding)
    padded = torch.cat(parts, 1)
    assert_same(model(padded, attention_mask=(padded != 0).long()).logits, model(ids).logits)

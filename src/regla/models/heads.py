"""Classification and question answering: transformers' own heads on `ReGLAModel`.

The label of a sequence is read at its last token that is not `pad_token_id`, as in transformers' other decoders.
"""

from __future__ import annotations

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from regla.models.modeling import ReGLAPreTrainedModel


class ReGLAForSequenceClassification(GenericForSequenceClassification, ReGLAPreTrainedModel):
    """One label for a sequence: logits [B, num_labels] of its last token."""


class ReGLAForTokenClassification(GenericForTokenClassification, ReGLAPreTrainedModel):
    """One label for each token: logits [B, T, num_labels]."""


class ReGLAForQuestionAnswering(GenericForQuestionAnswering, ReGLAPreTrainedModel):
    """Where an answer starts and ends: two logits [B, T]."""

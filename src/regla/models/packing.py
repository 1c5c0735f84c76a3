"""Documents of a sequence that see nothing of each other. Shapes: B sequences of T tokens, N documents, V vocabulary.

An end-of-text token stands before a document as much as behind one: as an input it is the first of the next document,
whose first token it predicts from an empty state, as in generation. So every token is predicted, and none from the
document before its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.compiler.disable  # their number is known at run time alone
def document_boundaries(ids_BT: Tensor, end_of_text: int) -> Tensor:
    """Where documents begin in the rows laid end to end, and the end of all, [N + 1] int32: at the first token of each
    row and at each end-of-text token."""
    begins_BT = ids_BT == end_of_text
    begins_BT[:, 0] = True
    begins = begins_BT.flatten().nonzero().flatten()
    found = F.pad(begins, (0, 1), value=ids_BT.numel()).int()
    torch._dynamo.maybe_mark_dynamic(found, 0)  # blocks compile once for any number of documents
    return found


def all_linear(model: PreTrainedModel) -> bool:
    """Whether every layer is linear, so that time and memory are proportional to the length of a row."""
    config = getattr(model.config, "linear_config", model.config)
    return all(kind == "linear_attention" for kind in getattr(config, "layer_types", None) or ("softmax",))


def document_logits(model: nn.Module, ids_BT: Tensor, end_of_text: int, *, together: bool) -> Tensor:
    """[B, T, V] of models that take packed rows.

    together: run all rows as one. Softmax layers build a mask of the square of a row's length, so with them
    (`all_linear` says no) each row is to run alone.
    """
    parts = []
    for rows_BT in [ids_BT] if together else ids_BT.split(1):
        bounds = document_boundaries(rows_BT, end_of_text)
        logits_1NV = model(input_ids=rows_BT.reshape(1, -1), cu_seq_lens_q=bounds, use_cache=False).logits
        parts.append(logits_1NV.view(*rows_BT.shape, -1))
    return parts[0] if together else torch.cat(parts)

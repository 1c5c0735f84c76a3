"""torch.compile by regions: one compilation serves all layers that are alike, so that training starts early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _regions(base: PreTrainedModel) -> list[nn.Module]:
    """The blocks of a base model, which stand in one list, and the norm behind them."""
    children = list(base.children())
    at = next(i for i, child in enumerate(children) if isinstance(child, nn.ModuleList))
    return [*children[at], children[at + 1]]


@contextmanager
def compiled_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Within the context each block of `model`, and its final norm, run compiled; blocks that are alike share the code.

    The rest (embeddings, masks, the head's product) runs eagerly, and a compiled function that calls the model leaves
    it out: compiled, a loss is a region, too. Shapes are taken as fixed; others compile again.
    """
    base = model.base_model
    with ExitStack() as undo:
        # Not whole modules: hooks, which transformers leaves on the blocks, would break the graph.
        for region in _regions(base):
            region.forward = torch.compile(region.forward, dynamic=False)
            undo.callback(delattr, region, "forward")
        # Else the compiler would follow a loss into the model, and through its blocks one by one.
        for whole in {model, base}:
            whole.forward = torch.compiler.disable(whole.forward)
            undo.callback(delattr, whole, "forward")
        yield

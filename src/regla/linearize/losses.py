"""What a converted model learns from its original.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regla.linearize.observe import Attention, observed_attention
from regla.models.student import linear_attention

Loss = Callable[[nn.Module, Tensor], Tensor]


def transfer_loss(original: PreTrainedModel, learning: Iterable[int] | None = None) -> Loss:
    """Attention transfer: mean over the layers `learning` of |mixer(x) - y|^2 / |y|^2.

    x and y are what goes into and comes out of the original's attention. Layers learn independently of each other;
    nothing but their mixers gets a gradient. The loss takes a converted model and crops [B, T + 1], whose last token
    it ignores.

    Args:
        original: the teacher.
        learning: numbers of linear layers; None: all of them.
    """
    numbers = None if learning is None else sorted(learning)

    def loss(model: nn.Module, crop_BL: Tensor) -> Tensor:
        linear = linear_attention(model)
        layers = linear if numbers is None else {number: linear[number] for number in numbers}
        errors: list[Tensor] = []

        def see(number: int, attention: Attention) -> None:
            with torch.enable_grad():
                y = layers[number].mix(attention.x, attention.rotary)
                expected = attention.y.float()
                errors.append((y.float() - expected).square().mean() / expected.square().mean())

        with torch.no_grad(), observed_attention(original, layers, see):
            original.base_model(crop_BL[:, :-1], use_cache=False)
        return torch.stack(errors).mean()

    return loss


def distillation_loss(original: PreTrainedModel) -> Loss:
    """KL(original || model) of the next token in nats, mean over tokens. Crops are full, so no token is masked."""

    def loss(model: nn.Module, crop_BL: Tensor) -> Tensor:
        inputs_BT = crop_BL[:, :-1]
        with torch.no_grad():
            target_BTV = original(input_ids=inputs_BT, use_cache=False).logits.float().log_softmax(-1)
        ours_BTV = model(input_ids=inputs_BT, use_cache=False).logits.float().log_softmax(-1)
        return nn.functional.kl_div(ours_BTV, target_BTV, reduction="none", log_target=True).sum(-1).mean()

    return loss

"""What a converted model learns from its original.

Shape legend: B sequences, T tokens, N = B T, D hidden channels, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regla.linearize.observe import Attention, observed_attention
from regla.models.student import linear_attention

Loss = Callable[[nn.Module, Tensor], Tensor]

LOGITS = 2**27
"""At a time, of each model; those of one token, if the vocabulary is larger."""


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
    """KL(original || model) of the next token in nats, mean over tokens. Crops are full, so no token is masked.

    The logits [N, V] of both models are never there as a whole, see `mean_divergence`.
    """

    def loss(model: nn.Module, crop_BL: Tensor) -> Tensor:
        inputs_BT = crop_BL[:, :-1]
        theirs = cast(PreTrainedModel, model)
        with torch.no_grad():
            target_ND = hidden_states(original, inputs_BT)
        return mean_divergence(original, target_ND, theirs, hidden_states(theirs, inputs_BT))

    return loss


def hidden_states(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """What the head is given for every token, [N, D]."""
    return cast(Tensor, model.base_model(input_ids=ids_BT, use_cache=False)[0]).flatten(0, 1)


class _Hidden:
    """The output of a base model that has hidden states and nothing else."""

    def __init__(self, last_hidden_state: Tensor):
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """A base model that hands on what it is given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **_: Any) -> _Hidden:
        return _Hidden(inputs_embeds)


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """From hidden states [N, D] to logits [N, V] float32, as the model's own class computes them: with its scaling,
    soft-cap and bias."""
    head = copy.copy(model)  # shares every weight
    head._modules = {**model._modules, model.base_model_prefix: _Given()}
    # The class's own forward: that of the instance may be a compiled one, of the whole model.
    forward = type(model).forward
    return lambda h_ND: forward(head, inputs_embeds=h_ND[None], use_cache=False).logits[0].float()


def token_divergences(
    original: PreTrainedModel, target_ND: Tensor, model: PreTrainedModel, h_ND: Tensor
) -> Iterable[Tensor]:
    """KL(original || model) in nats of the tokens, as consecutive parts of [N]."""
    size = max(1, LOGITS // int(original.config.vocab_size))
    theirs, ours = head_of(original), head_of(model)
    for target, h in zip(target_ND.split(size), h_ND.split(size), strict=True):
        with torch.no_grad():
            target_NV = theirs(target).log_softmax(-1)
        yield nn.functional.kl_div(ours(h).log_softmax(-1), target_NV, reduction="none", log_target=True).sum(-1)


@torch.compiler.disable
def mean_divergence(original: PreTrainedModel, target_ND: Tensor, model: PreTrainedModel, h_ND: Tensor) -> Tensor:
    """Mean KL(original || model) over tokens, from the hidden states of both.

    The logits of some tokens at a time are computed, and with them at once the gradients of the hidden states and of
    the head's weights, so that the memory of a step does not grow with N V.
    """
    if not torch.is_grad_enabled():
        return torch.cat(list(token_divergences(original, target_ND, model, h_ND))).mean()
    head = copy.copy(model)
    head._modules = {name: part for name, part in model._modules.items() if name != model.base_model_prefix}
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    return cast(Tensor, _MeanDivergence.apply(original, target_ND, model, h_ND, *weights))


class _MeanDivergence(torch.autograd.Function):
    """See `mean_divergence`. The backward pass multiplies gradients that the forward pass left."""

    @staticmethod
    def forward(
        ctx: Any,
        original: PreTrainedModel,
        target_ND: Tensor,
        model: PreTrainedModel,
        h_ND: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        leaf_ND = h_ND.detach().requires_grad_()
        total = torch.zeros((), device=h_ND.device)
        gradients = [torch.zeros_like(x) for x in (leaf_ND, *weights)]
        with torch.enable_grad():
            for part in token_divergences(original, target_ND, model, leaf_ND):
                nats = part.sum() / len(leaf_ND)
                for gradient, new in zip(gradients, torch.autograd.grad(nats, (leaf_ND, *weights)), strict=True):
                    gradient += new
                total += nats.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return None, None, None, *(gradient * kept for kept in ctx.saved_tensors)

"""What the original's attention sees and gives, layer by layer, as data run through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from regla.models.families import family_of


class Attention(NamedTuple):
    """One layer's attention on one batch."""

    x: Tensor  # [B, T, hidden], what comes in: the normalised hidden state
    rotary: tuple[Tensor, Tensor] | None  # (cos, sin), each [B or 1, T, rotated channels]; None without RoPE
    y: Tensor  # [B, T, hidden], what goes out, behind the output projection


@contextmanager
def observed_attention(
    original: PreTrainedModel, layers: Iterable[int], see: Callable[[int, Attention], None]
) -> Iterator[None]:
    """Within the context, every forward of `original` calls `see(number, attention)` for each of `layers`, in order."""

    def hook(number: int) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            see(number, Attention(x, kwargs.get("position_embeddings"), output[0]))

        return after

    family = family_of(original.config)
    handles = [
        family.attention_of(original, number).register_forward_hook(hook(number), with_kwargs=True) for number in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

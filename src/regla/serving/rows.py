"""Continuous batching of linear layers: what an engine has to store for a layer, and a step of many texts at once.

An engine lays the tokens of all texts of a step end to end, texts of one token first, and keeps a state for each text.

Shapes: N tokens of the step, R texts, C channels of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from regla.layers.attention import ReGLAState
from regla.models.configuration import ReGLAConfig
from regla.models.modeling import linear_mixer


def check_branch(config: ReGLAConfig) -> None:
    """Raise ValueError for linear layers with a window branch."""
    if config.window_branch:
        raise ValueError(
            f"window_branch is {config.window_branch}: vLLM's pages hold the states of linear layers, and no keys and "
            "values beside them; serve the model with `transformers serve`"
        )


def state_layout(config: ReGLAConfig, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape, without the batch, and dtype of each tensor that a linear layer of a model in `dtype` remembers of a text:
    S, m, and the convolution's if there is one, as in `ReGLAState`.

    Raises:
        ValueError: see `check_branch`.
    """
    check_branch(config)
    recurrent = ReGLAConfig(**(config.to_dict() | {"backend": "recurrent"}))  # other backends need real memory
    with FakeTensorMode(), torch.device("cpu"):  # one token through a layer without memory: no option can be forgotten
        mixer = linear_mixer(recurrent, 0)
        rotary = (torch.zeros(1, 1, mixer.head_dim),) * 2 if config.linear_rope else None
        state = mixer(torch.zeros(1, 1, config.hidden_size), rotary=rotary, return_state=True)[1]
    assert state is not None
    parts = ((state.S, torch.float32), (state.m, torch.float32), (state.conv, dtype))
    return [(tuple(part.shape[1:]), kind) for part, kind in parts if part is not None]


def mix_rows(
    mixer: Callable[..., tuple[Tensor, ReGLAState | None]],
    x_NC: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    starts: Sequence[int],
    single: int,
    before: ReGLAState,
) -> tuple[Tensor, ReGLAState]:
    """One step of a layer over texts laid end to end.

    Args:
        mixer: the layer, a `ReGLAAttention` or what is called like one.
        x_NC: hidden states.
        rotary: (cos, sin), each [1, N, D], by the tokens' positions in their own texts; None for no RoPE.
        starts: R + 1 numbers: text r has the tokens starts[r] to starts[r + 1] - 1.
        single: how many texts at the beginning have one token; they are one batch.
        before: the states of the R texts before these tokens, zeros for a new text. It may be overwritten.

    Returns:
        [N, C], and the states after these tokens.
    """
    groups = [(0, single, 1)] if single else []
    groups += [(row, row + 1, starts[row + 1] - starts[row]) for row in range(single, len(starts) - 1)]
    outputs: list[Tensor] = []
    states: list[Any] = []
    for first, last, length in groups:
        rows, tokens = slice(first, last), slice(starts[first], starts[last])
        turned = None if rotary is None else tuple(part[0, tokens].unflatten(0, (-1, length)) for part in rotary)
        y, after = mixer(
            x_NC[tokens].unflatten(0, (-1, length)),
            rotary=turned,
            state=ReGLAState(before.S[rows], before.m[rows], None if before.conv is None else before.conv[rows]),
            return_state=True,
            overwrite_state=True,
        )
        outputs.append(y.flatten(0, 1))
        states.append(after)
    conv = None if before.conv is None else torch.cat([state.conv for state in states])
    S, m = (torch.cat([state[part] for state in states]) for part in (0, 1))
    return torch.cat(outputs), ReGLAState(S, m, conv)

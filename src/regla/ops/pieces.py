"""The decays inside chunks as factors of a token times factors of another.

Shape legend: M chunks (of all sequences and heads), C tokens per chunk, D channels (or 1: one decay for all).

    exp(decay over (s, t]) = exp(B_t) * exp(-B_s),     B_t = sum of the log-decay over (anchor, t]

With one anchor per chunk, its start, the second factor overflows where a gate is small, and behind a reset of -1000
both factors have lost every digit. So each channel of a chunk is cut into *pieces*: a piece ends where B falls below
-reach, and the first token left out is the anchor of the next one, whose sum starts after it. s belongs to one piece; t
reads every piece that began before it. No sum of a piece contains what lies before its anchor, so a reset costs no
digit, and no factor of token t depends on a token after t.

Gates that lose less than `reach` over a chunk need the first piece alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: exp(B_t) is held this much above its value and exp(-B_s) as much below: the two share float32's range. With features
#: lifted by 2^48 = e^33 (`regla.ops.features.LIFT`), scores are up to e^37 over 64 channels; a value below e^5 times
#: exp(-B_s) / UNIT and summed over a chunk then stays below e^80. Behind a key outlier of +108 scores are e^-75, and
#: e^-75 / UNIT = e^-90 still has 20 bits.
UNIT = 2.0**22
#: How far B may fall in one piece, for the value axis and the key axis. The key axis has less room: its exp(-B_s) meets
#: gradients of scores that hold gradients of outputs times values, and lifted keys.
REACH_VALUE, REACH_KEY = 48.0, 37.0
#: Where exp(B) would not be a normal number, it is exp(-_FAR) * exp(B + _FAR), one after the other.
_FAR = 80.0


class Piece(NamedTuple):
    """One piece of some chunks. Without decay all fields are None."""

    rows: Tensor | None  # [m] the chunks that have this piece; None: all M
    grow: Tensor | None  # [m, C, D] UNIT * exp(B_t), 0 before the anchor
    shrink: Tensor | None  # [m, C, D] exp(-B_s) / UNIT, 0 outside the piece
    after: Tensor | None  # [m, C, D] bool, tokens whose log-decay B contains; None: all
    far: tuple[Tensor, Tensor] | None  # of these of its chunks [n] a second factor of exp(B_t), [n, C, D]

    def pick(self, x: Tensor) -> Tensor:
        """The chunks of x [M, ...] that have this piece."""
        return x if self.rows is None else x[self.rows]

    def add(self, total: Tensor | None, part: Tensor) -> Tensor:
        """total [M, ...] + part [m, ...], in place; None is the total of no piece: the first one has all chunks."""
        if total is None or self.rows is None:
            return part if total is None else total.add_(part)
        return total.index_add_(0, self.rows, part)

    def grown(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """x [m, G*C, D'] times UNIT * exp(B_t) times `factor`, with G queries per token, C varying faster."""
        if self.grow is None:
            return x if factor == 1.0 else x * factor
        m, C, _ = self.grow.shape
        x_mGCD: Tensor = torch.addcmul(x.new_zeros(()), x.view(m, -1, C, x.shape[-1]), self.grow[:, None], value=factor)
        if self.far is not None:
            rows, second = self.far
            x_mGCD[rows] *= second[:, None]
        return x_mGCD.view(m, -1, x.shape[-1])

    def shrunk(self, x: Tensor) -> Tensor:
        """x [m, C, D'] times exp(-B_s) / UNIT."""
        return x if self.shrink is None else x * self.shrink

    def end(self) -> Tensor:
        """[m, 1, D] exp(B) at the chunk's end."""
        assert self.grow is not None
        end = self.grow[:, -1:] / UNIT
        if self.far is not None:
            rows, second = self.far
            end[rows] *= second[:, -1:]
        return end


def pieces(g: Tensor | None, reach: float) -> list[Piece]:
    """The pieces of log-decays g [M, C, D] <= 0. Waits for the device once, and a few times more where one piece is not
    enough."""
    if g is None:
        return [Piece(None, None, None, None, None)]
    B = g.cumsum(1)
    rows = (B[:, -1] < -reach).any(1).nonzero()[:, 0]
    b = B[rows]
    grow = B.exp_().mul_(UNIT)
    shrink = grow.reciprocal()
    if not len(rows):
        return [Piece(None, grow, shrink, None, None)]
    left = b < -reach  # tokens that no piece has so far: from some token to the end of the chunk
    grow[rows], far = _grow(b)
    shrink[rows] = torch.where(left, 0.0, shrink[rows])
    found = [Piece(None, grow, shrink, None, None if far is None else (rows, far))]
    g = g[rows]
    while len(rows):
        after = left.roll(1, 1) & left
        after[:, 0] = False
        b = torch.where(after, g, 0.0).cumsum(1)
        begun, left = left, left & (b < -reach)
        grow, far = _grow(b.masked_fill(~begun, -math.inf))
        shrink = torch.where(begun & ~left, b.exp().mul_(UNIT).reciprocal_(), 0.0)
        found.append(
            Piece(
                rows, grow, shrink, after, None if far is None else (torch.arange(len(rows), device=rows.device), far)
            )
        )
        again = left.flatten(1).any(1)
        rows, left, g = rows[again], left[again], g[again]
    return found


def _grow(B: Tensor) -> tuple[Tensor, Tensor | None]:
    """UNIT * exp(B) in up to two factors, none of them a denormal number; the second is 1 down to -_FAR."""
    beyond = B + _FAR
    if not ((beyond < 0) & (beyond > -_FAR)).any():
        return torch.where(beyond < 0, 0.0, B.exp().mul_(UNIT)), None
    far = beyond.clamp_max(0.0).masked_fill_(beyond < -_FAR, -math.inf).exp_()
    return B.clamp_min(-_FAR).exp_().mul_(UNIT), far

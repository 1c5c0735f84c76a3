"""A short softmax attention beside the recurrence: over the last tokens and the first few, in linear time.

    o_t = (1 - a) r_t + a sum_s p_ts v_s,    p_t = softmax over s of scale q_t . k_s,    a = sigmoid(logit), one a head

r_t is the output of the recurrence, behind its norm and output gate; s runs over the last `size` tokens, t included,
and the first `sinks` of the text. Queries are cut into blocks, each of which sees the tokens near one of its own.

Shape legend: B batch, T tokens of this call, HQ query heads, H key heads, K, V channels of a key and a value, C their
sum; N blocks of n queries, L = n + size - 1 tokens near them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from regla.ops.call import owners

Kept = tuple[Tensor, Tensor]
"""What the branch remembers: keys and values [B, sinks + size - 1, H, C] of the first `sinks` tokens and of the last
size - 1, the newest behind; and how many tokens there were, [B] int64. Zeros: nothing yet."""

_BLOCK = 64  # least queries of a block: a tile of attention kernels


class WindowBranch(nn.Module):
    """
    Args:
        num_heads: query heads.
        size: tokens that a query sees, itself included.
        sinks: first tokens of the text that every later query sees, too.
        scale: what q . k is multiplied by.
        dropout: in training, how likely it is that a text goes without the branch (a = 0), so that the recurrence
            learns to do alone.
    """

    def __init__(self, num_heads: int, size: int, sinks: int, scale: float, dropout: float):
        super().__init__()
        self.size, self.sinks, self.scale, self.dropout = size, sinks, scale, dropout
        self.logit = nn.Parameter(torch.zeros(num_heads))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, past: Kept | None
    ) -> tuple[Tensor, Kept]:
        """Softmax attention [B, T, HQ, V] of q [B, T, HQ, K] over k [B, T, H, K] and v [B, T, H, V], and what to keep.

        mask [B, T] bool, True for real tokens: padding, wherever it lies, is passed over. cu_seqlens [texts + 1] int:
        boundaries of texts packed into one row, which remember nothing.
        """
        if mask is not None and cu_seqlens is not None:
            raise ValueError("mask is given with cu_seqlens, which a window branch does not take; leave padding out")
        B, T = q.shape[:2]
        kv = torch.cat([k, v], -1)
        if past is None:
            past = kv.new_zeros(B, self.sinks + self.size - 1, *kv.shape[2:]), kv.new_zeros(B, dtype=torch.long)
        kept, seen = past[0].to(kv.dtype), past[1]
        if mask is not None and T > 1:  # the real tokens of every row together, at its beginning
            real_first = torch.argsort(~mask, dim=1, stable=True)
            q, kv = _at(q, real_first), _at(kv, real_first)
        history = torch.cat([kept[:, self.sinks :], kv], 1)
        after = self._kept(kept, seen, kv, history, mask)
        if cu_seqlens is not None:
            return self._packed(q, kv, history, cu_seqlens), after
        o = self._rows(q, history, after[0][:, : self.sinks], seen)
        if mask is not None:
            o = o if T == 1 else _at(o, (mask.cumsum(1) - 1).clamp_min(0))
            o = torch.where(mask[..., None, None], o, 0.0)
        return o, after

    def mix(self, recurrence: Tensor, near: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """(1 - a) recurrence + a near, both [B, T, HQ, V]; in training by dropout a = 0 for whole texts."""
        share = torch.sigmoid(self.logit.float())[:, None]
        if self.training and self.dropout:
            B, T = recurrence.shape[:2]
            texts = B if cu_seqlens is None else len(cu_seqlens) - 1
            stays = torch.rand(texts, device=share.device) >= self.dropout
            stays = stays[:, None] if cu_seqlens is None else stays[owners(cu_seqlens, T)][None]
            share = share * stays[..., None, None]
        return recurrence + share.to(recurrence.dtype) * (near.to(recurrence.dtype) - recurrence)

    def _kept(self, kept: Tensor, seen: Tensor, kv: Tensor, history: Tensor, mask: Tensor | None) -> Kept:
        """What there is to remember behind the tokens of this call."""
        T, last = kv.shape[1], history[:, kv.shape[1] :]
        total = seen + (T if mask is None else mask.sum(1))
        if mask is not None:
            last = _at(history, mask.sum(1, keepdim=True) + torch.arange(self.size - 1, device=kv.device))
        slot = torch.arange(self.sinks, device=kv.device)
        source = torch.where(slot < seen[:, None], slot, self.sinks + slot - seen[:, None])
        first = _at(torch.cat([kept[:, : self.sinks], kv], 1), source.clamp_max(self.sinks + T - 1))
        first = torch.where((slot < total[:, None])[..., None, None], first, 0.0)
        return torch.cat([first, last], 1), total  # a copy: parts of `history` would keep all of it

    def _rows(self, q: Tensor, history: Tensor, first: Tensor, seen: Tensor) -> Tensor:
        """Attention of rows whose tokens are all real: q [B, T, HQ, K], history [B, size - 1 + T, H, C], the first
        tokens [B, sinks, H, C], and the number [B] of tokens before these."""
        T = q.shape[1]
        n, N = self._blocks(T)
        rest = (0, 0, 0, 0, 0, N * n - T)
        near = pad(history, rest).unfold(1, n + self.size - 1, n).movedim(-1, 2)
        before = seen[:, None] + n * torch.arange(N, device=q.device)
        o = self._attend(pad(q, rest).unflatten(1, (-1, n)), near, first[:, None].expand(-1, N, -1, -1, -1), before)
        return o.flatten(1, 2)[:, :T]

    def _packed(self, q: Tensor, kv: Tensor, history: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The same of texts packed into one row, of which each is cut into blocks by itself."""
        T, texts = q.shape[1], len(cu_seqlens) - 1
        n, _ = self._blocks(T)
        blocks = -(-cu_seqlens.diff() // n)  # of each text
        last = blocks.cumsum(0)
        block = torch.arange(T // n + texts, device=q.device)  # there are at most so many
        text = torch.searchsorted(last, block, right=True).clamp_max(texts - 1)
        before = n * (block - (last - blocks)[text])
        start = cu_seqlens[text] + before
        queries = start[:, None] + torch.arange(n, device=q.device)
        keys = start[:, None] + torch.arange(n + self.size - 1, device=q.device)
        sinks = cu_seqlens[text][:, None] + torch.arange(self.sinks, device=q.device)
        # What lies behind the end is not seen, and is any token: of one alone the gradient would be a long sum.
        q = q[:, queries % T]
        near = history[:, keys % history.shape[1]]
        o = self._attend(q, near, kv[:, sinks.clamp_max(T - 1)], before[None])
        owner = owners(cu_seqlens, T)
        place = torch.arange(T, device=q.device) - cu_seqlens[owner]
        return o.flatten(1, 2)[:, (last - blocks)[owner] * n + place]

    def _blocks(self, T: int) -> tuple[int, int]:
        """Queries of a block, and the number of blocks of T tokens."""
        if torch.compiler.is_exporting() and isinstance(cast(object, T), torch.SymInt):
            raise ValueError(
                "the number of tokens is open, and a program with a window branch has one number of blocks; export it "
                "for one length: leave the tokens out of dynamic_shapes"
            )
        n = min(max(self.size, _BLOCK), T)
        return n, -(-T // n)

    def _attend(self, q: Tensor, near: Tensor, first: Tensor, before: Tensor) -> Tensor:
        """Of blocks: q [B, N, n, HQ, K], near [B, N, L, H, C], first [B, N, sinks, H, C], and the number [B, N] of
        tokens of the text before a block; [B, N, n, HQ, V]."""
        (B, _, n, HQ, K), w = q.shape, self.size
        query, key = torch.arange(n, device=q.device)[:, None], torch.arange(near.shape[2], device=q.device)
        distance = query + w - 1 - key
        exists = before[..., None, None] + key >= w - 1
        sees_near = (distance >= 0) & (distance < w) & exists
        slot = torch.arange(self.sinks, device=q.device)
        sees_first = before[..., None, None] + query - slot >= w  # nearer ones are among the last
        sees = torch.cat([sees_first, sees_near], -1).flatten(0, 1)[:, None]
        kv = torch.cat([first, near], 2).flatten(0, 1).transpose(1, 2)
        G = HQ // kv.shape[1]
        q = q.flatten(0, 1).unflatten(2, (-1, G)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B N, H, G n, K]
        k, v = kv.split([K, kv.shape[-1] - K], -1)
        with _without_cudnn(q.device):
            o = scaled_dot_product_attention(q, k, v, attn_mask=sees.repeat(1, 1, G, 1), scale=self.scale)
        return o.unflatten(2, (G, n)).permute(0, 3, 1, 2, 4).flatten(2, 3).unflatten(0, (B, -1))

    def extra_repr(self) -> str:
        return f"{len(self.logit)}, size={self.size}, sinks={self.sinks}, dropout={self.dropout}"


def _without_cudnn(device: torch.device) -> AbstractContextManager[object]:
    """On GPUs cuDNN's attention comes first, plans anew for every number of blocks, and with masks has given NaN
    (PyTorch's issue 196678)."""
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if device.type == "cuda" else nullcontext()


def check_window(window_branch: int, window_sinks: int, window_dropout: float) -> None:
    """Raise a ValueError for options of the branch that do not fit."""
    if window_branch < 0:
        raise ValueError(f"window_branch is {window_branch}; expected 0 (none) or the tokens of its window")
    if window_sinks < 0:
        raise ValueError(f"window_sinks is {window_sinks}; expected a number of tokens from 0 on")
    if not 0 <= window_dropout < 1:
        raise ValueError(f"window_dropout is {window_dropout}; expected a probability from 0 to below 1")
    if not window_branch and (window_sinks or window_dropout):
        name, value = ("window_sinks", window_sinks) if window_sinks else ("window_dropout", window_dropout)
        raise ValueError(
            f"{name} is {value}, but window_branch is 0: give the tokens of its window, or leave {name} out"
        )


def _at(x: Tensor, tokens: Tensor) -> Tensor:
    """x [B, T, H, C] at the indices `tokens` [B, m]: [B, m, H, C]."""
    return x.gather(1, tokens[..., None, None].expand(-1, -1, *x.shape[2:]))

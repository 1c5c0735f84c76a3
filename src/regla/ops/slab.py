"""A slab of chunks: what happens inside them, and what they give to and take from the state.

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels, D either, C
tokens per chunk; of a slab: n chunks of every head, M = n*B*H blocks, m of them far.

With b_t the sum of an axis' log-decays from the chunk's start through t, the decay over (s, t] is exp(b_t) exp(-b_s),

    q' = q exp(bk)      k' = k exp(-bk)      v' = v exp(-bv)      P = tril(q' k'^T)
    o = exp(bv) (P v' + q' S)                S_next = exp(bk_C + bv_C) (S + k'^T v')

and all is a few products of matrices. It holds while exp(-b) is a number: down to b = -reach. Tokens beyond that, in
some channel, are *late* there: their exp(-b) is 0, and what they give to others is added by `regla.ops.tree`, which
knows no bound, in the few blocks that have any (*far* ones). Whether a token is late depends on no token after it, and
what the tree adds to tokens before it is exactly 0: changing the future changes no bit of the past.

The gradient of a log-decay is that of all b that contain it, and b_t's is what t reads less what it writes: q dq - k dk
on the key axis, o do - v dv on the value axis, whatever way they were computed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regla.ops import tree

#: exp(b) is held this much above its value and exp(-b) as much below: the two share float32's range. With features
#: lifted by 2^48 = e^33 (`regla.ops.features.LIFT`), scores are up to e^37 over 64 channels; a value below e^5 times
#: exp(-b) and summed over a chunk then stays below e^80. Behind a key outlier of +108 scores are e^-75, and e^-90
#: still has 20 bits.
UNIT = 2.0**22
#: How far b may fall on the value axis and on the key axis. The key axis has less room: its exp(-b) meets gradients of
#: scores, which hold gradients of outputs times values, and lifted keys.
REACH_VALUE, REACH_KEY = 48.0, 37.0
#: Below this exp(b) is 0 in far blocks: what it scales would become denormal numbers, which are slow. In units of UNIT,
#: that forgets what tokens that are not late would give through a decay of more than e^-75.
_SMALLEST = -60.0
#: Stands for any log-decay below it, -inf too: a sum with 0 * -inf in it is not a number.
_NOTHING_LEFT = -1e4


class Scratch:
    """Memory for one slab after another: what stays in a cache is a third faster."""

    def __init__(self, like: Tensor):
        self.like, self.tensors = like, dict[str, Tensor]()

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Uninitialised, of this shape; the last slab may have fewer chunks than the first."""
        size = math.prod(shape)
        if name not in self.tensors or self.tensors[name].numel() < size:
            self.tensors[name] = self.like.new_empty(size)
        return self.tensors[name][:size].view(shape)

    def ones(self, C: int, M: int, name: str) -> Tensor:
        """[M, C, C] "lower" (t >= s), "upper" (t <= s) or "above" (t < s): 1 there, 0 elsewhere."""
        if name not in self.tensors:
            ones = self.like.new_ones(C, C)
            self.tensors[name] = ones.tril_() if name == "lower" else ones.triu_(int(name == "above"))
        return self.tensors[name].expand(M, C, C)


class Decay:
    """The factors of one axis; without a decay there are none: `grow` is None."""

    grow: Tensor | None = None  # [M, C, D] exp(b)
    shrink: Tensor | None = None  # [M, C, D] 1 / exp(-b); infinite for late tokens
    end: Tensor | None = None  # [M, 1, D] over the whole chunk

    def __init__(self, g: Tensor | None, reach: float, scratch: Scratch, name: str):
        """g [n, B, H, 1, C, D]."""
        self.scratch, self.limit, self.is_far, self.zero = scratch, math.log(UNIT) - reach, False, scratch("zero", 1)[0]
        self.zero.zero_()
        if g is None:
            return
        self.g = torch.clamp(g, min=_NOTHING_LEFT, out=scratch(f"g{name}", *g.shape)).flatten(0, 3)
        self.g[:, 0] += math.log(UNIT)  # of which the tree knows nothing: no pair s < t has token 0 between
        M, C, _ = self.g.shape
        self.grow = torch.bmm(scratch.ones(C, M, "lower"), self.g, out=scratch(f"grow{name}", *self.g.shape))
        self.is_far = bool(self.grow[:, -1].amin() < self.limit)

    def far(self) -> Tensor | None:
        """[M] bool, the blocks that have late tokens; None: there are none."""
        return (self.grow[:, -1] < self.limit).any(-1) if self.is_far and self.grow is not None else None

    def exponentiate(self, far: Tensor | None) -> None:
        """From b to exp(b), with late tokens taken out."""
        if self.grow is None:
            return
        if far is not None:
            self.g, b = self.g[far], self.grow[far]
            self.late = b < self.limit
        self.grow.exp_()
        self.shrink = self.grow
        if far is not None:
            grow = b.exp().masked_fill_(b < _SMALLEST, 0.0)
            self.shrink = self.grow.clone()
            self.grow[far], self.shrink[far] = grow, grow.masked_fill(self.late, math.inf)
        self.end = self.grow[:, -1:] / UNIT

    def grown(self, x: Tensor, factor: float, out: Tensor) -> Tensor:
        """out = factor * x exp(b); x, out [n, B, H, G, C, D]."""
        if self.grow is None:
            return torch.mul(x, factor, out=out)
        grow = self.grow.view(*x.shape[:3], 1, *x.shape[4:])
        return torch.mul(x, grow, out=out) if factor == 1 else torch.addcmul(self.zero, x, grow, value=factor, out=out)

    def shrunk(self, x: Tensor, factor: float, out: Tensor) -> Tensor:
        """out = factor * x exp(-b); x, out [n, B, H, 1, C, D]."""
        if self.shrink is None:
            return torch.mul(x, factor, out=out)
        shrink = self.shrink.view(x.shape)
        return (
            torch.div(x, shrink, out=out) if factor == 1 else torch.addcdiv(self.zero, x, shrink, value=factor, out=out)
        )

    def decayed(self, x: Tensor, out: Tensor) -> Tensor:
        """out = x [M, C, D] decayed over the whole chunk; x itself where nothing decays."""
        return x if self.end is None else torch.mul(x, self.end, out=out)

    def backward(self, d_b: Tensor, out: Tensor, factor: float) -> None:
        """out [n, B, H, 1, C, D] = factor * gradient of g from that of b [M, C, D]."""
        M, C, D = d_b.shape
        d_g = torch.bmm(self.scratch.ones(C, M, "upper"), d_b, out=self.scratch("x", M, C, D))
        torch.mul(d_g.view(out.shape), factor, out=out)


class Late:
    """What late tokens of the far blocks need: x [m, C, D], the keys or the values, with the axis' decay."""

    def __init__(self, decay: Decay, far: Tensor, x: Tensor):
        self.x, self.x_late = x, x
        self.g: Tensor | None = None
        self.near: Tensor | float = 1.0  # [m, C, D] what is left of a token at the chunk's end if it isn't late
        self.left: Tensor | float = 0.0  # if it is
        if decay.shrink is not None and decay.end is not None:
            self.g, self.late = decay.g, decay.late
            self.x_late = torch.where(decay.late, x, 0.0)
            self.near = decay.end[far] / decay.shrink[far]
            after = torch.bmm(decay.scratch.ones(x.shape[1], len(x), "above"), decay.g)
            self.left = torch.where(decay.late, after.exp_() / UNIT, 0.0)

    def written(self, values: Late) -> Tensor:
        """[m, K, V]: what late keys or late values add to the state; self is the keys."""
        late = (self.x * self.left).transpose(1, 2) @ (values.x * (values.near + values.left))
        return late.baddbmm_((self.x * self.near).transpose(1, 2), values.x * values.left)

    def written_backward(self, other: Late, D: Tensor) -> Tensor:
        """[m, C, D] gradient of x by that, from D [m, D', D], that of the state after the chunk."""
        whole, late = (other.x * (other.near + other.left)) @ D, (other.x * other.left) @ D
        return whole * self.left + late * self.near


def part(x: Tensor, lo: int, hi: int, C: int, H: int) -> Tensor:
    """View [n, B, H, G, C, D] of chunks lo..hi of x [B, T, H*G, D]."""
    B, _, HG, D = x.shape
    return x[:, lo * C : hi * C].view(B, hi - lo, C, H, HG // H, D).permute(1, 0, 3, 4, 2, 5)


class Slab:
    """Chunks lo..hi of all heads. One at a time has the scratch memory; what methods return lies in it."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gk: Tensor | None,
        gv: Tensor | None,
        C: int,
        lo: int,
        hi: int,
        scratch: Scratch,
    ):
        H = k.shape[2]
        self.scratch, self.place = scratch, (lo, hi, C, H)
        q, k, v = (part(x, *self.place) for x in (q, k, v))
        self.q_read, self.shape = q, (*k.shape[:3], k.shape[-1], v.shape[-1])  # n, B, H, K, V
        self.key = Decay(None if gk is None else part(gk, *self.place), REACH_KEY, scratch, "k")
        self.value = Decay(None if gv is None else part(gv, *self.place), REACH_VALUE, scratch, "v")
        flags = [x for x in (self.key.far(), self.value.far()) if x is not None]
        self.far = flags[0].logical_or(flags[-1]).nonzero()[:, 0] if flags else None  # [m]
        self.key.exponentiate(self.far)
        self.value.exponentiate(self.far)
        if self.far is not None:
            self.at = torch.unravel_index(self.far, k.shape[:3])  # the same blocks in views [n, B, H, ...]
            self.late_k = Late(self.key, self.far, self._of_far(k)[:, 0])
            self.late_v = Late(self.value, self.far, self._of_far(v)[:, 0])
        self.q = self.key.grown(q, 1.0, scratch("q", *q.shape)).flatten(3, 4).flatten(0, 2)  # [M, G*C, K]
        self.k = self.key.shrunk(k, 1.0, scratch("k", *k.shape)).flatten(0, 3)  # [M, C, K]
        self.v = self.value.shrunk(v, 1.0, scratch("v", *v.shape)).flatten(0, 3)  # [M, C, V]
        # What is left of k' and v' at the chunk's end, where they by themselves may be large numbers.
        self.k_end = self.key.decayed(self.k, scratch("k_end", *self.k.shape))
        self.v_end = self.value.decayed(self.v, scratch("v_end", *self.v.shape))
        ends = [x for x in (self.value.end, None if self.key.end is None else self.key.end.mT) if x is not None]
        total = ends[0] * ends[1] if len(ends) == 2 else ends[0] if ends else self.k.new_ones(len(self.k), 1, 1)
        self.total = total.unflatten(0, self.shape[:3])  # [n, B, H, K or 1, V or 1]: what a chunk leaves of the state

    def written(self) -> Tensor:
        """[n, B, H, K, V]: what each chunk adds to the state."""
        written = self._product("written", self.k_end.mT, self.v_end)
        if self.far is not None:
            written.index_add_(0, self.far, self.late_k.written(self.late_v))
        return written.view(self.shape)

    def scores(self) -> Tensor:
        """P [M, G*C, C]: q_t . k_s under the decay of the key axis over (s, t], 0 for s > t."""
        P = _causal(self._product("P", self.q, self.k.mT))
        if self.far is not None and self.late_k.g is not None:
            self._add_late(P, tree.scores(self._of_far(self.q_read), self.late_k.x_late, self.late_k.g))
        return P

    def output(self, S: Tensor, scale: float, o: Tensor) -> None:
        """Into o [B, T, H*G, V], from the states S [n, B, H, K, V] before the chunks."""
        P, o = self.scores(), part(o, *self.place)
        read = self._product("x", self.q, S.flatten(0, 2)).baddbmm_(P, self.v)
        self.value.grown(read.view(o.shape), scale, o)
        if self.far is not None and self.late_v.g is not None:
            o[self.at] += tree.read(self._pick(P), self.late_v.x_late, self.late_v.g).mul_(scale)

    def read_backward(self, d_o: Tensor, factor: float) -> Tensor:
        """[n, B, H, K, V]: gradient of the states before the chunks by the tokens that read them, of factor * d_o."""
        self.d_o, self.factor = part(d_o, *self.place), factor
        d = self.value.grown(self.d_o, factor, self.scratch("d", *self.d_o.shape))
        self.d = d.flatten(3, 4).flatten(0, 2)
        return self._product("written", self.q.mT, self.d).view(self.shape)

    def backward(self, S: Tensor, after: Tensor, D: Tensor, o: Tensor, unit: float, grads: list[Tensor | None]) -> None:
        """Into grads, of q, k, v, gk, gv, from the states S before and `after` the chunks and the gradients D of those
        after them, [n, B, H, K, V]; after `read_backward`. All gradients are `unit` above their values."""
        C, P = self.k.shape[1], self.scores()
        d_P = _causal(self._product("d_P", self.d, self.v.mT))
        late = None if self.far is None else self._late_backward(P, d_P, D.flatten(0, 2)[self.far])
        carried = torch.mul(after, D, out=self.scratch("written", *self.shape)).flatten(0, 2)
        S, D = S.flatten(0, 2), D.flatten(0, 2)
        d_q, d_k, d_v, d_gk, d_gv = (None if x is None else part(x, *self.place) for x in grads)
        assert d_q is not None and d_k is not None and d_v is not None

        x = self._product("x", self.d, S.mT).baddbmm_(d_P, self.k)
        self.key.grown(x.view(d_q.shape), 1 / unit, d_q)
        if d_gk is not None:
            read = torch.mul(x, self.q, out=self.scratch("read", *x.shape))
            d_bk = _sum_queries(read.unflatten(1, (-1, C)), 1)
        x = self._product("x", self.v_end, D.mT)
        x = self.key.decayed(x, x).baddbmm_(d_P.mT, self.q)
        self.key.shrunk(x.view(d_k.shape), 1 / unit, d_k)
        if d_gk is not None:
            d_bk.addcmul_(x, self.k, value=-1)
            d_bk[:, -1] += carried.sum(2)
            if late is not None:
                d_bk[self.far] += (late[0] * self._of_far(self.q_read)).sum(1) - (late[1] * self.late_k.x[:, None])[
                    :, 0
                ]
            self.key.backward(d_bk, d_gk, 1 / unit)
        x = self._product("x", self.k_end, D)
        x = self.value.decayed(x, x).baddbmm_(P.mT, self.d)
        self.value.shrunk(x.view(d_v.shape), 1 / unit, d_v)
        if d_gv is not None:
            read = self.scratch("read", *self.d_o.shape)
            torch.addcmul(self.value.zero, self.d_o, part(o, *self.place), value=unit, out=read)  # in this order
            d_bv = _sum_queries(read, 3).flatten(0, 2).addcmul_(x, self.v, value=-1)
            d_bv[:, -1] += carried.sum(1)
            if late is not None:
                d_bv[self.far] -= (late[2] * self.late_v.x[:, None])[:, 0]
            self.value.backward(d_bv, d_gv, 1 / unit)
        for grad, value in zip((d_q, d_k, d_v), late or (), strict=False):
            grad[self.at] += value / unit

    def _late_backward(self, P: Tensor, d_P: Tensor, D: Tensor) -> list[Tensor]:
        """What late tokens add to the gradients of the far blocks' q, k, v, [m, G or 1, C, D]; d_P is completed."""
        k, v, q, d = self.late_k, self.late_v, self._of_far(self.q_read), self._of_far(self.d_o).mul_(self.factor)
        d_q, d_k, d_v = torch.zeros_like(q), k.written_backward(v, D.mT), v.written_backward(k, D)
        if v.g is not None:
            self._add_late(d_P, tree.scores(d, v.x_late, v.g))
            d_v += tree.gather(self._pick(P), d, v.g).mul_(v.late)
        if k.g is not None:
            d_P = self._pick(d_P)
            d_q, d_k = tree.read(d_P, k.x_late, k.g), d_k.add_(tree.gather(d_P, q, k.g).mul_(k.late))
        return [d_q, d_k[:, None], d_v[:, None]]

    def _product(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return torch.bmm(x, y, out=self.scratch(name, len(x), x.shape[1], y.shape[2]))

    def _of_far(self, x: Tensor) -> Tensor:
        """The far blocks [m, G, C, D] of a view [n, B, H, G, C, D]."""
        return x[self.at].to(self.scratch.like.dtype)

    def _pick(self, P: Tensor) -> Tensor:
        """The far blocks of P [M, G*C, C], as [m, G, C, C]."""
        return P[self.far].unflatten(1, (-1, P.shape[-1]))

    def _add_late(self, P: Tensor, late: Tensor) -> None:
        P.index_add_(0, self.far, late.flatten(1, 2))


def _causal(P: Tensor) -> Tensor:
    """P [M, G*C, C] with s > t set to zero, in place."""
    P.view(-1, P.shape[-1], P.shape[-1]).tril_()
    return P


def _sum_queries(x: Tensor, dim: int) -> Tensor:
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim)

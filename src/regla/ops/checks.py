"""Input checks: one sentence with the value, the expectation and the fix.

Shapes are always checked, numbers where that makes no device wait.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from regla.ops.call import Call, QKNorm
from regla.ops.features import KEY_MAX

_numbers_checked = True


@contextmanager
def numbers_unchecked() -> Iterator[None]:
    """Within the context numbers are not checked unless `validate` asks for it: for a caller that looks at the result,
    as a training loop does."""
    global _numbers_checked
    before, _numbers_checked = _numbers_checked, False
    try:
        yield
    finally:
        _numbers_checked = before


def check_decays(gk: Tensor | None, gv: Tensor | None, validate: bool | None, mask: Tensor | None = None) -> None:
    for name, g in (("gk", gk), ("gv", gv)):
        if g is not None and g.numel() and _reads_numbers(g, validate):
            real = g.detach() if mask is None else torch.where(mask[..., None, None], g.detach(), -torch.inf)
            top = real.max().item()
            if not top <= 0:
                raise ValueError(
                    f"{name} holds {top:g}; log-decays are natural logarithms of numbers in [0, 1], so at most 0: "
                    "pass logsigmoid of a gate's logits, or log of the gate"
                )


def check_refine(gk: Tensor | None, gv: Tensor | None, refine_k: Tensor | None, refine_v: Tensor | None) -> None:
    for axis, g, refine in (("k", gk, refine_k), ("v", gv, refine_v)):
        if refine is None:
            continue
        if g is None:
            raise ValueError(f"refine_{axis} is given without g{axis}, the logits of the gate it refines: pass both")
        if g.shape != refine.shape:
            raise ValueError(f"refine_{axis} has shape {list(refine.shape)}; expected {list(g.shape)}, as g{axis} has")


def check_qk_norm(norm: QKNorm, k: Tensor) -> None:
    """That the weights fit the channels of a head, and eps is a number."""
    if not norm.eps >= 0:
        raise ValueError(f"eps of qk_norm is {norm.eps}; expected a number of at least 0")
    for name, weight in (("q", norm.q), ("k", norm.k)):
        if list(weight.shape) != [k.shape[-1]] or weight.device != k.device:
            raise ValueError(
                f"the weight of {name} in qk_norm has shape {list(weight.shape)} on {weight.device}; expected "
                f"[{k.shape[-1]}], one number for each channel of a key, on {k.device}"
            )


def check_pair(initial_state: object) -> None:
    if initial_state is not None and not (isinstance(initial_state, tuple | list) and len(initial_state) == 2):
        raise ValueError(
            f"initial_state is a {type(initial_state).__name__}; expected the pair (S [N, H, K, V], m [N, H]) as "
            "returned with output_final_state=True"
        )


def check_call(call: Call, validate: bool | None) -> None:
    """That everything in a call of the additive rule fits together."""
    q, k, v, gates, _, key_max, mask, cu_seqlens, S, m, qk_norm, *_ = call
    if key_max is not None and key_max not in KEY_MAX:
        raise ValueError(f"key_max is {key_max!r}; expected one of {', '.join(map(repr, KEY_MAX))}")
    if mask is not None and cu_seqlens is not None:
        raise ValueError("mask and cu_seqlens are both given; packed sequences have no padding: pass one of them")
    check_gla(q, k, v, gates.gk, gates.gv, S, cu_seqlens, validate)
    if m is not None and S is not None and m.shape != S.shape[:2]:
        raise ValueError(
            f"m of initial_state has shape {list(m.shape)}; expected [N, H] = {list(S.shape[:2])}, as its S has"
        )
    if mask is not None:
        check_mask(mask, k)
    if qk_norm is not None:
        check_qk_norm(qk_norm, k)
    if gates.rk is not None or gates.rv is not None:
        check_refine(gates.gk, gates.gv, gates.rk, gates.rv)
    elif gates.gk is not None or gates.gv is not None:
        check_decays(gates.gk, gates.gv, validate, mask)


def check_mask(mask: Tensor, k: Tensor) -> None:
    if mask.shape != k.shape[:2]:
        raise ValueError(f"mask has shape {list(mask.shape)}; expected [B, T] = {list(k.shape[:2])}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; expected torch.bool, True for real tokens: use mask.bool()")


def check_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    validate: bool | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("gk", gk), ("gv", gv)):
        if x is None:
            continue
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; expected four dimensions [B, T, heads, channels]")
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}; expected float32, bfloat16 or float64")
    B, T, H, K = k.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} has shape {list(x.shape)}; expected at least one token, head and channel")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {list(v.shape)}; expected [B, T, H, V] with [B, T, H] = {[B, T, H]} as k has")
    if q.shape[:2] != k.shape[:2] or q.shape[-1] != K:
        raise ValueError(f"q has shape {list(q.shape)}; expected [B, T, HQ, K] = [{B}, {T}, HQ, {K}] as k has")
    if q.shape[2] % H:
        raise ValueError(
            f"q has {q.shape[2]} heads and k has {H}; the number of query heads must be a multiple of the key heads"
        )
    for name, g, D in (("gk", gk, K), ("gv", gv, v.shape[-1])):
        if g is not None and (g.shape[:3] != k.shape[:3] or g.shape[-1] not in (D, 1)):
            raise ValueError(f"{name} has shape {list(g.shape)}; expected {[B, T, H, D]} or {[B, T, H, 1]}")
    if v.dtype == torch.float16:
        raise ValueError("v is float16, and so would the output be; its range is too small: use bfloat16 or float32")
    N = B
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"cu_seqlens is given with B = {B}; packed sequences lie in one row: reshape to B = 1")
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; expected integers "
                "[N + 1] with N >= 1 sequences"
            )
        N = cu_seqlens.numel() - 1
        if _reads_numbers(cu_seqlens, validate):
            check_bounds(cu_seqlens.tolist(), T)
    if initial_state is not None and initial_state.shape != (N, H, K, v.shape[-1]):
        raise ValueError(
            f"initial_state has shape {list(initial_state.shape)}; expected [N, H, K, V] = {[N, H, K, v.shape[-1]]}"
        )


def check_bounds(bounds: list[int], T: int) -> None:
    if bounds[0] != 0 or bounds[-1] != T or any(lo > hi for lo, hi in itertools.pairwise(bounds)):
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        raise ValueError(
            f"cu_seqlens is {shown}; expected boundaries that start at 0, ascend, and end at T = {T} "
            "(two equal ones hold an empty sequence)"
        )


def _reads_numbers(x: Tensor, validate: bool | None) -> bool:
    if validate is None:
        return _numbers_checked and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return validate

"""The fused kernels as one differentiable operation, opaque to torch.compile."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, library

from regla.ops.triton.backward import backward_kernel
from regla.ops.triton.forward import forward_kernel

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? gk, Tensor? rk, Tensor? gv, Tensor? rv, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? initial_state, Tensor? before, "
)
_OPTIONS = "float scale, bool safe_exp, bool decaying"


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    rk: Tensor | None,
    gv: Tensor | None,
    rv: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    before: Tensor | None,
    *,
    scale: float,
    safe_exp: bool,
    decaying: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated linear attention, with the safe exponential and the refined gate inside if asked for.

    Args:
        q: [B, T, HQ, K]; k: [B, T, H, K]; v: [B, T, H, V]. Logits of the features with `safe_exp`.
        gk, gv: [B, T, H, K], [B, T, H, V]: natural log-decays, or gate logits where rk, rv are given; None: none.
        rk, rv: logits of the refining gate, as gk, gv.
        mask: [B, T] bool, only with `safe_exp`; cu_seqlens: [N + 1].
        initial_state, before: [N, H, K, V] float32 and [N, H] float32 (`NO_KEY`: no key yet), with `safe_exp`.
        decaying: the stabiliser falls with the slowest channel (key_max "decay"), or never ("running").

    Returns:
        o [B, T, HQ, V] in the dtype of v; in float32 the final state [N, H, K, V] and m [N, H] (0 without `safe_exp`).
    """
    tensors = [None if x is None else _rows(x) for x in (q, k, v, gk, rk, gv, rv)]
    needs = [x for x in (q, k, v, gk, rk, gv, rv, initial_state) if x is not None]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in needs)
    o, final, last, *_ = _forward(*tensors, mask, cu_seqlens, initial_state, before, scale, safe_exp, decaying, keep)
    return o, final, last


def _rows(x: Tensor) -> Tensor:
    """x [B, T, H, D] such that a token's heads and channels lie side by side, at one distance from token to token."""
    _B, T, H, D = x.shape
    aligned = x.stride(3) == 1 and x.stride(2) == D and x.stride(0) == T * x.stride(1)
    return x if aligned or (H == 1 and x.stride(3) == 1 and x.stride(0) == T * x.stride(1)) else x.contiguous()


def _layout(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Sequences, chunks of a sequence (0 with packing), chunks in all (with packing a bound)."""
    B, T = k.shape[:2]
    C = _chunk(k, v)
    if cu_seqlens is None:
        chunks = triton.cdiv(T, C)
        return B, chunks, B * chunks
    N = cu_seqlens.numel() - 1
    return N, 0, T // C + N


def _chunk(k: Tensor, v: Tensor) -> int:
    """32, or as many as float32 operands leave room for."""
    return 16 if v.dtype == torch.float32 and max(k.shape[-1], v.shape[-1]) > 64 else 32


def _common(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor | None) -> dict[str, Any]:
    """What both kernels are compiled for."""
    K, V = k.shape[-1], v.shape[-1]
    gk, rk, gv, rv = gates
    return {
        "G": q.shape[2] // k.shape[2],
        "K": K,
        "V": V,
        "BK": max(16, triton.next_power_of_2(K)),
        "BV": max(16, triton.next_power_of_2(V)),
        "C": _chunk(k, v),
        "KEY": _gate(gk, rk),
        "VALUE": _gate(gv, rv),
        "PRECISION": "tf32x3" if v.dtype == torch.float32 else "tf32",  # of float32 products: 3e-7, not 3e-4
        "num_warps": 8,
        "num_stages": 1,
    }


def _gate(g: Tensor | None, r: Tensor | None) -> str:
    return "none" if g is None else "log" if r is None else "refined"


def _step(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(1)


@library.custom_op(
    "regla::fused_forward",
    mutates_args=(),
    schema=f"({_INPUTS}{_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    rk: Tensor | None,
    gv: Tensor | None,
    rv: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    before: Tensor | None,
    scale: float,
    safe_exp: bool,
    decaying: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """(o, final state, last m, m of every token, the factor of every output, the state before each chunk)."""
    outputs = _outputs(q, k, v, cu_seqlens, safe_exp, keep)
    o, final, last, m, lower, states = outputs
    N, chunks, _ = _layout(k, v, cu_seqlens)
    T, H = k.shape[1:3]
    with torch.cuda.device_of(k):
        forward_kernel[(N * H,)](
            q, k, v, gk, rk, gv, rv, mask, cu_seqlens, initial_state, before,
            o, final, m, lower, states, last,
            scale, T, chunks, H, *map(_step, (q, k, v, gk, rk, gv, rv)),
            SAFE_EXP=safe_exp, DECAYING=decaying, STORE=keep, **_common(q, k, v, gk, rk, gv, rv),
            MASKED=mask is not None, VARLEN=cu_seqlens is not None, INITIAL=initial_state is not None,
        )  # fmt: skip
    return outputs


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, safe_exp: bool, keep: bool
) -> tuple[Tensor, ...]:
    N, _, chunks = _layout(k, v, cu_seqlens)
    B, T, H, K = k.shape
    V, HQ = v.shape[-1], q.shape[2]
    kept = keep and safe_exp
    return (
        v.new_empty(B, T, HQ, V),
        k.new_empty(N, H, K, V, dtype=torch.float32),
        k.new_empty(N, H, dtype=torch.float32) if safe_exp else k.new_zeros(N, H, dtype=torch.float32),
        k.new_empty(B, T if kept else 0, H, dtype=torch.float32),
        k.new_empty(B, T if kept else 0, HQ, dtype=torch.float32),
        v.new_empty(chunks if keep else 0, H, K, V),
    )


@_forward.register_fake
def _(q, k, v, gk, rk, gv, rv, mask, cu_seqlens, initial_state, before, scale, safe_exp, decaying, keep):  # type: ignore[no-untyped-def]
    return _outputs(q, k, v, cu_seqlens, safe_exp, keep)


@library.custom_op(
    "regla::fused_backward",
    mutates_args=(),
    schema=f"(Tensor d_o, Tensor? d_final, {_INPUTS}Tensor m, Tensor lower, Tensor states, float scale, "
    "bool safe_exp) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    d_o: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    rk: Tensor | None,
    gv: Tensor | None,
    rv: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    before: Tensor | None,
    m: Tensor,
    lower: Tensor,
    states: Tensor,
    scale: float,
    safe_exp: bool,
) -> tuple[Tensor, ...]:
    grads = _gradients_like((q, k, v, gk, rk, gv, rv), cu_seqlens)
    N, chunks, _ = _layout(k, v, cu_seqlens)
    T, H = k.shape[1:3]
    with torch.cuda.device_of(k):
        backward_kernel[(N * H,)](
            q, k, v, gk, rk, gv, rv, mask, cu_seqlens, before,
            m, lower, states, d_o.contiguous(), d_final,
            *grads,
            scale, T, chunks, H, *map(_step, (q, k, v, gk, rk, gv, rv)),
            SAFE_EXP=safe_exp, D_FINAL=d_final is not None, **_common(q, k, v, gk, rk, gv, rv),
            MASKED=mask is not None, VARLEN=cu_seqlens is not None, INITIAL=initial_state is not None,
        )  # fmt: skip
    return grads


def _gradients_like(inputs: tuple[Tensor | None, ...], cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    _, k, v, *_ = inputs
    assert k is not None and v is not None
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    like = [k.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]
    return *like, k.new_empty(N, k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


@_backward.register_fake
def _(d_o, d_final, q, k, v, gk, rk, gv, rv, mask, cu_seqlens, *rest):  # type: ignore[no-untyped-def]
    return _gradients_like((q, k, v, gk, rk, gv, rv), cu_seqlens)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, safe_exp, _, _ = inputs
    ctx.options = scale, safe_exp
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    q, _, v, *_, initial_state, _, _, _, _ = tensors
    if d_o is None:
        d_o = v.new_zeros(*q.shape[:3], v.shape[-1])
    *grads, d_initial = _backward(d_o, d_final, *tensors, *ctx.options)
    of_inputs = [None if x is None else d for x, d in zip(tensors, grads, strict=False)]
    return *of_inputs, None, None, None if initial_state is None else d_initial, *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_save)

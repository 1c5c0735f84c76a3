"""The gated delta rule: a state that is erased where it is written. The public operation and its backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regla.ops.call import Call, Gates, masked
from regla.ops.checks import check_decays, check_gla, check_mask
from regla.ops.delta_chunked import chunked_gated_delta_rule
from regla.ops.delta_recurrent import recurrent_gated_delta_rule
from regla.ops.dispatch import BACKENDS, for_forward_mode, why_not_native, why_not_triton
from regla.ops.forward_mode import has_tangents
from regla.ops.native.delta import native_gated_delta_rule

_WIDEST = 128  # channels of a key or value that the kernels take


def gated_delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gk: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention that replaces what the state answers for a key, in place of adding to it.

        S'_t = Diag(exp gk_t) S_{t-1}
        S_t  = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T        o_t = scale * S_t^T q_t

    With keys of length 1 and beta in [0, 2] nothing grows: I - beta k k^T has the eigenvalues 1 - beta and 1.

    Args:
        q: queries [B, T, HQ, K], HQ a multiple of H; consecutive groups of HQ / H query heads share a state.
        k: keys [B, T, H, K], of length at most 1.
        v: values [B, T, H, V].
        beta: how much of the old answer is replaced, [B, T, H], in [0, 2].
        gk: natural-log decays of the key axis, <= 0, [B, T, H, K] or [B, T, H, 1]; None: no decay; -inf forgets
            entirely.
        scale: factor on the output; None means K^-1/2.
        initial_state: [N, H, K, V] state before the first token; N = B, or the number of packed sequences.
        output_final_state: return the state after the last token.
        mask: [B, T] bool, True for real tokens. A padding token writes nothing, decays nothing, and its o is 0.
        cu_seqlens: [N + 1] int, boundaries of sequences packed into one row (B = 1).
        backend: "recurrent" (the definition, token by token), "chunked" (parallel, any device), "native" (kernels in C
            for CPUs, float32 or bfloat16), "triton" (kernels for GPUs, heads of up to 128 channels), or "auto":
            kernels where they can run, else recurrent for one token and chunked for more.
        validate: check the numbers too (decays <= 0, boundaries). None: on the CPU only, where that costs no wait.

    Returns:
        o [B, T, HQ, V] in the dtype of v, and the final state [N, H, K, V], float32 (float64 for float64 input), or
        None. Gradients flow to every input and through the returned state. Products and sums are float32; with
        "triton" and bfloat16 input, operands of products are bfloat16.

    Raises:
        ValueError: shapes that do not fit, positive decays, wrong boundaries, a backend that is unknown or cannot run.

    Source: paper equation 8 (without decay); Yang et al. 2024 (arXiv 2412.06464); docs/math.md.

    >>> q, k, v = torch.randn(3, 1, 10, 2, 4).unbind(0)
    >>> k = torch.nn.functional.normalize(k, dim=-1)
    >>> o, state = gated_delta_attention(q, k, v, torch.rand(1, 10, 2), output_final_state=True)
    >>> o.shape, state.shape
    (torch.Size([1, 10, 2, 4]), torch.Size([1, 2, 4, 4]))
    """
    if mask is not None and cu_seqlens is not None:
        raise ValueError("mask and cu_seqlens are both given; packed sequences have no padding: pass one of them")
    check_gla(q, k, v, gk, None, initial_state, cu_seqlens, validate)
    check_decays(gk, None, validate, mask)
    if list(beta.shape) != list(k.shape[:3]) or beta.device != k.device:
        raise ValueError(
            f"beta has shape {list(beta.shape)} on {beta.device}; expected [B, T, H] = {list(k.shape[:3])}, one number "
            f"for each token and state head, on {k.device}"
        )
    if mask is not None:
        check_mask(mask, k)
        q, k, v = (masked(x, mask) for x in (q, k, v))
        beta = torch.where(mask[..., None], beta, 0.0)
        gk = gk if gk is None else masked(gk, mask)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if has_tangents(x for x in (q, k, v, beta, gk, initial_state) if x is not None):
        backend = for_forward_mode(backend)
    run = _form(backend, k, v, cu_seqlens)
    o, state = run(q, k, v, beta, gk, scale, initial_state, cu_seqlens)
    return o, state if output_final_state else None


def _form(backend: str, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of the backend that `backend` stands for."""
    if backend not in ("auto", *BACKENDS):
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend is {backend!r}; expected one of {names}")
    if backend == "native" or (backend == "auto" and k.is_cpu):
        reason = why_not_native(k, v)
        if reason is None:
            return native_gated_delta_rule
        if backend == "native":
            raise ValueError(f"backend='native' cannot run: {reason}; use 'auto' or 'chunked'")
    is_step = k.shape[1] == 1 and cu_seqlens is None
    if backend == "recurrent" or k.shape[0] == 0 or k.shape[1] == 0 or (backend == "auto" and is_step):
        return recurrent_gated_delta_rule
    if backend == "triton" or (backend == "auto" and k.is_cuda):
        reason = why_not_triton(k, v)
        if reason is None and max(k.shape[-1], v.shape[-1]) > _WIDEST:
            reason = f"a head has {max(k.shape[-1], v.shape[-1])} channels, and the kernels take {_WIDEST}"
        if reason is None:
            return _triton
        if backend == "triton":
            raise ValueError(f"backend='triton' cannot run: {reason}; use 'auto' or 'chunked'")
    return chunked_gated_delta_rule


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gk: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from regla.ops.triton.delta_operation import triton_gated_delta_rule

    return triton_gated_delta_rule(
        Call(q, k, v, Gates(gk=gk, write=beta), scale, cu_seqlens=cu_seqlens, S=initial_state)
    )

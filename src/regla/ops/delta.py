"""The gated delta rule: a state that is erased where it is written. The public operation and its backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regla.ops.additive import normalised, without_padding
from regla.ops.call import Call, Forms, Gates, HeadNorm, QKNorm, masked
from regla.ops.checks import check_call
from regla.ops.delta_chunked import chunked_gated_delta_rule
from regla.ops.delta_recurrent import recurrent_gated_delta_rule
from regla.ops.dispatch import BACKENDS, for_forward_mode, step_engine, why_not_native, why_not_triton
from regla.ops.features import UNIT_MAPS
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
    call = Call(q, k, v, Gates(gk=gk, write=beta), _scale(scale, k), None, mask, cu_seqlens, initial_state)
    o, state, _ = attend_delta(call, Forms(), backend, validate=validate)
    return o, state if output_final_state else None


def regla_delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor,
    refine: Tensor,
    *,
    feature_map: str = "unit_safe_exp",
    beta_max: float = 1.0,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
    qk_norm: QKNorm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta_attention` from raw logits: features of unit length, a refined gate on the key axis, and beta.

        phi(x) = e / |e|,  e_i = exp(x_i - max_j x_j) or silu(x_i)
        F_t = (1 - r_t) g_t^2 + r_t (1 - (1 - g_t)^2)
        S'_t = Diag(F_t) S_{t-1}
        S_t  = S'_t + b_t phi(k_t) (v_t - S'_t^T phi(k_t))^T        o_t = scale * S_t^T phi(q_t)

    with g = sigmoid(gate), r = sigmoid(refine), b = beta_max * sigmoid(beta). The kernels for GPUs form all of these
    inside, forward and backward: nothing of them is stored.

    Args:
        q: query logits [B, T, HQ, K], HQ a multiple of H; consecutive groups of HQ / H query heads share a state.
        k: key logits [B, T, H, K].
        v: values [B, T, H, V].
        beta: logits of b, [B, T, H].
        gate, refine: logits of g and r, [B, T, H, K] or [B, T, H, 1], one for all channels.
        feature_map: which e, "unit_safe_exp" or "unit_silu".
        beta_max: the largest b, above 0 and at most 2.
        qk_norm: weights [K] and eps of an RMS norm over the channels of each head of q and k, which goes before
            everything above.
        scale, initial_state, output_final_state, mask, cu_seqlens, backend, validate: as in `gated_delta_attention`.

    Returns:
        o [B, T, HQ, V] in the dtype of v, and the final state [N, H, K, V], float32 (float64 for float64 input), or
        None. Gradients flow to every input and through the returned state.

    Raises:
        ValueError: shapes that do not fit, beta_max out of its range, an unknown map, wrong boundaries, a backend that
            is unknown or cannot run.

    Source: paper equations 8 and 11-13; docs/math.md.

    >>> q, k, v, gate, refine = torch.randn(5, 1, 10, 2, 4).unbind(0)
    >>> o, state = regla_delta_attention(q, k, v, torch.randn(1, 10, 2), gate, refine, output_final_state=True)
    >>> o.shape, state.shape
    (torch.Size([1, 10, 2, 4]), torch.Size([1, 2, 4, 4]))
    """
    if not 0 < beta_max <= 2:
        raise ValueError(f"beta_max is {beta_max}; expected a number above 0 and up to 2, behind which states grow")
    if feature_map not in UNIT_MAPS:
        raise ValueError(f"feature_map is {feature_map!r}; expected one of {', '.join(map(repr, UNIT_MAPS))}")
    gates = Gates(gk=gate, rk=refine, write=beta)
    call = Call(q, k, v, gates, _scale(scale, k), None, mask, cu_seqlens, initial_state, None, qk_norm)
    o, state, _ = attend_delta(call, Forms(feature_map, beta_max), backend, validate=validate)
    return o, state if output_final_state else None


def attend_delta(
    call: Call,
    forms: Forms,
    backend: str,
    *,
    validate: bool | None = None,
    norm: HeadNorm | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, bool]:
    """Check a call of the delta rule and run it.

    Args:
        call: shapes as there; `gates.write` is beta [B, T, H].
        forms: what of it is logits.
        backend, validate: see `gated_delta_attention`.
        norm: of the outputs, taken along where one token is decoded in one launch.
        overwrite: S of the call may be overwritten with the state after it, where that saves a copy.

    Returns:
        o, the state after the last token, and whether o is normalised.

    Raises:
        ValueError: input that does not fit; a backend that is unknown, or is asked for and cannot run.
    """
    _check(call, validate)
    if has_tangents(call.tensors()):
        backend = for_forward_mode(backend)
    elif call.cu_seqlens is None and step_engine(backend, "decay", call.k, call.v, *call.tensors()) == "triton":
        from regla.ops.triton.delta_operation import triton_delta_step_

        S = call.S if overwrite and _can_be_overwritten(call.S) else _copy_of_state(call)
        assert S is not None
        return triton_delta_step_(call, forms, S, norm), S, norm is not None
    run = _form(backend, call.k, call.v, call.cu_seqlens)
    if run is None:
        from regla.ops.triton.delta_operation import triton_gated_delta_rule

        return *triton_gated_delta_rule(call, forms), False
    q, k, v, gates, scale, _, _, cu_seqlens, S, *_ = _formed(call, forms)
    return *run(q, k, v, gates.write, gates.gk, scale, S, cu_seqlens), False


def _can_be_overwritten(S: Tensor | None) -> bool:
    return S is not None and S.dtype == torch.float32 and S.is_contiguous() and not S.requires_grad


def _copy_of_state(call: Call) -> Tensor:
    """A state to overwrite: the call's numbers in float32, or zeros."""
    B, _, H, K = call.k.shape
    if call.S is None:
        return call.k.new_zeros(B, H, K, call.v.shape[-1], dtype=torch.float32)
    return torch.empty(call.S.shape, dtype=torch.float32, device=call.S.device).copy_(call.S)


def _scale(scale: float | None, k: Tensor) -> float:
    return k.shape[-1] ** -0.5 if scale is None else scale


def _check(call: Call, validate: bool | None) -> None:
    check_call(call, validate)
    beta, k = call.gates.write, call.k
    assert beta is not None
    if list(beta.shape) != list(k.shape[:3]) or beta.device != k.device:
        raise ValueError(
            f"beta has shape {list(beta.shape)} on {beta.device}; expected [B, T, H] = {list(k.shape[:3])}, one number "
            f"for each token and state head, on {k.device}"
        )


def _formed(call: Call, forms: Forms) -> Call:
    """The call with features, log-decays and beta in place of logits, and with padding that does nothing."""
    mask = call.mask
    if mask is not None:  # what padding holds may be nan, which gradients would meet
        call = without_padding(call)
    if call.qk_norm is not None:
        call = normalised(call)
    q, k, gates = call.q, call.k, call.gates
    gk, _ = gates.logarithms()
    beta = gates.write
    assert beta is not None
    if forms.features != "given":
        unit = UNIT_MAPS[forms.features]
        q, k = unit(q), unit(k)
    if forms.beta_max:
        beta = forms.beta_max * torch.sigmoid(beta.to(torch.promote_types(beta.dtype, torch.float32)))
    if mask is not None:
        q, k = masked(q, mask), masked(k, mask)
        gk = gk if gk is None else masked(gk, mask)
        beta = torch.where(mask[..., None], beta, 0.0)
    return call._replace(q=q, k=k, gates=Gates(gk=gk, write=beta))


def _form(backend: str, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function of features of the backend that `backend` stands for; None: the kernels for GPUs, which take
    logits."""
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
            return None
        if backend == "triton":
            raise ValueError(f"backend='triton' cannot run: {reason}; use 'auto' or 'chunked'")
    return chunked_gated_delta_rule

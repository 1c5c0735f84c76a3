"""The public operations: check the input, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from regla.ops.backends import choose_backend, step_engine
from regla.ops.checks import check_decays, check_gla, check_qk_norm, check_refine, check_regla, check_together
from regla.ops.chunked import chunked_gated_linear_attention
from regla.ops.features import (
    NO_KEY,
    key_stabiliser,
    lifted_key_features,
    lowering,
    safe_exp_query,
    variance_reduction,
)
from regla.ops.fused import QKNorm, fused_step_
from regla.ops.gates import log_refined_gate
from regla.ops.recurrent import recurrent_gated_linear_attention
from regla.ops.slices import fits, fused, with_kernels
from regla.ops.units import with_gradient_times

# Outputs are lowered by 2^48 behind these forms, and so are their gradients, of which small ones would vanish: between
# there and the inputs gradients are so many times as large. More would leave no room for those behind an outlier.
_GRADIENT_LIFTS = {"recurrent": 2.0**20, "triton": 2.0**16}

_FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "recurrent": recurrent_gated_linear_attention,
    "chunked": chunked_gated_linear_attention,
    "native": partial(with_kernels, "native"),
    "triton": partial(with_kernels, "triton"),
}


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention whose state decays along the key axis, the value axis, both or neither.

        S_t = Diag(exp gk_t) S_{t-1} Diag(exp gv_t) + k_t v_t^T        o_t = scale * S_t^T q_t

    Args:
        q: queries [B, T, HQ, K], HQ a multiple of H; consecutive groups of HQ / H query heads share a state.
        k: keys [B, T, H, K].
        v: values [B, T, H, V].
        gk: natural-log decays of the key axis, <= 0, [B, T, H, K] or [B, T, H, 1]; -inf forgets entirely.
        gv: natural-log decays of the value axis, <= 0, [B, T, H, V] or [B, T, H, 1].
        scale: factor on the output; None means K^-1/2.
        initial_state: [N, H, K, V] state before the first token; N = B, or the number of packed sequences.
        output_final_state: return the state after the last token.
        cu_seqlens: [N + 1] int, boundaries of sequences packed into one row (B = 1): 0, ..., T, ascending; two equal
            ones hold an empty sequence, whose state stays as it is.
        backend: "recurrent" (the definition, token by token), "chunked" (parallel, any device), "native" (kernels in C
            for CPUs, compiled at their first use), "triton" (fused kernels for GPUs), or "auto": kernels where they can
            run; else recurrent for one token and chunked for more. In float32 "recurrent" and "native" keep half-lives
            of up to about 1e5 tokens (docs/math.md).
        validate: check the numbers too (decays <= 0, boundaries). None: on the CPU only, where that costs no wait.

    Returns:
        o [B, T, HQ, V] in the dtype of v, and the final state [N, H, K, V], float32 (float64 for float64 input), or
        None. Gradients flow to every input and through the returned state. Products and sums are float32.

    Raises:
        ValueError: shapes that do not fit, float16 values, positive decays, wrong boundaries, unknown backend.

    Source: paper equations 3-10; Yang et al. 2024 (arXiv 2312.06635) for key-axis gates.

    >>> q, k, v = torch.randn(3, 1, 10, 2, 4).unbind(0)
    >>> o, state = gated_linear_attention(q, k, v, gv=-torch.rand(1, 10, 2, 4), output_final_state=True)
    >>> o.shape, state.shape
    (torch.Size([1, 10, 2, 4]), torch.Size([1, 2, 4, 4]))
    """
    check_gla(q, k, v, gk, gv, initial_state, cu_seqlens, validate)
    check_decays(gk, gv, validate)
    backend = choose_backend(backend, k, v, cu_seqlens)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    o, state = _FORMS[backend](q, k, v, gk, gv, scale, initial_state, cu_seqlens)
    return o, state if output_final_state else None


def safe_exp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    *,
    refine_k: Tensor | None = None,
    refine_v: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_max: str = "decay",
    backend: str = "auto",
    validate: bool | None = None,
    qk_norm: QKNorm | None = None,
    qkv: Tensor | None = None,
    gates: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """`gated_linear_attention` on safe exponential features of raw q, k: any log-decays, or none.

        m_t = max(m_{t-1} + max_i gk_{t,i} + max_j gv_{t,j}, max_i k_{t,i})                           (key_max "decay")
        S_t = exp(m_{t-1} - m_t) Diag(exp gk_t) S_{t-1} Diag(exp gv_t) + exp(k_t - m_t) v_t^T
        h_t = scale * S_t^T exp(q_t - max_i q_{t,i})

    h_t equals what the paper's formula gives up to one positive factor per token and head, which a scale-free
    normalisation removes; without one, h depends on m, and m takes no gradient. The state is kept as 2^48 S_t: what
    comes back as S goes back in as S, and is of use nowhere else. See `regla_attention` for arguments, shapes, dtypes
    and errors; gk, gv as in `gated_linear_attention`, or, of an axis whose `refine_` is given, the gate's logits: its
    log-decays are then `log_refined_gate(gk, refine_k)`, `log_refined_gate(gv, refine_v)`. With kernels a
    single token that needs no gradient is one call, `safe_exp_step_` on copies of S and m.

    qk_norm: weights [K] and eps of an RMS norm over the channels of each head of q and k, which goes before everything
    above; the kernels for GPUs do it inside. Not while a single token is decoded.

    qkv and gates [B, T, channels], both optional: contiguous tensors of which q, k, v and gk, gv, refine_k, refine_v
    (those that there are) are the channels in this order, the heads of each side by side. With kernels the gradients of
    these are then one tensor from the start.
    """
    check_regla(q, k, v, gk, gv, initial_state, mask, cu_seqlens, key_max, validate)
    check_refine(gk, gv, refine_k, refine_v)
    check_qk_norm(qk_norm, k)
    check_together("qkv", qkv, {"q": q, "k": k, "v": v})
    check_together("gates", gates, {"gk": gk, "gv": gv, "refine_k": refine_k, "refine_v": refine_v})
    if refine_k is None and refine_v is None:
        check_decays(gk, gv, validate, mask)
    scale = variance_reduction(k.shape[-1]) if scale is None else scale
    S0 = None if initial_state is None else initial_state[0]
    weights = () if qk_norm is None else (qk_norm.q, qk_norm.k)
    others = q, gk, gv, refine_k, refine_v, S0, *weights
    engine = step_engine(backend, key_max, k, v, *others) if cu_seqlens is None else None
    if engine is not None:
        q, k = _normalised(q, k, qk_norm, mask)
        S, m = _copy_of_state(initial_state, k, v)
        h = safe_exp_step_(
            q,
            k,
            v,
            S,
            m,
            gk,
            gv,
            refine_k=refine_k,
            refine_v=refine_v,
            scale=scale,
            mask=mask,
            key_max=key_max,
            engine=engine,
        )
        return h, _empty_as_zero(S, m) if output_final_state else None
    backend = choose_backend(backend, k, v, cu_seqlens, key_max)
    inside = backend == "native" or (backend == "triton" and fits(q, k, v, gk, gv))
    state, before = (None, None) if initial_state is None else initial_state
    if state is not None and before is not None:
        # Zeros are an empty state, whatever m says.
        before = torch.where((state.detach() == 0).all(-1).all(-1), NO_KEY, before.detach())
    if qk_norm is not None and not (inside and backend == "triton"):
        q, k = _normalised(q, k, qk_norm, mask)
        qk_norm, qkv = None, None
    if inside:
        h, final, after = fused(
            backend,
            q,
            k,
            v,
            gk,
            gv,
            refine_k,
            refine_v,
            mask,
            cu_seqlens,
            state,
            before,
            scale,
            safe_exp=True,
            key_max=key_max,
            qk_norm=qk_norm,
            qkv=qkv,
            gates=gates,
        )
        return h, _empty_as_zero(final, after) if output_final_state else None
    if mask is not None:
        real = mask[..., None, None]
        q, k, v = (torch.where(real, x, 0.0) for x in (q, k, v))  # by choice, not by product: 0 * nan is nan
        gk, gv, refine_k, refine_v = (
            None if g is None else torch.where(real, g, 0.0) for g in (gk, gv, refine_k, refine_v)
        )
    gk = gk if gk is None or refine_k is None else log_refined_gate(gk, refine_k)
    gv = gv if gv is None or refine_v is None else log_refined_gate(gv, refine_v)
    if mask is not None:  # a refined gate of logits 0 decays by a half
        gk, gv = (None if g is None else torch.where(real, g, 0.0) for g in (gk, gv))
    slowest_k, slowest_v = (None if g is None else g.detach().amax(-1) for g in (gk, gv))
    slowest = slowest_k if slowest_v is None else slowest_v if slowest_k is None else slowest_k + slowest_v
    m, unit, after = key_stabiliser(k, slowest, key_max=key_max, initial_max=before, mask=mask, cu_seqlens=cu_seqlens)
    # The change of unit goes to one axis. With both, the key axis keeps its gates relative to its slowest channel, so
    # that what each axis decays by stays <= 1 by itself.
    if gk is None and gv is None:
        gk = unit[..., None]
    elif gv is None:
        gk = gk + unit[..., None]  # type: ignore[operator]
    elif gk is None:
        gv = gv + unit[..., None]
    else:
        assert slowest_k is not None
        slowest_k = slowest_k.clamp_min(NO_KEY)[..., None]  # a gate of exactly 0 has -inf, and inf - inf is nan
        gk = gk - slowest_k
        gv = gv + (unit[..., None] + slowest_k)
    phi_q = safe_exp_query(q)
    if mask is not None:
        phi_q = torch.where(real, phi_q, 0.0)
    phi_k = lifted_key_features(k, m, mask)
    if backend == "chunked":
        h, final = chunked_gated_linear_attention(phi_q, phi_k, v, gk, gv, scale, state, cu_seqlens, lifted=True)
    else:
        up, inputs = _GRADIENT_LIFTS[backend], [phi_q, phi_k, v, gk, gv, state]
        *inputs, state = (None if x is None else with_gradient_times(1 / up, x) for x in inputs)
        h, final = _FORMS[backend](*inputs, scale, state, cu_seqlens)
        h, final = with_gradient_times(up, h * lowering(h)), with_gradient_times(up, final)
    return h, _empty_as_zero(final, after) if output_final_state else None


def safe_exp_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor,
    m: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    *,
    refine_k: Tensor | None = None,
    refine_v: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    key_max: str = "decay",
    engine: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`safe_exp_attention` of one token in one launch: overwrites S and m and returns h, or h normalised.

    Only for inputs that `regla.ops.backends.step_engine` accepts. No gradient flows.

    Args:
        q, k, v, gk, gv, refine_k, refine_v, scale, mask, key_max: as in `safe_exp_attention`, with T = 1.
        S: [B, H, K, V] and m: [B, H], float32, contiguous: the state before the token, then the one after it.
        engine: what `step_engine` says: "native" or "triton".
        weight, bias: [HQ, V], of the norm over h: the scale-free RMS norm (weight alone) or layer norm (both).
        eps: of the norm.

    Returns:
        [B, 1, HQ, V] in the dtype of v.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_regla(q, k, v, gk, gv, (S, m), mask, None, key_max, validate=False)
    scale = variance_reduction(k.shape[-1]) if scale is None else scale
    decaying = key_max == "decay"
    return fused_step_(q, k, v, gk, refine_k, gv, refine_v, mask, S, m, weight, bias, scale, decaying, eps, engine)


def regla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    refine: Tensor,
    *,
    gate_axis: str = "value",
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_max: str = "decay",
    backend: str = "auto",
    validate: bool | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Refining gated linear attention from raw logits.

        F_t = (1 - r_t) g_t^2 + r_t (1 - (1 - g_t)^2),   g = sigmoid(gate), r = sigmoid(refine)
        S_t = S_{t-1} Diag(F_t) + phi_k(k_t) v_t^T       (gate_axis "value"; "key": Diag(F_t) S_{t-1}; "both": both)
        h_t = scale * S_t^T phi_q(q_t)

    with phi the safe exponential. Raw h is known up to one positive factor per token and head (`safe_exp_attention`):
    put a scale-free normalisation behind it (`regla.layers.norms`), and keep h in float32 or bfloat16.

    Args:
        q: query logits [B, T, HQ, K], HQ a multiple of H; consecutive groups of HQ / H query heads share a state.
        k: key logits [B, T, H, K].
        v: values [B, T, H, V].
        gate, refine: logits of g and r, [B, T, H, V] for gate_axis "value", [B, T, H, K] for "key", [B, T, H, K + V]
            (key axis first) for "both"; or [B, T, H, 1], one for all channels, for "value" and "key".
        gate_axis: "value", "key" or "both": which axis of the state decays.
        scale: factor on h; None means the variance reduction factor 1 / (e sqrt(K (e^2 - 1))).
        initial_state: (S [N, H, K, V], m [N, H]) before the first token, as returned; (0, 0) is empty.
        output_final_state: return (S, m) after the last token; S is in units of 2^-48 exp(m).
        mask: [B, T] bool, True for real tokens. A padding token writes nothing, decays nothing, and its h is 0.
        cu_seqlens: [N + 1] int, boundaries of sequences packed into one row (B = 1): 0, ..., T, ascending; two equal
            ones hold an empty sequence, whose state stays as it is.
        key_max: "decay" (default), "running" or "sequence" (not causal): see `safe_exp_key`.
        backend, validate: as in `gated_linear_attention`.

    Returns:
        h [B, T, HQ, V] in the dtype of v, and (S [N, H, K, V], m [N, H]) in float32 (float64 for float64 input) or
        None. Gradients flow to every input, initial S included, and through the returned S; m takes none.

    Raises:
        ValueError: shapes that do not fit, float16 values, unknown names, `mask` together with `cu_seqlens`, wrong
            boundaries.

    Source: paper sections 3.1-3.3.

    >>> q, k, v, gate, refine = torch.randn(5, 1, 10, 2, 4).unbind(0)
    >>> h, (S, m) = regla_attention(q, k, v, gate, refine, output_final_state=True)
    >>> h.shape, S.shape, m.shape
    (torch.Size([1, 10, 2, 4]), torch.Size([1, 2, 4, 4]), torch.Size([1, 2]))
    """
    gk, gv = gate_decays(gate, gate_axis, k.shape[-1], v.shape[-1])
    refine_k, refine_v = gate_decays(refine, gate_axis, k.shape[-1], v.shape[-1])
    return safe_exp_attention(
        q,
        k,
        v,
        gk,
        gv,
        refine_k=refine_k,
        refine_v=refine_v,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        mask=mask,
        cu_seqlens=cu_seqlens,
        key_max=key_max,
        backend=backend,
        validate=validate,
    )


def _normalised(q: Tensor, k: Tensor, norm: QKNorm | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and k, normalised in the dtype of the weights, in their own."""
    if norm is None:
        return q, k
    if mask is not None:  # what padding holds may be nan, which the weights' gradients would meet
        q, k = (torch.where(mask[..., None, None], x, 1.0) for x in (q, k))
    q, k = (rms_norm(x.to(w.dtype), w.shape, w, norm.eps).to(x.dtype) for x, w in ((q, norm.q), (k, norm.k)))
    return q, k


def gate_decays(log_decay: Tensor, gate_axis: str, K: int, V: int) -> tuple[Tensor | None, Tensor | None]:
    """Assign log-decays (or logits) [B, T, H, D] to their axis: (gk, gv), each [B, T, H, ...] or None."""
    width = log_decay.shape[-1]
    expected = {"value": (V, 1), "key": (K, 1), "both": (K + V,)}
    if gate_axis not in expected:
        raise ValueError(f"gate_axis is {gate_axis!r}; expected one of {', '.join(map(repr, expected))}")
    if width not in expected[gate_axis]:
        raise ValueError(
            f"gate has {width} channels; gate_axis={gate_axis!r} with K={K}, V={V} expects "
            f"{' or '.join(map(str, expected[gate_axis]))}: change the gate's last dimension or gate_axis"
        )
    if gate_axis == "value":
        return None, log_decay
    if gate_axis == "key":
        return log_decay, None
    return log_decay[..., :K], log_decay[..., K:]


def _copy_of_state(state: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A state to overwrite: that one's numbers in float32, or an empty one's."""
    if state is None:
        B, _, H, K = k.shape
        return k.new_zeros(B, H, K, v.shape[-1], dtype=torch.float32), k.new_zeros(B, H, dtype=torch.float32)
    S, m = (torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(x) for x in state)
    return S, m


def _empty_as_zero(S: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    return S, torch.where(m < NO_KEY / 2, 0.0, m)  # NaN stays

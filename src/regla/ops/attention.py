"""The public operations: check the input, and hand a call of the additive rule on (`regla.ops.additive`)."""

from __future__ import annotations

from torch import Tensor

from regla.ops.additive import attend
from regla.ops.call import Call, Gates, HeadNorm, QKNorm
from regla.ops.checks import check_call, check_pair
from regla.ops.features import variance_reduction
from regla.ops.fused import fused_step_


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
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    gates = Gates(gk=gk, gv=gv)
    call = Call(q, k, v, gates, scale, cu_seqlens=cu_seqlens, S=initial_state, keep_state=output_final_state)
    o, state, _ = attend(call, backend, validate=validate)
    return o, None if state is None else state[0]


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
    single token that needs no gradient is one launch, on copies of S and m.

    qk_norm: weights [K] and eps of an RMS norm over the channels of each head of q and k, which goes before everything
    above; the kernels for GPUs do it inside, but for a single token.
    """
    check_pair(initial_state)
    scale = variance_reduction(k.shape[-1]) if scale is None else scale
    S, m = (None, None) if initial_state is None else initial_state
    gates = Gates(gk, refine_k, gv, refine_v)
    call = Call(q, k, v, gates, scale, key_max, mask, cu_seqlens, S, m, qk_norm, keep_state=output_final_state)
    h, state, _ = attend(call, backend, validate=validate)
    return h, state


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

    Only for inputs that `regla.ops.dispatch.step_engine` accepts. No gradient flows.

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
    scale = variance_reduction(k.shape[-1]) if scale is None else scale
    call = Call(q, k, v, Gates(gk, refine_k, gv, refine_v), scale, key_max, mask, S=S, m=m)
    check_call(call, validate=False)
    return fused_step_(call, S, m, engine, None if weight is None else HeadNorm(weight, bias, eps))


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

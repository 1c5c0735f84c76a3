"""The additive rule, S_t = Diag(exp gk_t) S_{t-1} Diag(exp gv_t) + k_t v_t^T: a call, run as its plan says.

Every form takes (q, k, v, gk, gv, scale, initial state, cu_seqlens) of features and log-decays and returns the outputs
and the final state. The kernels also take a call as it is: logits, masks, a norm of q and k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from regla.ops.call import Call, Gates, HeadNorm, masked
from regla.ops.checks import check_call
from regla.ops.chunked import chunked_gated_linear_attention
from regla.ops.dispatch import Plan, plan
from regla.ops.features import (
    NO_KEY,
    key_stabiliser,
    lifted_key_features,
    lowering,
    safe_exp_query,
)
from regla.ops.forward_mode import has_tangents
from regla.ops.fused import fused_attention, fused_step_
from regla.ops.recurrent import recurrent_gated_linear_attention
from regla.ops.slices import in_slices
from regla.ops.units import with_gradient_times

_FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "recurrent": recurrent_gated_linear_attention,
    "chunked": chunked_gated_linear_attention,
    "native": partial(in_slices, "native"),
    "triton": partial(in_slices, "triton"),
}

# Outputs are lowered by 2^48 behind these forms, and so are their gradients, of which small ones would vanish: between
# there and the inputs gradients are so many times as large. More would leave no room for those behind an outlier.
_GRADIENT_LIFTS = {"recurrent": 2.0**20, "triton": 2.0**16}


class Attended(NamedTuple):
    """Outputs [B, T, HQ, V] in the dtype of v, and whether they are normalised already; where it was asked for, the
    state (S [N, H, K, V], m [N, H]) after the last token, m 0 where there has been no key or is no stabiliser."""

    h: Tensor
    state: tuple[Tensor, Tensor] | None
    is_normalised: bool = False


def attend(
    call: Call,
    backend: str,
    *,
    validate: bool | None = None,
    norm: HeadNorm | None = None,
    overwrite: bool = False,
) -> Attended:
    """Check a call and run it as `regla.ops.dispatch.plan` says.

    Args:
        call: shapes as there.
        backend: one of `regla.ops.dispatch.BACKENDS`, or "auto".
        validate: see `regla.ops.gated_linear_attention`.
        norm: of the outputs, taken along where one token is decoded in one launch; `is_normalised` tells.
        overwrite: S and m of the call may be overwritten with the state after it, where that saves a copy.

    Raises:
        ValueError: input that does not fit; a backend that is unknown, or is asked for and cannot run.
    """
    check_call(call, validate)
    how = plan(call, backend)
    if call.gates.write is not None:
        call = call._replace(v=call.v * call.gates.write.to(call.v.dtype), gates=call.gates._replace(write=None))
    if call.qk_norm is not None and not how.normalises:
        call = normalised(call)
    if how.is_step:
        S, m = (call.S, call.m) if overwrite and _can_be_overwritten(call) else _copy_of_state(call)
        assert S is not None and m is not None
        h = fused_step_(call, S, m, how.backend, norm)
        return Attended(h, (S, m) if call.keep_state else None, norm is not None)
    if call.key_max is None:
        o, S = _from_features(call, how)
        return Attended(o, (S, S.new_zeros(S.shape[:2])) if call.keep_state else None)
    if call.S is not None and call.m is not None:
        # Zeros are an empty state, whatever m says.
        is_empty = (call.S.detach() == 0).all(-1).all(-1)
        call = call._replace(m=torch.where(is_empty, NO_KEY, call.m.detach()))
    h, S, m = fused_attention(call, how.backend) if how.takes_logits else _from_logits(call, how)
    return Attended(h, (S, torch.where(m < NO_KEY / 2, 0.0, m)) if call.keep_state else None)


def _from_features(call: Call, how: Plan) -> tuple[Tensor, Tensor]:
    q, k, v, gates, scale, _, mask, cu_seqlens, S, *_ = without_padding(call)
    gk, gv = _log_decays(gates, mask)
    return _form(how)(q, k, v, gk, gv, scale, S, cu_seqlens)


def _from_logits(call: Call, how: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """By features of the safe exponential, formed here relative to the stabiliser m, in whose units the state is."""
    q, k, v, gates, scale, key_max, mask, cu_seqlens, S, before, *_ = without_padding(call)
    assert key_max is not None
    gk, gv = _log_decays(gates, mask)
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
    phi_q, phi_k = safe_exp_query(q), lifted_key_features(k, m, mask)
    phi_q = phi_q if mask is None else masked(phi_q, mask)
    if how.backend == "chunked":
        h, final = _form(how)(phi_q, phi_k, v, gk, gv, scale, S, cu_seqlens, lifted=True)
        return h, final, after
    inputs = [phi_q, phi_k, v, gk, gv, S]
    if has_tangents(call.tensors()):  # forward mode, in which gradients are not lowered, and need no lift
        *inputs, S = inputs
        h, final = _form(how)(*inputs, scale, S, cu_seqlens)
        return h * lowering(h), final, after
    up = _GRADIENT_LIFTS.get(how.backend, 1.0)
    *inputs, S = (None if x is None else with_gradient_times(1 / up, x) for x in inputs)
    h, final = _form(how)(*inputs, scale, S, cu_seqlens)
    return with_gradient_times(up, h * lowering(h)), with_gradient_times(up, final), after


def _form(how: Plan) -> Callable[..., tuple[Tensor, Tensor]]:
    return partial(_FORMS[how.backend], most=how.slices) if how.slices else _FORMS[how.backend]


def _log_decays(gates: Gates, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    gk, gv = gates.logarithms()
    if mask is not None:  # a refined gate of logits 0 decays by a half
        gk, gv = (None if g is None else masked(g, mask) for g in (gk, gv))
    return gk, gv


def without_padding(call: Call) -> Call:
    if call.mask is None:
        return call
    q, k, v = (masked(x, call.mask) for x in (call.q, call.k, call.v))
    gk, rk, gv, rv = (None if g is None else masked(g, call.mask) for g in call.gates[:4])
    write = call.gates.write if call.gates.write is None else torch.where(call.mask[..., None], call.gates.write, 0.0)
    return call._replace(q=q, k=k, v=v, gates=Gates(gk, rk, gv, rv, write))


def normalised(call: Call) -> Call:
    """With q and k normalised in the dtype of the weights, in their own."""
    q, k, norm = call.q, call.k, call.qk_norm
    assert norm is not None
    if call.mask is not None:  # what padding holds may be nan, which the weights' gradients would meet
        q, k = masked(q, call.mask, 1.0), masked(k, call.mask, 1.0)
    q, k = (rms_norm(x.to(w.dtype), w.shape, w, norm.eps).to(x.dtype) for x, w in ((q, norm.q), (k, norm.k)))
    return call._replace(q=q, k=k, qk_norm=None)


def _can_be_overwritten(call: Call) -> bool:
    S, m = call.S, call.m
    if S is None or m is None or S.requires_grad:
        return False
    return S.dtype == m.dtype == torch.float32 and S.is_contiguous() and m.is_contiguous()


def _copy_of_state(call: Call) -> tuple[Tensor, Tensor]:
    """A state to overwrite: the call's numbers in float32, or an empty one's."""
    if call.S is None or call.m is None:
        B, _, H, K = call.k.shape
        S = call.k.new_zeros(B, H, K, call.v.shape[-1], dtype=torch.float32)
        return S, call.k.new_zeros(B, H, dtype=torch.float32)
    S, m = (torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x) for x in (call.S, call.m))
    return S, m

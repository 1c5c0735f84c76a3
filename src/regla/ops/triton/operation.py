"""The engine that runs on a GPU: launches of the fused kernels. See `regla.ops.fused` for the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regla.ops.fused import Inputs, QKNorm, gate_kind
from regla.ops.triton.backward import GRADIENT_LIFT, backward_kernel
from regla.ops.triton.chip import Chip, chip_of
from regla.ops.triton.decode import decode_kernel, num_warps
from regla.ops.triton.forward import forward_kernel
from regla.ops.triton.launch import cdiv, launch, power_of_2, token_step
from regla.ops.triton.norm import norm_gradient_kernel
from regla.ops.triton.segments import chain_kernel, gradient_kernel, state_kernel
from regla.ops.triton.tiles import RANGE

_CTAS_OF_AN_AXIS = 65_535  # of a grid, but for its first
_MANY_OF_THE_FEW = 16  # from more heads on, of up to 64 channels, three quarters of a chip's `segments` are enough


def forward(
    inputs: Inputs,
    scale: float,
    safe_exp: bool,
    decaying: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """(o, final state, last m, m of every token, the factor of every output, the state before each chunk).

    A negative factor tells `backward` to compute its chunk over the tree of halves.
    """
    q, k, v, gk, rk, gv, rv, mask, cu_seqlens, initial_state, before, norm = _in_order(inputs)
    filled = outputs(q, k, v, cu_seqlens, safe_exp, keep)
    o, final, last, m, factors, states = filled
    if cu_seqlens is not None:  # a sequence without tokens has no CTA that would write these
        final.zero_() if initial_state is None else final.copy_(initial_state)
        last.zero_() if before is None else last.copy_(before)
    N, chunks, all_chunks = _layout(k, v, cu_seqlens)
    T, H = k.shape[1:3]
    slots = _sequence_of_slot(cu_seqlens, _chunk(k, v), chunks)
    parts, part, cut = _segments(N * H, chunks, chip=chip_of(k.device), wide=_wide(k, v), packed=cu_seqlens is not None)
    if parts > 1:
        initial_state, before = _states_before(inputs, parts, part, cut, safe_exp, decaying)
        final, last = final.new_empty(N * parts, *final.shape[1:]), last.new_empty(N * parts, H)
    passed_states = _passed(k, v, N * parts)
    passed = k.new_zeros(passed_states + 2 * all_chunks * H, dtype=torch.float32)
    passed_m = passed[passed_states:].view(torch.int64)
    launch(
        forward_kernel, _grid(H, N * parts, part, slots, chip=chip_of(k.device), wide=_wide(k, v)),
        (q, k, v, gk, rk, gv, rv, *_weights(norm), mask, cu_seqlens, slots, initial_state, before,
         o, final, m, factors, states, last, passed, passed_m),
        (scale, _eps(norm), T, chunks, part, parts, N * parts, H, *map(token_step, (q, k, v, gk, rk, gv, rv))),
        SAFE_EXP=safe_exp, DECAYING=decaying, STORE=keep,
        **_common(norm, q, k, v, gk, rk, gv, rv), MAX_DECAY=_max_decay(v, gk, gv, safe_exp),
        MASKED=mask is not None, VARLEN=cu_seqlens is not None, SPLIT=parts > 1, INITIAL=initial_state is not None,
        SLICES=_slices(k, v, gv), **_warps(k, v, gv, "forward"),
    )  # fmt: skip
    if parts > 1:
        filled[1].copy_(final[parts - 1 :: parts])
        if safe_exp:
            filled[2].copy_(last[parts - 1 :: parts])
    return filled


def outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, safe_exp: bool, keep: bool
) -> tuple[Tensor, ...]:
    """The tensors that `forward` fills."""
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


def backward(
    d_o: Tensor,
    d_final: Tensor | None,
    inputs: Inputs,
    m: Tensor,
    factors: Tensor,
    states: Tensor,
    scale: float,
    safe_exp: bool,
    decaying: bool,
    grads: Sequence[Tensor | None],
    d_initial: Tensor,
    d_weights: Tensor | None = None,
) -> None:
    """Fill the gradients of q, k, v, gk, rk, gv, rv, of the initial state, and of the weights of q's and k's norm
    [2, K]."""
    q, k, v, gk, rk, gv, rv, mask, cu_seqlens, initial_state, before, norm = _in_order(inputs)
    d_o = d_o.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    if cu_seqlens is not None:
        d_initial.zero_() if d_final is None else d_initial.copy_(d_final)
    N, chunks, _ = _layout(k, v, cu_seqlens)
    T, H = k.shape[1:3]
    slots = _sequence_of_slot(cu_seqlens, _chunk(k, v), chunks)
    parts, part, cut = _segments(N * H, chunks, chip=chip_of(k.device), wide=_wide(k, v), packed=cu_seqlens is not None)
    d_initials = d_initial
    if parts > 1:
        d_final = _gradients_behind(d_o, d_final, inputs, m, factors, parts, part, cut, scale, safe_exp)
        d_initials = d_initial.new_empty(N * parts, *d_initial.shape[1:])
    passed = k.new_zeros(_passed(k, v, N * parts), dtype=torch.float32)
    launch(
        backward_kernel, _grid(H, N * parts, part, slots, chip=chip_of(k.device), wide=_wide(k, v)),
        (q, k, v, gk, rk, gv, rv, *_weights(norm), mask, cu_seqlens, slots, before, m, factors, states, d_o, d_final,
         *grads, d_initials, passed),
        (scale, _eps(norm), T, chunks, part, parts, N * parts, H,
         *map(token_step, (q, k, v, gk, rk, gv, rv)), *map(token_step, grads)),
        SAFE_EXP=safe_exp, D_FINAL="none" if d_final is None else "lifted" if parts > 1 else "given",
        **_common(norm, q, k, v, gk, rk, gv, rv),
        MASKED=mask is not None, VARLEN=cu_seqlens is not None, SPLIT=parts > 1, INITIAL=initial_state is not None,
        SLICES=_slices(k, v, gv, q.shape[2] // H), **_warps(k, v, gv, "backward"),
    )  # fmt: skip
    if parts > 1:
        d_initial.copy_(d_initials[::parts])
    if norm is not None:
        assert d_weights is not None
        norm_gradient(q, k, norm, mask, grads[0], grads[1], d_weights)


def step(
    inputs: Inputs,
    S: Tensor,
    m: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    decaying: bool,
    eps: float,
    o: Tensor,
) -> Tensor:
    """o, filled: one token of every sequence, S and m overwritten."""
    q, k, v, gk, rk, gv, rv, mask, *_ = inputs
    N, _, H, K = k.shape
    V, HQ = v.shape[-1], q.shape[2]
    tensors = (q, k, v, gk, rk, gv, rv)
    rows, heads = ([0 if x is None else x.stride(axis) for x in tensors] for axis in (0, 2))
    BK, BV = _padded(K), _padded(V)
    launch(
        decode_kernel, (N * H, 1, 1), (*tensors, mask, S, m, weight, bias, o),
        (scale, eps, H, *rows, 0 if mask is None else mask.stride(0), *heads),
        G=HQ // H, K=K, V=V, BK=BK, BV=BV, KEY=gate_kind(gk, rk), VALUE=gate_kind(gv, rv), DECAYING=decaying,
        MASKED=mask is not None, NORM="none" if weight is None else "rmsnorm" if bias is None else "layernorm",
        num_warps=num_warps(BK, BV), maxnreg=_step_registers(chip_of(k.device), N * H, BK * BV, gv),
    )  # fmt: skip
    return o


def _states_before(
    inputs: Inputs, parts: int, part: int, cut: int, safe_exp: bool, decaying: bool
) -> tuple[Tensor, Tensor]:
    """The state [N parts, H, K, V] and m [N parts, H] before each of the `parts` segments, of `part` chunks and `cut`
    pieces, of every sequence."""
    q, k, v, gk, rk, gv, rv, mask, _, initial_state, before, norm = _in_order(inputs)
    (N, T, H, K), V, C = k.shape, v.shape[-1], _chunk(k, v)
    states, decay_k, decay_v = (k.new_empty(N * parts * cut, H, *D, dtype=torch.float32) for D in ((K, V), (K,), (V,)))
    m = k.new_empty(N * parts * cut, H, 2, dtype=torch.float32)
    common = _common(norm, q, k, v, gk, rk, gv, rv)
    del common["G"]
    launch(
        state_kernel, (H, N * parts * cut, 1),
        (k, v, gk, rk, gv, rv, *_weights(norm), mask, states, decay_k, decay_v, m),
        (_eps(norm), T, part // cut * C, parts * cut, (parts - 1) * part * C, H,
         *map(token_step, (k, v, gk, rk, gv, rv))),
        SAFE_EXP=safe_exp, DECAYING=decaying, **common, MASKED=mask is not None, **_warps(k, v, gv, "segments"),
    )  # fmt: skip
    return _chain(initial_state, before, states, decay_k, decay_v, m if safe_exp else None, parts, cut)


def _gradients_behind(
    d_o: Tensor,
    d_final: Tensor | None,
    inputs: Inputs,
    m: Tensor,
    factors: Tensor,
    parts: int,
    part: int,
    cut: int,
    scale: float,
    safe_exp: bool,
) -> Tensor:
    """The gradient of the state after each of the `parts` segments of every sequence, [N parts, H, K, V], lifted."""
    q, k, v, gk, rk, gv, rv, mask, *_, norm = _in_order(inputs)
    (N, T, H, K), V, C = k.shape, v.shape[-1], _chunk(k, v)
    states, decay_k, decay_v = (k.new_empty(N * parts * cut, H, *D, dtype=torch.float32) for D in ((K, V), (K,), (V,)))
    launch(
        gradient_kernel, (H, N * parts * cut, 1),
        (q, gk, rk, gv, rv, *_weights(norm), mask, m, factors, d_o, states, decay_k, decay_v),
        (scale, _eps(norm), T, part // cut * C, parts * cut, part * C, H, *map(token_step, (q, gk, rk, gv, rv))),
        SAFE_EXP=safe_exp, **_common(norm, q, k, v, gk, rk, gv, rv), MASKED=mask is not None,
        **_warps(k, v, gv, "segments"),
    )  # fmt: skip
    lift = GRADIENT_LIFT.value if safe_exp else 0.0
    return _chain(d_final, None, states, decay_k, decay_v, None, parts, cut, reverse=True, lift=lift)[0]


def _chain(
    start: Tensor | None,
    before: Tensor | None,
    states: Tensor,
    decay_k: Tensor,
    decay_v: Tensor,
    m: Tensor | None,
    parts: int,
    cut: int,
    *,
    reverse: bool = False,
    lift: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(the state before every segment, m before it to the base 2), or of the gradient of the state the one after it
    (`reverse`). `start`, which `states` are 2^lift times as large as, is the first."""
    pieces, H, K, V = states.shape
    chained, chained_m = states.new_empty(pieces // cut, H, K, V), states.new_empty(pieces // cut, H)
    rows = 8
    launch(
        chain_kernel, (H, pieces // (parts * cut), cdiv(K, rows)),
        (start, before, states, decay_k, decay_v, m, chained, chained_m), (parts, cut, H),
        K=K, V=V, R=rows, BV=power_of_2(V),
        MOVING=m is not None, INITIAL=start is not None, REVERSE=reverse, LIFT=lift, num_warps=2,
    )  # fmt: skip
    return chained, chained_m


def _in_order(inputs: Inputs) -> Inputs:
    """With the tensors that the kernels index without strides contiguous."""
    names = ("mask", "cu_seqlens", "initial_state", "before")
    return inputs._replace(**{name: x.contiguous() for name in names if (x := getattr(inputs, name)) is not None})


def norm_gradient(
    q: Tensor, k: Tensor, norm: QKNorm, mask: Tensor | None, dq: Tensor | None, dk: Tensor | None, d_weights: Tensor
) -> None:
    """Make dq and dk, the gradients of the normalised q and k, those of q and k, and fill the weights'."""
    (B, T, HQ, K), H, block = q.shape, k.shape[2], 32
    chip = chip_of(q.device)
    ctas = min(cdiv(B * T * HQ, block), chip.norm_ctas * chip.multiprocessors)
    of_ctas = d_weights.new_empty(ctas, 2, K)
    launch(
        norm_gradient_kernel, (ctas, 2, 1),
        (dq, q, norm.q, dk, k, norm.k, mask, of_ctas),
        (norm.eps, B * T * HQ, B * T * H, HQ, H, *map(token_step, (dq, q, dk, k))),
        K=K, BK=_padded(K), R=block, MASKED=mask is not None,
    )  # fmt: skip
    torch.sum(of_ctas, 0, out=d_weights)


def _weights(norm: QKNorm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.q, norm.k)


def _eps(norm: QKNorm | None) -> float:
    return 0.0 if norm is None else norm.eps


def _passed(k: Tensor, v: Tensor, segments: int) -> int:
    """Numbers of 32 bits, zero before a launch: two places of every head through which its state passes from chunk to
    chunk, and behind all of these a counter of every head, which gives its chunks to CTAs, in 32 of its own."""
    heads = segments * k.shape[2]
    return 2 * heads * _padded(k.shape[-1]) * _padded(v.shape[-1]) + 32 * heads


def _layout(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Sequences; chunks of each, with packing of all (a bound: `_sequence_of_slot`); slots of states."""
    B, T = k.shape[:2]
    C = _chunk(k, v)
    if cu_seqlens is None:
        return B, cdiv(T, C), B * cdiv(T, C)
    slots = T // C + cu_seqlens.numel() - 1
    return cu_seqlens.numel() - 1, slots, slots


def _sequence_of_slot(cu_seqlens: Tensor | None, C: int, slots: int) -> Tensor | None:
    """With packing, chunk i of sequence n has slot cu_seqlens[n] // C + n + i; a slot's sequence, -1 for none."""
    if cu_seqlens is None:
        return None
    first = cu_seqlens[:-1] // C + torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    end = first + (cu_seqlens.diff() + C - 1) // C
    slot = torch.arange(slots, device=cu_seqlens.device)
    n = torch.searchsorted(first, slot, right=True) - 1
    return torch.where(slot < end[n], n, -1).to(torch.int32)


def _chunk(k: Tensor, v: Tensor) -> int:
    """Tokens of a chunk: 32, or 16 where float32 operands would not fit in shared memory."""
    return 16 if v.dtype == torch.float32 and _wide(k, v) else 32


def _segments(heads: int, chunks: int, *, chip: Chip, wide: bool, packed: bool) -> tuple[int, int, int]:
    """(segments of a sequence, chunks of a segment, of the last perhaps fewer, pieces of a segment), where `heads` are
    those of all sequences: one segment, but several where heads are so few that their CTAs would mostly wait for
    each other."""
    part, cut = chunks, 1
    if not packed:
        if heads <= chip.few_heads[wide] and chunks >= 16 * chip.shortest_piece:
            piece = max(chip.shortest_piece, cdiv(chunks * heads, chip.pieces[wide]))
            aim = chip.segments[wide] * (0.75 if heads > _MANY_OF_THE_FEW and not wide else 1)
            cut = max(1, round(chunks * heads / (aim * piece)))
            cut = cdiv(cdiv(chunks, cdiv(chunks, piece * cut)), piece)  # the last segment is hardly shorter
            part = piece * cut
        part = min(part, _CTAS_OF_AN_AXIS // cut * cut)
    return cdiv(chunks, part), part, cut


def _wide(k: Tensor, v: Tensor) -> bool:
    return max(k.shape[-1], v.shape[-1]) > 64


def _slices(k: Tensor, v: Tensor, gv: Tensor | None, G: int = 1) -> int:
    """How many slices of its columns a CTA takes a state in, one after the other. G: of the backward pass, query
    heads to a key head; several want the state whole. By measurement, see docs/dev/kernel-log.md."""
    narrow = min(_padded(k.shape[-1]), _padded(v.shape[-1])) <= 64
    return 1 if narrow or gv is not None or v.dtype == torch.float32 or G > 1 else 2


def _grid(H: int, segments: int, chunks: int, slots: Tensor | None, *, chip: Chip, wide: bool) -> tuple[int, int, int]:
    """CTAs: (heads of a group of segments, chunks of a segment, groups). A GPU tends to start them in this order, group
    after group, which keeps the states of a group in L2; nothing relies on it (`forward.ticket`)."""
    if slots is not None:
        return (H * len(slots), 1, 1)
    cap = max(chip.chains[wide] // H, cdiv(segments, _CTAS_OF_AN_AXIS), 1)
    size = max(cdiv(segments, cdiv(segments, cap) or 1), 1)  # of groups of about the same size
    return (H * size, chunks, cdiv(segments, size))


def _warps(k: Tensor, v: Tensor, gv: Tensor | None, kernel: str) -> dict[str, int | None]:
    """Warps of a CTA, and registers of a thread, of the kernel "forward" or "backward" or those of "segments": as
    few as let several CTAs share a multiprocessor.

    By measurement, see docs/dev/kernel-log.md.
    """
    # 16 bytes of a state (regla.ops.triton.passing) are one thread's: two would pass them on twice.
    vectors = _padded(k.shape[-1]) * _padded(v.shape[-1]) // 4
    if v.dtype == torch.float32 or _wide(k, v):
        in_slices = kernel == "forward" and _slices(k, v, gv) > 1
        return {"num_warps": 4 if in_slices else min(8, vectors // 32)}
    registers = {"forward": 128 if gv is None else 168, "backward": None, "segments": 128}
    return {"num_warps": min(4, vectors // 32), "maxnreg": registers[kernel]}


def _step_registers(chip: Chip, heads: int, state: int, gv: Tensor | None) -> int | None:
    """Of a thread of the decode kernel: with decay on the key axis alone as few as let all heads have their CTAs at
    once, or where there are too many five of them on a multiprocessor. By measurement, see docs/dev/kernel-log.md."""
    if gv is not None or state != 64 * 64:
        return None
    return 80 if heads <= chip.decode_ctas * chip.multiprocessors else 96


def _max_decay(v: Tensor, gk: Tensor | None, gv: Tensor | None, safe_exp: bool) -> float:
    """Bits that a channel may decay by in a chunk before its tokens are out of range: more than RANGE for bfloat16
    features of the safe exponential, whose size is known (`tiles.decay_bounds`)."""
    if v.dtype == torch.float32 or not safe_exp:
        return RANGE.value
    return 150.0 if gk is None or gv is None else 110.0


def _common(norm: QKNorm | None, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor | None) -> dict[str, Any]:
    """What both kernels are compiled for."""
    K, V = k.shape[-1], v.shape[-1]
    gk, rk, gv, rv = gates
    return {
        "G": q.shape[2] // k.shape[2],
        "K": K,
        "V": V,
        "BK": _padded(K),
        "BV": _padded(V),
        "C": _chunk(k, v),
        "NORM": norm is not None,
        "KEY": gate_kind(gk, rk),
        "VALUE": gate_kind(gv, rv),
        "PRECISION": "tf32x3" if v.dtype == torch.float32 else "tf32",  # of float32 products: 3e-7, not 3e-4
        "ONE_PATH": v.dtype == torch.float32,  # shared memory holds the operands of one path
        "num_stages": 1,
    }


def _padded(D: int) -> int:
    return max(16, power_of_2(D))

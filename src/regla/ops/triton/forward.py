"""The forward kernel: one CTA for each chunk of tokens of each head, all in one launch (docs/kernels.md has a diagram).

A CTA first computes what needs no other chunk: gates, features, and what the chunk adds to the state. Then it waits for
the state from the chunk before, passes on the state after its own chunk, and computes its outputs. The stabiliser m, on
which features and decays depend, passes in the same way and earlier.

States pass through two places for each segment and head, in turn (regla.ops.triton.passing). A chunk writes the place
that the chunk before it has read; that one had read it before it passed on the state that this one has received.

The grid gives a CTA its segment and head, and a counter of the head, the ticket, its chunk. So the chunk before is held
by a CTA that has started, in whatever order CTAs start, and the CTA of a head's first chunk waits for none.

Shape legend: C tokens of a chunk, K and V channels, BK and BV the same padded to powers of two, BS = BV / SLICES
columns of a slice of the state, H heads of k and v, G query heads to each. Indices: n segment, h head, i chunk of the
segment, t token of the chunk, j query head of the group, s slice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.inputs import Config, key_features, load_chunk, load_query, query_features, relative_decays
from regla.ops.triton.norm import load_norm
from regla.ops.triton.passing import numbers_at, pass_state, publish_number, take_state, untagged, wait_for_number
from regla.ops.triton.tiles import (
    LN2,
    LOG2E,
    NO_KEY,
    RANGE,
    columns,
    cumulative,
    decay_bounds,
    exp2,
    factors,
    gate_at,
    growth,
    in_load_layout,
    largest,
    lowest_decay,
    maximum,
    may_leave_range,
    reciprocal,
    scores,
    stabiliser_scan,
    store_tile,
    to_the_end,
    too_small,
)
from regla.ops.triton.tree import levels, scores_over_tree, tree_level


@triton.jit
def ticket(passed_ptr, n, h, segments, H, BK: tl.constexpr, BV: tl.constexpr):
    """How many CTAs have taken a chunk of head h of segment n before this one; 0 for n < 0, which is no segment.

    The counters lie behind the places of all heads' states (`operation._passed`), each in a cache line of its own. A
    ticket publishes no data, so the atomic is relaxed.
    """
    counters = passed_ptr + segments.to(tl.int64) * H * (2 * BK * BV) + (n * H + h) * 32
    counters = counters.to(tl.pointer_type(tl.int32))
    return tl.atomic_add(counters, 1, mask=n >= 0, sem="relaxed", scope="gpu")


@triton.jit
def assign_chunk(
    passed_ptr, cu_ptr, slot_ptr, T, chunks, part, parts, segments, H, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, VARLEN: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The chunk that this CTA takes.

    A segment is a sequence or, with SPLIT, one of the `parts` segments of a sequence, each of `part` chunks, the last
    perhaps of fewer. Without packing the grid is (heads of a group of segments, chunks of a segment, groups); with
    packing (VARLEN) it is (slots times heads, 1, 1), and a slot is a place for one chunk's state (`slot_ptr`:
    `operation._sequence_of_slot`). The second index of the grid is not read: the ticket stands for it.

    Args:
        T, chunks: tokens and chunks of a sequence; with packing, `chunks` is the number of slots.
        segments: of all sequences.
        REVERSE: the first ticket takes the last chunk, for the backward pass.

    Returns: segment n, -1 if there is no chunk for this CTA; head h; chunk i of the segment; chunks of the segment;
        the segment's first token, counted over all sequences; its tokens; chunks of the sequence before the segment;
        slot of the chunk's state.
    """
    if VARLEN:
        slot = tl.program_id(0) // H
        h = tl.program_id(0) % H
        if REVERSE:
            slot = chunks - 1 - slot
        n = tl.load(slot_ptr + slot)
        begin = tl.load(cu_ptr + tl.maximum(n, 0)).to(tl.int64)
        length = (tl.load(cu_ptr + tl.maximum(n, 0) + 1) - begin).to(tl.int32)
        count = tl.cdiv(length, C)
        i = ticket(passed_ptr, n, h, segments, H, BK, BV)
        if REVERSE:
            i = count - 1 - i
        return n, h, i, count, begin, length, 0, begin // C + n + i
    h = tl.program_id(0) % H
    n = tl.program_id(2) * (tl.num_programs(0) // H) + tl.program_id(0) // H
    n = tl.where(n < segments, n, -1)  # the last group may be smaller
    i = ticket(passed_ptr, n, h, segments, H, BK, BV)
    past = 0
    sequence = n
    count = chunks
    if SPLIT:
        sequence = tl.maximum(n, 0) // parts
        past = (tl.maximum(n, 0) - sequence * parts) * part
        count = tl.minimum(part, chunks - past)
        n = tl.where(i < count, n, -1)
    if REVERSE:
        i = count - 1 - i
    length = tl.minimum(T - past * C, count * C)
    slot = sequence.to(tl.int64) * chunks + past + i
    return n, h, i, count, sequence.to(tl.int64) * T + past * C, length, past, slot


@triton.jit
def levels_needed(out_of_range):
    """`levels`, or 0 if no number of out_of_range [C, D] is true."""
    return tl.max(tl.max(out_of_range.to(tl.int32), 1), 0) * levels(out_of_range.shape[0])


@triton.jit
def scores_of(q, k, gk, Bk, bound, Ek, kd, norm, valid, TREE: tl.constexpr, cfg: tl.constexpr):
    """(q E [C, BK], scores [C, C]), both as operands, of one query head. q [C, BK] as it is in memory; k: features; kd:
    k W; gk: log2-decays; Bk: their cumulative sums. Pairs of tokens with W = 0 are added over the tree."""
    dtype = kd.dtype
    q = query_features(q, norm, valid, cfg) if cfg.SAFE_EXP else q.to(tl.float32)
    qd = (q * Ek).to(dtype) if cfg.KEYED else q.to(dtype)
    P = scores(qd, kd, cfg.PRECISION)
    if cfg.KEYED and TREE:
        out_of_range = bound[:, None] > Bk  # [C, BK]
        alone = tl.where(out_of_range, k, 0.0)  # kd has the others
        P += scores_over_tree(q, alone, gk, levels_needed(out_of_range), False, dtype, cfg.PRECISION, False)
    return qd, P.to(dtype)


@triton.jit
def read_columns(qd, Pd, x, v, gv, Bv, bound, Ev, S, TREE: tl.constexpr, cfg: tl.constexpr):
    """Outputs [C, D] of one query head, before their factor, for D columns of the state: P v + (q E) S.

    qd: q E [C, BK]; Pd: scores [C, C]; x: v W [C, D]; v [C, D]; S: the state before the chunk [BK, D], times 2^-c.
    """
    out = tl.dot(Pd, x, input_precision=cfg.PRECISION)
    out = tl.dot(qd, S, out, input_precision=cfg.PRECISION)
    if cfg.VALUED:
        out *= Ev
        if TREE:
            out_of_range = bound[:, None] > Bv  # [C, BV]
            for level in range(levels_needed(out_of_range)):
                joined, X = tree_level(level, gv, cfg.PRECISION)
                x = tl.where(out_of_range, v * X, 0.0).to(Pd.dtype)
                out += X * tl.dot(tl.where(joined, Pd, 0.0).to(Pd.dtype), x, input_precision=cfg.PRECISION)
    return out


@triton.jit
def write_outputs(
    o_ptr, factors_ptr, t, inside, valid, outs, above, begin, h, j, scale, H, BS: tl.constexpr, STORE: tl.constexpr,
    TREE: tl.constexpr, cfg: tl.constexpr,
):  # fmt: skip
    """Write the outputs of the j-th query head of the group: slices `outs`, [C, BS] each, times scale and a factor.

    The factor [C] takes the lift of the features out again. With STORE it is kept for the backward pass, negative where
    that is to go over the tree: where it is beyond `above`.
    """
    factor = scale
    if cfg.SAFE_EXP:
        # 2^-48, or more where the largest output of a token and head would fall below 2^-60 (regla.ops.features
        # .lowering); 2^-100 is the least size that is enlarged
        size = tl.full([t.shape[0]], 7.888609052210118e-31, tl.float32)
        for s in tl.static_range(cfg.SLICES):
            size = maximum(largest(tl.abs(outs[s]), 1) * tl.abs(scale), size)
        enlarged = tl.where(size == size, maximum(2.0**-12 * reciprocal(size), 1.0), 1.0)  # a NaN stays in its channel
        factor = enlarged * 2.0**-48
        if STORE:  # and with it, in its sign, whether the backward pass is to go over the tree
            over_tree = factor > above
            if not TREE:
                over_tree &= valid  # a masked token's output is not read, and its size says nothing
            at = factors_ptr + (begin + t) * (H * cfg.G) + h * cfg.G + j
            kept = tl.where(over_tree, -factor, factor)
            tl.store(at, tl.where(size == size, kept, float("nan")), mask=inside)
        factor = (factor * scale)[:, None]
    for s in tl.static_range(cfg.SLICES):
        store_tile(o_ptr + j * cfg.V, t, inside, H * cfg.G * cfg.V, tl.arange(0, BS) + s * BS, cfg.V, outs[s] * factor)


@triton.jit
def stabiliser(k, gk, gv, valid, ki, vi, DECAYING: tl.constexpr, cfg: tl.constexpr):
    """`stabiliser_scan` of a chunk, from the logits k [C, BK] and the log2-decays: m falls with the slowest channel
    (DECAYING) and is at least the largest key."""
    to_log2: tl.constexpr = 1.0 if cfg.NORM else LOG2E
    step = tl.zeros([k.shape[0]], tl.float32)
    if DECAYING:
        if cfg.KEY != "none":
            step += largest(tl.where((ki < cfg.K)[None, :], gk, float("-inf")), 1)
        if cfg.VALUE != "none":
            step += largest(tl.where((vi < cfg.V)[None, :], gv, float("-inf")), 1)
    top = tl.where(valid, largest(k, 1) * to_log2, NO_KEY)
    return stabiliser_scan(top, tl.where(valid, step, 0.0))


@triton.jit
def compute_chunk(
    q_ptr, initial_ptr, o_ptr, final_ptr, factors_ptr, states_ptr, passed_ptr, q, k, v, gk, gv, norm, bound_k, bound_v,
    above, t, inside, valid, begin, head, h, i, count, at, scale, H, q_step, STORE: tl.constexpr, TREE: tl.constexpr,
    cfg: tl.constexpr,
):  # fmt: skip
    """Add the chunk to the state, pass that on, and write the chunk's outputs.

    Args:
        q: of the first query head, as it is in memory [C, BK]; the others are loaded here.
        k, v: features [C, BK] and values [C, BV], float32.
        gk, gv: log2-decays relative to the stabiliser, [C, BK] and [C, BV].
        bound_k, bound_v: `decay_bounds` of each axis [C].
        above: factors of outputs beyond which the backward pass is to go over the tree.
        head, i, count: n H + h; this chunk; chunks of the segment. `at`: where this chunk's state is kept.
        TREE: the chunk may have tokens out of range. Without it none is, and nothing is compiled for them.
    """
    ki = tl.arange(0, cfg.BK)
    dtype = o_ptr.dtype.element_ty
    # Where no token is out of range, the state after the chunk is, with each axis' own c and S before the chunk,
    #     2^total_k S 2^total_v + (k W 2^(total_k + c_k))^T (v W) 2^(total_v + c_v).
    # The values' factor comes after the product: so v W is one operand for the state and for the outputs. The keys'
    # comes before: k W may be 2^104 and v W 2^56 times v, and products of these could leave float32.
    EXACT: tl.constexpr = dtype == tl.float32
    Bk, Ek = gk, 0.0
    kd = k.to(dtype)
    k_end = kd
    if cfg.KEYED:
        Bk, total_k = cumulative(gk, EXACT, TREE)
        Ek, Wk, ck = factors(Bk, total_k, bound_k, EXACT, TREE)
        kd = (k * Wk).to(dtype)
        k_end = (k * (to_the_end(gk, cfg.PRECISION) if TREE else Wk * exp2(total_k + ck)[None, :])).to(dtype)
    passed_ptr += head.to(tl.int64) * 2 * cfg.BK * cfg.BV
    tl.static_assert(cfg.SLICES == 1 or not cfg.VALUED)
    BS: tl.constexpr = cfg.BV // cfg.SLICES
    nothing = tl.zeros([cfg.BK, BS], tl.float32)
    vs = columns(v, cfg.SLICES)
    Bv, Ev = gv, 0.0
    xs, Ss = (), ()
    for s in tl.static_range(cfg.SLICES):
        vi = tl.arange(0, BS) + s * BS
        state_at = ki[:, None] * cfg.V + vi[None, :]
        state_mask = (ki < cfg.K)[:, None] & (vi < cfg.V)[None, :]
        x = vs[s].to(dtype)
        v_end = x
        if cfg.VALUED:
            Bv, total_v = cumulative(gv, EXACT, TREE)
            Ev, Wv, cv = factors(Bv, total_v, bound_v, EXACT, TREE)
            x = (v * Wv).to(dtype)
            v_end = (v * to_the_end(gv, cfg.PRECISION)).to(dtype) if TREE else x
        passed_at = passed_ptr + s * BS
        laid_out = numbers_at(passed_at, cfg.BK, BS, cfg.BV)
        written = in_load_layout(tl.dot(tl.trans(k_end), v_end, input_precision=cfg.PRECISION), laid_out)
        if cfg.VALUED and not TREE:
            written *= exp2(total_v + cv)[None, :]
        # The factors of the state are computed before the wait (of the first slice): after it the next chunk waits.
        if cfg.KEYED:
            keep_k = in_load_layout(exp2(total_k)[:, None] + nothing, laid_out)
        if cfg.VALUED:
            keep_v = in_load_layout(exp2(total_v)[None, :] + nothing, laid_out)
        S = nothing
        if not cfg.INITIAL:
            if tl.program_id(0) >= 0:  # always true. As the result of a branch the state keeps its layout below
                S = take_state(passed_at, i, cfg.BK, BS, cfg.BV, EXACT)
        elif i == 0:
            S = tl.load(initial_ptr + head.to(tl.int64) * cfg.K * cfg.V + state_at, mask=state_mask, other=0.0)
        else:
            S = take_state(passed_at, i, cfg.BK, BS, cfg.BV, EXACT)
        kept = S
        if cfg.KEYED:
            kept *= keep_k
        if cfg.VALUED:
            kept *= keep_v
        written += kept
        if i + 1 < count:
            pass_state(passed_at, i + 1, written, cfg.BV, EXACT)
        else:
            final_at = final_ptr + head.to(tl.int64) * cfg.K * cfg.V + state_at
            tl.store(final_at, untagged(written, EXACT), mask=state_mask)
        if STORE:
            tl.store(states_ptr + at + tl.max_contiguous(state_at, [1, 4]), S.to(dtype), mask=state_mask)
        if cfg.KEYED:  # q E, and on the value axis the E of the outputs, are 2^c too large for S
            S *= exp2(-ck)[:, None]
        if cfg.VALUED:
            S *= exp2(-cv)[None, :]
        xs, Ss = xs + (x,), Ss + (S.to(dtype),)
    for j in range(cfg.G):
        qd, Pd = scores_of(q, k, gk, Bk, bound_k, Ek, kd, norm, valid, TREE, cfg)
        if cfg.G > 1:
            q = load_query(q_ptr, j + 1, t, valid & (j + 1 < cfg.G), q_step, cfg)
        outs = ()
        for s in tl.static_range(cfg.SLICES):
            out = read_columns(qd, Pd, xs[s], v, gv, Bv, bound_v, Ev, Ss[s], TREE, cfg)
            outs = outs + (out,)
        write_outputs(o_ptr, factors_ptr, t, inside, valid, outs, above, begin, h, j, scale, H, BS, STORE, TREE, cfg)


@triton.jit(noinline=True)
def compute_over_tree(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, qw_ptr, kw_ptr, mask_ptr, initial_ptr, o_ptr, final_ptr,
    factors_ptr, states_ptr, passed_ptr, before, begin, length, head, h, i, count, at, scale, eps, H, q_step, k_step,
    v_step, gk_step, rk_step, gv_step, rv_step, DECAYING: tl.constexpr, MASKED: tl.constexpr, STORE: tl.constexpr,
    MAX_DECAY: tl.constexpr, cfg: tl.constexpr,
):  # fmt: skip
    """`compute_chunk` of a chunk that may have tokens out of range. before: the stabiliser before the chunk.

    Not inlined, and it loads the chunk again: so its registers and what it would need of the caller's cost the other
    path none.
    """
    ki, vi = tl.arange(0, cfg.BK), tl.arange(0, cfg.BV)
    t = tl.arange(0, cfg.C)
    inside = t < length - i * cfg.C
    valid = inside
    if MASKED:
        valid = inside & (tl.load(mask_ptr + begin + t, mask=inside, other=0) != 0)
    qw, kw = load_norm(qw_ptr, kw_ptr, cfg.K, cfg.BK, cfg.NORM)
    norm = qw, kw, eps
    q, k, v, gk, gv = load_chunk(
        q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, norm, t, valid, q_step, k_step, v_step, gk_step, rk_step,
        gv_step, rv_step, cfg,
    )  # fmt: skip
    m, m_before = 0.0, 0.0
    if cfg.SAFE_EXP:
        sums, tops, sums_before, tops_before = stabiliser(k, gk, gv, valid, ki, vi, DECAYING, cfg)
        m = maximum(before + sums, tops)
        m_before = maximum(before + sums_before, tops_before)
        k = key_features(k, m, cfg)
        gk, gv = relative_decays(gk, gv, m, m_before, ki, vi, cfg)
    BOTH: tl.constexpr = cfg.SAFE_EXP and cfg.KEY != "none" and cfg.VALUED
    weak = too_small(k, v, valid, cfg.K, cfg.VALUED)  # [C]
    bound_k, bound_v = decay_bounds(weak, m, m_before, MAX_DECAY, BOTH, cfg.INITIAL)
    compute_chunk(
        q_ptr, initial_ptr, o_ptr, final_ptr, factors_ptr, states_ptr, passed_ptr, q, k, v, gk, gv, norm, bound_k,
        bound_v, 0.0, t, inside, valid, begin, head, h, i, count, at, scale, H, q_step, STORE, True, cfg,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "chunks", "part", "parts", "segments"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, qw_ptr, kw_ptr, mask_ptr, cu_ptr, slot_ptr,
    initial_ptr, before_ptr,
    o_ptr, final_ptr, m_ptr, factors_ptr, states_ptr, last_ptr, passed_ptr, passed_m_ptr,
    scale, eps, T, chunks, part, parts, segments, H,
    q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SAFE_EXP: tl.constexpr, NORM: tl.constexpr, DECAYING: tl.constexpr,
    MASKED: tl.constexpr, VARLEN: tl.constexpr, SPLIT: tl.constexpr, INITIAL: tl.constexpr, STORE: tl.constexpr,
    PRECISION: tl.constexpr, SLICES: tl.constexpr, ONE_PATH: tl.constexpr, MAX_DECAY: tl.constexpr,
):  # fmt: skip
    """Outputs, final states and, with STORE, what the backward pass needs.

    Tensors, in addition to `load_chunk`'s (q [B, T, H G, K] and so on):
        mask [B, T]: 0 for padding (MASKED). cu, slot: packing (VARLEN), see `assign_chunk`.
        initial [N, H, K, V], before [N, H]: state and m before the first token (INITIAL), of N segments.
        o [B, T, H G, V], final [N, H, K, V], last [N, H]: outputs, state and m after the last token.
        m [B, T, H], factors [B, T, H G], states [slots, H, K, V]: kept for the backward pass (STORE).
        passed: two places [BK, BV] per segment and head, then the tickets; passed_m: a 64-bit word per slot and head.
            Both are zero before the launch.

    m is in natural units in `last` and in `before` from outside, else to the base 2. `*_step`: strides of tokens.
    ONE_PATH: every chunk is compiled with the tree, inlined. MAX_DECAY: `operation._max_decay`.
    """
    # The stabiliser's change is a decay too, of the key axis where the value axis has none.
    KEYED: tl.constexpr = KEY != "none" or (SAFE_EXP and VALUE == "none")
    VALUED: tl.constexpr = VALUE != "none"
    BOTH: tl.constexpr = SAFE_EXP and KEY != "none" and VALUED
    cfg: tl.constexpr = Config(
        G, K, V, BK, BV, C, KEY, VALUE, KEYED, VALUED, SAFE_EXP, NORM, INITIAL, PRECISION, SLICES
    )
    n, h, i, count, begin, length, _past, slot = assign_chunk(
        passed_ptr, cu_ptr, slot_ptr, T, chunks, part, parts, segments, H, BK, BV, C, VARLEN, SPLIT, False
    )
    if n >= 0:
        head = n * H + h
        t = tl.arange(0, C)
        ki, vi = tl.arange(0, BK), tl.arange(0, BV)
        begin += i * C
        inside = t < length - i * C
        valid = inside
        if MASKED:
            valid = inside & (tl.load(mask_ptr + begin + t, mask=inside, other=0) != 0)
        q_ptr += begin * q_step + h * G * K
        k_ptr += begin * k_step + h * K
        v_ptr += begin * v_step + h * V
        o_ptr += begin * (H * G * V) + h * G * V
        gk_at, rk_at = gate_at(gk_ptr, rk_ptr, begin, h, gk_step, rk_step, K, KEY)
        gv_at, rv_at = gate_at(gv_ptr, rv_ptr, begin, h, gv_step, rv_step, V, VALUE)
        qw, kw = load_norm(qw_ptr, kw_ptr, K, BK, NORM)
        norm = qw, kw, eps
        q, k, v, gk, gv = load_chunk(
            q_ptr, k_ptr, v_ptr, gk_at, rk_at, gv_at, rv_at, norm, t, valid, q_step, k_step, v_step, gk_step, rk_step,
            gv_step, rv_step, cfg,
        )  # fmt: skip
        before = tl.full([], NO_KEY, tl.float32)
        m, m_before = 0.0, 0.0
        if SAFE_EXP:
            sums, tops, sums_before, tops_before = stabiliser(k, gk, gv, valid, ki, vi, DECAYING, cfg)
            is_last = t == C - 1
            step, top = tl.sum(tl.where(is_last, sums, 0.0), 0), tl.sum(tl.where(is_last, tops, 0.0), 0)
            passed_m_ptr += slot * H + h
            if i > 0:
                before = wait_for_number(passed_m_ptr)
            elif INITIAL:
                before = tl.load(before_ptr + head)
                if not SPLIT:  # from outside
                    before *= LOG2E
            after = maximum(before + step, top)
            if i + 1 < count:
                publish_number(passed_m_ptr + H, after)
            else:
                tl.store(last_ptr + head, tl.where(after < -1e29, NO_KEY, after * LN2))
            m = maximum(before + sums, tops)
            m_before = maximum(before + sums_before, tops_before)
            k = key_features(k, m, cfg)
            gk, gv = relative_decays(gk, gv, m, m_before, ki, vi, cfg)
            if STORE:
                tl.store(m_ptr + (begin + t) * H + h, m, mask=inside)
        at = (slot * H + h) * K * V
        over_tree = False
        above = float("inf")
        if not ONE_PATH:
            lowest = lowest_decay(gk, gv)
            if BOTH:  # the nearest bound that `decay_bounds` may give the key axis
                lowest = tl.minimum(lowest, tl.min(tl.sum(gk, 0), 0) - tl.max(growth(m, m_before, INITIAL), 0))
            over_tree = may_leave_range(lowest, MAX_DECAY)
            if may_leave_range(lowest, RANGE):
                above = 2.0**-24  # outputs that are enlarged so much have large gradients
                if not over_tree:
                    over_tree = tl.max(too_small(k, v, valid, K, VALUED).to(tl.int32), 0) > 0
        if over_tree:
            compute_over_tree(
                q_ptr, k_ptr, v_ptr, gk_at, rk_at, gv_at, rv_at, qw_ptr, kw_ptr, mask_ptr, initial_ptr, o_ptr,
                final_ptr, factors_ptr, states_ptr, passed_ptr, before, begin, length, head, h, i, count, at, scale,
                eps, H, q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step, DECAYING, MASKED, STORE, MAX_DECAY,
                cfg,
            )  # fmt: skip
        else:
            weak = too_small(k, v, valid, K, VALUED)
            bound_k, bound_v = decay_bounds(weak, m, m_before, MAX_DECAY, BOTH, INITIAL)
            compute_chunk(
                q_ptr, initial_ptr, o_ptr, final_ptr, factors_ptr, states_ptr, passed_ptr, q, k, v, gk, gv, norm,
                bound_k, bound_v, above, t, inside, valid, begin, head, h, i, count, at, scale, H, q_step, STORE,
                ONE_PATH, cfg,
            )  # fmt: skip

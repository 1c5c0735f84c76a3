"""Kernels of the gated delta rule, in chunks of C tokens. `regla.ops.triton.delta_operation` launches them.

    A_ts = beta_t sum_i k_ti k_si D_i(s, t]   s < t        T = (I + A)^-1
    W = T Diag(beta) (K o E)      Y = T Diag(beta) V       U = Y - W S
    O = scale * ((Q o E) S + tril(P) U)                    S <- Diag(total) S + (K o F)^T U

with D(s, t] the decay between two tokens, E that from the chunk's start to a token, F that from a token to its end, and
P as A with queries in place of keys and without beta.

Decays. Logarithms are to the base 2, B is the inclusive cumulative log-decay. D(s, t] = 2^B_t 2^-B_s as long as channel
i of token s has B_s > -NEAR: no factor leaves float32, and scores are one product of matrices. The few pairs whose s
lies behind that are summed one column at a time, with the decays over (s, t] summed from their own tokens. Which way a
pair goes depends on s alone, so a later token never changes an earlier row.

Shape legend: C tokens of a chunk, K key channels, V value channels, G queries per state head; padded to powers of two.
Intermediates lie by chunk: [chunks, H, C, D].
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.tiles import LOG2E

NEAR = tl.constexpr(60.0)
LOWEST = tl.constexpr(-150.0)  # bits: what is left below is 0 in float32


@triton.jit
def bounds(slot, starts, stops, T, chunks, C: tl.constexpr, VARLEN: tl.constexpr):
    """First token of a chunk and the end of its sequence, counted over all rows."""
    if VARLEN:
        start, stop = tl.load(starts + slot), tl.load(stops + slot)
    else:
        row = slot // chunks
        start, stop = row * T + (slot % chunks) * C, row * T + T
    return start.to(tl.int64), stop.to(tl.int64)


@triton.jit
def load(ptr, token, valid, h, heads, width: tl.constexpr, BLOCK: tl.constexpr):
    """[C, BLOCK] float32 of head h of x [tokens, heads, width]; 0 outside."""
    column = tl.arange(0, BLOCK)
    at = (token * heads + h)[:, None] * width + column[None, :]
    return tl.load(ptr + at, mask=valid[:, None] & (column < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store(ptr, token, valid, h, heads, width: tl.constexpr, x, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at = (token * heads + h)[:, None] * width + column[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=valid[:, None] & (column < width)[None, :])


@triton.jit
def tile(ptr, index, ROWS: tl.constexpr, width: tl.constexpr, first, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] of the index-th of tensors [ROWS, width], from column `first` on."""
    column = first + tl.arange(0, BLOCK)
    at = index.to(tl.int64) * ROWS * width + tl.arange(0, ROWS)[:, None] * width + column[None, :]
    return tl.load(ptr + at, mask=(column < width)[None, :], other=0.0)


@triton.jit
def put(ptr, index, ROWS: tl.constexpr, width: tl.constexpr, first, x, BLOCK: tl.constexpr):
    column = first + tl.arange(0, BLOCK)
    at = index.to(tl.int64) * ROWS * width + tl.arange(0, ROWS)[:, None] * width + column[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=(column < width)[None, :])


@triton.jit
def rows_of(ptr, index, height: tl.constexpr, width: tl.constexpr, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] of the index-th of tensors [height, width], both padded, from column `first` on."""
    row, column = tl.arange(0, ROWS), first + tl.arange(0, BLOCK)
    at = index.to(tl.int64) * height * width + row[:, None] * width + column[None, :]
    return tl.load(ptr + at, mask=(row < height)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def put_rows(ptr, index, height: tl.constexpr, width: tl.constexpr, first, x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, ROWS), first + tl.arange(0, BLOCK)
    at = index.to(tl.int64) * height * width + row[:, None] * width + column[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=(row < height)[:, None] & (column < width)[None, :])


@triton.jit
def log_decays(g, token, valid, h, H, K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr):
    """[C, BK], base 2, at least LOWEST. GATE: "channel" [tokens, H, K] or "head" [tokens, H]."""
    if GATE == "channel":
        x = load(g, token, valid, h, H, K, BK)
    else:
        one = tl.load(g + token * H + h, mask=valid, other=0.0).to(tl.float32)
        x = tl.broadcast_to(one[:, None], (one.shape[0], BK))
    return tl.maximum(x * LOG2E, LOWEST)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, dtype: tl.constexpr):
    return tl.dot(a.to(dtype), b.to(dtype), input_precision=PRECISION)


@triton.jit
def pick(x, j):
    """Row j of x [C, D]: [D]."""
    row = tl.arange(0, x.shape[0])
    return tl.sum(tl.where((row == j)[:, None], x, 0.0), 0)


@triton.jit(noinline=True)
def add_deep_scores(
    x, hx, heads, k, g, out, start, stop, h, H,
    GATE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """Add to scores [C, C] at `out`, of rows x with the keys, what the factors leave out: channels with B_s <= -NEAR.

    A function that is called, and loads the chunk again: in line it would cost the other chunks registers.
    """
    t = tl.arange(0, C)
    token = start + t
    valid = token < stop
    xx, kk = load(x, token, valid, hx, heads, K, BK), load(k, token, valid, h, H, K, BK)
    gg = log_decays(g, token, valid, h, H, K, BK, GATE)
    B = tl.cumsum(gg, 0)
    P = tl.zeros((C, C), tl.float32)
    for j in range(C):
        left_out = pick(B, j) <= -NEAR
        if tl.max(left_out.to(tl.int32)) > 0:
            decay = tl.exp2(tl.cumsum(tl.where((t > j)[:, None], gg, 0.0), 0))
            reads = (t > j) if STRICT else (t >= j)
            terms = xx * tl.where(left_out, pick(kk, j), 0.0)[None, :] * decay
            column = tl.where(reads, tl.sum(terms, 1), 0.0)
            P += tl.where((t == j)[None, :], column[:, None], 0.0)
    at = t[:, None] * C + t[None, :]
    tl.debug_barrier()
    P += tl.load(out + at).to(tl.float32)
    tl.store(out + at, P.to(out.dtype.element_ty))
    tl.debug_barrier()


@triton.jit
def inverse(A):
    """(I + A)^-1 of strictly lower triangular A [C, C], row by row."""
    C: tl.constexpr = A.shape[0]
    t = tl.arange(0, C)
    X = -A
    for i in range(2, C):
        row = -pick(A, i)
        row += tl.sum(row[:, None] * X, 0)
        X = tl.where((t == i)[:, None], row[None, :], X)
    return X + tl.where(t[:, None] == t[None, :], 1.0, 0.0)


@triton.jit
def prepare_kernel(
    q, k, v, g, beta, starts, stops, W, Y, KF, QE, P, total, inverses, T, chunks, H,
    GATE: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """All of a chunk that needs no state; one CTA per chunk and state head."""
    slot, h = tl.program_id(0), tl.program_id(1)
    start, stop = bounds(slot, starts, stops, T, chunks, C, VARLEN)
    t = tl.arange(0, C)
    token = start + t
    valid = token < stop
    index = slot * H + h
    dtype: tl.constexpr = k.dtype.element_ty
    kk = load(k, token, valid, h, H, K, BK)
    beta_t = tl.load(beta + token * H + h, mask=valid, other=0.0).to(tl.float32)
    earlier = t[:, None] > t[None, :]
    kE, kW, kF = kk, kk, kk
    if GATE != "none":
        gg = log_decays(g, token, valid, h, H, K, BK, GATE)
        B = tl.cumsum(gg, 0)
        E = tl.exp2(B)
        near = B > -NEAR
        deep = tl.min(B) <= -NEAR
        kE, kW = kk * E, tl.where(near, kk * tl.exp2(tl.minimum(-B, NEAR)), 0.0)
        kF = kk * tl.exp2(tl.cumsum(gg, 0, reverse=True) - gg)
        tl.store(total + index * BK + tl.arange(0, BK), tl.exp2(tl.sum(gg, 0)))
    A = product(kE, tl.trans(kW), PRECISION, dtype)
    if GATE != "none":
        if deep:
            put(inverses, index, C, C, 0, A, C)
            add_deep_scores(k, h, H, k, g, inverses + index * C * C, start, stop, h, H, GATE, K, BK, C, True)
            A = tile(inverses, index, C, C, 0, C)
    inv = inverse(tl.where(earlier, A * beta_t[:, None], 0.0))
    put(W, index, C, K, 0, product(inv, beta_t[:, None] * kE, SOLVE, tl.float32), BK)
    vv = load(v, token, valid, h, H, V, BV)
    put(Y, index, C, V, 0, product(inv, beta_t[:, None] * vv, SOLVE, tl.float32), BV)
    put(KF, index, C, K, 0, kF, BK)
    if KEEP:
        put(inverses, index, C, C, 0, inv, C)
    for i in tl.static_range(G):
        qq = load(q, token, valid, h * G + i, H * G, K, BK)
        qE = qq
        if GATE != "none":
            qE = qq * E
        scores = product(qE, tl.trans(kW), PRECISION, dtype)
        put(QE, index * G + i, C, K, 0, qE, BK)
        put(P, index * G + i, C, C, 0, tl.where(earlier | (t[:, None] == t[None, :]), scores, 0.0), C)
        if GATE != "none":
            if deep:
                hq, of_query = h * G + i, P + (index * G + i) * C * C
                add_deep_scores(q, hq, H * G, k, g, of_query, start, stop, h, H, GATE, K, BK, C, False)


@triton.jit
def state_kernel(
    W, Y, KF, total, initial, states, final, firsts, chunks, H,
    GATE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk of a sequence and head, BV columns of the state: U in place of Y, and the state before each."""
    first_v, n, h = tl.program_id(0) * BV, tl.program_id(1) // H, tl.program_id(1) % H
    begin, end = n * chunks, n * chunks + chunks
    if VARLEN:
        begin, end = tl.load(firsts + n), tl.load(firsts + n + 1)
    dtype: tl.constexpr = W.dtype.element_ty
    at = n * H + h
    S = tl.zeros((BK, BV), tl.float32)
    if INITIAL:
        S = rows_of(initial, at, K, V, first_v, BK, BV)
    for slot in range(begin, end):
        index = slot * H + h
        put_rows(states, index, K, V, first_v, S, BK, BV)
        U = tile(Y, index, C, V, first_v, BV).to(tl.float32)
        U -= product(tile(W, index, C, K, 0, BK), S, PRECISION, dtype)
        put(Y, index, C, V, first_v, U, BV)
        if GATE != "none":
            S *= tl.load(total + index * BK + tl.arange(0, BK))[:, None]
        S += product(tl.trans(tile(KF, index, C, K, 0, BK)), U, PRECISION, dtype)
    put_rows(final, at, K, V, first_v, S, BK, BV)


@triton.jit
def output_kernel(
    QE, P, U, states, starts, stops, o, scale, T, chunks, H,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of a chunk and query head."""
    slot, hq = tl.program_id(0), tl.program_id(1)
    start, stop = bounds(slot, starts, stops, T, chunks, C, VARLEN)
    token = start + tl.arange(0, C)
    dtype: tl.constexpr = QE.dtype.element_ty
    index = slot * H + hq // G
    of_query = slot * H * G + hq
    S = rows_of(states, index, K, V, 0, BK, BV)
    out = product(tile(QE, of_query, C, K, 0, BK), S, PRECISION, dtype)
    out += product(tile(P, of_query, C, C, 0, C), tile(U, index, C, V, 0, BV), PRECISION, dtype)
    store(o, token, token < stop, hq, H * G, V, out * scale, BV)


@triton.jit
def state_gradient_kernel(
    W, KF, QE, P, total, d_o, d_final, starts, stops, firsts, d_U, d_states, d_initial, scale, T, chunks, H,
    GATE: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The other way round: gradients of U and of the state behind each chunk, BV columns of a sequence and head."""
    first_v, n, h = tl.program_id(0) * BV, tl.program_id(1) // H, tl.program_id(1) % H
    begin, end = n * chunks, n * chunks + chunks
    if VARLEN:
        begin, end = tl.load(firsts + n), tl.load(firsts + n + 1)
    dtype: tl.constexpr = W.dtype.element_ty
    at = n * H + h
    column = first_v + tl.arange(0, BV)
    dS = tl.zeros((BK, BV), tl.float32)
    if FINAL:
        dS = rows_of(d_final, at, K, V, first_v, BK, BV)
    for slot in range(end - 1, begin - 1, -1):
        index = slot * H + h
        start, stop = bounds(slot, starts, stops, T, chunks, C, VARLEN)
        token = start + tl.arange(0, C)
        inside = (token < stop)[:, None] & (column < V)[None, :]
        put_rows(d_states, index, K, V, first_v, dS, BK, BV)
        dU = product(tile(KF, index, C, K, 0, BK), dS, PRECISION, dtype)
        if GATE != "none":
            dS *= tl.load(total + index * BK + tl.arange(0, BK))[:, None]
        for i in tl.static_range(G):
            of_query = index * G + i
            d_out = tl.load(d_o + (token * H * G + h * G + i)[:, None] * V + column[None, :], mask=inside, other=0.0)
            d_out = d_out.to(tl.float32) * scale
            dU += product(tl.trans(tile(P, of_query, C, C, 0, C)), d_out, PRECISION, dtype)
            dS += product(tl.trans(tile(QE, of_query, C, K, 0, BK)), d_out, PRECISION, dtype)
        put(d_U, index, C, V, first_v, dU, BV)
        dS -= product(tl.trans(tile(W, index, C, K, 0, BK)), dU, PRECISION, dtype)
    put_rows(d_initial, at, K, V, first_v, dS, BK, BV)


@triton.jit(noinline=True)
def add_deep_gradients(
    x, hx, heads, k, g, d_read, U, d_x, d_k, d_g, start, stop, h, H, index, factor,
    GATE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    STRICT: tl.constexpr,
):  # fmt: skip
    """Add the gradients of `add_deep_scores` to those of x, of k and of g, from what it read U with: d_read, times
    `factor`."""
    t = tl.arange(0, C)
    token = start + t
    valid = token < stop
    xx, kk = load(x, token, valid, hx, heads, K, BK), load(k, token, valid, h, H, K, BK)
    gg = log_decays(g, token, valid, h, H, K, BK, GATE)
    B = tl.cumsum(gg, 0)
    read = load(d_read, token, valid, hx, heads, V, BV) * factor
    d_P = tl.dot(read, tl.trans(tile(U, index, C, V, 0, BV).to(tl.float32)), input_precision="ieee")
    of_x, of_k, of_g = tl.zeros_like(xx), tl.zeros_like(xx), tl.zeros_like(xx)
    for j in range(C):
        left_out = pick(B, j) <= -NEAR
        if tl.max(left_out.to(tl.int32)) > 0:
            decay = tl.exp2(tl.cumsum(tl.where((t > j)[:, None], gg, 0.0), 0))
            reads = (t > j) if STRICT else (t >= j)
            column = tl.sum(tl.where((t == j)[None, :], d_P, 0.0), 1)
            terms = tl.where(reads[:, None] & left_out[None, :], decay * column[:, None], 0.0)
            k_j = pick(kk, j)[None, :]
            of_x += terms * k_j
            of_k += tl.where((t == j)[:, None], tl.sum(terms * xx, 0)[None, :], 0.0)
            of_g += tl.where((t > j)[:, None], tl.cumsum(terms * xx * k_j, 0, reverse=True), 0.0)
    tl.debug_barrier()
    store(d_x, token, valid, hx, heads, K, of_x + load(d_x, token, valid, hx, heads, K, BK), BK)
    tl.debug_barrier()
    store(d_k, token, valid, h, H, K, of_k + load(d_k, token, valid, h, H, K, BK), BK)
    if GATE == "channel":
        store(d_g, token, valid, h, H, K, of_g + load(d_g, token, valid, h, H, K, BK), BK)
    else:
        so_far = tl.load(d_g + token * H + h, mask=valid, other=0.0).to(tl.float32)
        tl.store(d_g + token * H + h, (so_far + tl.sum(of_g, 1)).to(d_g.dtype.element_ty), mask=valid)
    tl.debug_barrier()


@triton.jit
def gradient_kernel(
    q, k, v, g, beta, starts, stops, inverses, U, states, d_U, d_states, d_o, d_q, d_k, d_v, d_g, d_beta,
    scale, T, chunks, H,
    GATE: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's inputs, from those of U and of the state behind it; one CTA per chunk and state head."""
    slot, h = tl.program_id(0), tl.program_id(1)
    start, stop = bounds(slot, starts, stops, T, chunks, C, VARLEN)
    t = tl.arange(0, C)
    token = start + t
    valid = token < stop
    index = slot * H + h
    dtype: tl.constexpr = k.dtype.element_ty
    kk = load(k, token, valid, h, H, K, BK)
    beta_t = tl.load(beta + token * H + h, mask=valid, other=0.0).to(tl.float32)
    earlier = t[:, None] > t[None, :]
    kE, kW, E, Wf, F = kk, kk, 1.0, 1.0, 1.0
    if GATE != "none":
        gg = log_decays(g, token, valid, h, H, K, BK, GATE)
        B = tl.cumsum(gg, 0)
        near = B > -NEAR
        deep = tl.min(B) <= -NEAR
        E, Wf = tl.exp2(B), tl.where(near, tl.exp2(tl.minimum(-B, NEAR)), 0.0)
        F = tl.exp2(tl.cumsum(gg, 0, reverse=True) - gg)
        kE, kW = kk * E, kk * Wf
    S, dS = rows_of(states, index, K, V, 0, BK, BV), rows_of(d_states, index, K, V, 0, BK, BV)
    uu, vv = tile(U, index, C, V, 0, BV), load(v, token, valid, h, H, V, BV)
    R = product(tl.trans(tile(inverses, index, C, C, 0, C)), tile(d_U, index, C, V, 0, BV), SOLVE, tl.float32)
    overlap = product(kE, tl.trans(kW), PRECISION, dtype)
    if GATE != "none":
        if deep:
            # Over the inverse, which has been read.
            tl.debug_barrier()
            put(inverses, index, C, C, 0, overlap, C)
            add_deep_scores(k, h, H, k, g, inverses + index * C * C, start, stop, h, H, GATE, K, BK, C, True)
            overlap = tile(inverses, index, C, C, 0, C)
    answers = product(kE, S, PRECISION, dtype)
    answers += product(tl.where(earlier, overlap, 0.0), uu, PRECISION, dtype)
    tl.store(d_beta + token * H + h, tl.sum(R * (vv - answers), 1).to(d_beta.dtype.element_ty), mask=valid)
    dv = beta_t[:, None] * R
    store(d_v, token, valid, h, H, V, dv, BV)
    # The keys as queries: what the state answers for them has the gradient -dv.
    d_P = tl.where(earlier, -product(dv, tl.trans(uu), PRECISION, dtype), 0.0)
    d_read = -product(dv, tl.trans(S), PRECISION, dtype) + product(d_P, kW, PRECISION, dtype)
    d_column = product(tl.trans(d_P), kE, PRECISION, dtype)
    d_row = d_read * E  # of k as what reads
    log_gradient = kE * d_read  # of B
    d_key = d_row
    for i in tl.static_range(G):
        hq = h * G + i
        qq = load(q, token, valid, hq, H * G, K, BK)
        qE = qq * E
        d_out = load(d_o, token, valid, hq, H * G, V, BV) * scale
        d_Pq = tl.where(t[:, None] >= t[None, :], product(d_out, tl.trans(uu), PRECISION, dtype), 0.0)
        d_read = product(d_out, tl.trans(S), PRECISION, dtype) + product(d_Pq, kW, PRECISION, dtype)
        d_column += product(tl.trans(d_Pq), qE, PRECISION, dtype)
        d_query = d_read * E
        log_gradient += qE * d_read
        store(d_q, token, valid, hq, H * G, K, d_query, BK)
    d_written = product(uu, tl.trans(dS), PRECISION, dtype)  # of K o F
    d_key += d_column * Wf + d_written * F
    store(d_k, token, valid, h, H, K, d_key, BK)
    if GATE != "none":
        log_gradient -= kW * d_column
        written = kk * F * d_written
        carried = tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1) * tl.exp2(tl.sum(gg, 0))
        # F spans (t, end of the chunk]: of g_t, what the tokens before t wrote; the carried state takes every g.
        through = tl.cumsum(log_gradient, 0, reverse=True) + (tl.cumsum(written, 0) - written) + carried[None, :]
        if GATE == "channel":
            store(d_g, token, valid, h, H, K, through, BK)
        else:
            tl.store(d_g + token * H + h, tl.sum(through, 1).to(d_g.dtype.element_ty), mask=valid)
        if deep:
            add_deep_gradients(
                k, h, H, k, g, d_v, U, d_k, d_k, d_g, start, stop, h, H, index, -1.0,
                GATE, K, V, BK, BV, C, True,
            )  # fmt: skip
            for i in tl.static_range(G):
                add_deep_gradients(
                    q, h * G + i, H * G, k, g, d_o, U, d_q, d_k, d_g, start, stop, h, H, index, scale,
                    GATE, K, V, BK, BV, C, False,
                )  # fmt: skip

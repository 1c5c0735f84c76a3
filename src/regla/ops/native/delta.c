/* The gated delta rule on a CPU, token by token, with the state in the first-level cache.
 *
 *     S'_t = Diag(a_t) S_(t-1)        w_t = v_t - S'_t^T k_t        S_t = S'_t + k_t (beta_t w_t)^T
 *     o_t = scale * S_t^T q_t
 *
 * see regla/ops/delta.py and docs/math.md. One thread takes one state head of one sequence.
 *
 * Forward: it walks the tokens; every `chunk` tokens it puts the state away, and of every token w, if there will be a
 * backward pass. Backward: chunk by chunk from the end. The states of the chunk's tokens are made again from the one
 * that was put away, then the gradient D of the state walks back through them:
 *
 *     D_t += q_t do_t^T       du_t = D_t^T k_t       dv_t = beta_t du_t       dbeta_t = w_t . du_t       e_t = -dv_t
 *     D'_t = D_t + k_t e_t^T        dk_t = D_t u_t + S'_t e_t        dq_t = S_t do_t
 *     dlog a_t = rows of (D'_t o S'_t),        D_(t-1) = Diag(a_t) D'_t
 *
 * Sums of products of what the forward pass had: no quotient, no triangular system. Keys that are nearly parallel and
 * gates of any speed are nothing special, and any split of a sequence into calls gives the same bits.
 *
 * Columns of the state, the value channels, do not meet. Forward, vectors run along the columns, and what the state
 * answers is a sum over rows. Backward, most sums are over columns: vectors run along the rows, and one column after
 * another, LANES of them at a time, goes through the chunk.
 */
#include "rows.h"
#include "threads.h"

#define AHEAD 2 /* tokens whose numbers are asked for before their turn */

enum { NONE, PER_HEAD, PER_CHANNEL };

typedef struct {
    int64_t sequences, heads, queries, K, V, chunk, threads; /* heads: of the state; queries: per state head */
    int64_t gate;
    float scale;
    const int64_t *bounds, *first_chunk; /* [sequences + 1] tokens and chunks before each sequence */
    Rows q, k, v, beta, gk;
    const float *initial_state; /* [sequences, heads, K, V] or null */
    Rows o;
    float *final_state, *states; /* as initial_state; [chunks, heads, K, padded V] or null */
    Rows w;                      /* as v, or null */
    Rows d_o;
    const float *d_final;
    Rows d_q, d_k, d_v, d_beta, d_gk;
    float *d_initial;
} Problem;

/* a of a token. */
static void read_decays(const Problem *p, int64_t t, int64_t h, float *a) {
    const int64_t K = p->K, channels = p->gate == PER_CHANNEL ? K : 1;
    const float *gk = row(p->gk, t, h * channels);
    for (int64_t i = 0; i < K; i += LANES) {
        vec x = p->gate == PER_CHANNEL ? load(gk, i, K, 0.0f) : all(p->gate == PER_HEAD ? *gk : 0.0f);
        put(exp_of(x), a, i);
    }
}

/* ---- forward: S [K][padded V], n vectors of its columns at a time ---- */

/* out = S^T x. Even and odd rows by themselves: one sum would wait for itself. */
INLINE void answer(const int n, int64_t K, int64_t VP, const float *S, const float *restrict x, vec *restrict out) {
    vec even[TILE] = {0}, odd[TILE] = {0};
    int64_t i = 0;
    for (; i + 1 < K; i += 2)
        for (int c = 0; c < n; c++) {
            even[c] += x[i] * get(S + i * VP, c * LANES);
            odd[c] += x[i + 1] * get(S + (i + 1) * VP, c * LANES);
        }
    for (int c = 0; c < n; c++) out[c] = even[c] + odd[c] + (i < K ? x[i] * get(S + i * VP, c * LANES) : (vec){0});
}

/* S = Diag(a) S + k u^T, out = S^T q */
INLINE void write_and_read(const int n, int64_t K, int64_t VP, float *restrict S, const float *restrict a,
                           const float *restrict k, const float *restrict q, const vec *restrict u,
                           vec *restrict out) {
    vec sum[TILE] = {0}, write[TILE];
    for (int c = 0; c < n; c++) write[c] = u[c];
    for (int64_t i = 0; i < K; i++)
        for (int c = 0; c < n; c++) {
            vec s = get(S + i * VP, c * LANES) * a[i] + k[i] * write[c];
            put(s, S + i * VP, c * LANES);
            sum[c] += q[i] * s;
        }
    for (int c = 0; c < n; c++) out[c] = sum[c];
}

/* One token: S to the state after it. a and decayed [padded K] are buffers. */
static void forward_token(const Problem *p, int64_t t, int64_t h, float *S, float *a, float *decayed) {
    const int64_t K = p->K, V = p->V, G = p->queries, VP = padded(V);
    const float *k = row(p->k, t, h * K), *q = row(p->q, t, h * G * K), *v = row(p->v, t, h * V);
    const float beta = *row(p->beta, t, h);
    read_decays(p, t, h, a);
    for (int64_t i = 0; i < K; i++) decayed[i] = a[i] * k[i];
    for (int64_t column = 0; column < VP; column += TILE * LANES) {
        const int width = width_at(column, VP);
        vec u[TILE], out[TILE];
        BY_WIDTH(width, answer(W, K, VP, S + column, decayed, u))
        for (int c = 0; c < width; c++) {
            const int64_t j = column + c * LANES;
            u[c] = load(v, j, V, 0.0f) - u[c];
            if (p->w.at) store_away(u[c], row(p->w, t, h * V), j, V);
            u[c] *= beta;
        }
        BY_WIDTH(width, write_and_read(W, K, VP, S + column, a, k, q, u, out))
        for (int64_t g = 0; g < G; g++) {
            if (g > 0) BY_WIDTH(width, answer(W, K, VP, S + column, q + g * K, out))
            for (int c = 0; c < width; c++)
                store(out[c] * p->scale, row(p->o, t, (h * G + g) * V), column + c * LANES, V);
        }
    }
}

INLINE void expect_token(const Problem *p, int64_t t, int64_t h) {
    const int64_t K = p->K, V = p->V, G = p->queries;
    expect_row(p->q, t, h * G * K, G * K), expect_row(p->k, t, h * K, K), expect_row(p->v, t, h * V, V);
    if (p->gate == PER_CHANNEL) expect_row(p->gk, t, h * K, K);
    expect_row(p->w, t, h * V, V), expect_row(p->d_o, t, h * G * V, G * V);
}

static void forward_head(const void *work, char *memory, int64_t item) {
    const Problem *p = work;
    const int64_t K = p->K, V = p->V, VP = padded(V), H = p->heads, n = item / H, h = item % H;
    float *S = take(&memory, K * VP), *a = take(&memory, padded(K)), *decayed = take(&memory, padded(K));
    const float *from = p->initial_state ? p->initial_state + item * K * V : 0;
    memset(S, 0, K * VP * sizeof(float));
    for (int64_t i = 0; from && i < K; i++) memcpy(S + i * VP, from + i * V, V * sizeof(float));
    const int64_t begin = p->bounds[n], end = p->bounds[n + 1];
    for (int64_t t = begin; t < end; t++) {
        if (p->states && (t - begin) % p->chunk == 0) {
            float *to = p->states + ((p->first_chunk[n] + (t - begin) / p->chunk) * H + h) * K * VP;
            for (int64_t i = 0; i < K * VP; i += LANES) store_away(get(S, i), to, i, K * VP);
        }
        if (t + AHEAD < end) expect_token(p, t + AHEAD, h);
        forward_token(p, t, h, S, a, decayed);
    }
    for (int64_t i = 0; i < K; i++) memcpy(p->final_state + (item * K + i) * V, S + i * VP, V * sizeof(float));
}

/* ---- backward: LANES columns of the state [LANES][padded K], n vectors of their rows at a time ---- */

/* What a thread works with: of a chunk's tokens, rows of whole vectors. */
typedef struct {
    float *q, *k, *a;          /* [chunk, queries, padded K], [chunk, padded K] twice */
    float *d_o, *w, *u;        /* [chunk, queries, padded V] times the scale, [chunk, padded V] twice */
    float *beta;               /* [chunk] */
    float *d_q, *d_k, *d_a;    /* as q, k, a */
    float *d_decayed;          /* [chunk, padded K]: what dk has of S_(t-1) e_t, before its decay */
    float *d_v, *d_beta;       /* as w; [chunk, LANES] */
    float *D, *history;        /* [padded V, padded K]; [chunk + 1, LANES, padded K] of some columns */
} Work;

static int64_t lay_out(const Problem *p, Work *w, char *memory) {
    const int64_t C = p->chunk, G = p->queries, KP = padded(p->K), VP = padded(p->V);
    char *start = memory;
    w->q = take(&memory, C * G * KP), w->k = take(&memory, C * KP), w->a = take(&memory, C * KP);
    w->d_o = take(&memory, C * G * VP), w->w = take(&memory, C * VP), w->u = take(&memory, C * VP);
    w->beta = take(&memory, C);
    w->d_q = take(&memory, C * G * KP), w->d_k = take(&memory, C * KP), w->d_a = take(&memory, C * KP);
    w->d_decayed = take(&memory, C * KP);
    w->d_v = take(&memory, C * VP), w->d_beta = take(&memory, C * LANES);
    w->D = take(&memory, VP * KP), w->history = take(&memory, (C + 1) * LANES * KP);
    return memory - start;
}

/* next = Diag(a) S + k u^T, d_q += next d_o */
INLINE void advance(const int n, int64_t KP, const float *restrict S, float *restrict next, const float *restrict a,
                    const float *restrict k, const float *restrict u, const float *restrict d_o,
                    float *restrict d_q) {
    vec A[TILE], write[TILE], sum[TILE];
    for (int c = 0; c < n; c++) A[c] = get(a, c * LANES), write[c] = get(k, c * LANES), sum[c] = get(d_q, c * LANES);
    for (int j = 0; j < LANES; j++)
        for (int c = 0; c < n; c++) {
            vec s = get(S + j * KP, c * LANES) * A[c] + u[j] * write[c];
            put(s, next + j * KP, c * LANES);
            sum[c] += d_o[j] * s;
        }
    for (int c = 0; c < n; c++) put(sum[c], d_q, c * LANES);
}

/* d_q += S d_o */
INLINE void read_backward(const int n, int64_t KP, const float *restrict S, const float *restrict d_o,
                          float *restrict d_q) {
    vec sum[TILE];
    for (int c = 0; c < n; c++) sum[c] = get(d_q, c * LANES);
    for (int j = 0; j < LANES; j++)
        for (int c = 0; c < n; c++) sum[c] += d_o[j] * get(S + j * KP, c * LANES);
    for (int c = 0; c < n; c++) put(sum[c], d_q, c * LANES);
}

/* D += q d_o^T */
INLINE void write_backward(const int n, int64_t KP, float *restrict D, const float *restrict q,
                           const float *restrict d_o) {
    vec Q[TILE];
    for (int c = 0; c < n; c++) Q[c] = get(q, c * LANES);
    for (int j = 0; j < LANES; j++)
        for (int c = 0; c < n; c++) put(get(D + j * KP, c * LANES) + d_o[j] * Q[c], D + j * KP, c * LANES);
}

/* The same, and products of D and k, whose lanes' sums are D^T k. */
INLINE void gather(const int n, int64_t KP, float *restrict D, const float *restrict q, const float *restrict k,
                   const float *restrict d_o, vec *restrict products) {
    vec Q[TILE], key[TILE];
    for (int c = 0; c < n; c++) Q[c] = get(q, c * LANES), key[c] = get(k, c * LANES);
    for (int j = 0; j < LANES; j++) {
        vec sum = products[j];
        for (int c = 0; c < n; c++) {
            vec d = get(D + j * KP, c * LANES) + d_o[j] * Q[c];
            put(d, D + j * KP, c * LANES);
            sum += d * key[c];
        }
        products[j] = sum;
    }
}

/* D to Diag(a) (D + k e^T), with what it gives on the way; S is the state before the token. */
INLINE void step_back(const int n, int64_t KP, float *restrict D, const float *restrict S, const float *restrict a,
                      const float *restrict k, const float *restrict u, const float *restrict e, float *restrict d_k,
                      float *restrict d_decayed, float *restrict d_a) {
    vec A[TILE], key[TILE], of_k[TILE], of_decayed[TILE], of_a[TILE];
    for (int c = 0; c < n; c++) {
        const int at = c * LANES;
        A[c] = get(a, at), key[c] = get(k, at);
        of_k[c] = get(d_k, at), of_decayed[c] = get(d_decayed, at), of_a[c] = get(d_a, at);
    }
    for (int j = 0; j < LANES; j++)
        for (int c = 0; c < n; c++) {
            vec d = get(D + j * KP, c * LANES), s = get(S + j * KP, c * LANES);
            of_k[c] += u[j] * d;
            of_decayed[c] += e[j] * s;
            d += e[j] * key[c];
            of_a[c] += d * s;
            put(d * A[c], D + j * KP, c * LANES);
        }
    for (int c = 0; c < n; c++) {
        const int at = c * LANES;
        put(of_k[c], d_k, at), put(of_decayed[c], d_decayed, at), put(of_a[c], d_a, at);
    }
}

static void copy_row(const float *from, int64_t n, float factor, float *to) {
    for (int64_t i = 0; i < n; i += LANES) put(load(from, i, n, 0.0f) * factor, to, i);
}

/* The numbers of `count` tokens from t on. */
static void read_chunk(const Problem *p, const Work *w, int64_t h, int64_t t, int64_t count) {
    const int64_t K = p->K, V = p->V, G = p->queries, KP = padded(K), VP = padded(V);
    for (int64_t c = 0; c < count; c++, t++) {
        if (c + AHEAD < count) expect_token(p, t + AHEAD, h);
        w->beta[c] = *row(p->beta, t, h);
        copy_row(row(p->k, t, h * K), K, 1.0f, w->k + c * KP);
        copy_row(row(p->w, t, h * V), V, 1.0f, w->w + c * VP);
        copy_row(row(p->w, t, h * V), V, w->beta[c], w->u + c * VP);
        for (int64_t g = 0; g < G; g++) {
            copy_row(row(p->q, t, (h * G + g) * K), K, 1.0f, w->q + (c * G + g) * KP);
            copy_row(row(p->d_o, t, (h * G + g) * V), V, p->scale, w->d_o + (c * G + g) * VP);
        }
        read_decays(p, t, h, w->a + c * KP);
    }
    memset(w->d_q, 0, count * G * KP * sizeof(float));
    memset(w->d_k, 0, count * KP * sizeof(float));
    memset(w->d_decayed, 0, count * KP * sizeof(float));
    memset(w->d_a, 0, count * KP * sizeof(float));
    memset(w->d_beta, 0, count * LANES * sizeof(float));
}

/* The gradients of the tokens' numbers, to where they belong. */
static void write_chunk(const Problem *p, const Work *w, int64_t h, int64_t t, int64_t count) {
    const int64_t K = p->K, V = p->V, G = p->queries, KP = padded(K), VP = padded(V);
    for (int64_t c = 0; c < count; c++, t++) {
        const float *a = w->a + c * KP, *d_a = w->d_a + c * KP;
        float of_beta = 0.0f, of_gate = 0.0f;
        for (int l = 0; l < LANES; l++) of_beta += w->d_beta[c * LANES + l];
        *row(p->d_beta, t, h) = of_beta;
        for (int64_t j = 0; j < V; j += LANES) store_away(get(w->d_v + c * VP, j), row(p->d_v, t, h * V), j, V);
        for (int64_t i = 0; i < K; i += LANES) {
            const vec decay = get(a, i);
            store_away(get(w->d_k + c * KP, i) + decay * get(w->d_decayed + c * KP, i), row(p->d_k, t, h * K), i, K);
            if (p->gate == PER_CHANNEL) store_away(decay * get(d_a, i), row(p->d_gk, t, h * K), i, K);
            for (int64_t g = 0; g < G; g++)
                store_away(get(w->d_q + (c * G + g) * KP, i), row(p->d_q, t, (h * G + g) * K), i, K);
        }
        for (int64_t i = 0; p->gate == PER_HEAD && i < K; i++) of_gate += a[i] * d_a[i];
        if (p->gate == PER_HEAD) *row(p->d_gk, t, h) = of_gate;
    }
}

/* LANES columns of a chunk, from `column` on; `before` is the state before its tokens. */
static void backward_columns(const Problem *p, const Work *w, int64_t column, int64_t count, const float *before) {
    const int64_t K = p->K, G = p->queries, KP = padded(K), VP = padded(p->V), size = LANES * KP;
    float *D = w->D + column * KP;
    memset(w->history, 0, size * sizeof(float));
    for (int64_t i = 0; i < K; i++)
        for (int64_t j = 0; j < LANES; j++) w->history[j * KP + i] = before[i * VP + column + j];
    for (int64_t c = 0; c < count; c++) {
        const float *d_o = w->d_o + c * G * VP + column, *u = w->u + c * VP + column;
        for (int64_t i = 0; i < KP; i += TILE * LANES) {
            const int width = width_at(i, KP);
            const float *S = w->history + c * size + i, *a = w->a + c * KP + i, *k = w->k + c * KP + i;
            float *next = w->history + (c + 1) * size + i, *d_q = w->d_q + c * G * KP + i;
            BY_WIDTH(width, advance(W, KP, S, next, a, k, u, d_o, d_q))
            for (int64_t g = 1; g < G; g++)
                BY_WIDTH(width, read_backward(W, KP, next, d_o + g * VP, d_q + g * KP))
        }
    }
    for (int64_t c = count; c-- > 0;) {
        const float *d_o = w->d_o + c * G * VP + column, *u = w->u + c * VP + column;
        vec products[LANES] = {0};
        for (int64_t i = 0; i < KP; i += TILE * LANES) {
            const int width = width_at(i, KP);
            const float *q = w->q + c * G * KP + i, *k = w->k + c * KP + i;
            for (int64_t g = 1; g < G; g++)
                BY_WIDTH(width, write_backward(W, KP, D + i, q + g * KP, d_o + g * VP))
            BY_WIDTH(width, gather(W, KP, D + i, q, k, d_o, products))
        }
        const vec d_u = sums_of(products), d_v = d_u * w->beta[c];
        float e[LANES] __attribute__((aligned(ALIGNMENT)));
        put(-d_v, e, 0);
        put(d_v, w->d_v + c * VP, column);
        put(get(w->d_beta, c * LANES) + d_u * get(w->w + c * VP, column), w->d_beta, c * LANES);
        for (int64_t i = 0; i < KP; i += TILE * LANES) {
            const int width = width_at(i, KP);
            const int64_t at = c * KP + i;
            const float *S = w->history + c * size + i;
            BY_WIDTH(width, step_back(W, KP, D + i, S, w->a + at, w->k + at, u, e, w->d_k + at, w->d_decayed + at,
                                      w->d_a + at))
        }
    }
}

static void backward_head(const void *work, char *memory, int64_t item) {
    const Problem *p = work;
    const int64_t K = p->K, V = p->V, KP = padded(K), VP = padded(V), H = p->heads, n = item / H, h = item % H;
    const int64_t begin = p->bounds[n], end = p->bounds[n + 1];
    Work w;
    lay_out(p, &w, memory);
    memset(w.D, 0, VP * KP * sizeof(float));
    for (int64_t i = 0; p->d_final && i < K; i++)
        for (int64_t j = 0; j < V; j++) w.D[j * KP + i] = p->d_final[(item * K + i) * V + j];
    for (int64_t chunk = (end - begin + p->chunk - 1) / p->chunk; chunk-- > 0;) {
        const int64_t t = begin + chunk * p->chunk, count = t + p->chunk < end ? p->chunk : end - t;
        read_chunk(p, &w, h, t, count);
        for (int64_t column = 0; column < VP; column += LANES)
            backward_columns(p, &w, column, count, p->states + ((p->first_chunk[n] + chunk) * H + h) * K * VP);
        write_chunk(p, &w, h, t, count);
    }
    for (int64_t i = 0; i < K; i++)
        for (int64_t j = 0; j < V; j++) p->d_initial[(item * K + i) * V + j] = w.D[j * KP + i];
}

/* ---- what Python calls ---- */

static int run(const Problem *p, Item *of_head, int64_t bytes) {
    const int is_much = p->bounds[p->sequences] * p->heads * p->K * p->V >= WORTH_A_THREAD;
    return share_out(p, of_head, p->sequences * p->heads, bytes, is_much ? p->threads : 1);
}

int64_t regla_size_of_delta_problem(void) { return sizeof(Problem); }

/* 0, or 1 where there is no memory for the threads' buffers. */
int regla_delta_forward(const Problem *p) {
    return run(p, forward_head, (p->K * padded(p->V) + 2 * padded(p->K)) * sizeof(float) + 3 * ALIGNMENT);
}

int regla_delta_backward(const Problem *p) {
    Work w;
    return run(p, backward_head, lay_out(p, &w, 0));
}

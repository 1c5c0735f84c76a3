/* Gated linear attention on a CPU, token by token, with the state in the first-level cache.
 *
 *     S_t = e^(m_(t-1) - m_t) Diag(a_t) S_(t-1) Diag(b_t) + phi(k_t) v_t^T        o_t = scale * S_t^T phi(q_t)
 *
 * with phi the safe exponential, or q and k as they are (then m is 0); see regla/ops/attention.py and docs/math.md.
 *
 * Forward: one thread takes one state head of one sequence and walks its tokens; every `chunk` tokens it puts the state
 * away, if there will be a backward pass. Backward: chunk by chunk from the end; the states of the chunk's tokens are
 * made again from the one that was put away, then the gradient D of the state walks back through them:
 *
 *     D_t += phi(q_t) do_t^T    dphi(k_t) = D_t v_t    dv_t = D_t^T phi(k_t)
 *     dlog a_t = rows of, dlog b_t = columns of  (D_t o decayed S_(t-1)),      D_(t-1) = decayed D_t
 *
 * Sums of products of what the forward pass had: no quotient, no difference, so no gate is too fast and no reset too
 * hard. A token's result depends on the state alone, so that any split of a sequence into calls gives the same bits.
 *
 * Columns of a state, the value channels, are worked on in tiles of up to TILE vectors, padded with zeros to whole
 * vectors. Written for GCC and Clang: vector_size types, pthreads, nothing else beyond C11.
 */
#include "threads.h"
#include "token.h"

#define GROUP 2 /* tokens that the backward pass takes a tile through at once */
#define AHEAD 2 /* tokens whose numbers are asked for before their turn */
#define PARTS 4 /* of the work, per thread: none waits long for the last */

/* What one thread works with. */
typedef struct {
    Token *tokens;                  /* [chunk], or one at a time */
    int64_t *real;                  /* [chunk] where they are */
    float *S, *m;                   /* of some heads, state or its gradient [tiles][K, width of the tile]; and m */
    double *tops;                   /* of some heads, the largest gradient of what is read from its state */
    float *units;                   /* of some heads, what their gradients are multiplied by */
    float *history;                 /* [chunk + 1][K, width] of one tile */
    float *out;                     /* [queries, padded V] */
    float *d_out;                   /* [chunk, queries, padded V] */
    float *d_phi_q, *d_phi_k, *d_a; /* [chunk, queries, padded K], [chunk, padded K] twice */
    float *d_v, *d_b;               /* [chunk, padded V] */
} Work;

/* ---- a tile of the state; n vectors wide ---- */

/* next = S after `m` tokens; `has_a`: rows have decays of their own. On the way d_phi_q += S d_out, token by token, of
 * the first query head. */
INLINE void advance(const int n, const int m, const int has_a, int64_t K, const vec *restrict S, vec *restrict next,
                    const Token *x, int64_t column, const float *d_out, int64_t d_out_step, float *d_phi_q,
                    int64_t d_phi_q_step) {
    for (int64_t first = 0; first < K; first += LANES) {
        vec sums[GROUP][LANES];
        for (int u = 0; u < m; u++)
            for (int i = 0; i < LANES; i++) sums[u][i] = (vec){0};
        const int64_t end = K < first + LANES ? K : first + LANES;
        for (int64_t i = first; i < end; i++) {
            vec sum[GROUP] = {0};
            for (int c = 0; c < n; c++) {
                vec s = S[i * n + c];
                for (int u = 0; u < m; u++) {
                    const int64_t at = column + c * LANES;
                    s *= get(x[u].b, at);
                    if (has_a) s *= x[u].a[i];
                    s += x[u].phi_k[i] * get(x[u].v, at);
                    sum[u] += s * get(d_out + u * d_out_step, at);
                }
                next[i * n + c] = s;
            }
            for (int u = 0; u < m; u++) sums[u][i - first] = sum[u];
        }
        for (int u = 0; u < m; u++) {
            float *to = d_phi_q + u * d_phi_q_step;
            put(get(to, first) + sums_of(sums[u]), to, first);
        }
    }
}

/* The same in place, and out = S^T phi_q of the first query head. */
INLINE void advance_and_read(const int n, const int has_a, int64_t K, vec *restrict S, const Token *x, int64_t column,
                             vec *restrict out) {
    const float *restrict a = x->a, *restrict phi_k = x->phi_k, *restrict phi_q = x->phi_q;
    vec v[TILE], b[TILE], sum[TILE] = {0};
    for (int c = 0; c < n; c++) v[c] = ((const vec *)(x->v + column))[c], b[c] = ((const vec *)(x->b + column))[c];
    for (int64_t i = 0; i < K; i++) {
        const float k_i = phi_k[i], q_i = phi_q[i], a_i = has_a ? a[i] : 1.0f;
        for (int c = 0; c < n; c++) {
            vec s = S[i * n + c] * b[c];
            if (has_a) s *= a_i;
            s += k_i * v[c];
            S[i * n + c] = s;
            sum[c] += q_i * s;
        }
    }
    for (int c = 0; c < n; c++) out[c] = sum[c];
}

INLINE void read_state(const int n, int64_t K, const vec *restrict S, const float *restrict phi_q, vec *restrict out) {
    vec sum[TILE] = {0};
    for (int64_t i = 0; i < K; i++)
        for (int c = 0; c < n; c++) sum[c] += phi_q[i] * S[i * n + c];
    for (int c = 0; c < n; c++) out[c] = sum[c];
}

/* d_phi_q += S d_out */
INLINE void read_backward(const int n, int64_t K, const vec *restrict S, const vec *d_out, vec *restrict d_phi_q) {
    vec d[TILE];
    for (int c = 0; c < n; c++) d[c] = d_out[c];
    for (int64_t first = 0; first < K; first += LANES) {
        vec sums[LANES] = {0};
        for (int64_t i = first; i < K && i < first + LANES; i++) {
            vec sum = S[i * n] * d[0];
            for (int c = 1; c < n; c++) sum += S[i * n + c] * d[c];
            sums[i - first] = sum;
        }
        d_phi_q[first / LANES] += sums_of(sums);
    }
}

/* D += phi_q d_out^T */
INLINE void write_backward(const int n, int64_t K, vec *restrict D, const float *restrict phi_q, const vec *d_out) {
    for (int64_t i = 0; i < K; i++)
        for (int c = 0; c < n; c++) D[i * n + c] += phi_q[i] * d_out[c];
}

/* D from after the reads of `m` tokens to before the first of them, with all that it gives on the way; S is the state
 * before them. */
INLINE void step_back(const int n, const int m, const int has_a, int64_t K, vec *restrict D, const vec *restrict S,
                      const Token *x, int64_t column, const float *d_out, int64_t d_out_step, float *d_phi_k,
                      float *d_a, int64_t KP, float *d_v, float *d_b, int64_t VP) {
    vec sum_v[GROUP][TILE] = {0}, sum_b[GROUP][TILE] = {0};
    for (int64_t first = 0; first < K; first += LANES) {
        vec sums_k[GROUP][LANES], sums_a[GROUP][LANES];
        for (int u = 0; u < m; u++)
            for (int i = 0; i < LANES; i++) sums_k[u][i] = sums_a[u][i] = (vec){0};
        const int64_t end = K < first + LANES ? K : first + LANES;
        for (int64_t i = first; i < end; i++) {
            vec sum_k[GROUP] = {0}, sum_a[GROUP] = {0};
            for (int c = 0; c < n; c++) {
                const int64_t at = column + c * LANES;
                vec s[GROUP], d = D[i * n + c];
                s[0] = S[i * n + c];
                for (int u = 0; u + 1 < m; u++) {
                    s[u + 1] = s[u] * get(x[u].b, at);
                    if (has_a) s[u + 1] *= x[u].a[i];
                    s[u + 1] += x[u].phi_k[i] * get(x[u].v, at);
                }
                for (int u = m - 1; u >= 0; u--) {
                    d += x[u].phi_q[i] * get(d_out + u * d_out_step, at);
                    sum_k[u] += d * get(x[u].v, at);
                    sum_v[u][c] += x[u].phi_k[i] * d;
                    d *= get(x[u].b, at);
                    if (has_a) d *= x[u].a[i];
                    vec worth = d * s[u];
                    sum_b[u][c] += worth;
                    if (has_a) sum_a[u] += worth;
                }
                D[i * n + c] = d;
            }
            for (int u = 0; u < m; u++) {
                sums_k[u][i - first] = sum_k[u];
                if (has_a) sums_a[u][i - first] = sum_a[u];
            }
        }
        for (int u = 0; u < m; u++) {
            put(get(d_phi_k + u * KP, first) + sums_of(sums_k[u]), d_phi_k + u * KP, first);
            if (has_a) put(get(d_a + u * KP, first) + sums_of(sums_a[u]), d_a + u * KP, first);
        }
    }
    for (int u = 0; u < m; u++)
        for (int c = 0; c < n; c++) {
            put(sum_v[u][c], d_v + u * VP, column + c * LANES);
            put(sum_b[u][c], d_b + u * VP, column + c * LANES);
        }
}

/* One body for each shape of a tile, width and number of tokens, with and without decays of rows. */
#define BY_SHAPE(n, m, a, call)                                       \
    if (m == 1 && a) { enum { M = 1, A = 1 }; BY_WIDTH(n, call) }     \
    else if (m == 1) { enum { M = 1, A = 0 }; BY_WIDTH(n, call) }     \
    else if (a) { enum { M = GROUP, A = 1 }; BY_WIDTH(n, call) }      \
    else { enum { M = GROUP, A = 0 }; BY_WIDTH(n, call) }

/* ---- passes over a sequence ---- */

static void load_state(const Problem *p, const float *from, float factor, float *S) {
    const int64_t VP = padded(p->V);
    for (int64_t column = 0; column < VP; column += TILE * LANES) {
        int64_t width = width_at(column, VP) * LANES;
        for (int64_t i = 0; i < p->K; i++)
            for (int64_t j = 0; j < width; j++)
                S[p->K * column + i * width + j] =
                    from && column + j < p->V ? from[i * p->V + column + j] * factor : 0.0f;
    }
}

static void store_state(const Problem *p, const float *S, float factor, float *to) {
    const int64_t VP = padded(p->V);
    for (int64_t column = 0; column < VP; column += TILE * LANES) {
        int64_t width = width_at(column, VP) * LANES;
        for (int64_t i = 0; i < p->K; i++)
            for (int64_t j = 0; j < width && column + j < p->V; j++)
                to[i * p->V + column + j] = S[p->K * column + i * width + j] * factor;
    }
}

/* Tokens `begin` to `end` of one head, from S and m to those after them. */
static void forward_chunk(const Problem *p, Work *w, int64_t n, int64_t h, int64_t begin, int64_t end,
                          float *state, float *m) {
    const int64_t K = p->K, V = p->V, H = p->heads, G = p->queries, VP = padded(V);
    Token *x = w->tokens;
    if (p->states) {
        int64_t chunk = (p->first_chunk[n] + (begin - p->bounds[n]) / p->chunk) * H + h;
        for (int64_t i = 0; i < K * VP; i += LANES) store_away(get(state, i), p->states + chunk * K * VP, i, K * VP);
        p->chunk_m[chunk] = *m;
    }
    for (int64_t t = begin; t < end; t++) {
        if (p->mask && !p->mask[t]) {
            memset(row(p->o, t, h * G * V), 0, G * V * sizeof(float));
            for (int64_t g = 0; g < G && p->weight; g++) normalise(p, h * G + g, row(p->o, t, (h * G + g) * V));
            for (int64_t g = 0; g < G && p->factor; g++) p->factor[(t * H + h) * G + g] = 0.0f;
            continue;
        }
        if (t + AHEAD < end) expect_token(p, t + AHEAD, h);
        read_token(p, t, h, *m, x);
        *m = x->m;
        for (int64_t column = 0; column < VP; column += TILE * LANES) {
            vec *S = (vec *)(state + K * column);
            const int width = width_at(column, VP);
            if (p->key_gate)
                BY_WIDTH(width, advance_and_read(W, 1, K, S, x, column, (vec *)(w->out + column)))
            else
                BY_WIDTH(width, advance_and_read(W, 0, K, S, x, column, (vec *)(w->out + column)))
            for (int64_t g = 1; g < G; g++)
                BY_WIDTH(width, read_state(W, K, S, x->phi_q + g * padded(K), (vec *)(w->out + g * VP + column)))
        }
        for (int64_t g = 0; g < G; g++) {
            float factor = write_output(p, h * G + g, w->out + g * VP, row(p->o, t, (h * G + g) * V));
            if (p->factor) p->factor[(t * H + h) * G + g] = factor;
        }
    }
}

/* An empty state, whatever its m. */
static int is_zero(const float *S, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (S[i] != 0.0f) return 0;
    return 1;
}

/* Heads side by side in memory go through a chunk one after another: their pages are the same. */
static void forward_heads(const Problem *p, Work *w, int64_t n, int64_t first, int64_t last) {
    const int64_t KV = p->K * p->V, size = p->K * padded(p->V), at = n * p->heads, end = p->bounds[n + 1];
    for (int64_t h = first; h < last; h++) {
        const float *S = p->initial_state ? p->initial_state + (at + h) * KV : 0;
        load_state(p, S, 1.0f, w->S + (h - first) * size);
        w->m[h - first] = !p->safe_exp ? 0.0f : p->before && !is_zero(S, KV) ? p->before[at + h] : NO_KEY;
    }
    for (int64_t begin = p->bounds[n]; begin < end; begin += p->chunk)
        for (int64_t h = first; h < last; h++)
            forward_chunk(p, w, n, h, begin, begin + p->chunk < end ? begin + p->chunk : end,
                          w->S + (h - first) * size, w->m + (h - first));
    for (int64_t h = first; h < last; h++) {
        store_state(p, w->S + (h - first) * size, 1.0f, p->final_state + (at + h) * KV);
        const float m = w->m[h - first];
        p->last[at + h] = m < NO_KEY / 2 && p->before ? p->before[at + h] : m; /* still empty: as it was */
    }
}

static void write_zeros(Rows x, int64_t t, int64_t offset, int64_t n) {
    if (x.at) memset(row(x, t, offset), 0, n * sizeof(float));
}

/* Tokens `begin` to `end` of a chunk, the real ones: their numbers into w->tokens, their places into w->real. */
static int64_t read_chunk(const Problem *p, Work *w, int64_t h, int64_t begin, int64_t end, float m, float unit) {
    const int64_t K = p->K, V = p->V, G = p->queries, VP = padded(V);
    int64_t count = 0;
    for (int64_t t = begin; t < end; t++) {
        if (p->mask && !p->mask[t]) {
            write_zeros(p->d_q, t, h * G * K, G * K);
            write_zeros(p->d_k, t, h * K, K), write_zeros(p->d_v, t, h * V, V);
            write_zeros(p->d_gk, t, h * K, K), write_zeros(p->d_rk, t, h * K, K);
            write_zeros(p->d_gv, t, h * V, V), write_zeros(p->d_rv, t, h * V, V);
            continue;
        }
        if (t + AHEAD < end) expect_token(p, t + AHEAD, h);
        read_token(p, t, h, m, w->tokens + count);
        m = w->tokens[count].m;
        for (int64_t g = 0; g < G; g++) {
            const float *d_o = row(p->d_o, t, (h * G + g) * V);
            const float factor = p->factor[(t * p->heads + h) * G + g] * unit;
            for (int64_t j = 0; j < V; j += LANES)
                put(load(d_o, j, V, 0.0f) * factor, w->d_out + (count * G + g) * VP, j);
        }
        w->real[count++] = t;
    }
    return count;
}

static void backward_chunk(const Problem *p, Work *w, int64_t n, int64_t h, int64_t begin, int64_t end,
                           float *d_state, float unit) {
    const int64_t K = p->K, G = p->queries, KP = padded(K), VP = padded(p->V);
    const int64_t chunk = (p->first_chunk[n] + (begin - p->bounds[n]) / p->chunk) * p->heads + h;
    const int64_t count = read_chunk(p, w, h, begin, end, p->chunk_m[chunk], unit);
    memset(w->d_phi_q, 0, count * G * KP * sizeof(float));
    memset(w->d_phi_k, 0, count * KP * sizeof(float));
    memset(w->d_a, 0, count * KP * sizeof(float));
    for (int64_t column = 0; column < VP; column += TILE * LANES) {
        const int width = width_at(column, VP);
        const int64_t size = K * width * LANES;
        memcpy(w->history, p->states + chunk * K * VP + K * column, size * sizeof(float));
        int64_t step = 0;
        for (int64_t c = 0; c < count; step++) {
            const int64_t m = G == 1 && c + GROUP <= count ? GROUP : 1;
            const vec *S = (const vec *)(w->history + step * size);
            vec *next = (vec *)(w->history + (step + 1) * size);
            const Token *x = w->tokens + c;
            const float *d_out = w->d_out + c * G * VP;
            float *d_phi_q = w->d_phi_q + c * G * KP;
            BY_SHAPE(width, m, p->key_gate, advance(W, M, A, K, S, next, x, column, d_out, VP, d_phi_q, KP))
            for (int64_t g = 1; g < G; g++) {
                const vec *d = (const vec *)(d_out + g * VP + column);
                BY_WIDTH(width, read_backward(W, K, next, d, (vec *)(d_phi_q + g * KP)))
            }
            c += m;
        }
        vec *D = (vec *)(d_state + K * column);
        for (int64_t c = count; step-- > 0;) {
            const int64_t m = G == 1 && c % GROUP == 0 ? GROUP : 1;
            c -= m;
            const vec *S = (const vec *)(w->history + step * size);
            const Token *x = w->tokens + c;
            const float *d_out = w->d_out + c * G * VP;
            float *d_v = w->d_v + c * VP, *d_b = w->d_b + c * VP;
            float *d_phi_k = w->d_phi_k + c * KP, *d_a = w->d_a + c * KP;
            for (int64_t g = 1; g < G; g++)
                BY_WIDTH(width, write_backward(W, K, D, x->phi_q + g * KP, (const vec *)(d_out + g * VP + column)))
            BY_SHAPE(width, m, p->key_gate,
                     step_back(W, M, A, K, D, S, x, column, d_out, VP, d_phi_k, d_a, KP, d_v, d_b, VP))
            if (column + TILE * LANES < VP) continue; /* the last tile: nothing more comes to these tokens */
            for (int64_t u = c; u < c + m; u++)
                write_gradients(p, w->real[u], h, w->tokens + u, 1.0f / unit, w->d_phi_q + u * G * KP,
                                w->d_phi_k + u * KP, w->d_v + u * VP, w->d_a + u * KP, w->d_b + u * VP);
        }
    }
}

/* x < 2^exponent. What is not finite counts as 0: it stays what it is in any unit. */
static int exponent_of(double x) {
    int exponent = 0;
    if (isfinite(x)) frexp(x, &exponent);
    return exponent;
}

/* What the gradients of each head are multiplied by while they are worked on: a power of two that makes the largest of
 * what is read from its states about 2^36, and that of the last state at most 2^60, as large as products with keys,
 * lifted by 2^48, allow. Behind outliers outputs are tiny and their gradients huge, up to 2^140 times the others',
 * which must not become 0. */
static void find_units(const Problem *p, Work *w, int64_t n, int64_t first, int64_t last) {
    const int64_t V = p->V, G = p->queries, KV = p->K * V;
    for (int64_t h = first; h < last; h++) w->tops[h - first] = 0.0;
    for (int64_t t = p->bounds[n]; t < p->bounds[n + 1]; t++) {
        if (p->mask && !p->mask[t]) continue;
        for (int64_t i = first * G; i < last * G; i++) {
            const float *d_o = row(p->d_o, t, i * V);
            vec top = {0};
            for (int64_t j = 0; j < V; j += LANES) {
                vec x = load(d_o, j, V, 0.0f);
                top = larger(larger(x, -x), top);
            }
            double read = (double)top_of(top) * p->factor[t * p->heads * G + i];
            if (read > w->tops[i / G - first]) w->tops[i / G - first] = read;
        }
    }
    for (int64_t h = first; h < last; h++) {
        int exponent = exponent_of(w->tops[h - first]) - 36;
        if (p->d_final) {
            const float *D = p->d_final + (n * p->heads + h) * KV;
            float top = 0.0f;
            for (int64_t i = 0; i < KV; i++) top = fabsf(D[i]) > top ? fabsf(D[i]) : top;
            const int of_state = exponent_of(top) - 60;
            exponent = of_state > exponent ? of_state : exponent;
        }
        w->units[h - first] = ldexpf(1.0f, exponent > 100 ? -100 : exponent < -100 ? 100 : -exponent);
    }
}

static void backward_heads(const Problem *p, Work *w, int64_t n, int64_t first, int64_t last) {
    const int64_t KV = p->K * p->V, size = p->K * padded(p->V), at = n * p->heads;
    const int64_t begin = p->bounds[n], end = p->bounds[n + 1];
    find_units(p, w, n, first, last);
    for (int64_t h = first; h < last; h++)
        load_state(p, p->d_final ? p->d_final + (at + h) * KV : 0, w->units[h - first], w->S + (h - first) * size);
    for (int64_t start = begin + (end - begin - 1) / p->chunk * p->chunk; end > begin && start >= begin; start -= p->chunk)
        for (int64_t h = first; h < last; h++)
            backward_chunk(p, w, n, h, start, start + p->chunk < end ? start + p->chunk : end,
                           w->S + (h - first) * size, w->units[h - first]);
    for (int64_t h = first; h < last; h++)
        store_state(p, w->S + (h - first) * size, 1.0f / w->units[h - first], p->d_initial + (at + h) * KV);
}

/* ---- threads ---- */

typedef void Pass(const Problem *, Work *, int64_t sequence, int64_t first_head, int64_t last_head);

typedef struct {
    const Problem *problem;
    Pass *pass;
    int64_t tokens, groups, heads; /* tokens that a thread holds at a time; parts of a sequence, and their heads */
} Parts;

/* Lays the buffers out from `memory`; with null, only tells how many bytes they take. */
static int64_t lay_out(const Problem *p, int64_t tokens, int64_t heads, Work *w, char *memory) {
    const int64_t K = p->K, G = p->queries, KP = padded(K), VP = padded(p->V);
    char *start = memory;
    w->tokens = (Token *)take(&memory, tokens * sizeof(Token) / sizeof(float));
    for (int64_t c = 0; c < tokens; c++) {
        Token x = {.phi_q = take(&memory, G * KP), .phi_k = take(&memory, KP), .v = take(&memory, VP),
                   .a = take(&memory, KP), .b = take(&memory, VP),
                   .slopes = p->d_initial ? take(&memory, 2 * (KP + VP)) : 0};
        if (start) w->tokens[c] = x;
    }
    w->S = take(&memory, heads * K * VP);
    w->m = take(&memory, heads);
    w->out = take(&memory, G * VP);
    if (p->d_initial) {
        w->tops = (double *)take(&memory, heads * sizeof(double) / sizeof(float));
        w->units = take(&memory, heads);
        w->real = (int64_t *)take(&memory, tokens * sizeof(int64_t) / sizeof(float));
        w->history = take(&memory, (tokens + 1) * K * (VP < TILE * LANES ? VP : TILE * LANES));
        w->d_out = take(&memory, tokens * G * VP);
        w->d_phi_q = take(&memory, tokens * G * KP);
        w->d_phi_k = take(&memory, tokens * KP);
        w->d_a = take(&memory, tokens * KP);
        w->d_v = take(&memory, tokens * VP);
        w->d_b = take(&memory, tokens * VP);
    }
    return memory - start;
}

static void run_part(const void *work, char *memory, int64_t item) {
    const Parts *parts = work;
    Work w = {0};
    lay_out(parts->problem, parts->tokens, parts->heads, &w, memory);
    int64_t all = parts->problem->heads, first = item % parts->groups * parts->heads, last = first + parts->heads;
    if (first < all) parts->pass(parts->problem, &w, item / parts->groups, first, last < all ? last : all);
}

static int run(const Problem *p, Pass *pass, int64_t tokens) {
    if (!p->sequences) return 0; /* a batch of none */
    int64_t groups = (PARTS * p->threads + p->sequences - 1) / p->sequences;
    if (groups > p->heads) groups = p->heads;
    Parts parts = {p, pass, tokens, groups, (p->heads + groups - 1) / groups};
    Work w = {0};
    const int is_much = p->bounds[p->sequences] * p->heads * p->K * p->V >= WORTH_A_THREAD;
    return share_out(&parts, run_part, p->sequences * groups, lay_out(p, tokens, parts.heads, &w, 0),
                     is_much ? p->threads : 1);
}

int64_t regla_lanes(void) { return LANES; }

int64_t regla_size_of_problem(void) { return sizeof(Problem); }

/* 0, or 1 where there is no memory for the threads' buffers. */
int regla_forward(const Problem *p) { return run(p, forward_heads, 1); }

int regla_backward(const Problem *p) { return run(p, backward_heads, p->chunk); }

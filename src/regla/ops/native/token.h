/* What a token brings to the recurrence, and what the gradients of that are worth in the numbers it came from. */
#ifndef REGLA_TOKEN_H
#define REGLA_TOKEN_H

#include "rows.h"

#define NO_KEY -1e30f

enum { NONE, LOG, REFINED };

typedef struct {
    int64_t sequences, heads, queries, K, V, chunk, threads; /* heads: of the state; queries: per state head */
    int64_t safe_exp, decaying, key_gate, value_gate;
    float scale;
    const int64_t *bounds, *first_chunk; /* [sequences + 1] tokens and chunks before each sequence */
    const uint8_t *mask;                 /* [tokens] or null */
    Rows q, k, v, gk, rk, gv, rv;
    const float *initial_state, *before; /* [sequences, heads, K, V], [sequences, heads], or null */
    Rows o;
    float *final_state, *last;        /* as initial_state, before */
    float *states, *chunk_m, *factor; /* [chunks, heads, K, padded V], [chunks, heads], [tokens, heads * queries] */
    const float *weight, *bias; /* [heads * queries, V] of a norm over the output, with a bias a layer norm; or null */
    float eps;
    Rows d_o;
    const float *d_final;
    Rows d_q, d_k, d_v, d_gk, d_rk, d_gv, d_rv;
    float *d_initial;
} Problem;

/* Rows of whole vectors: beyond K and V there are zeros. */
typedef struct {
    float *phi_q; /* [queries, padded K]; of the safe exponential 2^24 phi(q) */
    float *phi_k; /* [padded K]; 2^48 phi(k) */
    float *v;     /* [padded V] */
    float *a, *b; /* [padded K], [padded V]: what rows and columns of the state decay by */
    float *slopes; /* [2, padded K], [2, padded V]: of log a and log b, in the logits of refined gates; or null */
    float m;
} Token;

INLINE void expect_token(const Problem *p, int64_t t, int64_t h) {
    const int64_t K = p->K, V = p->V, G = p->queries;
    expect_row(p->q, t, h * G * K, G * K), expect_row(p->k, t, h * K, K), expect_row(p->v, t, h * V, V);
    expect_row(p->gk, t, h * K, K), expect_row(p->rk, t, h * K, K);
    expect_row(p->gv, t, h * V, V), expect_row(p->rv, t, h * V, V);
    expect_row(p->d_o, t, h * G * V, G * V);
}

/* ---- gates ---- */

static double log_sigmoid(double x) { return x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x)); }

static double log_add(double x, double y) { return x > y ? x + log1p(exp(y - x)) : y + log1p(exp(x - y)); }

/* A logit of -inf, finite: inf - inf would be nan. */
static double finite_logit(double x) { return x < NO_KEY ? NO_KEY : x; }

static double log_refined(double a, double c) {
    a = finite_logit(a), c = finite_logit(c);
    double forget = exp(log_sigmoid(-a)), u = forget * (forget + 2 * exp(log_sigmoid(-c)) * (1 - forget));
    if (u < 0.5) return log1p(-u);
    return log_sigmoid(a) + log_add(log_sigmoid(a), log_sigmoid(-a) + log_sigmoid(c) + log(2.0));
}

/* Where the refined gate and all that it is made of are ordinary numbers of float32. */
static int is_ordinary(const float *a, const float *c, int64_t n) {
    lanes yes = (lanes){0} - 1;
    for (int64_t i = 0; i < n; i += LANES) {
        vec x = load(a, i, n, 0.0f), y = load(c, i, n, 0.0f);
        yes &= (x > -40.0f) & (x < 80.0f) & (y > -80.0f) & (y < 80.0f);
    }
    return !any(~yes);
}

/* A refined gate F and what its logarithm's gradient is worth in the logits, where all is ordinary. With e^-|a|, e^-|c|
 * and 1 + those for the denominators, one division makes everything, and nothing is a difference of near equals. */
INLINE vec refined(vec a, vec c, vec *slope_a, vec *slope_c) {
    lanes a_low = a < 0.0f, c_low = c < 0.0f;
    const vec one = all(1.0f), e = exp_of(choose(a_low, a, -a)), f = exp_of(choose(c_low, c, -c));
    const vec keep = choose(a_low, e, one), forget = choose(a_low, one, e); /* g, 1 - g, times A */
    const vec fine = choose(c_low, f, one), coarse = choose(c_low, one, f); /* r, 1 - r, times C */
    const vec A = one + e, C = one + f, second = 2.0f * fine * forget, sum = keep * C + second;
    const vec AC = A * C, inverse = 1.0f / (AC * sum), over_AC = inverse * sum, over_A = over_AC * C;
    const vec g = keep * over_A, rest = forget * over_A;
    const vec u = rest * (rest + 2.0f * coarse * over_AC * keep);
    const vec F = g * sum * over_AC;
    if (slope_a) {
        const vec share = second * inverse * AC, other = keep * C * inverse * AC, over_C = over_AC * A;
        *slope_a = rest * (2.0f * coarse * over_C * other + share);
        *slope_c = share * coarse * over_C;
    }
    return choose(u < 0.5f, one - u, F);
}

/* Writes a row of decays and the slowest's logarithm, and where `slopes` are asked for what the gradient of a log-decay
 * is worth in g and r. Returns whether the decays are logarithms still. */
INLINE int gate(int64_t kind, const float *g, const float *r, int64_t n, float *restrict decay, float *slowest,
                float *restrict slope_g, float *restrict slope_r) {
    vec top = all(NO_KEY);
    *slowest = 0.0f;
    if (kind == NONE) return 0;
    if (kind == REFINED && is_ordinary(g, r, n)) {
        for (int64_t i = 0; i < n; i += LANES) {
            vec in_g, in_r;
            vec F = refined(load(g, i, n, -39.0f), load(r, i, n, 0.0f), slope_g ? &in_g : 0, slope_g ? &in_r : 0);
            put(F, decay, i);
            top = larger(F, top);
            if (slope_g) put(in_g, slope_g, i), put(in_r, slope_r, i);
        }
        *slowest = logf(top_of(top));
        return 0;
    }
    if (kind == REFINED)
        for (int64_t i = 0; i < n; i++) {
            decay[i] = (float)log_refined(g[i], r[i]);
            if (slope_g) {
                double a = finite_logit(g[i]), c = finite_logit(r[i]);
                double forget = exp(log_sigmoid(-a)), coarse = exp(log_sigmoid(-c));
                double share = exp(log_sigmoid(log_sigmoid(c) - a + log(2.0)));
                slope_g[i] = (float)(forget * (2 * coarse * (1 - share) + share));
                slope_r[i] = (float)(share * coarse);
            }
        }
    for (int64_t i = 0; i < n; i += LANES) {
        vec x = load(kind == REFINED ? decay : g, i, n, NO_KEY);
        x = choose(x < NO_KEY, all(NO_KEY), x); /* -inf, a gate of exactly 0, would make inf - inf */
        put(x, decay, i);
        top = larger(x, top);
    }
    *slowest = top_of(top);
    return 1;
}

/* At most 1; what is compared stands second, so that a nan stays one. */
INLINE void shift_decay(int are_logarithms, float *decay, float shift, int64_t n) {
    const vec one = all(1.0f), none = {0};
    if (are_logarithms)
        for (int64_t i = 0; i < n; i += LANES) put(exp_of(smaller(none, get(decay, i) + shift)), decay, i);
    else if (shift != 0.0f) {
        const float half = expf(0.5f * shift); /* the factor by itself may be beyond float32 */
        for (int64_t i = 0; i < n; i += LANES) put(smaller(one, get(decay, i) * half * half), decay, i);
    }
}

/* ---- a token ---- */

INLINE float top_of_row(const float *x, int64_t n) {
    vec top = all(-INFINITY);
    for (int64_t i = 0; i < n; i += LANES) top = larger(load(x, i, n, -INFINITY), top);
    return top_of(top);
}

/* root^2 e^x, which may be an ordinary number where e^x is too small for one. */
INLINE vec lifted_exp(vec x, float root) {
    vec half = exp_of(0.5f * x) * root;
    return half * half;
}

static void read_token(const Problem *p, int64_t t, int64_t h, float m_before, Token *x) {
    const int64_t K = p->K, V = p->V, G = p->queries;
    const float *k = row(p->k, t, h * K), *v = row(p->v, t, h * V);
    float *slope = x->slopes, slow_k, slow_v, shift_k = 0.0f, shift_v = 0.0f;
    for (int64_t j = 0; j < V; j += LANES) put(load(v, j, V, 0.0f), x->v, j);
    int log_k = gate(p->key_gate, row(p->gk, t, h * K), row(p->rk, t, h * K), K, x->a, &slow_k, slope,
                     slope ? slope + padded(K) : 0);
    int log_v = gate(p->value_gate, row(p->gv, t, h * V), row(p->rv, t, h * V), V, x->b, &slow_v,
                     slope ? slope + 2 * padded(K) : 0, slope ? slope + 2 * padded(K) + padded(V) : 0);
    if (p->safe_exp) {
        float m = p->decaying ? m_before + (slow_k + slow_v) : m_before, top = top_of_row(k, K);
        m = top > m ? top : m;
        for (int64_t i = 0; i < K; i += LANES) put(lifted_exp(load(k, i, K, -INFINITY) - m, 0x1p24f), x->phi_k, i);
        for (int64_t g = 0; g < G; g++) {
            const float *q = row(p->q, t, (h * G + g) * K), q_top = top_of_row(q, K);
            for (int64_t i = 0; i < K; i += LANES)
                put(lifted_exp(load(q, i, K, -INFINITY) - q_top, 0x1p12f), x->phi_q + g * padded(K), i);
        }
        /* The change of unit goes to one axis, such that what each axis decays by stays <= 1 by itself. */
        float unit = m_before - m;
        if (p->key_gate && p->value_gate) shift_k = -slow_k, shift_v = unit + slow_k;
        else if (p->key_gate) shift_k = unit;
        else shift_v = unit;
        x->m = m;
    } else {
        x->m = 0.0f;
        for (int64_t i = 0; i < K; i += LANES) put(load(k, i, K, 0.0f), x->phi_k, i);
        for (int64_t g = 0; g < G; g++)
            for (int64_t i = 0; i < K; i += LANES)
                put(load(row(p->q, t, (h * G + g) * K), i, K, 0.0f), x->phi_q + g * padded(K), i);
    }
    if (p->key_gate) shift_decay(log_k, x->a, shift_k, K);
    if (p->value_gate) shift_decay(log_v, x->b, shift_v, V);
    else {
        vec decay = all(shift_v == 0.0f ? 1.0f : expf(shift_v));
        for (int64_t j = 0; j < V; j += LANES) put(decay, x->b, j);
    }
}

/* The scale-free norms of regla/layers/norms.py, in place. */
static void normalise(const Problem *p, int64_t head, float *o) {
    const int64_t V = p->V;
    const float *weight = p->weight + head * V, *bias = p->bias ? p->bias + head * V : 0;
    float top = 0.0f, mean = 0.0f, square = 0.0f;
    for (int64_t j = 0; j < V; j++) top = fabsf(o[j]) > top ? fabsf(o[j]) : top;
    top = top < 0x1p-126f ? 1.0f : 1.0f / top;
    for (int64_t j = 0; j < V; j++) o[j] *= top, mean += o[j] / V;
    for (int64_t j = 0; j < V; j++) o[j] -= bias ? mean : 0.0f, square += o[j] * o[j] / V;
    square = 1.0f / sqrtf(square + p->eps);
    for (int64_t j = 0; j < V; j++) o[j] = o[j] * square * weight[j] + (bias ? bias[j] : 0.0f);
}

/* o = factor * out, or that normalised; returns the factor. See `_lower` in regla/ops/attention.py. */
INLINE float write_output(const Problem *p, int64_t head, const float *out, float *o) {
    float factor = p->scale;
    if (p->safe_exp) {
        factor *= 0x1p-24f; /* of phi_q */
        vec top = all(0x1p-100f);
        for (int64_t j = 0; j < p->V; j += LANES) {
            vec x = get(out, j) * factor;
            top = larger(larger(x, -x), top);
        }
        float raised = 0x1p-12f / top_of(top);
        factor *= (raised > 1.0f ? raised : 1.0f) * 0x1p-48f;
    }
    for (int64_t j = 0; j < p->V; j += LANES)
        if (p->states) store_away(get(out, j) * factor, o, j, p->V);
        else store(get(out, j) * factor, o, j, p->V);
    if (p->weight) normalise(p, head, o);
    return factor;
}

INLINE void write_gates(int64_t kind, const float *d, const float *slopes, int64_t n, float back, float *d_g,
                        float *d_r) {
    if (kind == LOG)
        for (int64_t i = 0; i < n; i += LANES) store_away(get(d, i) * back, d_g, i, n);
    if (kind == REFINED)
        for (int64_t i = 0; i < n; i += LANES) {
            vec worth = get(d, i) * back;
            store_away(worth * get(slopes, i), d_g, i, n);
            store_away(worth * get(slopes + padded(n), i), d_r, i, n);
        }
}

/* Gradients of what `read_token` made, times `back`, to those of the token's numbers. */
static void write_gradients(const Problem *p, int64_t t, int64_t h, const Token *x, float back, const float *d_phi_q,
                            const float *d_phi_k, const float *d_v, const float *d_a, const float *d_b) {
    const int64_t K = p->K, V = p->V, G = p->queries;
    const vec one = all(1.0f);
    for (int64_t i = 0; i < K; i += LANES)
        store_away(get(d_phi_k, i) * (p->safe_exp ? get(x->phi_k, i) : one) * back, row(p->d_k, t, h * K), i, K);
    for (int64_t g = 0; g < G; g++)
        for (int64_t i = 0; i < K; i += LANES) {
            vec phi = p->safe_exp ? get(x->phi_q + g * padded(K), i) : one;
            store_away(get(d_phi_q + g * padded(K), i) * phi * back, row(p->d_q, t, (h * G + g) * K), i, K);
        }
    for (int64_t j = 0; j < V; j += LANES) store_away(get(d_v, j) * back, row(p->d_v, t, h * V), j, V);
    write_gates(p->key_gate, d_a, x->slopes, K, back, row(p->d_gk, t, h * K), row(p->d_rk, t, h * K));
    write_gates(p->value_gate, d_b, x->slopes + 2 * padded(K), V, back, row(p->d_gv, t, h * V), row(p->d_rv, t, h * V));
}

#endif

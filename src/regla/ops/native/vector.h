/* Vectors of floats and what is computed on them. GCC and Clang turn vector_size types into what the processor has. */
#ifndef REGLA_VECTOR_H
#define REGLA_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES))); /* may overflow */

/* Writes past the caches where the processor can: what lies at x is not fetched first only to be written over. The
 * thread that did so calls `end_of_streams` before others read it. */
INLINE void stream(vec y, float *x) {
#if LANES == 16
    _mm512_stream_ps(x, (__m512)y);
#elif LANES == 8
    _mm256_stream_ps(x, (__m256)y);
#elif defined(__SSE__)
    _mm_stream_ps(x, (__m128)y);
#else
    memcpy(x, &y, sizeof y);
#endif
}

INLINE void end_of_streams(void) {
#if defined(__SSE__)
    _mm_sfence();
#endif
}

INLINE vec all(float x) { return x - (vec){0}; }

INLINE vec choose(lanes where, vec x, vec otherwise) {
    return (vec)(((lanes)x & where) | ((lanes)otherwise & ~where));
}

INLINE vec larger(vec x, vec y) { return choose(x > y, x, y); }

INLINE vec smaller(vec x, vec y) { return choose(x < y, x, y); }

INLINE int any(lanes x) {
    int32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= x[i];
    return found != 0;
}

/* e^x for x <= 88, to about one unit in the last place; 0 where it would be smaller than a normal number. */
INLINE vec exp_of(vec x) {
    const float magic = 0x1.8p23f; /* the sum with it is rounded to an integer, which its lowest bits hold */
    vec t = x * 1.44269504088896341f + magic, n = t - magic;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r;
    vec power = (vec)(((bits)t << 23) + 0x3f800000);
    return choose(x < -87.3f, (vec){0}, p * power + power);
}

/* FOLD(a, b, s): lanes whose number lacks the bit s hold a[l] + a[l ^ s], the others b[l] + b[l ^ s]. */
#define LANE(l, s, other) ((((l) & (s)) ? LANES : 0) + ((l) ^ ((other) ? (s) : 0)))
#define LANES_4(l, s, o) LANE(l, s, o), LANE(l + 1, s, o), LANE(l + 2, s, o), LANE(l + 3, s, o)
#if LANES == 16
#define ALL_LANES(s, o) LANES_4(0, s, o), LANES_4(4, s, o), LANES_4(8, s, o), LANES_4(12, s, o)
#elif LANES == 8
#define ALL_LANES(s, o) LANES_4(0, s, o), LANES_4(4, s, o)
#else
#define ALL_LANES(s, o) LANES_4(0, s, o)
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif
#define FOLD(a, b, s) (SHUFFLE(a, b, ALL_LANES(s, 0)) + SHUFFLE(a, b, ALL_LANES(s, 1)))

INLINE float top_of(vec x) {
    x = larger(x, SHUFFLE(x, x, ALL_LANES(1, 1)));
    x = larger(x, SHUFFLE(x, x, ALL_LANES(2, 1)));
#if LANES >= 8
    x = larger(x, SHUFFLE(x, x, ALL_LANES(4, 1)));
#endif
#if LANES >= 16
    x = larger(x, SHUFFLE(x, x, ALL_LANES(8, 1)));
#endif
    return x[0];
}

/* Lane l: the sum of all lanes of x[l]. Overwrites x. */
INLINE vec sums_of(vec *x) {
    for (int i = 0; i < LANES; i += 2) x[i] = FOLD(x[i], x[i + 1], 1);
    for (int i = 0; i < LANES; i += 4) x[i] = FOLD(x[i], x[i + 2], 2);
#if LANES >= 8
    for (int i = 0; i < LANES; i += 8) x[i] = FOLD(x[i], x[i + 4], 4);
#endif
#if LANES >= 16
    x[0] = FOLD(x[0], x[8], 8);
#endif
    return x[0];
}

#endif

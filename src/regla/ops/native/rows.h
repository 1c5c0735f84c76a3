/* Rows of numbers, and what is done to them a vector at a time. */
#ifndef REGLA_ROWS_H
#define REGLA_ROWS_H

#include "vector.h"

#define TILE 4 /* vectors that a tile's rows have: as many as there are registers for */

/* A tensor [tokens, heads, channels]: a token's heads and channels side by side, tokens `step` numbers apart. */
typedef struct {
    float *at;
    int64_t step;
} Rows;

INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE float *row(Rows x, int64_t t, int64_t offset) { return x.at ? x.at + t * x.step + offset : 0; }

/* Vector i of a row of n numbers, `beyond` where it ends. */
INLINE vec load(const float *x, int64_t i, int64_t n, float beyond) {
    vec y = all(beyond);
    if (i + LANES <= n) memcpy(&y, x + i, sizeof y);
    else memcpy(&y, x + i, (n - i) * sizeof(float));
    return y;
}

INLINE void store(vec y, float *x, int64_t i, int64_t n) {
    if (i + LANES <= n) memcpy(x + i, &y, sizeof y);
    else memcpy(x + i, &y, (n - i) * sizeof(float));
}

/* The same of what this pass does not read again, past the caches if it lies at a whole vector's address. */
INLINE void store_away(vec y, float *x, int64_t i, int64_t n) {
    if (i + LANES <= n && (uintptr_t)(x + i) % sizeof y == 0) stream(y, x + i);
    else store(y, x, i, n);
}

INLINE void put(vec y, float *x, int64_t i) { *(vec *)(x + i) = y; }

INLINE vec get(const float *x, int64_t i) { return *(const vec *)(x + i); }

/* Asks for the numbers of a token that comes later: from token to token they lie too far apart for the processor to
 * guess. To be inlined: a function that only asks has no effect, and compilers drop calls of such. */
INLINE void expect_row(Rows x, int64_t t, int64_t offset, int64_t n) {
    if (x.at)
        for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(x.at + t * x.step + offset + i, 0, 2);
}

INLINE int width_at(int64_t column, int64_t end) {
    int64_t left = (end - column) / LANES;
    return left < TILE ? (int)left : TILE;
}

/* One body for each width of a tile. */
#define BY_WIDTH(n, call)          \
    switch (n) {                   \
    case 1: { enum { W = 1 }; call; } break; \
    case 2: { enum { W = 2 }; call; } break; \
    case 3: { enum { W = 3 }; call; } break; \
    default: { enum { W = TILE }; call; } break; \
    }

#endif

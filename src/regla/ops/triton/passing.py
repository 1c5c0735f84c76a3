"""How states pass from the CTA of a chunk to that of the next: through memory, without flags.

Each segment and head has two places [BK, BV] for a state, which passings use in turn. Passing p is the state before the
p-th chunk in the order of the pass; it lies in place p mod 2. Passing 0 is an empty state, which nobody writes.

In memory a state consists of vectors of four float32 numbers, which a thread reads and writes as one (16 bytes,
single-copy atomic). A vector carries a tag of 12 bits, three in the lowest bits of each of its numbers. The tag counts
the passings through the place; 0 is the memory before the first. So a vector says by itself whether it is the awaited
one, and a chunk has the state as soon as it is in memory. (With a flag behind the state the writer waits until all of
it is there, and the reader reads it only after it has seen the flag.)

Overwriting is safe without a signal from the reader. Chunk i writes passing i + 1 over passing i - 1, which chunk i - 1
has read. Chunk i writes only after it has received passing i, and chunk i - 1 passes that on only after all of its
threads have read (a barrier). Slices of a state are columns of one place, and the same holds for each. A tag comes
again after 4,096 passings through a place, 8,192 chunks on: more than a GPU has CTAs under way at once.

The tag is an error of up to 2^-20 of a number at each passing, to either side. Of a zero it makes at most 7 x 2^-149,
which is nothing in products of bfloat16 (`untagged` makes it zero again), and of infinity NaN. With EXACT, for float32
inputs, numbers are rounded to 21 bits, and read without their tags.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.tiles import INTERPRETED, in_load_layout

TAG_STEP = tl.constexpr(1263)  # odd: `_tag`


@triton.constexpr_function
def _take(n):
    """Assembly that waits for n vectors. Operands: 4 n words, the results; n addresses; the tag, n times, since every
    element of the packed tile has one; and n times the address of one vector that tends to arrive last. While the
    vectors are not all there, the thread spins on that one alone, which costs less traffic than reading all again."""
    lines = [".reg .pred stale;", ".reg .b64 low, high;", ".reg .b32 part<4>, differs, x;", f".reg .b128 vector<{n}>;"]
    lines += [f"shr.u32 part{i}, ${5 * n}, {3 * i};" for i in range(4)]
    lines += ["bra look;", "spin:", f"ld.relaxed.gpu.global.b32 x, [${6 * n}];", "xor.b32 differs, x, part0;"]
    lines += ["and.b32 differs, differs, 7;", "setp.ne.u32 stale, differs, 0;", "@stale bra spin;", "look:"]
    lines += [f"ld.relaxed.gpu.global.b128 vector{i}, [${4 * n + i}];" for i in range(n)]
    lines += ["mov.b32 differs, 0;"]
    for i in range(n):
        lines += [f"mov.b128 {{low, high}}, vector{i};"]
        lines += [f"mov.b64 {{${i}, ${n + i}}}, low;", f"mov.b64 {{${2 * n + i}, ${3 * n + i}}}, high;"]
        for word in range(4):
            lines += [f"xor.b32 x, ${word * n + i}, part{word};", "or.b32 differs, differs, x;"]
    lines += ["and.b32 differs, differs, 7;", "setp.ne.u32 stale, differs, 0;", "@stale bra spin;"]
    return "{" + "\n".join(lines) + "}"


@triton.constexpr_function
def _take_constraints(n):
    return ",".join(["=&r"] * (4 * n) + ["l"] * n + ["r"] * n + ["l"] * n)


@triton.jit
def _tag(passing):
    """The tag of a passing, in the 12 lowest bits: the count of the passings through its place, times an odd number, so
    that all four parts of the tag change from one to the next. Passing 0 has tag 0."""
    return ((passing + 1) >> 1) * TAG_STEP


@triton.jit
def numbers_at(ptr, BK: tl.constexpr, BV: tl.constexpr, ROW: tl.constexpr):
    """Pointers to the numbers [BK, BV] of a place whose rows have ROW numbers."""
    return ptr + (tl.arange(0, BK)[:, None] * ROW + tl.arange(0, BV)[None, :])


@triton.jit
def _vectors_at(ptr, BK: tl.constexpr, BV: tl.constexpr, ROW: tl.constexpr):
    return ptr + (tl.arange(0, BK)[:, None] * ROW + tl.arange(0, BV // 4)[None, :] * 4)


@triton.jit
def take_state(ptr, passing, BK: tl.constexpr, BS: tl.constexpr, ROW: tl.constexpr, EXACT: tl.constexpr):
    """Wait for the state of a passing and return it, float32 [BK, BS]; zeros for passing 0. ptr: its first column of
    BS, in a place whose rows have ROW numbers."""
    ptr += (passing & 1) * BK * ROW
    if INTERPRETED:
        S = tl.load(numbers_at(ptr, BK, BS, ROW))
    else:
        n: tl.constexpr = BK * BS // (4 * tl.extra.cuda.num_threads())  # at least 1: no vector has two threads
        a, b, c, d = tl.inline_asm_elementwise(
            _take(n),
            _take_constraints(n),
            [_vectors_at(ptr, BK, BS, ROW), _tag(passing), ptr + ((BK - 1) * ROW + BS - 4)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=n,
        )
        tl.debug_barrier()
        words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(BK, BS)
        if EXACT:
            words &= -8
        S = in_load_layout(words.to(tl.float32, bitcast=True), numbers_at(ptr, BK, BS, ROW))
    return S


@triton.jit
def pass_state(ptr, passing, x, ROW: tl.constexpr, EXACT: tl.constexpr):
    """Write x [BK, BS], float32, as the state of a passing, 1 or more; ptr and ROW as in `take_state`."""
    BK: tl.constexpr = x.shape[0]
    BS: tl.constexpr = x.shape[1]
    ptr += (passing & 1) * BK * ROW
    if INTERPRETED:
        tl.store(numbers_at(ptr, BK, BS, ROW), x)
    else:
        words = x.to(tl.int32, bitcast=True)
        if EXACT:
            words = tl.where(x == x, words + 4, words)  # rounds; a NaN of ones would become zero
        ac, bd = words.reshape(BK, BS // 4, 2, 2).split()
        a, c = ac.split()
        b, d = bd.split()
        tag = _tag(passing)
        tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d;
            .reg .b64 low, high;
            .reg .b128 vector;
            lop3.b32 a, $2, 7, $6, 0xb8;
            lop3.b32 b, $3, 7, $7, 0xb8;
            lop3.b32 c, $4, 7, $8, 0xb8;
            lop3.b32 d, $5, 7, $9, 0xb8;
            mov.b64 low, {a, b};
            mov.b64 high, {c, d};
            mov.b128 vector, {low, high};
            st.relaxed.gpu.global.b128 [$1], vector;
            mov.b32 $0, 0;
            }""",  # 0xb8: the third where the second has bits, else the first
            "=r,l,r,r,r,r,r,r,r,r",
            [_vectors_at(ptr, BK, BS, ROW), a, b, c, d, tag, tag >> 3, tag >> 6, tag >> 9],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def untagged(x, EXACT: tl.constexpr):
    """x without what a tag may have left in it: a zero is zero again."""
    if EXACT:
        return x
    return (x.to(tl.int32, bitcast=True) & -8).to(tl.float32, bitcast=True)


@triton.jit
def wait_for_number(ptr):
    """Spin until the number of `publish_number` is at ptr, and return it, float32."""
    if INTERPRETED:
        word = tl.atomic_add(ptr, 0, sem="relaxed", scope="gpu")
        while word == 0:
            word = tl.atomic_add(ptr, 0, sem="relaxed", scope="gpu")
    else:
        word = tl.inline_asm_elementwise(
            """{
            .reg .pred there;
            spin:
            ld.relaxed.gpu.global.s64 $0, [$1];
            setp.ne.s64 there, $0, 0;
            @!there bra spin;
            }""",
            "=&l,l",
            [ptr],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def publish_number(ptr, x):
    """Write x, float32, into a 64-bit word that was 0, with bit 32 set: a reader sees from the word alone whether x is
    there, and no fence is needed."""
    word = (x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | 0x100000000
    tl.atomic_xchg(ptr, word, sem="relaxed", scope="gpu")

"""How states pass from the CTA of a chunk to that of the next: through memory, without flags.

Each sequence and head has two places for a state, which passings use in turn. In memory a state consists of vectors
of four float32 numbers, which threads read and write as one (16 bytes, single-copy atomic). The three lowest bits of
each number are replaced by its tag, 12 bits that tell the passings through its place apart, zero for what is there
before the first. So a vector says by itself whether it is the one that is waited for, and a chunk has the state as
soon as it is in memory. (With a flag behind the state the writer waits until all of it is there, and the reader reads
it only after it has seen the flag.)

What a chunk has read, the next one writes over, once it has what this one passes on; this one passes nothing on before
all of it is read (a barrier). So it is with each slice of a state that is taken in slices, columns of one place. A tag
comes again after 4,096 passings through a place, 8,192 chunks on: more than a GPU has CTAs under way at once.

The tag is an error of up to 2^-20 of a number at each passing, now to one side, now to the other; of a zero it makes at
most 7 x 2^-149, which is nothing in products of bfloat16 (`untagged` makes it zero again), and of infinity nan. With
EXACT numbers are rounded to 21 bits, and read without their tags.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.tiles import INTERPRETED, in_load_layout

TAG_STEP = tl.constexpr(1263)


@triton.constexpr_function
def _take(n):
    """Assembly that waits for n vectors: 4 n words, from n addresses, the tag, and the address of a vector that tends
    to come last, which is looked at alone while it is not there."""
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
    """Of what is passed on as the passing's state, its 12 lowest bits, of 0 zero: the count of the passings through a
    place, from 0, times an odd number, with which all of the tag's four parts change with each."""
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
    """The state [BK, BS], float32, of this passing: of 0 zeros, else what `pass_state` passes, for which it waits. Or
    columns of it, BS of ROW, from ptr on."""
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
    """Pass x [BK, BS], float32, on as the passing's state, from 1 on, or as columns of it, BS of ROW."""
    BK: tl.constexpr = x.shape[0]
    BS: tl.constexpr = x.shape[1]
    ptr += (passing & 1) * BK * ROW
    if INTERPRETED:
        tl.store(numbers_at(ptr, BK, BS, ROW), x)
    else:
        words = x.to(tl.int32, bitcast=True)
        if EXACT:
            words = tl.where(x == x, words + 4, words)  # of the largest nan 4 more would be zero
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
    """x, and zero where it is what a tag makes of zero."""
    if EXACT:
        return x
    return (x.to(tl.int32, bitcast=True) & -8).to(tl.float32, bitcast=True)


@triton.jit
def wait_for_number(ptr):
    """Spin until a number of `publish_number` is there, and return it."""
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
    """Write x such that who sees it needs to see nothing else: into 64 bits that were 0, with a bit above its own."""
    word = (x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | 0x100000000
    tl.atomic_xchg(ptr, word, sem="relaxed", scope="gpu")

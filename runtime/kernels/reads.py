"""What a turn of a decode kernel reads: words of the weight, its scales, and x; see `warp`.

Loads of words and of x go through one unit, which answers in order: x asked for after the words of
a later turn would wait for memory, so that both are asked for together.
"""

# Jitted functions are Triton's language: constants are annotations, tuples may grow.
# mypy: disable-error-code="name-defined,assignment"

from __future__ import annotations

from slimfx.errors import need

triton = need("triton")
tl = need("triton.language")


@triton.jit
def ask():
    """Have what was read above asked for here. ptxas puts a load in front of what needs it, however
    early it was written, but over no trigger of performance counters, which does nothing else.
    """
    tl.inline_asm_elementwise("pmevent 0; mov.b32 $0, 0;", "=r", [], tl.int32, False, 1)


@triton.jit
def load_words_of_x(at, inside, c, CHECK: tl.constexpr, FRESH: tl.constexpr):
    """Words of x, 0 where they are not inside."""
    if FRESH:
        words = tl.load(at, inside & (c >= 0), 0, cache_modifier=".cg")
    elif CHECK:
        words = tl.load(at, inside & (c >= 0), 0, eviction_policy="evict_last")
    else:
        words = tl.load(at, eviction_policy="evict_last")
    return words


@triton.jit
def load_x(
    x, M, kb, lane, c,
    FIRST: tl.constexpr, STEPS: tl.constexpr, F: tl.constexpr, PAIR: tl.constexpr,
    P: tl.constexpr, K: tl.constexpr, CHECK: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """Fragments of 32 inputs each, STEPS from FIRST on in the kb-th 256: for P fragments of eight
    rows, from PAIR on, all steps of the first and then those of the next. Zeros from K on.
    """
    out = ()
    for n in tl.static_range(P):
        row = tl.minimum(lane // 4, tl.maximum(M - 1 - 8 * (PAIR + n), 0))
        t = lane & 3  # Triton takes lane % 4 for contiguous, and gives x a layout of its own
        for i in tl.static_range(STEPS):
            step = kb * 8 + (FIRST + i)
            at = x + (step * F + (PAIR + n)) * 128 + (row * 16 + t * 4) + c
            out += (load_words_of_x(at, step < (K + 31) // 32, c, CHECK, FRESH),)
    return out


@triton.jit
def load_row(x, kb, lane, c, K: tl.constexpr, CHECK: tl.constexpr, FRESH: tl.constexpr):
    """The kb-th 256 inputs of x's only row: lanes 4 g to 4 g + 3 hold those of the g-th 32."""
    word = (kb * 8 + lane // 4) * 16 + (lane & 3) + 4 * c
    return load_words_of_x(x + word, word < (K + 1) // 2, c, CHECK, FRESH)


@triton.jit
def spread(row, lane):
    """The fragments of what `load_row` read: in the g-th, only column g is not zero, so that eight
    columns of the sums share the inputs of a row; `reduce` adds them up.
    """
    out = ()
    for g in tl.static_range(8):
        out += (tl.where(lane // 4 == g, row, 0),)
    return out


@triton.jit
def load_turn_of_x(
    x, M, kb, lane, c,
    K: tl.constexpr, CHECK: tl.constexpr, F: tl.constexpr, ROW: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """What a turn reads of x ahead: nothing if there are no registers for it."""
    out = ()
    if ROW:
        out += (load_row(x, kb, lane, c, K, CHECK, FRESH),)
    elif F <= 2:
        out += load_x(x, M, kb, lane, c, 0, 8, F, 0, F, K, CHECK, FRESH)
    return out


@triton.jit
def load_turn(
    words, scales, first, TILES, kb, c,
    SPARSE: tl.constexpr, K: tl.constexpr, CHECK: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """What a turn reads of RT tiles: for each the positions if SPARSE, codes, and the scales of its
    groups.

    With CHECK, what there is last stands for what is not there.
    """
    SUBS: tl.constexpr = 2 if SPARSE else 4
    LAST: tl.constexpr = (K + 255) // 256 - 1 if SPARSE else (K + 63) // 64 - 1
    PADDED: tl.constexpr = (LAST + 1) * (256 if SPARSE else 64)
    GROUPS: tl.constexpr = 1 if GROUP == 0 else (PADDED + GROUP - 1) // GROUP
    out = ()
    for j in tl.static_range(RT):
        tile = tl.minimum(first + j, TILES - 1).to(tl.int64)
        if SPARSE:
            block = tl.minimum(kb, LAST) if CHECK else kb
            at = words + tile * ((LAST + 1) * 384) + block * 384
            out += (tl.load(at + (256 + c), eviction_policy="evict_first"),)
        else:
            at = words + tile * ((LAST + 1) * 128)
        for s in tl.static_range(SUBS):
            if SPARSE:
                word = tl.load(at + (128 * s + c), eviction_policy="evict_first")
            elif CHECK:
                sub = tl.minimum(kb * SUBS + s, LAST)
                word = tl.load(at + (sub * 128 + c), eviction_policy="evict_first")
            else:
                word = tl.load(at + (kb * 512 + (128 * s + c)), eviction_policy="evict_first")
            out += (word,)
        if GROUP > 0:
            for i in tl.static_range(256 // PART):
                group = tl.minimum((kb * 256 + i * PART) // GROUP, GROUPS - 1)
                out += (tl.load(scales + tile * (GROUPS * 8) + group * 8),)
    return out

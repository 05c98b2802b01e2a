"""What a program of the decode kernels does: tiles of 16 rows times up to 64 rows of x.

A warp is 32 rows of a tensor [32 NW, 4], and one of these rows the four registers of a thread.
`is_by_lane` tells whether Triton laid it out so, on which the assembly of tensor cores relies.

Constants: K inputs; GROUP inputs share a scale, 0 if all do; PART of them one sum before it; RT
tiles a program; NW warps, SK programs share the inputs of a tile, F fragments of eight rows of x.
"""

# Jitted functions are Triton's language: constants are annotations, tuples may grow.
# mypy: disable-error-code="name-defined,assignment"

from __future__ import annotations

import re

from slimfx.errors import need

triton = need("triton")
tl = need("triton.language")
_cuda = need("triton.language.extra.cuda")
_begin_next, _wait = _cuda.gdc_launch_dependents, _cuda.gdc_wait


def is_by_lane(ttgir: str, warps: int) -> bool:
    """Does every product in a kernel's TTGIR see one lane in each row?

    However many of its four columns a thread has at once, its registers follow them in order.
    """
    wanted = re.compile(
        r"(#\w+) = .*sizePerThread = \[1, [124]\], threadsPerWarp = \[32, 1\], "
        rf"warpsPerCTA = \[{warps}, 1\]"
    )
    lines = ttgir.splitlines()
    names = [found[1] for line in lines if (found := wanted.match(line))]
    assembly = [line for line in lines if "elementwise_inline_asm" in line and "mma" in line]
    return bool(assembly) and all(any(f", {name}>" in line for name in names) for line in assembly)


@triton.jit
def multiply(operands, TEXT: tl.constexpr, KINDS: tl.constexpr, N: tl.constexpr):
    """Run assembly of `four_products` that has N results."""
    if N == 1:
        out = tl.inline_asm_elementwise(TEXT, KINDS, operands, (tl.float32,), True, 4)
    elif N == 2:
        out = tl.inline_asm_elementwise(TEXT, KINDS, operands, (tl.float32, tl.float32), True, 4)
    elif N == 4:
        out = tl.inline_asm_elementwise(
            TEXT, KINDS, operands, (tl.float32, tl.float32, tl.float32, tl.float32), True, 4
        )
    else:
        out = tl.inline_asm_elementwise(
            TEXT, KINDS, operands,
            (tl.float32, tl.float32, tl.float32, tl.float32,
             tl.float32, tl.float32, tl.float32, tl.float32),
            True, 4,
        )  # fmt: skip
    return _first(out, N)


@triton.jit
def _first(items, N: tl.constexpr):
    """N of a tuple; the interpreter adds up only tuples of Python's own."""
    out = ()
    for n in tl.static_range(N):
        out += (items[n],)
    return out


@triton.jit
def zeros(R: tl.constexpr, N: tl.constexpr):
    """N accumulators of R lanes."""
    out = ()
    for _ in tl.static_range(N):
        out += (tl.zeros((R, 4), tl.float32),)
    return out


@triton.jit
def load_x(
    x, M, kb, lane, c,
    FIRST: tl.constexpr, STEPS: tl.constexpr, F: tl.constexpr, PAIR: tl.constexpr,
    P: tl.constexpr, K: tl.constexpr, CHECK: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Fragments of 32 inputs each, STEPS from FIRST on in the kb-th 256: for P fragments of eight
    rows, from PAIR on, all steps of the first and then those of the next. Zeros from K on.

    x is as `launch.arranged` leaves it, which is one row of words if NATURAL.
    """
    out = ()
    for n in tl.static_range(P):
        row = tl.minimum(lane // 4, tl.maximum(M - 1 - 8 * (PAIR + n), 0))
        t = lane & 3  # Triton takes lane % 4 for contiguous, and gives x a layout of its own
        for i in tl.static_range(STEPS):
            step = kb * 8 + (FIRST + i)
            if NATURAL:
                word = step * 16 + t + 4 * c
                if CHECK:
                    part = tl.load(x + word, word < (K + 1) // 2, 0, eviction_policy="evict_last")
                else:
                    part = tl.load(x + word, eviction_policy="evict_last")
            else:
                at = x + (step * F + (PAIR + n)) * 128 + (row * 16 + t * 4) + c
                if CHECK:
                    inside = step < (K + 31) // 32
                    part = tl.load(at, inside & (c >= 0), 0, eviction_policy="evict_last")
                else:
                    part = tl.load(at, eviction_policy="evict_last")
            out += (part,)
    return out


@triton.jit
def load_scale(scales, at, c):
    """The scales of a thread's four sums: two of row g, two of row g + 8."""
    pair = tl.load(scales + at)
    return tl.where(c < 2, pair << 16, pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def add_scaled(sums, parts, factor, FIRST: tl.constexpr, F: tl.constexpr):
    """sums + factor parts, F of them."""
    out = ()
    for n in tl.static_range(F):
        out += (sums[n] + parts[FIRST + n] * factor,)
    return out


@triton.jit
def load_words(
    words, first, TILES, kb, c,
    SPARSE: tl.constexpr, K: tl.constexpr, CHECK: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """What RT tiles have for 256 inputs, the kb-th of each warp: codes, and positions if SPARSE.

    With CHECK, what there is last stands for what is not there.
    """
    SUBS: tl.constexpr = 2 if SPARSE else 4
    LAST: tl.constexpr = (K + 255) // 256 - 1 if SPARSE else (K + 63) // 64 - 1
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
    return out


@triton.jit
def _replace(items, new, FIRST: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr):
    """A tuple of ALL with N new items from FIRST on."""
    out = ()
    for i in tl.static_range(ALL):
        if i >= FIRST and i < FIRST + N:
            out += (new[i - FIRST],)
        else:
            out += (items[i],)
    return out


@triton.jit
def turn(
    sums, held, x, M, scales, first, TILES, kb, lane, c,
    SPARSE: tl.constexpr, K: tl.constexpr, CHECK: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, TEXT0: tl.constexpr, TEXT1: tl.constexpr, KINDS: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, RT: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """The products of RT tiles, of which `held` are the words, with 256 inputs, added to sums."""
    SUBS: tl.constexpr = 2 if SPARSE else 4
    WIDTH: tl.constexpr = 256 // SUBS
    PADDED: tl.constexpr = (K + 255) // 256 * 256 if SPARSE else (K + 63) // 64 * 64
    GROUPS: tl.constexpr = 1 if GROUP == 0 else (PADDED + GROUP - 1) // GROUP
    PARTS: tl.constexpr = WIDTH // PART if PART < WIDTH else 1
    H: tl.constexpr = 3 if SPARSE else 4
    P: tl.constexpr = 2 if F > 1 else 1
    B: tl.constexpr = WIDTH // 32
    ready = ()
    if F <= 2:  # there are registers for all of x
        for s in tl.static_range(SUBS):
            ready += load_x(x, M, kb, lane, c, s * B, B, F, 0, P, K, CHECK, NATURAL)
    part = zeros(R, RT * F if GROUP > 0 and PARTS == 1 else 0)
    for s in tl.static_range(SUBS):
        start = kb * 256 + s * WIDTH
        if CHECK:  # of what stands for inputs that are not there, x is zero
            start = tl.minimum(start, (K - 1) // WIDTH * WIDTH)
        for p in tl.static_range(F // P):
            if F <= 2:
                xs = ready[s * B * P : s * B * P + B * P]
            else:
                xs = load_x(x, M, kb, lane, c, s * B, B, F, p * P, P, K, CHECK, NATURAL)
            for j in tl.static_range(RT):
                at = scales + tl.minimum(first + j, TILES - 1).to(tl.int64) * (GROUPS * 8)
                operands = held[j * H + s + 1 : j * H + s + 2] + held[j * H : j * H + 1]
                if not SPARSE:
                    operands = held[j * H + s : j * H + s + 1]
                operands += xs
                if GROUP == 0:
                    new = sums[j * F + p * P : j * F + p * P + P]
                    new = multiply(new + operands, TEXT0 if s == 0 else TEXT1, KINDS, P)
                    sums = _replace(sums, new, j * F + p * P, P, RT * F)
                elif PARTS == 1:
                    new = part[j * F + p * P : j * F + p * P + P]
                    new = multiply(new + operands, TEXT0 if s == 0 else TEXT1, KINDS, P)
                    if (s + 1) * WIDTH % PART == 0:
                        old = sums[j * F + p * P : j * F + p * P + P]
                        factor = load_scale(at, start // GROUP * 8, c)
                        new = add_scaled(old, new, factor, 0, P)
                        sums = _replace(sums, new, j * F + p * P, P, RT * F)
                        new = zeros(R, P)
                    part = _replace(part, new, j * F + p * P, P, RT * F)
                else:
                    pieces = multiply(operands, TEXT0 if s == 0 else TEXT1, KINDS, P * PARTS)
                    for i in tl.static_range(PARTS):
                        old = sums[j * F + p * P : j * F + p * P + P]
                        factor = load_scale(at, (start + i * PART) // GROUP * 8, c)
                        new = add_scaled(old, pieces, factor, i * P, P)
                        sums = _replace(sums, new, j * F + p * P, P, RT * F)
    return sums


@triton.jit
def accumulate(
    x, M, words, scales, first, TILES, share,
    SPARSE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    TEXT0: tl.constexpr, TEXT1: tl.constexpr, KINDS: tl.constexpr,
    F: tl.constexpr, RT: tl.constexpr, NW: tl.constexpr, SK: tl.constexpr,
    EARLY: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Sums [32, 4] of RT tiles from `first` on, F for each, over a share of the inputs.

    With EARLY the launch may begin before the one ahead of it has ended, whose results are waited
    for when the first words are on their way. Words are read a turn ahead, over the loop's end:
    otherwise the assembler moves what it reads of them behind what needs them.
    """
    R: tl.constexpr = 32 * NW
    STEP: tl.constexpr = NW * SK
    TURNS: tl.constexpr = (K + 256 * STEP - 1) // (256 * STEP)
    CHECK: tl.constexpr = TURNS * STEP * 256 != K
    r = tl.arange(0, R)[:, None]
    c = tl.arange(0, 4)[None, :]
    lane = r % 32
    words = words + lane * 4
    scales = scales + lane // 4
    kb = share * NW + r // 32
    sums = zeros(R, RT * F)
    held = load_words(words, first, TILES, kb, c, SPARSE, K, CHECK, RT)
    if EARLY:
        _begin_next()
        _wait()
    for _ in range(TURNS - 1):
        sums = turn(
            sums, held, x, M, scales, first, TILES, kb, lane, c,
            SPARSE, K, False, GROUP, PART, TEXT0, TEXT1, KINDS, F, R, RT, NATURAL,
        )  # fmt: skip
        kb += STEP
        held = load_words(words, first, TILES, kb, c, SPARSE, K, CHECK, RT)
    sums = turn(
        sums, held, x, M, scales, first, TILES, kb, lane, c,
        SPARSE, K, CHECK, GROUP, PART, TEXT0, TEXT1, KINDS, F, R, RT, NATURAL,
    )  # fmt: skip
    out = ()
    for j in tl.static_range(RT * F):
        out += (tl.sum(tl.reshape(sums[j], (NW, 32, 4)), 0),)
    return out


@triton.jit
def finish(
    sums, scales, parts, bias, y, M, N, first, GROUP: tl.constexpr, PARTS: tl.constexpr,
    BIAS: tl.constexpr, F: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """Store y [M, N] of RT tiles, scaled unless it is, plus parts [PARTS, M, N] and the bias."""
    lane = tl.arange(0, 32)[:, None]
    c = tl.arange(0, 4)[None, :]
    for j in tl.static_range(RT):
        row = (first + j) * 16 + lane // 4 + 8 * (c // 2)
        for n in tl.static_range(F):
            column = 8 * n + 2 * (lane % 4) + c % 2
            inside = (row < N) & (column < M)
            at = column.to(tl.int64) * N + row
            total = sums[j * F + n]
            if GROUP == 0:
                tile = tl.minimum(first + j, (N + 15) // 16 - 1)
                total = total * load_scale(scales + lane // 4, tile * 8, c)
            for p in tl.static_range(PARTS):
                total += tl.load(parts + p * M * N + at, inside, 0)
            if BIAS:
                total += tl.load(bias + row, row < N, 0).to(tl.float32)
            tl.store(y + at, total.to(y.dtype.element_ty), inside)


@triton.jit
def finish_low(
    sums, scales, z, M, RANK, first, EACH, GROUP: tl.constexpr, F: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """Store RT tiles of x L^T as `launch.arranged` would, EACH rows of L after the other."""
    lane = tl.arange(0, 32)[:, None]
    c = tl.arange(0, 4)[None, :]
    for j in tl.static_range(RT):
        row = (first + j) * 16 + lane // 4 + 8 * (c // 2)
        k = row % EACH
        at = z + (row // EACH).to(tl.int64) * ((EACH + 31) // 32 * (256 * F))
        last = (k // 16 * 16 + 16 >= EACH) & (k % 32 < 16)  # what is left of 32 inputs is zero
        for n in tl.static_range(F):
            column = 8 * n + 2 * (lane % 4) + c % 2
            inside = (row < RANK) & (column < M)
            total = sums[j * F + n]
            if GROUP == 0:
                tile = tl.minimum(first + j, RANK // 16 - 1)
                total = total * load_scale(scales + lane // 4, tile * 8, c)
            tl.store(at + _arranged(k, column, F), total.to(z.dtype.element_ty), inside)
            more = at + _arranged(k + 16, column, F)
            tl.store(more, tl.zeros_like(total).to(z.dtype.element_ty), inside & last)


@triton.jit
def _arranged(k, m, F: tl.constexpr):
    """Where input k of row m is, in numbers, as `launch.arranged` leaves x."""
    w = k // 2
    word = ((w // 16 * F + m // 8) * 32 + m % 8 * 4 + w % 4) * 4 + w % 16 // 4
    return 2 * word + k % 2

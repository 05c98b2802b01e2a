"""What a program of the decode kernels does: tiles of 16 rows times up to 64 rows of x.

A warp is 32 rows of a tensor [32 NW, 4], and one of these rows the four registers of a thread.
`is_by_lane` tells whether Triton laid it out so, on which the assembly of tensor cores relies.

A turn is 256 inputs of each warp, the kb-th. What it reads of memory is read A turns ahead, so that
bytes are on their way while a warp computes: words of the weight, its scales, and x, which is read
by the same unit in the same order and would wait for what was asked for before it. For up to eight
rows of x, whose registers suffice, `reads.ask` keeps ptxas from putting that off.

Constants: K inputs; GROUP inputs share a scale, 0 if all do; PART of them one sum before it; RT
tiles a program; NW warps share the inputs of a tile; F fragments of eight rows of x; ROW: x is one
row as it lies in memory, not `launch.arranged`; FRESH: x was written by the launch ahead, and what
a multiprocessor holds of it may be older.
"""

# Jitted functions are Triton's language: constants are annotations, tuples may grow.
# mypy: disable-error-code="name-defined,assignment"

from __future__ import annotations

import re

from slimfx.runtime.kernels.reads import ask, load_turn, load_turn_of_x, load_x, spread

from slimfx.errors import need

triton = need("triton")
tl = need("triton.language")


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
def scale_of(pair, c):
    """The scales of a thread's four sums: two of row g, two of row g + 8."""
    return tl.where(c < 2, pair << 16, pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def add_scaled(sums, parts, factor, FIRST: tl.constexpr, F: tl.constexpr):
    """sums + factor parts, F of them."""
    out = ()
    for n in tl.static_range(F):
        out += (sums[n] + parts[FIRST + n] * factor,)
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
    sums, held, x, M, kb, lane, c,
    SPARSE: tl.constexpr, K: tl.constexpr, CHECK: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, TEXT0: tl.constexpr, TEXT1: tl.constexpr, KINDS: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, RT: tl.constexpr, ROW: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """The products of RT tiles with 256 inputs, added to sums; `held` is what was read ahead."""
    SUBS: tl.constexpr = 2 if SPARSE else 4
    WIDTH: tl.constexpr = 256 // SUBS
    PARTS: tl.constexpr = WIDTH // PART if PART < WIDTH else 1
    H: tl.constexpr = 3 if SPARSE else 4
    EACH: tl.constexpr = H + (256 // PART if GROUP > 0 else 0)
    P: tl.constexpr = 2 if F > 1 else 1
    B: tl.constexpr = WIDTH // 32
    ready = ()
    if ROW:
        ready = spread(held[RT * EACH], lane)
    elif F <= 2:
        ready = held[RT * EACH : RT * EACH + 8 * F]
    part = zeros(R, RT * F if GROUP > 0 and PARTS == 1 else 0)
    for s in tl.static_range(SUBS):
        for p in tl.static_range(F // P):
            if F > 2:
                xs = load_x(x, M, kb, lane, c, s * B, B, F, p * P, P, K, CHECK, FRESH)
            elif F == 2:
                xs = ready[s * B : s * B + B] + ready[8 + s * B : 8 + s * B + B]
            else:
                xs = ready[s * B : s * B + B]
            for j in tl.static_range(RT):
                if SPARSE:
                    operands = held[j * EACH + s + 1 : j * EACH + s + 2]
                    operands += held[j * EACH : j * EACH + 1]
                else:
                    operands = held[j * EACH + s : j * EACH + s + 1]
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
                        factor = scale_of(held[j * EACH + H + s * WIDTH // PART], c)
                        new = add_scaled(old, new, factor, 0, P)
                        sums = _replace(sums, new, j * F + p * P, P, RT * F)
                        new = zeros(R, P)
                    part = _replace(part, new, j * F + p * P, P, RT * F)
                else:
                    pieces = multiply(operands, TEXT0 if s == 0 else TEXT1, KINDS, P * PARTS)
                    for i in tl.static_range(PARTS):
                        old = sums[j * F + p * P : j * F + p * P + P]
                        factor = scale_of(held[j * EACH + H + s * PARTS + i], c)
                        new = add_scaled(old, pieces, factor, i * P, P)
                        sums = _replace(sums, new, j * F + p * P, P, RT * F)
    return sums


@triton.jit
def begin(
    words, scales, first, TILES, kb, c,
    SPARSE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    RT: tl.constexpr, NW: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What the first turns read of a weight, and the scales of its rows if they have one each.

    A launch may do this before the one ahead of it has ended, which is not so for x.
    """
    TURNS: tl.constexpr = (K + 256 * NW - 1) // (256 * NW)
    A: tl.constexpr = AHEAD if AHEAD < TURNS else TURNS
    out = ()
    for a in tl.static_range(A):
        out += load_turn(
            words, scales, first, TILES, kb + a * NW, c, SPARSE, K, TURNS * NW * 256 != K, GROUP,
            PART, RT,
        )  # fmt: skip
    if GROUP == 0:
        for j in tl.static_range(RT):
            tile = tl.minimum(first + j, TILES - 1)
            out += (tl.load(scales + tile * 8),)
    return out


@triton.jit
def stream(
    sums, begun, x, M, words, scales, first, TILES, kb, lane, c,
    SPARSE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    TEXT0: tl.constexpr, TEXT1: tl.constexpr, KINDS: tl.constexpr,
    F: tl.constexpr, RT: tl.constexpr, NW: tl.constexpr, AC: tl.constexpr, AHEAD: tl.constexpr,
    ROW: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """Sums [32 NW AC, 4] of RT tiles, F for each, with the products of all turns but the last ones;
    and what was read for those, which `drain` takes.
    """
    R: tl.constexpr = 32 * NW * AC
    TURNS: tl.constexpr = (K + 256 * NW - 1) // (256 * NW)
    CHECK: tl.constexpr = TURNS * NW * 256 != K
    A: tl.constexpr = AHEAD if AHEAD < TURNS else TURNS
    REST: tl.constexpr = (TURNS - A) % A
    N: tl.constexpr = RT * ((3 if SPARSE else 4) + (256 // PART if GROUP > 0 else 0))
    W: tl.constexpr = N + (1 if ROW else 8 * F if F <= 2 else 0)
    held = ()
    for a in tl.static_range(A):
        held += begun[a * N : a * N + N]
        held += load_turn_of_x(x, M, kb + a * NW, lane, c, K, CHECK, F, ROW, FRESH)
    if F == 1 and TURNS > A:
        ask()
    for _ in range((TURNS - A) // A):
        for a in tl.static_range(A):
            sums = turn(
                sums, held[a * W : a * W + W], x, M, kb, lane, c,
                SPARSE, K, False, GROUP, PART, TEXT0, TEXT1, KINDS, F, R, RT, ROW, FRESH,
            )  # fmt: skip
            new = load_turn(
                words, scales, first, TILES, kb + A * NW, c, SPARSE, K, CHECK, GROUP, PART, RT
            )
            new += load_turn_of_x(x, M, kb + A * NW, lane, c, K, CHECK, F, ROW, FRESH)
            if F == 1:
                ask()
            held = _replace(held, new, a * W, W, A * W)
            kb += NW
    for a in tl.static_range(REST):
        sums = turn(
            sums, held[a * W : a * W + W], x, M, kb, lane, c,
            SPARSE, K, False, GROUP, PART, TEXT0, TEXT1, KINDS, F, R, RT, ROW, FRESH,
        )  # fmt: skip
        new = load_turn(
            words, scales, first, TILES, kb + A * NW, c, SPARSE, K, CHECK, GROUP, PART, RT
        )
        new += load_turn_of_x(x, M, kb + A * NW, lane, c, K, CHECK, F, ROW, FRESH)
        if F == 1:
            ask()
        held = _replace(held, new, a * W, W, A * W)
        kb += NW
    return sums + held[REST * W : A * W] + held[0 : REST * W]


@triton.jit
def drain(
    sums, streamed, begun, x, M, kb, lane, c,
    SPARSE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    TEXT0: tl.constexpr, TEXT1: tl.constexpr, KINDS: tl.constexpr,
    F: tl.constexpr, RT: tl.constexpr, NW: tl.constexpr, AC: tl.constexpr, AHEAD: tl.constexpr,
    ROW: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """What `stream` began with the products of the last turns, scaled and added to sums if all
    inputs share a scale; otherwise `stream` was given the sums.
    """
    R: tl.constexpr = 32 * NW * AC
    TURNS: tl.constexpr = (K + 256 * NW - 1) // (256 * NW)
    A: tl.constexpr = AHEAD if AHEAD < TURNS else TURNS
    N: tl.constexpr = RT * ((3 if SPARSE else 4) + (256 // PART if GROUP > 0 else 0))
    W: tl.constexpr = N + (1 if ROW else 8 * F if F <= 2 else 0)
    if F == 1:
        ask()
    added = streamed[0 : RT * F]
    kb += (TURNS - A) * NW
    for a in tl.static_range(A):
        added = turn(
            added, streamed[RT * F + a * W : RT * F + a * W + W], x, M, kb, lane, c,
            SPARSE, K, TURNS * NW * 256 != K, GROUP, PART, TEXT0, TEXT1, KINDS, F, R, RT, ROW,
            FRESH,
        )  # fmt: skip
        kb += NW
    if GROUP == 0:
        for j in tl.static_range(RT):
            old = sums[j * F : j * F + F]
            new = add_scaled(old, added, scale_of(begun[A * N + j], c), j * F, F)
            sums = _replace(sums, new, j * F, F, RT * F)
    else:
        sums = added
    return sums


@triton.jit
def reduce(sums, COUNT: tl.constexpr, NW: tl.constexpr, AC: tl.constexpr, ROW: tl.constexpr):
    """The sums [32 AC, 4] of all warps that share inputs; of one row of x [8 AC, 2], those of all
    columns of a fragment in one.
    """
    LANES: tl.constexpr = 8 if ROW else 32
    EACH: tl.constexpr = 2 if ROW else 4
    out = ()
    for j in tl.static_range(COUNT):
        total = sums[j]
        if ROW:
            total = tl.sum(tl.sum(tl.reshape(total, (8 * NW * AC, 4, 2, 2)), 3), 1)
        if NW > 1:
            warps = tl.reshape(total, (AC, NW, LANES, EACH))
            total = tl.reshape(tl.sum(warps, 1), (LANES * AC, EACH))
        out += (total,)
    return out


@triton.jit
def places_of(first, RT: tl.constexpr, AC: tl.constexpr, ROW: tl.constexpr):
    """Where what `reduce` gives belongs: row of the weight in the first of RT tiles, row of x."""
    if ROW:
        r, c = tl.arange(0, 8 * AC)[:, None], tl.arange(0, 2)[None, :]
        row, column = (first + r // 8 * RT) * 16 + r % 8 + 8 * c, 0 * c
    else:
        r, c = tl.arange(0, 32 * AC)[:, None], tl.arange(0, 4)[None, :]
        row = (first + r // 32 * RT) * 16 + r % 32 // 4 + 8 * (c // 2)
        column = 2 * (r % 4) + c % 2
    return row, column


@triton.jit
def finish(
    sums, bias, y, M, N, first,
    BIAS: tl.constexpr, F: tl.constexpr, RT: tl.constexpr, AC: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Store y [M, N] of RT tiles for each of AC, plus the bias."""
    row, start = places_of(first, RT, AC, ROW)
    for j in tl.static_range(RT):
        for n in tl.static_range(F):
            column = 8 * n + start
            inside = (row < N) & (column < M)
            total = sums[j * F + n]
            if BIAS:
                total += tl.load(bias + row, row < N, 0).to(tl.float32)
            tl.store(y + column.to(tl.int64) * N + row, total.to(y.dtype.element_ty), inside)
        row += 16


@triton.jit
def finish_low(
    sums, z, M, RANK, first, EACH,
    F: tl.constexpr, RT: tl.constexpr, AC: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Store RT tiles of x L^T as `launch.arranged` would, EACH rows of L after the other."""
    row, start = places_of(first, RT, AC, ROW)
    for j in tl.static_range(RT):
        k = row % EACH
        width = (EACH + 31) // 32 * (32 if ROW else 256 * F)
        at = z + (row // EACH).to(tl.int64) * width
        last = (k // 16 * 16 + 16 >= EACH) & (k % 32 < 16)  # what is left of 32 inputs is zero
        for n in tl.static_range(F):
            column = 8 * n + start
            inside = (row < RANK) & (column < M)
            total = sums[j * F + n].to(z.dtype.element_ty)
            tl.store(at + _arranged(k, column, F, ROW), total, inside)
            more = at + _arranged(k + 16, column, F, ROW)
            tl.store(more, tl.zeros_like(total), inside & last)
        row += 16


@triton.jit
def _arranged(k, m, F: tl.constexpr, ROW: tl.constexpr):
    """Where input k of row m is, in numbers, as `launch.arranged` leaves x."""
    if ROW:
        return k + 0 * m
    w = k // 2
    word = ((w // 16 * F + m // 8) * 32 + m % 8 * 4 + w % 4) * 4 + w % 16 // 4
    return 2 * word + k % 2

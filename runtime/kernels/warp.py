"""What a program of the decode kernels does: tiles of 16 rows times up to 16 rows of x.

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


def is_by_lane(ttgir: str, warps: int) -> bool:
    """Does every piece of assembly in a kernel's TTGIR see one lane in each row?

    However many of its four columns a thread has at once, its registers follow them in order.
    """
    wanted = re.compile(
        r"(#\w+) = .*sizePerThread = \[1, [124]\], threadsPerWarp = \[32, 1\], "
        rf"warpsPerCTA = \[{warps}, 1\]"
    )
    lines = ttgir.splitlines()
    names = [found[1] for line in lines if (found := wanted.match(line))]
    assembly = [line for line in lines if "elementwise_inline_asm" in line]
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
def load_x(at, word, c, FIRST: tl.constexpr, N: tl.constexpr, K: tl.constexpr, CHECK: tl.constexpr):
    """N fragments of 32 inputs, two a word, from a lane's first word on; zeros from K on."""
    out = ()
    for i in tl.static_range(N):
        step = FIRST + 16 * i
        if CHECK:
            inside = word + (4 * c + step) < (K + 1) // 2
            part = tl.load(at + (4 * c + step), inside, 0, eviction_policy="evict_last")
        else:
            part = tl.load(at + (4 * c + step), eviction_policy="evict_last")
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
def load_turn(
    near, far, word, kb, c,
    SUBS: tl.constexpr, K: tl.constexpr, CHECK: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """x as `turn` takes it: for each part of 256 inputs the first eight rows, then the others."""
    word = word + kb * 128
    near = near + kb * 128
    far = far + kb * 128
    xs = ()
    for s in tl.static_range(SUBS):
        xs = xs + load_x(near, word, c, s * (128 // SUBS), 8 // SUBS, K, CHECK)
        if F == 2:
            xs = xs + load_x(far, word, c, s * (128 // SUBS), 8 // SUBS, K, CHECK)
    return xs


@triton.jit
def turn(
    sums, held, scales, xs, kb, c,
    SPARSE: tl.constexpr, K: tl.constexpr, CHECK: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, TEXT0: tl.constexpr, TEXT1: tl.constexpr, KINDS: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A tile's products with 256 inputs, added to its sums."""
    SUBS: tl.constexpr = 2 if SPARSE else 4
    WIDTH: tl.constexpr = 256 // SUBS
    B: tl.constexpr = WIDTH // 32 * F
    PARTS: tl.constexpr = WIDTH // PART if PART < WIDTH else 1
    part = zeros(R, F)
    for s in tl.static_range(SUBS):
        start = kb * 256 + s * WIDTH
        if CHECK:  # of what stands for inputs that are not there, x is zero
            start = tl.minimum(start, (K - 1) // WIDTH * WIDTH)
        operands = held[s + 1 : s + 2] + held[0:1] if SPARSE else held[s : s + 1]
        operands += xs[s * B : s * B + B]
        if GROUP == 0:
            sums = multiply(sums + operands, TEXT0 if s == 0 else TEXT1, KINDS, F)
        elif PARTS == 1:
            part = multiply(part + operands, TEXT0 if s == 0 else TEXT1, KINDS, F)
            if (s + 1) * WIDTH % PART == 0:
                factor = load_scale(scales, start // GROUP * 8, c)
                sums = add_scaled(sums, part, factor, 0, F)
                part = zeros(R, F)
        else:
            pieces = multiply(operands, TEXT0 if s == 0 else TEXT1, KINDS, F * PARTS)
            for p in tl.static_range(PARTS):
                factor = load_scale(scales, (start + p * PART) // GROUP * 8, c)
                sums = add_scaled(sums, pieces, factor, p * F, F)
    return sums


@triton.jit
def all_tiles(
    sums, held, scales, first, TILES, xs, kb, c,
    SPARSE: tl.constexpr, K: tl.constexpr, CHECK: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, TEXT0: tl.constexpr, TEXT1: tl.constexpr, KINDS: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """`turn` for each tile of a program."""
    PADDED: tl.constexpr = (K + 255) // 256 * 256 if SPARSE else (K + 63) // 64 * 64
    GROUPS: tl.constexpr = 1 if GROUP == 0 else (PADDED + GROUP - 1) // GROUP
    H: tl.constexpr = 3 if SPARSE else 4
    out = ()
    for j in tl.static_range(RT):
        tile = tl.minimum(first + j, TILES - 1).to(tl.int64)
        out = out + turn(
            sums[j * F : j * F + F], held[j * H : j * H + H], scales + tile * (GROUPS * 8),
            xs, kb, c,
            SPARSE, K, CHECK, GROUP, PART, TEXT0, TEXT1, KINDS, F, R,
        )  # fmt: skip
    return out


@triton.jit
def accumulate(
    x, XS, M, words, scales, first, TILES, share,
    SPARSE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    TEXT0: tl.constexpr, TEXT1: tl.constexpr, KINDS: tl.constexpr,
    F: tl.constexpr, RT: tl.constexpr, NW: tl.constexpr, SK: tl.constexpr,
):  # fmt: skip
    """Sums [32, 4] of RT tiles from `first` on, F for each, over a share of the inputs."""
    R: tl.constexpr = 32 * NW
    SUBS: tl.constexpr = 2 if SPARSE else 4
    STEP: tl.constexpr = NW * SK
    TURNS: tl.constexpr = (K + 256 * STEP - 1) // (256 * STEP)
    CHECK: tl.constexpr = TURNS * STEP * 256 != K
    r = tl.arange(0, R)[:, None]
    c = tl.arange(0, 4)[None, :]
    lane = r % 32
    t = lane & 3  # Triton takes lane % 4 for contiguous, and gives x a layout of its own
    near = x + (tl.minimum(lane // 4, M - 1) * XS + t)
    far = x + (tl.minimum(lane // 4 + 8, M - 1) * XS + t)
    words = words + lane * 4
    scales = scales + lane // 4
    kb = share * NW + r // 32
    sums = zeros(R, RT * F)
    for _ in range(TURNS - (1 if CHECK else 0)):
        held = load_words(words, first, TILES, kb, c, SPARSE, K, False, RT)
        xs = load_turn(near, far, t, kb, c, SUBS, K, False, F)
        sums = all_tiles(
            sums, held, scales, first, TILES, xs, kb, c,
            SPARSE, K, False, GROUP, PART, TEXT0, TEXT1, KINDS, F, R, RT,
        )  # fmt: skip
        kb += STEP
    if CHECK:
        held = load_words(words, first, TILES, kb, c, SPARSE, K, True, RT)
        xs = load_turn(near, far, t, kb, c, SUBS, K, True, F)
        sums = all_tiles(
            sums, held, scales, first, TILES, xs, kb, c,
            SPARSE, K, True, GROUP, PART, TEXT0, TEXT1, KINDS, F, R, RT,
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

"""The C++ kernels, compiled alone for each instruction set, beside the op's float64 reference.

SLIMFX_SANITIZE=1 compiles them with the address and undefined-behaviour sanitizers; `make sanitize`
preloads what that needs.
"""

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_linears import Kind, Linear, linear
from slimfx.runtime.cpu_ops import Form, forms, groups
from slimfx.runtime.inductor.cpu_linear import library
from slimfx.runtime.interleave import LANES, whole
from torch import Tensor

W4, D4, D8, D16, D32 = ("2:4", 4), ("dense", 4), ("dense", 8), ("dense", 16), ("dense", 32)
WEIGHTS: list[Kind] = [
    *(W4, ("2:4", 8), ("2:4", 16), D4, D8, D16, D32),
    *(("bitmask", 4), ("bitmask", 8), ("bitmask", 16)),
]
COMBINATIONS = [(weight, D4, D4) for weight in WEIGHTS] + [
    (W4, D16, D16),
    (W4, D32, D32),
    (W4, W4, D8),
]
BUILDS = {"native": "-march=native", "avx2": "-march=x86-64-v3", "plain": "-march=x86-64"}
SANITIZE = "SLIMFX_SANITIZE" in os.environ
_SHIM = """
#include "linear.h"
using namespace slimfx;
struct Shape {{ int64_t M, inputs, count; }};
extern "C" void run(int which, const float* x, const Shape* s, const Part* parts, float* y,
                    int64_t columns) {{
  auto store = [&](int64_t m0, int64_t rows, int64_t n, int64_t width, const float* acc) {{
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = 0; i < width; ++i) y[(m0 + m) * columns + n + i] = acc[m * WIDTH + i];
  }};
  switch (which) {{
{cases}
  }}
}}
"""
_NAMES = {"dense": "DENSE", "2:4": "TWO_FOUR", "bitmask": "BITMASK"}


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("K", "group", "tile_bytes")),
    )


class Part(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("start", "rows", "hidden", "rank")),
        *((name, Matrix) for name in ("weight", "first", "second")),
    )


@cache
def folder() -> tempfile.TemporaryDirectory:
    """Where this process keeps what it compiles."""
    return tempfile.TemporaryDirectory(prefix="slimfx-kernels-")


@cache
def built(build: str) -> ctypes.CDLL:
    """The kernels of every combination, as a library."""
    cases = []
    for i, kinds in enumerate(COMBINATIONS):
        stored = ", ".join(f"Stored<{_NAMES[where]}, {bits}>" for where, bits in kinds)
        for rounded in (0, 1):
            call = f"linear<{stored}, {'true' if rounded else 'false'}>"
            arguments = "x, s->M, s->inputs, parts, (int)s->count, store"
            cases.append(f"    case {2 * i + rounded}: {call}({arguments}); break;")
    home = Path(folder().name)
    source, target = home / f"{build}.cpp", home / f"{build}.so"
    (home / "linear.h").write_text(library())
    source.write_text(_SHIM.format(cases="\n".join(cases)))
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"] if SANITIZE else []
    command = ["g++", "-O2", "-std=c++17", "-fopenmp", "-shared", "-fPIC", BUILDS[build], *flags]
    # gcc's own AVX-512 headers use undefined values on purpose
    warnings = ["-Wall", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    subprocess.run([*command, *warnings, source, "-o", target], check=True)
    return ctypes.CDLL(str(target))


def multiplied(build: str, which: int, case: Linear, x: Tensor, *, rounded: bool = False) -> Tensor:
    """y [M, N] from the library, on copies of the data that end where a page might."""
    M, inputs = x.shape
    kept = [None if t is None else np.array(t.view(torch.uint8).numpy()) for t in case.tensors]
    kinds = forms(case.form)
    at = [[0, 0] for _ in range(3)]

    def matrix(i: int, kind: Form, N: int, K: int) -> Matrix:
        tiles = whole(N) // LANES
        data, scale = kept[2 * i], kept[2 * i + 1]
        assert data is not None and scale is not None
        size = len(data) // tiles if kind.where == "bitmask" else kind.tile_bytes(K)
        found = Matrix(
            data.ctypes.data + at[i][0],
            scale.ctypes.data + at[i][1],
            *(whole(K), min(kind.group, whole(K)), size),
        )
        at[i][0] += tiles * size
        at[i][1] += tiles * groups(kind, K) * LANES * 2
        return found

    parts = []
    start = hidden = 0
    for i, N in enumerate(case.rows):
        part = Part(start, N, hidden, 0, matrix(0, kinds[0], N, inputs))
        if case.ranks:
            part.rank = whole(case.ranks[i])
            part.first = matrix(1, kinds[1], part.rank, inputs)
            part.second = matrix(2, kinds[2], N, part.rank)
        parts.append(part)
        start, hidden = start + N, hidden + part.rank
    given = np.array(x.numpy(), copy=True)
    y = np.full((M, start), np.nan, dtype=np.float32)
    shape = (ctypes.c_int64 * 3)(M, inputs, len(parts))
    built(build).run(
        2 * which + rounded,
        *(given.ctypes.data_as(ctypes.c_void_p), shape, (Part * len(parts))(*parts)),
        *(y.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(start)),
    )
    return torch.from_numpy(y)


def assert_near(y: Tensor, expected: Tensor, K: int) -> None:
    """Within a few float32 roundings of sums of K products."""
    assert y.isfinite().all()
    bound = 4e-7 * K**0.5 * expected.abs().amax().clamp_min(1) if y.numel() else 0
    assert (y - expected).abs().amax() <= bound if y.numel() else True


EVERY = [(i, True) for i in range(len(COMBINATIONS))] + [(i, False) for i in range(len(WEIGHTS))]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("which", "adapters"), EVERY)
def test_every_kernel_multiplies_as_the_reference(build: str, which: int, adapters: bool) -> None:
    weight, *adapter = COMBINATIONS[which]
    for K, N, rank, scales in (
        (64, 48, 20, "tensor"),
        (100, 70, 4, "row"),
        (1184, 33, 16, "group"),
    ):
        case = linear(
            weight,
            [N],
            K,
            adapter=(adapter[0], adapter[1]) if adapters else None,
            ranks=[rank],
            scales="tensor" if weight[1] >= 16 else scales,
        )
        for M in (1, 2, 3, 7, 16, 33, 65, 301):
            x = torch.randn(M, K)
            assert_near(multiplied(build, which, case, x), case(x.double()), K)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("M", [0, 1, 4, 5, 6, 8, 9, 15, 17, 31, 32, 47, 48, 49, 50, 64])
def test_every_number_of_rows(build: str, M: int) -> None:
    case = linear(W4, [64, 64, 40], 96, adapter=(D4, D4), ranks=[12, 5, 30])
    x = torch.randn(M, 96)
    y = multiplied(build, 0, case, x)
    assert y.shape == (M, 168)
    assert_near(y, case(x.double()), 96)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("which", [0, 1, 3, 4], ids=["2:4 int4", "2:4 int8", "int4", "int8"])
@pytest.mark.parametrize("M", [1, 3, 8, 21, 60])
def test_rounded_inputs_multiply_as_rounded_numbers(build: str, which: int, M: int) -> None:
    case = linear(
        COMBINATIONS[which][0], [80], 160, adapter=(D4, D4), ranks=[18], scales="group", seed=M
    )
    x = torch.randn(M, 160)
    x[0] = 0
    step = x.abs().amax(1, keepdim=True) / 127
    grid = torch.where(step > 0, (x * (1 / step)).round() * step, 0).double()
    y = multiplied(build, which, case, x, rounded=True)
    assert_near(y, case(grid), 160)


def test_the_same_call_gives_the_same_bits() -> None:
    case = linear(W4, [96], 256, adapter=(D4, D4), ranks=[24])
    x = torch.randn(3, 256)
    one, two = (multiplied("native", 0, case, x) for _ in range(2))
    assert torch.equal(one, two)

"""Weights as dense matrices: the same bits as the ops', prefill, and the machine code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import offline
import pytest
import torch
from cpu_linears import matrix
from slimfx.runtime.kernels import bitmask, portable_24, portable_int4
from slimfx.runtime.kernels import expand as module
from slimfx.runtime.kernels.bitmask import bits_of
from slimfx.runtime.kernels.expand import expand, prefill, tl
from slimfx.runtime.kernels.portable_24 import words_24
from slimfx.runtime.kernels.portable_int4 import words_4
from slimfx.runtime.ops import linear_24, linear_bitmask, linear_int
from slimfx.runtime.pack import Packed24, PackedBitmask, PackedDense, PackedMatrix
from torch import Tensor

from slimfx.errors import SlimError

KINDS = [
    *[("dense", bits) for bits in (2, 3, 4, 8)],
    *[(where, bits) for where in ("2:4", "bitmask") for bits in (2, 3, 4, 8, 16)],
]
SHAPES = [(9, 132, "row", torch.bfloat16), (12, 300, "group", torch.float16)]


def reference(packed: PackedMatrix, K: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] as its op multiplies by it."""
    eye, rest = torch.eye(K, dtype=dtype), (packed.scale, packed.bits, packed.group)
    if isinstance(packed, PackedDense):
        assert packed.scale is not None
        return linear_int(eye, packed.codes, packed.scale, packed.bits, packed.group).T
    if isinstance(packed, Packed24):
        return linear_24(eye, packed.values, packed.indices, *rest).T
    return linear_bitmask(eye, packed.values, packed.mask, *rest).T


def expanded(
    device: str, kind: tuple[str, int], N: int, K: int, scales: str, dtype: torch.dtype, words: bool
) -> tuple[Tensor, Tensor]:
    """What the kernel writes, and what it should."""
    packed = matrix(kind, N, K, torch.Generator().manual_seed(N), scales=scales)
    weight: Any = packed
    if words:
        laid_out = {"2:4": words_24, "dense": words_4, "bitmask": bits_of}
        weight = laid_out[kind[0]](packed, K)  # type: ignore[operator]
    return expand(offline.to(device, weight), K, dtype).cpu(), reference(packed, K, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]} {shape[2]}")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]} {kind[1]}")
def test_it_writes_what_the_op_multiplies_by(
    run: offline.Run, kind: tuple[str, int], shape: tuple[int, int, str, torch.dtype]
) -> None:
    W, wanted = run(expanded, kind, *shape, False)
    assert W.dtype == wanted.dtype and torch.equal(W, wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]} {shape[2]}")
@pytest.mark.parametrize("where", ["dense", "2:4", "bitmask"])
def test_it_reads_the_products_layout(
    run: offline.Run, where: str, shape: tuple[int, int, str, torch.dtype]
) -> None:
    W, wanted = run(expanded, (where, 4), *shape, True)
    assert W.dtype == wanted.dtype and torch.equal(W, wanted)


def odd_group(device: str, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Groups that no product takes."""
    packed = matrix(("bitmask", bits), 5, 100, torch.Generator(), scales="group")
    assert isinstance(packed, PackedBitmask)
    scale = torch.rand(5, -(-100 // group)).bfloat16()
    packed = replace(packed, scale=scale, group=group)
    return expand(offline.to(device, packed), 100, torch.float32).cpu(), reference(
        packed, 100, torch.float32
    )


@pytest.mark.parametrize("group", [1, 16, 24])
def test_groups_may_have_any_size(run: offline.Run, group: int) -> None:
    W, wanted = run(odd_group, 4, group)
    assert torch.equal(W, wanted)


def prefilled(device: str, adapters: str) -> tuple[Tensor, Tensor, Tensor]:
    """y, in float64, and of magnitudes."""
    draw = torch.Generator().manual_seed(0)
    W = matrix(("2:4", 4), 48, 64, draw, scales="group")
    kind = {"codes": ("dense", 4), "floats": ("dense", 16)}.get(adapters)
    L, R = (
        (None, None) if kind is None else (matrix(kind, r, k, draw) for r, k in ((8, 64), (48, 8)))
    )
    x = torch.randn(2, 20, 64, generator=draw)
    there = [
        None if m is None else m.to(device) if isinstance(m, Tensor) else offline.to(device, m)
        for m in (L, R)
    ]
    scratch = torch.empty(48, 64, device=device)
    assert isinstance(W, Packed24)
    y = prefill(x.to(device), offline.to(device, words_24(W, 64)), *there, scratch=scratch)
    assert torch.equal(scratch.cpu(), reference(W, 64, torch.float32))
    wide = reference(W, 64, torch.float64)
    if L is not None and R is not None:
        pair = (
            m.double() if isinstance(m, Tensor) else reference(m, k, torch.float64)
            for m, k in ((R, 8), (L, 64))
        )
        second, first = pair
        wide = wide + second @ first
    return y.cpu(), x.double() @ wide.T, x.double().abs() @ wide.abs().T


@pytest.mark.parametrize("adapters", ["none", "codes", "floats"])
def test_prefill_multiplies_and_adds_the_adapters(run: offline.Run, adapters: str) -> None:
    y, wanted, magnitude = run(prefilled, adapters)
    assert y.shape == (2, 20, 48)
    assert ((y.double() - wanted).abs() <= 4e-6 * magnitude).all()


def test_what_no_kernel_writes_is_refused() -> None:
    packed = matrix(("2:4", 4), 4, 16, torch.Generator())
    with pytest.raises(SlimError, match=r"torch\.float64 is not bfloat16, float16 or float32"):
        expand(packed, 16, torch.float64)
    with pytest.raises(SlimError, match=r"scratch is torch\.float32 \(4, 12\), not contiguous"):
        expand(packed, 16, torch.float32, out=torch.empty(4, 12))
    with pytest.raises(SlimError, match=r"\(4, 4\) for a weight \[4, 20\], not \[4, 5\]"):
        expand(packed, 20, torch.float32)
    assert isinstance(packed, Packed24)
    with pytest.raises(SlimError, match="a weight of 16 inputs, and x of 20"):
        expand(words_24(packed, 16), 20, torch.float32)


def compiled(target: str, where: str, bits: int, GROUP: int = 128) -> Any:
    """The kernel that writes bfloat16, as `expand` launches it."""
    words, inputs = where.startswith("words"), 128 if where == "bitmask" else 512
    values = "*bf16" if bits == 16 else "*i32" if words or where == "bitmask" else "*u8"
    types = {
        **{
            "values": values,
            "places": "*i16" if words else "*i32" if where == "bitmask" else "*u8",
            "rows": "*i64",
        },
        **{"blocks": "*i32", "scale": "*bf16", "W": "*bf16", "N": "i32", "K": "i32"},
        **{"stride": "i32", "scale_row": "i32"},
    }
    per = {"words 2:4": 16, "bitmask": 32}.get(where, 8)
    constants = {
        **{"WHERE": where, "BITS": bits, "PRMT": target != "gfx942", "SCALED": bits < 16},
        **{"GROUP": GROUP if bits < 16 else 0, "OUT": tl.bfloat16},
        **{"ROWS": 4096 // inputs, "UNITS": inputs // per, "PER": per},
    }
    given = {"multiples": ("N", "K", "stride")}
    return offline.compile(module._expand, types, constants, target, **given)


@pytest.mark.parametrize("where", ["words 2:4", "words dense"])
def test_it_waits_for_memory(where: str) -> None:
    """Of 2.375 bytes a weight an H200 moves 1.81e12 a second, and issues 16.4 instructions for
    each: 132 x 128 x 1.755 GHz.
    """
    code = offline.sass(compiled("sm_90", where, 4))
    each = len(code.opcodes) / 32
    print(f"sm_90, {where}: {each:.2f} instructions a weight, start and end with them")
    assert each <= 16.4 / 1.5 and code.spills == 0
    assert offline.count(code.opcodes, "STG") == offline.count(code.opcodes, "STG.128") == 4


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("where", "bits"),
    [("2:4", 8), ("2:4", 16), ("dense", 8), ("bitmask", 4), ("bitmask", 16), ("words 2:4", 4)],
)
def test_it_compiles(target: str, where: str, bits: int) -> None:
    built = compiled(target, where, bits)
    if target == "gfx942":
        assert ".vgpr_spill_count: 0" in built.asm["amdgcn"]
    else:
        code = offline.sass(built)
        assert offline.count(code.opcodes, "DADD", "DMUL", "DFMA", "LDL", "STL") == 0
        assert offline.count(code.opcodes, "STG") == offline.count(code.opcodes, "STG.128") == 4


def narrow(built: Any, pointers: str) -> list[str]:
    """What a kernel adds to one of these pointers first, where it has only 32 bits."""
    found = []
    for name in pointers.split():
        starts, added = {f"%{name}"}, []
        for line in built.asm["ttir"].splitlines():
            new, _, what = line.strip().partition(" = ")
            if what.startswith("tt.addptr ") and what.split()[1].rstrip(",") in starts:
                added.append(what.split(" loc(")[0].rstrip())
            starts.discard(new)  # names of one loop come again in the next
            if what.startswith(f"tt.splat %{name} :"):
                starts.add(new)
        assert added, name
        found += [line for line in added if not line.endswith(("i64>", "i64"))]
    return found


def test_weights_may_have_more_than_two_to_the_31_inputs() -> None:
    assert narrow(compiled("sm_90", "words 2:4", 4), "values places scale W") == []
    assert narrow(compiled("sm_90", "dense", 8), "values W") == []
    assert narrow(compiled("sm_90", "bitmask", 4), "values places rows blocks W") == []
    for kernel, pointers in (
        (portable_24, "x words places scale y z R R_scale"),
        (portable_int4, "x words scale y z R R_scale"),
        (bitmask, "x values mask rows blocks scale y z R R_scale"),
    ):
        built = product(kernel)
        assert narrow(built, pointers) == []
        assert narrow(built, "bias") != []  # of N numbers, and shows that the search finds these


@pytest.mark.parametrize("kernel", [portable_24, portable_int4, bitmask], ids=lambda m: m.__name__)
def test_numbers_that_are_one_become_constants(kernel: Any) -> None:
    """Triton compiles a kernel anew for an integer argument of 1."""
    ones = dict.fromkeys(("M", "N", "steps", "scale_row", "R_scale_row"), 1)
    assert offline.sass(product(kernel, **ones)).spills == 0


def product(kernel: Any, **ones: int) -> Any:
    """One of the products, compiled."""
    own = {"BM": 16, "GROUP": 128, "low": 128, **({"BITS": 4} if kernel is bitmask else {})}
    return offline.portable(kernel.product_kernel, offline.STORED, "sm_90", **own, **ones)

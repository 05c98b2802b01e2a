"""2:4 weights in the form that cuSPARSELt multiplies by: its bytes, and who may write them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import offline
import pytest
import torch
import triton
from cpu_linears import matrix
from packaging.version import Version
from slimfx.runtime.gpu_layout import form_of, lay_out
from slimfx.runtime.gpu_ops import Held, launch
from slimfx.runtime.kernels import expand_cslt as module
from slimfx.runtime.kernels.expand import expand
from slimfx.runtime.kernels.expand_cslt import blob, expand_cslt, multiply, tl, why_not
from slimfx.runtime.kernels.portable_24 import Words24, words_24
from slimfx.runtime.ops import linear_24
from slimfx.runtime.pack import Packed24, pack_24
from slimfx.runtime.select import SPARSE_ROWS, gpu_of
from test_expand import narrow
from torch import Tensor
from torch.nn.functional import linear

from slimfx.errors import SlimError

BLOBS = Path(__file__).parent / "cslt_blobs.safetensors"
"""2:4 matrices, and what `torch._cslt_compress` (cuSPARSELt 0.8) made of them on an H200."""
SHAPES = {
    "one block": (64, 64, "tensor", torch.bfloat16),
    "inputs end within a program": (64, 320, "group", torch.float16),
    "and within words that are padded": (192, 448, "row", torch.bfloat16),
    "two programs": (128, 512, "group", torch.bfloat16),
}


def stored(N: int, K: int, scales: str) -> Packed24:
    """Random; no value that is kept is zero, since the library would look for others."""
    packed = matrix(("2:4", 4), N, K, torch.Generator().manual_seed(N + K), scales=scales)
    assert isinstance(packed, Packed24)
    low, high = packed.values & 15, packed.values >> 4
    low, high = (torch.where(code == 8, 9, code) for code in (low, high))
    return replace(packed, values=low | high << 4)


def dense(packed: Packed24, K: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] as its op multiplies by it."""
    rest = (packed.values, packed.indices, packed.scale, packed.bits, packed.group)
    return linear_24(torch.eye(K, dtype=dtype), *rest).T


def kept(W: Tensor, indices: Tensor) -> Tensor:
    """Values [N, K / 2] at positions."""
    both = torch.stack([indices & 15, indices >> 4], -1).flatten(1).long()
    places = torch.stack([both & 3, both >> 2], -1)
    return W.unflatten(1, (-1, 4)).gather(-1, places).flatten(1)


def there(device: str, packed: Packed24, K: int) -> Words24:
    """As the kernel reads it, on a device."""
    assert packed.scale is not None
    tensors = (packed.values.to(device), packed.indices.to(device), packed.scale.to(device))
    return words_24(Packed24(*tensors, packed.bits, packed.group), K)


@pytest.mark.parametrize("size", ["32 64", "64 128"])
def test_the_layout_is_the_librarys(size: str) -> None:
    recorded = pytest.importorskip("safetensors.torch").load_file(BLOBS)
    W, compressed = recorded[f"weight {size}"], recorded[f"blob {size}"]
    assert (W.unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all() and W.unique().numel() > 1000
    made = blob(*pack_24(W, 16))
    assert made.dtype == compressed.dtype and torch.equal(made, compressed)


def written(
    device: str, N: int, K: int, scales: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Packed24]:
    """What the kernel writes, what it should, and of what."""
    packed = stored(N, K, scales)
    found = expand_cslt(there(device, packed, K), K, dtype).cpu()
    return found, blob(kept(dense(packed, K, dtype), packed.indices), packed.indices), packed


@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_writes_it(run: offline.Run, name: str) -> None:
    found, wanted, packed = run(written, *SHAPES[name])
    N, K = SHAPES[name][:2]
    assert packed.scale.shape == {"tensor": (1, 1), "row": (N, 1)}.get(
        SHAPES[name][2], (N, K // 32)
    )
    assert found.dtype == SHAPES[name][3] and found.shape == (N, K // 16 * 9)
    assert torch.equal(found, wanted) and found.count_nonzero() >= N * K // 2


def extremes(device: str) -> tuple[Tensor, Tensor]:
    """Every pair of codes at every pair of positions, scales from 2^-130 to 2^100, half negative;
    beside what `expand` writes.
    """
    number = torch.arange(64 * 16)
    packed = Packed24(
        (number % 256).to(torch.uint8).view(64, 16),
        torch.tensor([0x44, 0x88, 0x99, 0xCC, 0xDD, 0xEE]).to(torch.uint8)[number % 6].view(64, -1),
        (2.0 ** torch.linspace(-130, 100, 64) * torch.tensor([1.0, -1.3]).repeat(32))
        .bfloat16()
        .view(64, 1),
        *(4, 32),
    )
    packed = replace(packed, indices=packed.indices[:, :8].contiguous())
    weight = there(device, packed, 64)
    W = expand(weight, 64, torch.bfloat16).cpu()
    found = expand_cslt(weight, 64, torch.bfloat16).cpu()
    return found, blob(kept(W, packed.indices), packed.indices)


def test_products_of_codes_and_scales_are_rounded_once(run: offline.Run) -> None:
    found, wanted = run(extremes)
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize(("N", "K"), [(256, 512), (4096, 4096)])
def test_it_is_what_the_library_compresses(N: int, K: int) -> None:
    packed = on_gpu(N, K)
    weight = there("cuda", packed, K)
    compressed = torch._cslt_compress(expand(weight, K, torch.bfloat16))
    found = expand_cslt(weight, K, torch.bfloat16)
    assert found.shape == compressed.shape and torch.equal(found, compressed)


@pytest.mark.parametrize("M", [1024, 1021])
def test_the_library_multiplies_by_it(M: int) -> None:
    weight = there("cuda", on_gpu(512, 1024), 1024)
    x = torch.randn(M * 1024 + 1, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    W = expand(weight, 1024, torch.bfloat16).double()
    for rows in (x[:-1].view(M, 1024), x[1:].view(M, 1024)):  # the last begin between words
        y = multiply(expand_cslt(weight, 1024, torch.bfloat16), rows)
        exact, magnitude = linear(rows.double(), W), linear(rows.double().abs(), W.abs())
        assert y.is_contiguous() and y.dtype == torch.bfloat16
        assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 2e-6 * magnitude).all()


def test_a_recorded_graph_multiplies_by_it() -> None:
    weight = there("cuda", on_gpu(512, 1024), 1024)
    x = torch.randn(SPARSE_ROWS, 1024, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    wanted = multiply(expand_cslt(weight, 1024, torch.bfloat16), x)  # finds the algorithm
    with torch.cuda.graph(graph):
        assert why_not(512, 1024, torch.bfloat16, x.device) is None
        y = multiply(expand_cslt(weight, 1024, torch.bfloat16), x)
    graph.replay()
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("M", [SPARSE_ROWS - 1, SPARSE_ROWS])
def test_the_op_multiplies_by_it(M: int) -> None:
    packed = on_gpu(512, 1024)
    stored = [tensor.cuda() for tensor in lay_out(packed, 1024, "stored")]
    held = Held([], stored, (form_of(packed, 1024),), [512], 0)
    weight = there("cuda", packed, 1024)
    x = torch.randn(M, 1024, device="cuda").bfloat16()
    ways = {
        False: linear(x, expand(weight, 1024, torch.bfloat16)),
        True: multiply(expand_cslt(weight, 1024, torch.bfloat16), x),
    }
    y = launch(x, held, gpu_of(x.device))
    assert torch.equal(y, ways[M >= SPARSE_ROWS])


def on_gpu(N: int, K: int) -> Packed24:
    """A weight that can be multiplied here, else the test is skipped with the reason."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    why = why_not(N, K, torch.bfloat16, torch.device("cuda", 0))
    assert why is None or "form" not in why, why  # that a library changes it is no reason to skip
    if why is not None:
        pytest.skip(why)
    return stored(N, K, "group")


def test_what_the_library_does_not_take_is_named() -> None:
    cpu = torch.device("cpu")
    assert why_not(64, 64, torch.float32, cpu) == "x is torch.float32, not bfloat16 or float16"
    assert why_not(96, 64, torch.float16, cpu) == "the weight is [96, 64], not multiples of 64"
    assert why_not(64, 64, torch.float16, cpu) == "cpu is no NVIDIA GPU"
    weight = there("cpu", stored(64, 64, "row"), 64)
    with pytest.raises(SlimError, match="a weight of 64 inputs, and x of 128"):
        expand_cslt(weight, 128, torch.bfloat16)
    with pytest.raises(
        SlimError, match=r"torch\.float32 \[64, 64\], not bfloat16 or float16 in mul"
    ):
        expand_cslt(weight, 64, torch.float32)
    with pytest.raises(SlimError, match=r"\[64, 96\], not bfloat16 or float16 in multiples of 64"):
        expand_cslt(there("cpu", stored(64, 96, "row"), 96), 96, torch.bfloat16)


def compiled(GROUP: int, OUT: Any = tl.bfloat16) -> Any:
    """The kernel, as `expand_cslt` launches it."""
    types = {
        **{"words": "*i32", "places": "*i32", "scale": "*bf16", "meta": "*i32"},
        **{"values": "*bf16" if OUT == tl.bfloat16 else "*fp16"},
        **{"K": "i32", "width": "i32", "scale_row": "i32"},
    }
    constants = {"GROUP": GROUP, "OUT": OUT, "OCTETS": module._OCTETS}
    constants["WARPS"] = module._WARPS
    given: Any = {"warps": module._WARPS, "multiples": ("K", "width")}
    types = {name: types[name] for name in module._expand_cslt.arg_names if name in types}
    return offline.compile(module._expand_cslt, types, constants, "sm_90", **given)


@pytest.mark.parametrize("OUT", ["bfloat16", "float16"])
@pytest.mark.parametrize("GROUP", [0, 32, 128])
def test_it_waits_for_memory(GROUP: int, OUT: str) -> None:
    """Of 1.5 bytes a weight an H200 moves 2.86e12 a second, and issues 10.4 instructions for each:
    132 x 128 x 1.755 GHz.
    """
    code = offline.sass(compiled(GROUP, getattr(tl, OUT)))
    each = len(code.opcodes) * module._WARPS * 32 / (64 * 32 * module._OCTETS)
    print(f"sm_90, groups of {GROUP}: {each:.2f} instructions a weight, start and end with them")
    assert each <= 10.4 * 0.55 and code.spills == 0  # 5.4 under Triton 3.6, 4.6 since
    stores = 64 * 32 * module._OCTETS * 9 // 8 // (module._WARPS * 32 * 16)
    assert offline.count(code.opcodes, "STG") == offline.count(code.opcodes, "STG.128") == stores
    if Version(triton.__version__) >= Version("3.7"):  # older ones change layouts here and there
        assert offline.count(code.opcodes, *offline.EXCHANGE) == 0


def test_neighbours_read_and_write_side_by_side() -> None:
    """A sector of memory has 32 bytes. Triton 3.6 gave each thread of a warp another row where the
    order of two axes was left open; what is stored of positions is 16 bytes of each of them.
    """
    found = set(offline.runs(compiled(0)))
    loads = {("tt.load 8x16", 64), ("tt.load 16x8", 32), ("tt.load 8x1", 2)}
    assert found == loads | {("tt.store 8x128", 256), ("tt.store 16x8x4", 16)}


def test_weights_may_have_more_than_two_to_the_31_inputs() -> None:
    assert narrow(compiled(128), "words places scale values meta") == []

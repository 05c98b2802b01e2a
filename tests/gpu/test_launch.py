"""`linear_gpu` by its kernels, for each row of `select`: in the interpreter, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_linears import Linear, linear
from slimfx.runtime.gpu_ops import launch
from slimfx.runtime.select import Gpu, Layer, select
from torch import Tensor

Run = Callable[..., Any]
H100, MI300 = Gpu("cuda", 90), Gpu("hip", "gfx942")
BF16, INT4, STORED = torch.bfloat16, ("dense", 4), ("stored",)
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-19}
CASES: dict[str, tuple[str, Callable[[], Linear], int, Gpu, torch.dtype]] = {
    "decode": ("decode_24", lambda: linear(("2:4", 4), [35], 260), 3, H100, BF16),
    "decode, parts": (
        *("decode_24", lambda: linear(("2:4", 4), [32, 16, 21], 256, scales="row")),
        *(1, H100, BF16),
    ),
    "decode, adapters": (
        *("decode_24", lambda: linear(("2:4", 4), [40], 256, adapter=INT4, ranks=[37])),
        *(9, H100, BF16),
    ),
    "decode, parts, adapters": (
        "decode_24",
        lambda: linear(("2:4", 4), [32, 64, 24], 256, adapter=INT4, ranks=[40, 7, 33]),
        *(2, H100, BF16),
    ),
    "decode, equal parts, adapters": (
        *("decode_24", lambda: linear(("2:4", 4), [32, 32], 256, adapter=INT4, ranks=[20, 16])),
        *(1, H100, BF16),
    ),
    "decode, odd parts, adapters": (
        "decode_24",
        lambda: linear(
            ("2:4", 4), [16, 32, 16, 5], 256, adapter=INT4, ranks=[32] * 4, scales="group"
        ),
        *(9, H100, BF16),
    ),
    "decode, adapters in floats": (
        "decode_24",
        lambda: linear(("2:4", 4), [32, 24], 256, adapter=("dense", 16), ranks=[8, 5]),
        *(2, H100, BF16),
    ),
    "decode int4": ("decode_int4", lambda: linear(INT4, [35], 192, scales="group"), 4, H100, BF16),
    "decode int4, parts, adapters": (
        "decode_int4",
        lambda: linear(INT4, [16, 20], 192, adapter=INT4, ranks=[16, 12], scales="group"),
        *(1, H100, BF16),
    ),
    "decode int4, adapters of an odd rank": (
        "decode_int4",
        lambda: linear(INT4, [20], 192, adapter=INT4, ranks=[12], scales="group"),
        *(1, H100, BF16),
    ),
    "portable": ("portable_24", lambda: linear(("2:4", 4), [35], 260), 17, H100, torch.float16),
    "portable, parts, adapters": (
        "portable_24",
        lambda: linear(("2:4", 4), [32, 64, 24], 256, adapter=INT4, ranks=[40, 7, 33]),
        *(3, MI300, BF16),
    ),
    "portable int4, parts, float adapters": (
        "portable_int4",
        lambda: linear(INT4, [32, 24], 192, adapter=("dense", 16), ranks=[8, 5], scales="group"),
        *(2, H100, torch.float32),
    ),
    "bitmask, sparse adapters": (
        "bitmask",
        lambda: linear(
            ("bitmask", 3), [20], 140, adapter=("2:4", 4), ranks=[12], layouts=STORED, scales="row"
        ),
        *(2, H100, BF16),
    ),
    "expand, parts, adapters": (
        "expand",
        lambda: linear(("2:4", 4), [32, 16, 20], 128, adapter=INT4, ranks=[40, 7, 33]),
        *(360, H100, torch.float32),
    ),
    "expand eight bits": (
        "expand",
        lambda: linear(("2:4", 8), [20], 132, layouts=STORED, scales="group"),
        *(2, H100, BF16),
    ),
    "expand floats": (
        "expand", lambda: linear(("2:4", 16), [20], 64, layouts=STORED), 2, H100, torch.float16
    ),
}  # fmt: skip


def launched(device: str, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, once more if it is a GPU, exactly, and of magnitudes."""
    _, make, M, gpu, dtype = CASES[name]
    made = make()
    x = torch.randn(1, M, made.parts[0][0].shape[1], generator=torch.Generator().manual_seed(1))
    x = x.to(dtype)
    y = launch(x.to(device), made.to(device), gpu).cpu()
    again = launch(x.to(device), made.to(device), gpu).cpu() if device == "cuda" else y
    return y, again, made.exact(x), made.magnitude(x)


@pytest.mark.parametrize("name", CASES)
def test_every_kernel_gives_what_the_op_defines(run: Run, name: str) -> None:
    kernel, make, M, gpu, dtype = CASES[name]
    held = make().held
    assert select(Layer(held.forms[0], held.forms[1:], dtype), M, gpu).kernel == kernel
    y, again, exact, magnitude = run(launched, name)
    assert y.dtype == dtype and y.shape == exact.shape and torch.equal(y, again)
    # The product, adapters' share and their sum may each be rounded, besides x L^T.
    limit = ROUNDING[dtype] * (2 * exact.abs() + 0.2 * magnitude)
    assert ((y.double() - exact).abs() <= limit).all()
    assert limit.mean() < exact.abs().mean() / 10  # or it would hide a mistake


@pytest.mark.parametrize("name", ["decode, parts, adapters", "expand, parts, adapters"])
def test_torch_finds_the_kernels_by_the_device(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    _, make, M, _, dtype = CASES[name]
    made = make()
    x = torch.randn(M, made.parts[0][0].shape[1]).to(dtype)
    there = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cuda(), made.arguments())
    y = torch.ops.slimfx.linear_gpu(x.cuda(), *there).cpu()
    limit = ROUNDING[dtype] * (2 * made.exact(x).abs() + 0.2 * made.magnitude(x))
    assert ((y.double() - made.exact(x)).abs() <= limit).all()

"""What launches of decode kernels, and of others, ask and do: arguments, devices, rows of x."""

# Jitted functions are Triton's language: constants are annotations.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from slimfx.runtime.fragments import Fragments
from slimfx.runtime.kernels.mma import fragments_of
from slimfx.runtime.kernels.warp import is_by_lane
from slimfx.runtime.select import DECODE_ROWS
from torch import Tensor

from slimfx.errors import SlimError, need

triton = need("triton")
tl = need("triton.language")
_cuda = need("triton.language.extra.cuda")
_begin_next, _wait = _cuda.gdc_launch_dependents, _cuda.gdc_wait

PARTS = 4
"""Linears that one weight with adapters holds, at most."""
_PIECES = 4


def why_not_on(backend: str, arch: Any) -> str | None:
    """Why a GPU of Triton's cannot run the decode kernels, or None if it can."""
    if backend != "cuda":
        return f"{arch} has no mma.sp and mma.sync instructions; the portable kernels run there"
    if arch < 80:
        return f"sm_{arch} is older than sm_80; the portable kernels run there"
    return None


def check(name: str, x: Tensor, weight: Fragments) -> None:
    """Refuse what a kernel would misread."""
    M, K = x.shape if x.dim() == 2 else (0, -1)
    torch._check(
        x.dtype is torch.bfloat16 and weight.K == K and 1 <= M <= DECODE_ROWS,
        lambda: (
            f"{name}: x is {x.dtype} {tuple(x.shape)}, not bfloat16 "
            f"[1 to {DECODE_ROWS}, {weight.K}]"
        ),
    )
    check_weight(name, weight, x.device)


def check_weight(name: str, weight: Fragments, device: torch.device) -> None:
    """Refuse a weight that a kernel would misread."""
    torch._check(
        weight.data.device == device,
        lambda: f"{name}: the weight is on {weight.data.device}, not on {device}",
    )
    torch._check(  # Triton takes four words at once only if it knows that it may
        weight.data.data_ptr() % 16 == 0 and weight.data.is_contiguous(),
        lambda: f"{name}: the weight's data must be contiguous and begin at a multiple of 16 bytes",
    )


def starts_of(rows: Sequence[int]) -> list[int]:
    """Where the second linear's rows begin, the third's and the fourth's; beyond all if none do."""
    starts = [sum(rows[: i + 1]) for i in range(len(rows) - 1)]
    return starts + [2**31 - 1] * (PARTS - 1 - len(starts))


@cache
def check_device(name: str, device: torch.device) -> None:
    """Refuse a device that cannot run the kernels; the interpreter runs them on any."""
    if triton.knobs.runtime.interpret:
        return
    if device.type != "cuda":
        raise SlimError(f"{name}: x is on {device}, not on a GPU; move it and the weight to one")
    target = triton.runtime.driver.active.get_current_target()
    reason = why_not_on(target.backend, target.arch)
    if reason is not None:
        raise SlimError(f"{name}: {reason}")


@cache
def early(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch that may begin before the one ahead of it has ended, from sm_90 on."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@cache
def check_layout(name: str, compiled: Any, warps: int) -> None:
    """Refuse what a kernel computed if its compiler gave rows to other lanes than assembly needs.

    There is nothing compiled, and nothing to check, in the interpreter.
    """
    if compiled is None:
        return
    if "ttgir" not in compiled.asm:
        raise SlimError(
            f"{name}: Triton kept no TTGIR, so its layout is unknown; unset "
            "TRITON_STORE_BINARY_ONLY and empty Triton's cache"
        )
    if not is_by_lane(compiled.asm["ttgir"], warps):
        raise SlimError(
            f"{name}: Triton {triton.__version__} laid its tensors out otherwise than "
            "threadsPerWarp [32, 1], columns in one thread; use Triton 3.6 or 3.7"
        )


def arranged(x: Tensor) -> Tensor:
    """x bfloat16 [M, K] as `warp.load_x` takes it.

    One row stays as it is. More become int32 [ceil(K / 32), F, 8, 4, 4]: for each 32 inputs and
    eight rows what each lane holds of them, side by side. Read as they are, each of a lane's four
    words would be a load of its own, from as many lines of the cache as there are rows.
    """
    words = pairs(x)
    M, W = words.shape
    if M == 1:
        return words
    F = fragments_of(M)
    out = torch.empty(-(-W // 16) * F * 128, dtype=torch.int32, device=x.device)
    arrange_kernel[(-(-W // (16 * _PIECES)),)](
        words, words.stride(0), M, W, out, out.numel(), F=F, PIECES=_PIECES, **early(x.device)
    )
    return out


@triton.jit(do_not_specialize=["M"])
def arrange_kernel(
    x, XS, M, W, out, SIZE, F: tl.constexpr, PIECES: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Words [M, W] as `arranged` says, PIECES times 16 of a row a program; zeros after them."""
    if EARLY:
        _begin_next()
        _wait()
    at = tl.program_id(0) * (PIECES * F * 128) + tl.arange(0, PIECES * F * 128)
    row = at // 16 % (8 * F)
    word = at // (128 * F) * 16 + at % 4 * 4 + at // 4 % 4
    part = tl.load(x + row * XS + word, (row < M) & (word < W), 0)
    tl.store(out + at, part, at < SIZE)


def pairs(x: Tensor) -> Tensor:
    """x bfloat16 [M, K] as int32 [M, ceil(K / 2)], two numbers a word; a copy where it must be."""
    odd = x.shape[1] % 2
    if odd or x.stride(1) != 1 or x.stride(0) % 2 or x.storage_offset() % 2:
        whole = x.new_zeros(x.shape[0], x.shape[1] + odd)
        whole[:, : x.shape[1]] = x
        x = whole
    return x.view(torch.int32)

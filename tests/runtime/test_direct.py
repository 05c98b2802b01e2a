"""Kernels that are called with sizes of run time multiply as the op's definition does."""

from __future__ import annotations

import itertools

import pytest
import torch
from slimfx.runtime.cpu_ops import Form
from slimfx.runtime.inductor import direct
from slimfx.runtime.interleave import Interleaved, dense_weight, whole
from torch import Tensor

D4 = Form("dense", 4, 32)


def matrix(pool: Tensor, numbers: list[int], form: Form, N: int, K: int) -> Tensor:
    """The weight that five numbers of a `Part` point to, their addresses taken as places."""
    data, scale, _, group, size = numbers
    tiles, groups = whole(N) // 16, whole(K) // group
    bytes_ = pool[data : data + tiles * size].view(tiles, size)
    scales = pool[scale : scale + tiles * groups * 32].view(torch.bfloat16).view(tiles, groups, 16)
    laid = Interleaved(bytes_, scales, form.where, form.bits, group)
    return dense_weight(laid, N, K, torch.float64)


@pytest.mark.parametrize("rank", [0, 40])
@pytest.mark.parametrize("form", [Form("dense", 8, 96), Form("2:4", 4, 96), Form("bitmask", 4, 96)])
def test_it_is_the_op(form: Form, rank: int) -> None:
    N, K = 72, 96
    pool = direct.memory(1 << 16)
    sizes = direct.Sizes(N, K, rank, (form, D4, Form("dense", 4, 16)) if rank else (form,))
    y = next(direct.calls(sizes, pool))()
    numbers, _ = direct._part(sizes, 0)
    x = torch.ones(1, K, dtype=torch.float64)
    exact = x @ matrix(pool, numbers[4:9], form, N, K).T
    if rank:
        L = matrix(pool, numbers[9:14], sizes.forms[1], whole(rank), K)
        R = matrix(pool, numbers[14:19], sizes.forms[2], N, whole(rank))
        exact = exact + (x @ L.T) @ R.T
    assert torch.allclose(y.double(), exact[0], rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_every_call_reads_other_bytes_until_they_end() -> None:
    sizes = direct.Sizes(64, 64, 0, (Form("dense", 4, 64),))
    pool = direct.memory(3 * sum(direct._part(sizes, 0)[1]))
    answers = [call().clone() for call in itertools.islice(direct.calls(sizes, pool), 4)]
    assert torch.equal(answers[0], answers[3])
    assert not torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[1], answers[2])

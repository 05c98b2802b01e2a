"""A package for a GPU, on one: `make gpu-package`. It answers as the program does on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from slimfx.runtime.targets import aoti
from torch import nn
from torch.export import Dim

import slimfx


def test_a_package_for_this_gpu_answers_as_the_program(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).bfloat16().eval()
    batches = [(torch.randn(64, 256).bfloat16(),) for _ in range(2)]
    rows = ({0: Dim("rows", min=1, max=4096)},)
    small = slimfx.compress(
        torch.export.export(model, batches[0], dynamic_shapes=rows), "slim-q", batches
    )
    written = slimfx.export(small, "aoti", tmp_path / "small.pt2", device="cuda")
    assert (written.kernels, written.linears, written.notes) == (2, 2, ())
    assert aoti.check(tmp_path / "small.pt2").passed
    run, module = aoti.load(tmp_path / "small.pt2"), small.module()
    for M in (1, 40, 300):
        x = torch.randn(M, 256).bfloat16()
        y, wanted = run(x), module(x)
        assert y.device == x.device
        assert (y - wanted).abs().max() < 2e-2 * wanted.abs().max()

"""Promise 4: what a new process loads gives the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from models import case, compressed

import slimfx

READ = """
import sys
import safetensors.torch
import torch
import slimfx
torch.set_num_threads(1)  # as in the tests: sums of other threads round otherwise
program = slimfx.load(sys.argv[1])
inputs = safetensors.torch.load_file(sys.argv[2])
inputs = {name: x.clone() for name, x in inputs.items()}  # begins where tensors do: MKL asks
y = program.module()(**inputs)
safetensors.torch.save_file({"y": y if hasattr(y, "shape") else y[0]}, sys.argv[3])
"""


@pytest.mark.parametrize("form", ["op", "aten"])
def test_saved_is_loaded(form: str, tmp_path: Path) -> None:
    program, inputs = compressed("mlp", "slim-q"), case("mlp").inputs
    files = [tmp_path / name for name in ("a.pt2", "x.safetensors", "y.safetensors")]
    slimfx.save(program, files[0], form=form)
    safetensors.torch.save_file(inputs, files[1])
    subprocess.run([sys.executable, "-c", READ, *map(str, files)], check=True, timeout=120)
    found = safetensors.torch.load_file(files[2])["y"]
    expected = slimfx.load(files[0]).module()(**inputs)
    assert found.equal(expected)
    if form == "op":
        assert found.equal(program.module()(**inputs))

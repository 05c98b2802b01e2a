"""Promise 16: a damaged file is an error of slimfx, or the same program; never a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import case, compressed

import slimfx
from slimfx.errors import SlimError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("hostile") / "a.pt2"
    slimfx.save(compressed("mlp", "slim-q"), path, verify=False)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.97, 0.999])
def test_truncated_files_are_refused(share: float, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "cut.pt2").write_bytes(data[: int(share * len(data))])
    with pytest.raises(SlimError):
        slimfx.load(tmp_path / "cut.pt2")


def test_hostile_files(data: bytes, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, refused = case("mlp").inputs, 0
    y = compressed("mlp", "slim-q").module()(**inputs)
    for at in torch.randint(len(data), (60,), generator=draw).tolist():
        bit = 1 << int(torch.randint(8, (1,), generator=draw))
        flipped = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
        (tmp_path / "flipped.pt2").write_bytes(flipped)
        try:
            program = slimfx.load(tmp_path / "flipped.pt2")
        except SlimError:
            refused += 1
        else:  # the bit says nothing of the program: a date, a flag that nobody reads
            assert program.module()(**inputs).equal(y), f"byte {at}"
    assert refused > 30

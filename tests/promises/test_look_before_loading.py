"""Promise 2: a `.pt2` is looked at before torch reads a byte of it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from models import compressed

import slimfx
from slimfx.errors import ArtifactError


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, bytes]:
    """The records of a good file."""
    slimfx.save(compressed("mlp", "slim"), tmp_path / "good.pt2", verify=False)
    with zipfile.ZipFile(tmp_path / "good.pt2") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pickled(records: dict[str, bytes]) -> None:
    [name] = (n for n in records if n.endswith("model_weights_config.json"))
    table = json.loads(records[name])
    next(iter(table["config"].values()))["use_pickle"] = True
    records[name] = json.dumps(table).encode()


def outside(records: dict[str, bytes]) -> None:
    records["model/../../outside"] = b"x"


def unknown(records: dict[str, bytes]) -> None:
    records["model/data/run_me.py"] = b"x"


@pytest.mark.parametrize(
    ("forge", "said"),
    [(pickled, "stored as a pickle"), (outside, "does not belong"), (unknown, "does not belong")],
)
def test_look_before_loading(
    forge: Any, said: str, saved: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(saved)
    with zipfile.ZipFile(tmp_path / "forged.pt2", "w") as archive:
        for name, data in saved.items():
            archive.writestr(name, data)

    reads: list[object] = []  # an error here would pass for one of torch's about a bad program
    monkeypatch.setattr(torch.export, "load", lambda *given, **named: reads.append(given))
    monkeypatch.setattr(torch, "load", lambda *given, **named: reads.append(given))
    with pytest.raises(ArtifactError, match=rf"forged\.pt2.*{said}"):
        slimfx.load(tmp_path / "forged.pt2")
    assert not reads

"""At every write of every format: killed, or out of space, the old file or the new one is there."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import DIED, SAVED, THROUGH, meet
from models import RECIPES, compressed, ids, tiny_llama, word_tokenizer
from slimfx.runtime import sidecar
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.targets import hf, onnx, pt2, pte
from torch.export import ExportedProgram
from trust import trying

import slimfx
from slimfx import Training
from slimfx.cli_bench import collect
from slimfx.errors import SlimError

Save = Callable[[Path], object]
FAULTS = ("kill", "ENOSPC", "EIO")
MOST = 400
"""Points of one save; a save that is never through fails its test."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a bench writes."""

    name: str
    value: float


def record_beside(path: Path) -> None:
    """What `export` writes beside a file of another format."""
    one = {"x": torch.ones(2)}
    held = sidecar.Sidecar("onnx", manifest_of(compressed("mlp", "slim")), {}, one, one)
    sidecar.write(path, held, [])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ExportedProgram:
    """A compressed program that came from a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(word_tokenizer(), encoding="utf-8")
    return slimfx.compress(slimfx.capture(folder), RECIPES["slim"], [ids(1, 4, 24)])


def content(path: Path) -> object:
    """Every byte of a file or folder, and of the record beside it; None where there is none."""
    beside = path.with_name(f"{path.name}.slimfx")
    own = beside.read_bytes() if beside.exists() else None
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): file.read_bytes() for file in files}
    return (path.read_bytes() if path.exists() else None, own)


def survive(path: Path, save: Save, fault: str, *, step: int = 1) -> int:
    """Meet `fault` at every `step`-th point of a save over an older one; how many there were.

    What is there in the end is the old content or the new, or, where a file has a record beside
    it, a pair that `check` refuses.
    """
    save(path)
    new = content(path)
    put_back(path, new)
    stale = marked(path, new)
    for point in range(0, MOST, step):
        put_back(path, stale)
        became = meet(lambda: save(path), path.parent, point, fault)
        if became == THROUGH:
            assert content(path) == new
            return point // step
        with trying("fault points"):
            assert became == DIED if fault == "kill" else is_ours(became)
            assert became != SAVED or content(path) == new
            settled(path, stale, new)
            tidy(path, fault)
    raise AssertionError(f"{MOST} points were not all")


def marked(path: Path, new: object) -> object:
    """An older content that differs from the new one."""
    if isinstance(new, dict):
        return {**new, "README.md": b"older"}
    return (b"older", None if new[1] is None else b"older")  # type: ignore[index]


def put_back(path: Path, held: object) -> None:
    """Write a content where it was."""
    if isinstance(held, dict):
        shutil.rmtree(path, ignore_errors=True)
        for name, data in held.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return
    path.write_bytes(held[0])  # type: ignore[index]
    if held[1] is not None:  # type: ignore[index]
        path.with_name(f"{path.name}.slimfx").write_bytes(held[1])  # type: ignore[index]


def settled(path: Path, old: object, new: object) -> None:
    """Is a content whole?"""
    found = content(path)
    if isinstance(old, dict):
        set_aside = [content(left) for left in path.parent.glob(".*.old")]
        assert found in (old, new) or (not path.exists() and old in set_aside)
        return
    for part, older, newer in zip(found, old, new):  # type: ignore[call-overload]
        assert part in (older, newer)


def tidy(path: Path, fault: str) -> None:
    """Nothing strange beside the file; after an error nothing at all."""
    own = {path.name, f"{path.name}.slimfx"}
    for left in path.parent.iterdir():
        if left.name in own:
            continue
        assert fault == "kill" and left.name.startswith("."), left
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def is_ours(became: str) -> bool:
    """Was the fault got round, or told in an error of slimfx?"""
    return became == SAVED or issubclass(getattr(slimfx.errors, became, Exception), SlimError)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", pt2.FORMS)
def test_saving_a_program(tmp_path: Path, form: str, fault: str) -> None:
    program, path = compressed("mlp", "slim"), tmp_path / "model.pt2"
    step = 3 if form == "op" else 11  # which takes longer
    points = survive(
        path, lambda p: pt2.save(program, p, form=form, verify=False), fault, step=step
    )
    assert points >= 4


@pytest.mark.parametrize("fault", FAULTS)
def test_writing_a_record_beside_a_file(tmp_path: Path, fault: str) -> None:
    assert survive(tmp_path / "model.onnx.slimfx", record_beside, fault) >= 5


@pytest.mark.parametrize("fault", FAULTS)
def test_writing_the_results_of_a_bench(tmp_path: Path, fault: str) -> None:
    rows = [Row("a", 1.0), Row("b", 2.0)]
    points = survive(tmp_path / "results.json", lambda p: collect(rows[:1], p), fault)
    assert points >= 5


@pytest.mark.parametrize("fault", FAULTS)
def test_exporting_a_folder(tmp_path: Path, llama: ExportedProgram, fault: str) -> None:
    assert survive(tmp_path / "folder", lambda p: hf.save(llama, p), fault, step=3) >= 10


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", [onnx, pte], ids=["onnx", "pte"])
def test_exporting_a_file(tmp_path: Path, target: object, fault: str) -> None:
    path = tmp_path / f"model.{'onnx' if target is onnx else 'pte'}"
    points = survive(path, lambda p: target.save(captured_mlp(), p), fault, step=2)  # type: ignore[attr-defined]
    assert points >= 3


def captured_mlp() -> ExportedProgram:
    return compressed("mlp", "slim")


QUICK = Training(tokens=16 * 32, length=32, accumulate=4, rate=0.05, save_every=1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fine_tuning_can_be_resumed_or_began_anew(
    tmp_path: Path, llama: ExportedProgram, fault: str
) -> None:
    """Whatever it met, the next run with `resume` ends with the same weights."""
    text = torch.arange(1, 96).repeat(12)

    def train(folder: Path) -> ExportedProgram:
        return slimfx.finetune(llama, text, how=QUICK, checkpoints=folder, resume=folder.exists())

    whole, folder = train(tmp_path / "whole"), tmp_path / "folder"
    for point in range(0, MOST, 7):
        shutil.rmtree(folder, ignore_errors=True)
        became = meet(lambda: train(folder), folder, point, fault)
        if became == THROUGH:
            assert point > 14
            return
        with trying("fault points"):
            assert became == DIED or fault != "kill"
            again = train(folder)
            for name, tensor in whole.state_dict.items():
                assert torch.equal(again.state_dict[name], tensor)
    raise AssertionError(f"{MOST} points were not all")


def test_a_folder_that_takes_no_files_is_one_clear_error(tmp_path: Path) -> None:
    """Where permissions hold: root may write anywhere, so a file stands where the folder would."""
    (tmp_path / "file").write_text("x")
    with trying("fault points"), pytest.raises(SlimError, match="no such folder"):
        pt2.save(compressed("mlp", "slim"), tmp_path / "file" / "model.pt2")

"""Tensors left in their files: what becomes of a program of such, what goes wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import safetensors.torch
import torch
from models import RECIPES, bits, case, compressed, same_tensors
from slimfx.runtime import unread
from slimfx.runtime.unread import left_unread, place_of, places, put, read

import slimfx
from slimfx.errors import ArtifactError, CaptureError, PlanError

TEXT = ("llama", "gpt2", "bert", "qwen2")


def folder_of(kind: str, path: Path) -> Path:
    """The model of a kind in several files."""
    case(kind).model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_part_at_a_time_is_what_safetensors_reads(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unread, "_PART", 7)
    stored = {"a": torch.randn(5, 6).to(dtype), "b": torch.randn(3).to(dtype), "c": torch.ones(())}
    safetensors.torch.save_file(stored, tmp_path / "x.safetensors")
    found = places(tmp_path / "x.safetensors")
    assert found.keys() == stored.keys()
    for name, place in found.items():
        left = unread.unread(place, stored[name].dtype)
        assert left.is_meta
        assert bits(read(left)) == bits(stored[name])
        assert bits(read(unread.unread(place, torch.float64))) == bits(stored[name].double())


def test_views_and_other_names_share_a_place(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.randn(5, 6)}, tmp_path / "x.safetensors")
    place = places(tmp_path / "x.safetensors")["a"]
    whole = put(torch.empty(5, 6), place)
    left = left_unread({"one": torch.nn.Parameter(whole), "other": whole.T[1:]})
    assert isinstance(left["one"], torch.nn.Parameter)
    assert left["one"].untyped_storage()._cdata == left["other"].untyped_storage()._cdata
    assert torch.equal(read(left["other"]), read(left["one"]).T[1:])
    assert read(left["other"]).stride() == whole.T[1:].stride()
    assert place_of(torch.empty(2)) is None


@pytest.mark.parametrize("kind", TEXT)
def test_the_file_is_the_same_to_the_byte(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / "model")
    forms = ("op", "aten") if kind == "qwen2" else ("op",)
    programs = {name: slimfx.capture(folder, weights=name) for name in (True, "unread")}
    assert all(tensor.is_meta for tensor in programs["unread"].state_dict.values())
    files = {}
    for name, program in programs.items():
        small = slimfx.compress(program, RECIPES["slim"], case(kind).batches)
        for form in forms:
            slimfx.save(small, tmp_path / "small.pt2", form=form)
            files[name, form] = (tmp_path / "small.pt2").read_bytes()
    for form in forms:
        assert files["unread", form] == files[True, form]
    again = slimfx.load(tmp_path / "small.pt2")
    assert not any(tensor.is_meta for tensor in again.state_dict.values())


def test_another_dtype_is_made_when_it_is_read(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    eager = slimfx.capture(folder, dtype="bfloat16")
    left = slimfx.capture(folder, dtype="bfloat16", weights="unread")
    values = {name: read(tensor) for name, tensor in left.state_dict.items()}
    assert same_tensors(values, dict(eager.state_dict))
    assert same_tensors(dict(left.constants), dict(eager.constants))


def test_tied_weights_that_differ_in_the_files_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = case("qwen2").model
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "slimfx"):
        program = slimfx.capture(tmp_path, weights="unread")
    assert "read now" in caplog.text
    assert same_tensors(dict(program.state_dict), dict(slimfx.capture(tmp_path).state_dict))


def test_a_program_without_places_has_no_weights(tmp_path: Path) -> None:
    case("llama").model.config.save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="has no weights"):
        slimfx.compress(slimfx.capture(tmp_path, weights=False))


def test_unread_is_for_folders() -> None:
    with pytest.raises(CaptureError, match="for a folder"):
        slimfx.capture(case("llama").model, weights="unread")


def edited(folder: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """Put another tensor, or none, in the place of one; return its file."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    state = safetensors.torch.load_file(file)
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("weights", [True, "unread"])
def test_missing_and_misshapen_tensors_are_named(weights: bool | str, tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    file = edited(folder, name, torch.zeros(8, 8))
    with pytest.raises(CaptureError, match=rf"{file.name}: {name} is \[8, 8\], .* \[64, 32\]"):
        slimfx.capture(folder, weights=weights)
    edited(folder, name, None)
    with pytest.raises(CaptureError, match=f"hold no tensor {name}"):
        slimfx.capture(folder, weights=weights)


@pytest.mark.parametrize("weights", [True, "unread"])
def test_damaged_and_missing_files_are_named(weights: bool | str, tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CaptureError, match="fully covered"):
        slimfx.capture(folder, weights=weights)
    file.unlink()
    with pytest.raises(CaptureError, match=file.name):
        slimfx.capture(folder, weights=weights)


def test_a_file_that_changes_later_is_named(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    program = slimfx.capture(folder, weights="unread")
    tensor = program.state_dict["model.model.layers.1.mlp.up_proj.weight"]
    place = place_of(tensor)
    assert place is not None
    place.path.write_bytes(place.path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=rf"{place.path.name}: ends within"):
        for left in program.state_dict.values():
            read(left)
    place.path.unlink()
    with pytest.raises(
        ArtifactError, match=rf"{place.path.name}: model\.layers\.1.* cannot be read"
    ):
        slimfx.compress(program, RECIPES["slim"], case("llama").batches)


def test_what_is_given_stays_unread(tmp_path: Path) -> None:
    program = slimfx.capture(folder_of("llama", tmp_path / "model"), weights="unread")
    before = dict(program.state_dict)
    small = slimfx.compress(program, RECIPES["slim"], case("llama").batches)
    assert all(program.state_dict[name] is tensor for name, tensor in before.items())
    values = {name: read(tensor) for name, tensor in small.state_dict.items()}
    assert same_tensors(values, dict(compressed("llama", "slim").state_dict))

"""capture: folders and modules become programs, and the module stays as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import (
    LONGEST,
    Mlp,
    answer,
    bits,
    captured,
    case,
    ids,
    normal,
    tiny_bert,
    tiny_llama,
    tiny_vit,
    word_tokenizer,
)
from slimfx.passes.inputs import tensor_inputs
from slimfx.runtime.manifest import Manifest, manifest_of
from torch import Tensor, nn

import slimfx
from slimfx.errors import CaptureError


class Modes(nn.Module):
    """A dropout left in training mode and one in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.on = nn.Dropout(0.5)
        self.off = nn.Dropout(0.5)
        self.train()
        self.off.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.off(self.on(self.a(x)))


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_every_module_gets_its_own_training_mode_back() -> None:
    model = Modes()
    before = modes(model)
    assert set(before.values()) == {True, False}
    program = slimfx.capture(model, (normal(1, 4, 16),))
    assert modes(model) == before
    x = normal(2, 4, 16)
    assert torch.equal(program.module()(x), model.a(x))  # no dropout in the program


def test_a_failed_capture_gives_the_modes_back_too() -> None:
    model = Branching()
    with pytest.raises(CaptureError, match=r"torch\.export cannot trace Branching: "):
        slimfx.capture(model, (normal(1, 4, 16),))
    assert model.training and model.a.training


class Branching(nn.Module):
    """Decides on a value, which torch.export cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


def test_weights_and_gradients_of_the_module_are_untouched() -> None:
    model = tiny_llama().train()
    before = {name: (t.data_ptr(), bits(t)) for name, t in model.state_dict().items()}
    slimfx.capture(model)
    assert {name: (t.data_ptr(), bits(t)) for name, t in model.state_dict().items()} == before
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "encoder layer"])
def test_the_program_answers_as_the_module(kind: str) -> None:
    inputs = case(kind).inputs
    found = captured(kind).module()(**inputs)
    torch.testing.assert_close(found, answer(case(kind).model, inputs), rtol=1e-5, atol=1e-5)


def test_a_causal_model_needs_no_examples_and_knows_its_longest_input() -> None:
    program = slimfx.capture(tiny_llama())
    [info] = tensor_inputs(program).values()
    assert (info.name, info.sizes) == ("input_ids", ((1, 1024), (1, LONGEST)))
    shorter = slimfx.capture(tiny_llama(), max_length=20)
    assert tensor_inputs(shorter)["input_ids"].sizes[1] == (1, 20)
    assert manifest_of(program) == Manifest()


def test_named_examples_and_shapes_of_ones_own_are_taken_as_they_are() -> None:
    rows = torch.export.Dim("rows", min=3, max=9)
    program = slimfx.capture(Mlp(), {"x": normal(1, 4, 16)}, dynamic_shapes={"x": {0: rows}})
    assert tensor_inputs(program)["x"].sizes == ((3, 9), (16, 16))


def test_the_default_leaves_the_first_dimension_free() -> None:
    module = slimfx.capture(Mlp().eval(), (normal(1, 4, 16),)).module()
    for rows in (1, 2, 3, 50):
        assert module(normal(2, rows, 16)).shape == (rows, 8)


def test_inputs_that_are_no_tensors_may_be_among_the_examples() -> None:
    program = slimfx.capture(Scaled(), (normal(1, 4, 16), 3, None))
    x = normal(2, 7, 16)
    assert torch.equal(program.module()(x, 3, None), x * 3)


class Scaled(nn.Module):
    """A tensor, a number and perhaps a shift."""

    def forward(self, x: Tensor, by: int, shift: Tensor | None = None) -> Tensor:
        return x * by if shift is None else x * by + shift


@pytest.mark.parametrize("examples", [(), (1, 2, 3), {"y": 1}])
def test_examples_that_do_not_fit_the_module_are_a_capture_error(examples: Any) -> None:
    with pytest.raises(CaptureError, match="Mlp"):
        slimfx.capture(Mlp(), examples)


@pytest.mark.parametrize("model", [tiny_vit, Mlp])
def test_a_model_without_input_ids_asks_for_examples(model: type[nn.Module]) -> None:
    made = model()
    with pytest.raises(CaptureError) as caught:
        slimfx.capture(made)
    assert type(made).__name__ in str(caught.value)
    assert "example_inputs" in str(caught.value) and "pixel_values" in str(caught.value)


def test_a_model_that_does_not_say_how_long_its_input_is_asks_for_it() -> None:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=16, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config)
    with pytest.raises(CaptureError, match=r"BloomForCausalLM .* give max_length"):
        slimfx.capture(model)
    [info] = tensor_inputs(slimfx.capture(model, max_length=8)).values()
    assert info.sizes[1] == (1, 8)


@pytest.mark.parametrize("length", [0, 1])
def test_a_longest_input_of_no_use_is_a_capture_error(length: int) -> None:
    with pytest.raises(CaptureError, match="max_length"):
        slimfx.capture(tiny_llama(), max_length=length)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as save_pretrained writes it, with a tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    tiny_llama(eos_token_id=5).save_pretrained(path)
    (path / "tokenizer.json").write_text(word_tokenizer(), encoding="utf-8")
    return path


def test_a_folder_becomes_the_program_of_its_causal_model(folder: Path) -> None:
    program = slimfx.capture(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = {"input_ids": ids(1, 3, 9)}
    expected = answer(model, tokens)
    assert expected.shape == (3, 9, 96)
    torch.testing.assert_close(program.module()(**tokens), expected, rtol=1e-5, atol=1e-5)
    manifest = manifest_of(program)
    assert manifest.eos_token == 5
    assert json.loads(manifest.tokenizer) == json.loads(word_tokenizer())


def test_a_folder_may_be_given_as_text_and_loaded_in_bfloat16(folder: Path) -> None:
    program = slimfx.capture(str(folder), dtype="bfloat16", max_length=16)
    floating = {t.dtype for t in program.state_dict.values() if t.is_floating_point()}
    assert floating == {torch.bfloat16}
    assert program.module()(input_ids=ids(1, 2, 4)).dtype is torch.bfloat16


def test_a_folder_that_holds_an_encoder_becomes_its_hidden_states(tmp_path: Path) -> None:
    model = tiny_bert().eval()
    model.save_pretrained(tmp_path)
    program = slimfx.capture(tmp_path)
    inputs = case("bert").inputs
    assert list(tensor_inputs(program)) == list(inputs)
    torch.testing.assert_close(
        program.module()(**inputs), answer(model, inputs), rtol=1e-5, atol=1e-5
    )
    assert manifest_of(program).tokenizer is None


def test_the_first_of_several_end_tokens_is_kept(tmp_path: Path) -> None:
    tiny_llama(eos_token_id=[7, 9]).save_pretrained(tmp_path)
    assert manifest_of(slimfx.capture(tmp_path)).eos_token == 7


@pytest.mark.parametrize("name", ["./absent", "../a/b/absent", "some/where/absent", "/absent"])
def test_a_folder_that_is_not_there_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(CaptureError, match=r"absent: no such folder; .*config\.json"):
        slimfx.capture(name)


def test_a_missing_path_object_is_a_missing_folder_too(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no such folder"):
        slimfx.capture(tmp_path / "absent")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(CaptureError, match="not a folder"):
        slimfx.capture(path)


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"not a model, it has no config\.json"):
        slimfx.capture(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no such type"}', "{}"])
def test_a_folder_with_a_broken_configuration_is_no_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CaptureError, match=re.escape(str(tmp_path))):
        slimfx.capture(tmp_path)


def test_a_folder_without_weights_is_no_model(folder: Path, tmp_path: Path) -> None:
    config = (folder / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(CaptureError, match="not a model that transformers can load"):
        slimfx.capture(tmp_path)


def test_damaged_weights_are_a_capture_error(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CaptureError):
        slimfx.capture(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "int8", "fp16", ""])
def test_an_unknown_dtype_is_refused_with_the_known_ones(dtype: str) -> None:
    with pytest.raises(CaptureError, match="is not one of float32, bfloat16, float16"):
        slimfx.capture("./absent", dtype=dtype)

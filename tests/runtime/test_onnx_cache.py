"""Decoders with a cache as files for ONNX Runtime, driven as other programs drive such files."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import RECIPES, ids, tiny_llama
from numpy.typing import NDArray
from slimfx.runtime.targets.onnx import check, load, save
from torch.export import ExportedProgram

import slimfx

LENGTH = 24
PROMPT, NEW = 6, 8


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    """One layer of Llama, compressed, with its cache."""
    torch.manual_seed(0)
    whole = slimfx.capture(tiny_llama(num_hidden_layers=1), kv_cache=True, max_length=LENGTH)
    batch = {"input_ids": ids(1, 1, LENGTH), "cache_position": torch.arange(LENGTH)}
    return slimfx.compress(whole, RECIPES["slim-q"], [batch])


@pytest.fixture(scope="module")
def path(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file."""
    path = tmp_path_factory.mktemp("cache") / "model.onnx"
    _, notes = save(program, path)
    assert notes[-1].startswith("the cache grows: start with past_key_values of length 0")
    return path


def generated(path: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy tokens of every prompt; the loop of any program that knows decoders, with numpy alone.

    Prompts are padded at their start to one length.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    longest = max(map(len, prompts))
    tokens = np.array([[0] * (longest - len(p)) + p for p in prompts])
    mask = np.array([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    past: dict[str, NDArray[np.float32]] = {
        each.name: np.zeros((len(prompts), each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values.")
    }
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    found: list[list[int]] = [[] for _ in prompts]
    for _ in range(new):
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        logits, *present = session.run(None, {**given, **past})
        past = dict(zip(past, present, strict=True))
        tokens = logits[:, -1:].argmax(-1)
        mask = np.concatenate([mask, np.ones_like(tokens)], 1)
        positions = mask.sum(1, keepdims=True) - 1
        for row, token in zip(found, tokens[:, 0].tolist()):
            row.append(token)
    return found


def test_a_plain_loop_generates_what_the_program_does(program: ExportedProgram, path: Path) -> None:
    prompts = [ids(5, PROMPT).tolist(), ids(6, PROMPT - 4).tolist(), ids(7, PROMPT - 1).tolist()]
    expected = []
    for prompt in prompts:
        text = list(prompt)
        module = program.module()
        for _ in range(NEW):
            every = torch.arange(len(text))
            with torch.no_grad():
                logits = module(input_ids=torch.tensor([text]), cache_position=every)
            text.append(int(logits[0, -1].argmax()))
        expected.append(text[len(prompt) :])
    assert generated(path, prompts, NEW) == expected
    assert generated(path, prompts[:1], 1) == [expected[0][:1]]


def test_a_text_may_start_with_one_token(program: ExportedProgram, path: Path) -> None:
    one = ids(5, 1)
    with torch.no_grad():
        logits = program.module()(input_ids=one[None], cache_position=torch.arange(1))
    assert generated(path, [one.tolist()], 1) == [[int(logits[0, -1].argmax())]]


def test_inputs_and_outputs_are_those_of_other_decoders(path: Path) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    past, present = ["batch", 2, "past", 8], ["batch", 2, "past + sequence", 8]
    assert {each.name: each.shape for each in session.get_inputs()} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "past + sequence"],
        "position_ids": ["batch", "sequence"],
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
    }
    assert {each.name: each.shape for each in session.get_outputs()} == {
        "logits": ["batch", "sequence", 96],
        "present.0.key": present,
        "present.0.value": present,
    }


def test_linears_are_compressed_and_the_old_cache_is_gone(path: Path) -> None:
    graph = onnx.load(path).graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 21
    assert not any("kv_cache" in tensor.name for tensor in graph.initializer)


def test_the_file_is_checked_with_a_past_and_loads(path: Path) -> None:
    assert check(path).max_difference < 1e-5
    run = load(path)
    empty = torch.zeros(1, 2, 0, 8)
    tokens = ids(5, 1, 4)
    logits, key, value = run(
        **{
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "position_ids": torch.arange(4)[None],
            "past_key_values.0.key": empty,
            "past_key_values.0.value": empty,
        }
    )
    assert logits.shape == (1, 4, 96)
    assert key.shape == value.shape == (1, 2, 4, 8)

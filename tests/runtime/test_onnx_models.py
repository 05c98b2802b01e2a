"""Language models as files for ONNX Runtime: a decoder, one whose weights lie as [in, out], and an
encoder.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from models import answer, compressed, ids, padded
from slimfx.passes.decompose import slimfx_nodes
from slimfx.runtime.targets.onnx import check, load, save

TEXT = {"llama": "slim-q", "gpt2": "slim", "bert": "1:4"}
Files = dict[str, tuple[Path, tuple[str, ...]]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A decoder, one whose weights lie as [in, out], and an encoder."""
    folder = tmp_path_factory.mktemp("onnx")
    written = {}
    for kind, recipe in TEXT.items():
        path = folder / f"{kind}.onnx"
        size, notes = save(compressed(kind, recipe), path)
        assert size == path.stat().st_size + beside(path).stat().st_size
        written[kind] = (path, notes)
    assert {path.suffix for path in folder.iterdir()} == {".onnx", ".slimfx"}
    return written


def beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.slimfx")


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def faces(path: Path) -> dict[str, tuple[Any, ...]]:
    """Inputs and outputs by name, with their sizes or the names of these."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return {e.name: tuple(e.shape) for e in (*session.get_inputs(), *session.get_outputs())}


@pytest.mark.parametrize("kind", TEXT)
def test_the_file_answers_as_the_program(files: Files, kind: str) -> None:
    path, _ = files[kind]
    program = compressed(kind, TEXT[kind])
    run = load(path)
    for shape in ((1, 1), (2, 7), (5, 40)):
        given = {"input_ids": ids(5, *shape)}
        if kind == "bert":
            given = padded(5, *shape, keep=(shape[1] + 1) // 2)
        expected = answer(program.module(), given)
        assert (run(**given) - expected).abs().max() < 1e-4
    assert check(path).max_difference < 1e-5


def test_names_are_those_of_other_exporters(files: Files) -> None:
    tokens = ("batch", "sequence")
    assert faces(files["llama"][0]) == {"input_ids": tokens, "logits": (*tokens, 96)}
    assert faces(files["gpt2"][0]) == {"input_ids": tokens, "logits": (*tokens, 96)}
    assert faces(files["bert"][0]) == {
        "input_ids": tokens,
        "attention_mask": tokens,
        "last_hidden_state": (*tokens, 32),
    }


@pytest.mark.parametrize("kind", TEXT)
def test_every_compressed_product_is_one_op(files: Files, kind: str) -> None:
    path, notes = files[kind]
    program = compressed(kind, TEXT[kind])
    found = ops(path)
    assert found["MatMulNBits"] == slimfx_nodes(program)
    weights = sum(name.endswith("slim_values") for name in program.state_dict)
    assert notes[0].startswith(f"{weights} sparse matrices are written with their zeros")
    held = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    layers = {n.rpartition(".slim_")[0] for n in program.state_dict if ".slim_" in n}
    floats = {layer for layer in layers if f"{layer}.weight" in held}
    assert layers and floats == set()


def test_the_file_says_nothing_of_this_machine(files: Files) -> None:
    for path, _ in files.values():
        data = path.read_bytes() + beside(path).read_bytes()
        assert str(Path.cwd()).encode() not in data
        assert b"site-packages" not in data and b"slimfx/" not in data

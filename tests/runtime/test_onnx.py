"""Files for ONNX Runtime: their answers, what is in them, and what is refused."""

import dataclasses
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from models import answer, captured, case, compressed, word_tokenizer
from slimfx.runtime import sidecar
from slimfx.runtime.manifest import Manifest, attach
from slimfx.runtime.targets.onnx import check, load, save
from torch import Tensor, nn

import slimfx
from slimfx.errors import ArtifactError, SlimError
from slimfx.recipe import Recipe
from slimfx.steps import Adapter, Inputs, Prune, Quantize


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two linears."""
    path = tmp_path_factory.mktemp("small") / "rows.onnx"
    save(compressed("rows", "slim"), path)
    return path


def beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.slimfx")


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_a_layer_takes_half_a_byte_a_weight(tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Linear(512, 512, bias=False)).eval()
    program = slimfx.capture(linear, (torch.randn(2, 512),))
    recipe = Recipe(quantize=Quantize("absmax"), prune=Prune("magnitude"), adapter=None)
    small = slimfx.compress(program, recipe, [torch.randn(600, 512)])
    save(small, tmp_path / "a.onnx")
    codes, scales = 512 * 512 // 2, 512 * 4 * 4
    assert 0 <= (tmp_path / "a.onnx").stat().st_size - codes - scales < 2000


GROUPS = Quantize("absmax", granularity="group", group=16)
OTHERS = {
    "int8": (Recipe(None, Quantize("absmax", bits=8), adapter=None), 2),
    "50% int3": (
        Recipe(
            Prune("wanda", sparsity=0.5),
            dataclasses.replace(GROUPS, bits=3),
            adapter=Adapter(rank=0.2, bits=4, group=16, sparse=True),
        ),
        6,
    ),
    "2:4 bf16": (Recipe(quantize=None), 0),
    "fp8": (Recipe(None, GROUPS, adapter=None, inputs=Inputs("fp8")), 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_answer_as_the_program(name: str, tmp_path: Path) -> None:
    recipe, products = OTHERS[name]
    program = slimfx.compress(captured("rows"), recipe, case("rows").batches)
    path = tmp_path / "a.onnx"
    _, notes = save(program, path)
    assert ops(path)["MatMulNBits"] == products
    assert any("bfloat16 values are written dense" in note for note in notes) is (products == 0)
    for size in (1.0, 1e4):  # beyond what the narrower of FP8's types holds
        given = {name: size * x for name, x in case("rows").inputs.items()}
        expected = answer(program.module(), given)
        assert (load(path)(**given) - expected).abs().max() < 1e-4 * size


def test_level_4_rounds_inputs_and_says_so(tmp_path: Path) -> None:
    program = compressed("rows", "slim-q")
    path = tmp_path / "a.onnx"
    _, notes = save(program, path, accuracy_level=4)
    assert notes[-1].startswith("ONNX Runtime rounds the inputs of 6 compressed products to eight")
    inputs = case("rows").inputs
    exact = answer(program.module(), inputs)
    error = (load(path)(**inputs) - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05
    assert check(path).tolerance == 2e-2
    assert check(path, tolerance=1e-3).passed  # golden outputs are of the same arithmetic


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    program = slimfx.capture(nn.Linear(64, 64).eval(), (torch.ones(2, 64),))
    path = tmp_path / "a.onnx"
    data = tmp_path / "a.onnx.data"
    size, notes = save(program, path, external_data=True)
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert data.is_file() and ".data" in notes[-1]
    assert check(path).passed
    flip(data, data.stat().st_size // 2)
    with pytest.raises(ArtifactError, match=r"a\.onnx\.data: damaged"):
        load(path)
    data.unlink()
    with pytest.raises(ArtifactError, match=r"a\.onnx\.data: missing"):
        load(path)
    save(program, path)
    assert check(path).passed and not data.exists()


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_flipped_byte_is_refused(small: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / small.name
    path.write_bytes(small.read_bytes())
    beside(path).write_bytes(beside(small).read_bytes())
    assert check(path).passed
    flip(path, int(share * path.stat().st_size))
    for read in (load, check):
        with pytest.raises(ArtifactError, match=r"rows\.onnx: damaged"):
            read(path)


def test_a_second_save_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    path = tmp_path / small.name
    save(compressed("rows", "slim"), path)
    assert path.read_bytes() == small.read_bytes()
    assert beside(path).read_bytes() == beside(small).read_bytes()


def test_manifest_and_tokenizer_travel_beside_the_file(tmp_path: Path) -> None:
    program = compressed("rows", "slim")
    manifest = program.graph_module.meta["slimfx"]
    path = tmp_path / "a.onnx"
    try:
        attach(program, dataclasses.replace(manifest, tokenizer=word_tokenizer()))
        save(program, path)
    finally:
        attach(program, manifest)
    held = sidecar.read(beside(path), "onnx")
    assert held.manifest.tokenizer == word_tokenizer()
    assert [layer.name for layer in held.manifest.layers] == ["first", "second"]
    sizes = [[2, None], [16, 16]]
    described = [{"name": "x", "dtype": "torch.float32", "sizes": sizes}]
    assert held.record == {"accuracy_level": 1, "inputs": described}
    assert isinstance(held.manifest, Manifest)


def test_wrong_inputs_are_named(small: Path) -> None:
    run = load(small)
    with pytest.raises(ArtifactError, match="takes x; y was given"):
        run(y=torch.zeros(1, 16))
    with pytest.raises(ArtifactError, match="takes x; nothing was given"):
        run()
    with pytest.raises(ArtifactError, match=r"refuses: [\s\S]*Got: 17 Expected: 16"):
        run(x=torch.zeros(1, 17))
    with pytest.raises(ArtifactError, match=r"refuses: .*float"):
        run(x=torch.zeros(1, 16, dtype=torch.int64))


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(
    module: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SlimError, match=rf"{module} is not installed; run: pip install 'slimfx\["):
        save(compressed("rows", "slim"), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
    if module == "onnxruntime":
        with pytest.raises(SlimError, match="onnxruntime is not installed"):
            load(small)


class Eigenvalues(nn.Module):
    """For these there is no ONNX."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


class Calls(nn.Module):
    """Counts its calls in a view of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0].add_(1)
        return x + self.calls[0]


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    bare = slimfx.capture(nn.Linear(4, 4).eval(), (torch.zeros(2, 4),))
    bare.example_inputs = None
    half = nn.Linear(4, 4, dtype=torch.bfloat16).eval()
    for program, options, where, message in (
        (compressed("rows", "wanda"), {}, path, r"first: groups of 8 inputs, not a multiple of 16"),
        (compressed("rows", "slim"), {"accuracy_level": 3}, path, "accuracy_level 3 is not one of"),
        (compressed("rows", "slim"), {}, tmp_path / "no" / "a.onnx", "no such folder"),
        (bare, {}, path, "no example inputs"),
        (captured_rows(Calls()), {}, path, "writes to its own buffers"),
        (captured_rows(Eigenvalues()), {}, path, "the program has no ONNX form: .*linalg_eig"),
        (captured_rows(half, torch.bfloat16), {}, path, "computes in bfloat16"),
    ):
        with pytest.raises(ArtifactError, match=message):
            save(program, where, **options)
        assert list(tmp_path.iterdir()) == []


def test_writing_to_what_is_no_state_is_no_harm(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    program = captured_rows(model)
    save(program, tmp_path / "a.onnx")
    x = torch.eye(4)
    assert (load(tmp_path / "a.onnx")(input=x) - program.module()(x)).abs().max() < 1e-5


def captured_rows(model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    return torch.export.export(model.eval(), (torch.eye(4, dtype=dtype),))


def test_the_exporter_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("torch.onnx._internal.exporter._registration").level
    save(captured("rows"), tmp_path / "a.onnx")
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx._internal.exporter._registration").level == level

"""Compiled packages: their answers, here and in a process without slimfx, and what is refused."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from models import case, compressed, ids
from slimfx.passes.lower_gpu import lower_gpu
from slimfx.runtime.gpu_ops import OP
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.select import Gpu
from slimfx.runtime.targets import aoti, aoti_gpu
from torch import Tensor

import slimfx
from slimfx.errors import ArtifactError
from slimfx.export import Exported

_ALONE = """
import sys, torch
inputs, expected = torch.load(sys.argv[2])
logits = torch._inductor.aoti_load_package(sys.argv[1])(**inputs)
logits = logits if isinstance(logits, torch.Tensor) else logits[0]
assert "slimfx" not in sys.modules
assert not hasattr(torch.ops.slimfx, "linear_cpu")
print((logits - expected).abs().max().item())
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Exported]]:
    """The tiny Llama for this machine, and for any with AVX2, inputs rounded."""
    folder = tmp_path_factory.mktemp("aoti")
    program = compressed("llama", "slim-q")
    options = {
        "native": {"march": "native"},
        "portable": {"march": "x86-64-v3", "accuracy": "int8-activations"},
    }
    return {
        name: (folder / f"{name}.pt2", slimfx.export(program, "aoti", folder / f"{name}.pt2", **o))
        for name, o in options.items()
    }


Packages = dict[str, tuple[Path, Exported]]


def logits(answer: object) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer[0]  # type: ignore[index]


def test_the_package_answers_as_the_program(packages: Packages) -> None:
    path, written = packages["native"]
    assert (written.kernels, written.linears, written.notes) == (10, 14, ())
    assert written.bytes == path.stat().st_size
    run = aoti.load(path)
    program = compressed("llama", "slim-q").module()
    for shape in ((1, 2), (2, 7), (3, 40)):
        tokens = ids(5, *shape)
        expected = logits(program(input_ids=tokens))
        assert (logits(run(input_ids=tokens)) - expected).abs().max() <= 1e-5


def test_a_process_without_slimfx_gets_the_same(packages: Packages, tmp_path: Path) -> None:
    inputs = case("llama").inputs
    with torch.no_grad():
        expected = logits(compressed("llama", "slim-q").module()(**inputs))
    torch.save((inputs, expected), tmp_path / "case")
    command = [sys.executable, "-c", _ALONE, str(packages["native"][0]), str(tmp_path / "case")]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(found.stdout) <= 1e-5


def test_a_portable_package_rounds_inputs_and_has_no_avx512(
    packages: Packages, tmp_path: Path
) -> None:
    path, _ = packages["portable"]
    inputs = case("llama").inputs
    with torch.no_grad():
        exact = logits(compressed("llama", "slim-q").module()(**inputs))
        near = logits(aoti.load(path)(**inputs))
    assert 1e-4 < (near - exact).norm() / exact.norm() < 0.05
    with zipfile.ZipFile(path) as file:
        name = next(name for name in file.namelist() if name.endswith(".so"))
        library = Path(file.extract(name, tmp_path))
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True)
    assert re.search(r"%ymm\d", code.stdout)
    assert not re.search(r"%zmm\d", code.stdout)


def test_wrong_inputs_are_named(packages: Packages) -> None:
    run = aoti.load(packages["native"][0])
    with pytest.raises(ArtifactError, match=r"input_ids: torch.float32, not torch.int64"):
        run(input_ids=torch.zeros(1, 4))
    with pytest.raises(ArtifactError, match=r"input_ids: shape \(1, 65\), exported for \["):
        run(input_ids=ids(0, 1, 65))
    with pytest.raises(ArtifactError, match="the program takes input_ids; 2 tensors were given"):
        run(ids(0, 1, 4), ids(0, 1, 4))


def changed(path: Path, target: Path, **fields: object) -> Path:
    """The same package with other words about itself."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("slimfx/aoti.json"):
                data = json.dumps({**json.loads(data), **fields}).encode()
            new.writestr(entry, data)
    return target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"needs": ["amx_fp8"], "march": "native"}, "this processor has no amx_fp8"),
        ({"torch": "2.9.1+cpu"}, r"was built for torch 2.9.1\+cpu, this is"),
    ],
)
def test_a_package_for_another_place_is_refused(
    packages: Packages, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    path = changed(packages["native"][0], tmp_path / "other.pt2", **fields)
    with pytest.raises(ArtifactError, match=message):
        aoti.load(path)


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    program = compressed("llama", "slim-q")
    for target, path, options, message in (
        ("onyx", "a.pt2", {}, "target 'onyx' is not one of pt2, aoti"),
        ("aoti", "a.pt2", {"march": "z80"}, "march 'z80' is not one of native"),
        ("aoti", "a.pt2", {"accuracy": "low"}, "accuracy 'low' is not one of exact"),
        ("aoti", "a.so", {}, "named .pt2"),
        ("aoti", "missing/a.pt2", {}, "no such folder"),
    ):
        with pytest.raises(ArtifactError, match=message):
            slimfx.export(program, target, tmp_path / path, **options)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_no_packages(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("text")
    slimfx.save(compressed("llama", "slim-q"), tmp_path / "program.pt2")
    with pytest.raises(ArtifactError, match="not a complete compiled package"):
        aoti.read(tmp_path / "text.pt2")
    with pytest.raises(ArtifactError, match="holds no compiled program of slimfx"):
        aoti.load(tmp_path / "program.pt2")


def test_golden_outputs_are_replayed_and_the_manifest_travels(packages: Packages) -> None:
    for name, limit in (("native", 1e-5), ("portable", 1e-2)):
        result = aoti.check(packages[name][0])
        assert result.passed
        assert result.max_difference <= limit
    assert aoti.read_manifest(packages["native"][0]) == manifest_of(compressed("llama", "slim-q"))


def test_a_package_holds_no_source_and_a_second_one_has_the_same_bytes(
    packages: Packages, tmp_path: Path
) -> None:
    path = packages["native"][0]
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
    assert {name.partition("/")[0] for name in names} == {"model"}
    assert [name for name in names if name.endswith((".cpp", "serialization_id"))] == []
    slimfx.export(compressed("llama", "slim-q"), "aoti", tmp_path / "again.pt2")
    assert (tmp_path / "again.pt2").read_bytes() == path.read_bytes()


def test_a_flipped_byte_is_refused(packages: Packages, tmp_path: Path) -> None:
    data = bytearray(packages["native"][0].read_bytes())
    with zipfile.ZipFile(packages["native"][0]) as file:
        code = next(entry for entry in file.infolist() if entry.filename.endswith(".so"))
    data[code.header_offset + code.file_size // 2] ^= 1
    (tmp_path / "flipped.pt2").write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        aoti.load(tmp_path / "flipped.pt2")


def test_a_package_for_a_gpu_is_of_what_is_there(packages: Packages, tmp_path: Path) -> None:
    program = compressed("llama", "slim-q")
    with pytest.raises(ArtifactError, match="'int8-activations' is for processors"):
        aoti.save(program, tmp_path / "a.pt2", accuracy="int8-activations", device="cuda")
    with pytest.raises(ArtifactError, match="'tpu' is not cpu or cuda"):
        aoti.save(program, tmp_path / "a.pt2", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ArtifactError, match=r"device 'cuda': torch .* sees no GPU here"):
            slimfx.export(program, "aoti", tmp_path / "a.pt2", device="cuda")
    path, other = packages["native"][0], tmp_path / "other.pt2"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("aoti.json"):
                data = json.dumps({**json.loads(data), "gpu": "sm_1"}).encode()
            new.writestr(entry, data)
    assert aoti.read(other).gpu == "sm_1"
    with pytest.raises(ArtifactError, match="was built for a GPU of sm_1, here is"):
        aoti.load(other)
    assert not list(tmp_path.glob("a*"))


def test_what_no_template_takes_is_no_package_for_a_gpu() -> None:
    lowered, _ = lower_gpu(compressed("llama", "slim-q"), Gpu("cuda", 90), layouts=("stored",))
    ops = [node for node in lowered.graph.nodes if node.target is OP]
    assert ops and all(not node.args[1] and node.args[2] for node in ops)
    with pytest.raises(ArtifactError, match=r"linear_gpu.*: x is torch\.float32.*dtype='bfloat16'"):
        aoti_gpu.check_templates(lowered)
    for node in ops:
        node.args[0].meta["val"] = node.args[0].meta["val"].bfloat16()
    aoti_gpu.check_templates(lowered)

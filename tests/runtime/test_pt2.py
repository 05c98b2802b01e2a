"""`.pt2` files: what is saved is loaded, to the bit, anywhere, and the same bytes every time."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import (
    RECIPES,
    bits,
    captured,
    case,
    compressed,
    same_tensors,
    tiny_llama,
    word_tokenizer,
)
from slimfx.passes.decompose import slimfx_nodes
from slimfx.passes.inputs import call_arguments
from slimfx.runtime import golden
from slimfx.runtime.manifest import Manifest, attach, manifest_of
from slimfx.runtime.targets import pt2
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx
from slimfx.errors import ArtifactError, SlimError

PAIRS = [
    ("mlp", "slim"),
    ("mlp", "int4"),
    ("mlp", "1:4"),
    ("tied", "slim"),
    ("llama", "slim"),
]


@cache
def artifact(kind: str, recipe: str, form: str) -> bytes:
    """A compressed program as a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        size = pt2.save(compressed(kind, recipe), path, form=form)
        assert size == path.stat().st_size
        return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt2"


def outputs(program: ExportedProgram, inputs: dict[str, Tensor]) -> bytes:
    """What a program answers, as bytes."""
    args, kwargs = call_arguments(program, inputs)
    with torch.no_grad():
        return bits(program.module()(*args, **kwargs))


@pytest.mark.parametrize("form", pt2.FORMS)
@pytest.mark.parametrize(("kind", "recipe"), PAIRS)
def test_a_loaded_program_answers_to_the_bit_like_the_one_that_was_saved(
    path: Path, kind: str, recipe: str, form: str
) -> None:
    path.write_bytes(artifact(kind, recipe, form))
    program, loaded = compressed(kind, recipe), pt2.load(path)
    inputs = case(kind).inputs
    assert outputs(loaded, inputs) == outputs(program, inputs)
    assert same_tensors(dict(loaded.state_dict), dict(program.state_dict))
    assert (slimfx_nodes(loaded) > 0) == (form == "op")


def test_a_program_that_was_not_compressed_is_saved_and_loaded_too(path: Path) -> None:
    pt2.save(captured("llama"), path)
    inputs = case("llama").inputs
    assert outputs(pt2.load(path), inputs) == outputs(captured("llama"), inputs)


@pytest.mark.parametrize("form", pt2.FORMS)
def test_dynamic_sizes_survive_the_file(path: Path, form: str) -> None:
    path.write_bytes(artifact("llama", "slim", form))
    module = pt2.load(path).module()
    for rows, length in ((1, 2), (3, 7), (2, 64)):
        ids = torch.ones(rows, length, dtype=torch.int64)
        assert module(input_ids=ids).shape[:2] == (rows, length)
    with pytest.raises(AssertionError, match="Guard failed"):
        module(input_ids=torch.ones(1, 65, dtype=torch.int64))


@pytest.mark.parametrize("form", pt2.FORMS)
def test_manifest_tokenizer_and_example_inputs_come_back(path: Path, form: str) -> None:
    own = manifest_of(compressed("mlp", "slim"))
    manifest = dataclasses.replace(own, tokenizer=word_tokenizer(), eos_token=5)
    program = attach(compressed("mlp", "slim").run_decompositions({}), manifest)
    pt2.save(program, path, form=form)
    loaded = pt2.load(path)
    expected = dataclasses.replace(manifest, form=form)
    assert manifest_of(loaded) == expected
    assert pt2.read_manifest(path) == expected
    assert len(expected.layers) == 2
    assert loaded.example_inputs[0] == ()
    assert same_tensors(loaded.example_inputs[1], program.example_inputs[1])


@pytest.mark.parametrize("first", pt2.FORMS)
def test_what_was_loaded_can_be_saved_again(tmp_path: Path, first: str) -> None:
    pt2.save(compressed("mlp", "slim"), tmp_path / "one.pt2", form=first)
    loaded = pt2.load(tmp_path / "one.pt2")
    pt2.save(loaded, tmp_path / "two.pt2", form="aten")
    inputs = case("mlp").inputs
    again = outputs(pt2.load(tmp_path / "two.pt2"), inputs)
    assert again == outputs(compressed("mlp", "slim"), inputs)


def test_saving_leaves_the_program_and_the_random_state_as_they_were(tmp_path: Path) -> None:
    program = compressed("mlp", "slim")
    tensors = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    code, manifest, state = str(program.graph), manifest_of(program), torch.get_rng_state()
    for form in pt2.FORMS:
        pt2.save(program, tmp_path / "model.pt2", form=form)
    assert same_tensors(dict(program.state_dict), tensors)
    assert str(program.graph) == code
    assert manifest_of(program) == manifest
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_but_the_file_is_left_in_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    for form in pt2.FORMS:
        pt2.save(compressed("mlp", "slim"), path, form=form)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_saving_over_a_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "model.pt2"
    pt2.save(captured("mlp"), path)
    path.chmod(mode)
    pt2.save(compressed("mlp", "slim"), path)
    assert path.stat().st_mode & 0o777 == mode
    assert slimfx_nodes(pt2.load(path)) > 0


FRESH = """
import json, sys
import torch
torch.set_num_threads(1)
path, inputs, expected = sys.argv[1:]
program = torch.export.load(path)
given = torch.load(inputs, weights_only=True)
found = program.module()(**given)
same = torch.equal(found, torch.load(expected, weights_only=True))
print(json.dumps({"same": same, "modules": sorted(sys.modules)}))
"""


def test_the_aten_form_runs_in_a_fresh_process_with_torch_alone(tmp_path: Path) -> None:
    program = compressed("llama", "slim")
    inputs = case("llama").inputs
    (tmp_path / "model.pt2").write_bytes(artifact("llama", "slim", "aten"))
    with torch.no_grad():
        torch.save(program.module()(**inputs), tmp_path / "expected")
    torch.save(inputs, tmp_path / "inputs")
    paths = [str(tmp_path / name) for name in ("model.pt2", "inputs", "expected")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, *paths], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["same"]
    assert {"slimfx", "transformers", "tokenizers"} & set(found["modules"]) == set()


def test_the_op_form_without_slimfx_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(artifact("mlp", "slim", "op"))
    script = "import sys, torch; torch.export.load(sys.argv[1]).module()"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path / "model.pt2")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0


MADE = """
import dataclasses, hashlib, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import slimfx
from slimfx.recipe import Calibration, Recipe
model, target, text = map(Path, sys.argv[1:])
recipe = dataclasses.replace(
    Recipe.preset("slim"), calibration=Calibration(samples=2, length=16)
)
sums = {}
program = slimfx.compress(slimfx.capture(model), recipe, text)
for form in ("op", "aten"):
    path = target / f"{form}.pt2"
    slimfx.save(program, path, form=form, verify=False)
    sums[form] = hashlib.sha256(path.read_bytes()).hexdigest()
print(json.dumps(sums))
"""


@dataclasses.dataclass(frozen=True)
class Made:
    """Artifacts made from a model folder in processes of their own."""

    sums: list[dict[str, str]]
    files: dict[str, bytes]
    secrets: list[str]
    """What of this machine they must not hold."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("a-folder-nobody-else-has")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_llama(eos_token_id=3, num_hidden_layers=1).save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_text(word_tokenizer())
    (folder / "text.txt").write_text(" ".join(f"w{i * 7 % 96}" for i in range(400)))
    sums = []
    for seed in ("1", "2"):
        target = folder / f"seed-{seed}"
        target.mkdir()
        arguments = [str(folder / "model"), str(target), str(folder / "text.txt")]
        done = subprocess.run(
            [sys.executable, "-c", MADE, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONHASHSEED": seed, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        sums.append(json.loads(done.stdout.splitlines()[-1]))
    files = {form: (folder / "seed-1" / f"{form}.pt2").read_bytes() for form in pt2.FORMS}
    secrets = [folder.name, "site-packages", str(Path.home()), str(Path.cwd()), sys.prefix]
    return Made(sums, files, [*secrets, tempfile.gettempdir()])


@pytest.mark.parametrize("form", pt2.FORMS)
def test_the_same_model_and_recipe_give_the_same_bytes_whatever_the_hash_seed(
    made: Made, form: str
) -> None:
    assert len({sums[form] for sums in made.sums}) == 1


@pytest.mark.parametrize("form", pt2.FORMS)
def test_compressing_and_saving_again_gives_the_same_bytes(path: Path, form: str) -> None:
    found = set()
    for _ in range(4):
        program = slimfx.compress(captured("mlp"), RECIPES["slim"], case("mlp").batches)
        pt2.save(program, path, form=form)
        found.add(path.read_bytes())
    assert len(found) == 1
    assert found == {artifact("mlp", "slim", form)}


def test_the_forms_differ(made: Made) -> None:
    assert made.files["op"] != made.files["aten"]


@pytest.mark.parametrize("form", pt2.FORMS)
def test_no_path_of_this_machine_is_in_the_file(made: Made, form: str) -> None:
    for secret in made.secrets:
        assert secret.encode() not in made.files[form], secret
        for record, data in records(made.files[form]).items():
            assert secret.encode() not in data, f"{secret} in {record}"


def records(data: bytes) -> dict[str, bytes]:
    """Every record of an archive, inflated, without the root folder."""
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        return {entry.filename.partition("/")[2]: zipped.read(entry) for entry in zipped.infolist()}


@pytest.mark.parametrize("form", pt2.FORMS)
def test_every_record_is_json_safetensors_a_raw_tensor_or_a_tiny_mark(
    made: Made, form: str
) -> None:
    found = records(made.files[form])
    sizes = {}
    for prefix in ("data/weights/", "data/constants/"):
        config = json.loads(found[f"{prefix}model_{prefix.split('/')[1]}_config.json"])["config"]
        assert not any(payload["use_pickle"] for payload in config.values())
        for payload in config.values():
            meta = payload["tensor_meta"]
            count = 1
            for size in meta["sizes"]:
                count *= size["as_int"]
            sizes.setdefault(prefix + payload["path_name"], []).append((count, meta["dtype"]))
    for record, data in found.items():
        if record.endswith(".json"):
            json.loads(data)
        elif record.endswith(".safetensors"):
            safetensors.torch.load(data)
        elif record in sizes:
            assert all(len(data) % count == 0 for count, _ in sizes[record]), record
        else:
            assert len(data) <= 8, record
            assert data == b"" or data.decode().isprintable() or data.strip().isdigit(), record


def test_end_token_and_tokenizer_travel_from_the_folder(made: Made, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(made.files["op"])
    manifest = pt2.read_manifest(tmp_path / "model.pt2")
    assert manifest.eos_token == 3
    assert manifest.tokenizer == word_tokenizer()


@pytest.mark.parametrize("form", pt2.FORMS)
def test_check_passes_on_what_was_saved(made: Made, tmp_path: Path, form: str) -> None:
    (tmp_path / "model.pt2").write_bytes(made.files[form])
    result = pt2.check(tmp_path / "model.pt2")
    assert result.identical and result.passed
    assert result.max_difference == 0.0
    assert result.tolerance == pt2.TOLERANCE


def rezipped(data: bytes, changes: dict[str, Any]) -> bytes:
    """The same archive with correct checksums, some records put through a function."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as new:
        for record, value in records(data).items():
            changed = changes[record](value) if record in changes else value
            new.writestr(f"model/{record}", changed)
    return target.getvalue()


def weights(data: bytes, ending: str) -> list[str]:
    """The records of the weights whose name ends so."""
    config = json.loads(records(data)["data/weights/model_weights_config.json"])["config"]
    return [
        f"data/weights/{payload['path_name']}"
        for name, payload in config.items()
        if name.endswith(ending)
    ]


def flip(place: int) -> Any:
    """Change the top bit of one byte."""
    return lambda value: value[:place] + bytes([value[place] ^ 0x80]) + value[place + 1 :]


@pytest.mark.parametrize("form", pt2.FORMS)
@pytest.mark.parametrize(
    ("ending", "place"),
    [(".slim_values", 0), (".slim_values", 31), (".slim_indices", 0), (".slim_L", 1), ("bias", 3)],
)
def test_check_fails_when_one_byte_of_a_weight_is_another(
    tmp_path: Path, form: str, ending: str, place: int
) -> None:
    data = artifact("mlp", "slim", form)
    path = tmp_path / "changed.pt2"
    for record in weights(data, ending):
        path.write_bytes(rezipped(data, {record: flip(place)}))
        try:
            result = pt2.check(path)
        except ArtifactError as error:
            assert ending == ".slim_indices" and "do not ascend" in str(error)
            continue
        assert not result.identical, record
        assert not result.passed, record
    path.write_bytes(rezipped(data, {}))
    assert pt2.check(path).identical


def test_check_fails_when_a_scale_is_not_a_number(tmp_path: Path) -> None:
    data = artifact("mlp", "slim", "op")
    record = weights(data, ".slim_scale")[0]
    (tmp_path / "nan.pt2").write_bytes(rezipped(data, {record: lambda value: b"\xc0\x7f"}))
    result = pt2.check(tmp_path / "nan.pt2")
    assert not result.identical
    assert not result.passed


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_check_takes_the_tolerance_it_is_given(tmp_path: Path, tolerance: float) -> None:
    data = artifact("mlp", "slim", "op")
    record = weights(data, "second.bias")[0]
    small = torch.frombuffer(bytearray(records(data)[record]), dtype=torch.float32) * 1.001
    near = rezipped(data, {record: lambda value: small.numpy().tobytes()})
    (tmp_path / "near.pt2").write_bytes(near)
    result = pt2.check(tmp_path / "near.pt2", tolerance=tolerance)
    assert not result.identical
    assert 0 < result.max_difference < 1
    assert result.passed == (tolerance == 1.0)


def test_check_of_a_file_without_golden_outputs_says_so(tmp_path: Path) -> None:
    torch.export.save(captured("mlp"), tmp_path / "foreign.pt2")
    with pytest.raises(ArtifactError, match="carries no golden outputs"):
        pt2.check(tmp_path / "foreign.pt2")


def test_a_file_of_torch_export_save_is_loaded_with_an_empty_manifest(tmp_path: Path) -> None:
    torch.export.save(captured("mlp"), tmp_path / "foreign.pt2")
    loaded = pt2.load(tmp_path / "foreign.pt2")
    inputs = case("mlp").inputs
    assert outputs(loaded, inputs) == outputs(captured("mlp"), inputs)
    assert manifest_of(loaded) == Manifest()
    small = slimfx.compress(loaded, RECIPES["slim"], case("mlp").batches)
    assert outputs(small, inputs) == outputs(compressed("mlp", "slim"), inputs)


def test_a_file_that_answers_differently_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    pt2.save(captured("mlp"), path)
    before = path.read_bytes()
    real = golden.record

    def of_another(program: ExportedProgram, inputs: Any) -> bytes:
        return real(captured("mlp"), inputs)

    monkeypatch.setattr(golden, "record", of_another)
    with pytest.raises(ArtifactError, match="answers differently"):
        pt2.save(compressed("mlp", "slim"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    pt2.save(compressed("mlp", "slim"), path, verify=False)
    assert not pt2.check(path).identical


def test_an_unknown_form_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="form 'onnx' is not one of op, aten"):
        pt2.save(compressed("mlp", "slim"), tmp_path / "model.pt2", form="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_program_without_example_inputs_is_refused(tmp_path: Path) -> None:
    program = captured("mlp").run_decompositions({})
    program.example_inputs = None
    with pytest.raises(ArtifactError, match="no example inputs"):
        pt2.save(program, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


class Bytes8(torch.Tensor):
    """A tensor subclass, which torch.export.save pickles."""


class Held(nn.Module):
    """A module whose weight is one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("verify", [True, False])
def test_a_program_of_tensor_subclasses_is_not_written_as_a_pickle(
    tmp_path: Path, verify: bool
) -> None:
    program = torch.export.export(Held(), (torch.randn(2, 16),))
    program.state_dict["linear.weight"] = nn.Parameter(torch.randn(8, 16).as_subclass(Bytes8))
    with pytest.raises(SlimError):
        pt2.save(program, tmp_path / "model.pt2", verify=verify)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ask", [pt2.load, pt2.check, pt2.read_manifest])
def test_a_missing_file_and_a_folder_are_clear_errors(tmp_path: Path, ask: Any) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        ask(tmp_path / "missing.pt2")
    with pytest.raises(ArtifactError, match="Is a directory"):
        ask(tmp_path)


@pytest.mark.parametrize("ask", [pt2.load, pt2.check, pt2.read_manifest])
def test_a_path_may_be_text(tmp_path: Path, ask: Any) -> None:
    pt2.save(compressed("mlp", "slim"), str(tmp_path / "model.pt2"))
    assert ask(str(tmp_path / "model.pt2")) is not None

"""The command line: what each command prints, its exit codes, and one line for every error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from models import DEMO, captured, case, compressed, word_tokenizer
from slimfx.runtime.manifest import Manifest, attach, manifest_of
from slimfx.runtime.targets import pt2

import slimfx
from slimfx import cli
from slimfx.recipe import Recipe

COMMANDS = ["capture", "plan", "compress", "eval", "generate", "inspect", "check", "report"]
RECIPE = """
preset: slim
calibration: {samples: 2, length: 64}
adapter: {rank: 4}
skip: ["lm_head", "*.layers.[1-5].*"]
"""


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str


def run(*arguments: Any) -> Ran:
    """The command in this process, with its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    line = ["slimfx", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", line),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
        sys.exit(0)
    code = ended.value.code
    return Ran(
        code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue()
    )


def from_json(ran: Ran) -> Any:
    """The JSON on standard output; anything else there fails."""
    assert ran.code == 0, ran.err

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(ran.out, parse_constant=refuse)


@dataclass(frozen=True)
class Made:
    """The demo model, captured and compressed by the commands."""

    dense: Path
    small: Path
    recipe: Path
    text: Path
    captured: Ran
    compressed: Ran


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars() -> Iterator[None]:
    """The command silences transformers before it is imported; here it is imported already."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    paths = [folder / name for name in ("dense.pt2", "small.pt2", "recipe.yaml", "text.txt")]
    dense, small, recipe, text = paths
    recipe.write_text(RECIPE)
    text.write_text("The function returns a list of names. " * 60)
    first = run("capture", DEMO, "-o", dense, "--max-length", 64, "--json")
    second = run("compress", dense, "-o", small, "-r", recipe, "-d", text, "--json")
    return Made(dense, small, recipe, text, first, second)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed program of two layers."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt2"
    pt2.save(compressed("mlp", "slim"), path)
    return path


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of two narrow layers, as it is."""
    path = tmp_path_factory.mktemp("little") / "little.pt2"
    program = captured("llama").run_decompositions({})
    pt2.save(attach(program, Manifest(tokenizer=word_tokenizer())), path)
    return path


@dataclass(frozen=True)
class Given:
    """What the commands that fail are given."""

    folder: Path
    little: Path
    tiny: Path
    recipe: Path

    @property
    def output(self) -> Path:
        return self.folder / "x.pt2"


def test_capture_reports_the_file_it_wrote(made: Made) -> None:
    said = from_json(made.captured)
    assert said == {"file": str(made.dense), "bytes": made.dense.stat().st_size}
    assert manifest_of(pt2.load(made.dense)).eos_token == 0


def test_compress_reports_what_it_saved(made: Made) -> None:
    said = from_json(made.compressed)
    assert said["file"] == str(made.small)
    assert said["bytes"] == made.small.stat().st_size < made.dense.stat().st_size
    assert said["bytes"] == pytest.approx(said["bytes_planned"], rel=0.02)
    assert said["seconds"] > 0
    assert 3 < said["bits_per_weight"] < 6


def test_compress_of_a_folder_writes_what_the_whole_model_gives(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "model", tmp_path / "recipe.yaml"
    case("llama").model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text(word_tokenizer())
    recipe.write_text("calibration: {samples: 2, length: 16}")
    text = ["w1 w2 w3 w5 w8 w13 w21 w34 w55 w89 " * 4]
    (tmp_path / "text.txt").write_text(text[0])
    output = tmp_path / "small.pt2"
    run("compress", folder, "-o", output, "-r", recipe, "-d", tmp_path / "text.txt", "--json")
    small = slimfx.compress(slimfx.capture(folder), str(recipe), text)
    slimfx.save(small, tmp_path / "whole.pt2")
    assert output.read_bytes() == (tmp_path / "whole.pt2").read_bytes()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_plan_says_before_what_compress_does(made: Made) -> None:
    said = from_json(run("plan", made.dense, "-r", made.recipe, "--json"))
    layers = {row["name"]: row for row in said["layers"]}
    written = pt2.read_manifest(made.small)
    assert {name for name, row in layers.items() if not row["skipped"]} == {
        layer.name for layer in written.layers
    }
    assert len(layers) == 43
    for layer in written.layers:
        row = layers[layer.name]
        assert (row["layout"], row["rank"]) == (layer.layout, layer.rank)
        assert row["bytes_after"] == layer.bytes
    assert said["file_bytes"] == from_json(made.compressed)["bytes_planned"]


def test_eval_measures_the_perplexity(made: Made) -> None:
    line = ["--data", made.text, "--samples", 2, "--length", 32, "--json"]
    small, dense = (from_json(run("eval", path, *line)) for path in (made.small, made.dense))
    assert (small["metric"], small["samples"], small["tokens"]) == ("perplexity", 2, 62)
    assert small["value"] != dense["value"]
    assert small["value"] == pytest.approx(dense["value"], rel=0.5)


def test_generate_continues_the_prompt(made: Made) -> None:
    said = run("generate", made.small, "The function", "--tokens", 3)
    assert said.code == 0
    expected = "".join(slimfx.generate(pt2.load(made.small), "The function", tokens=3))
    assert said.out == f"The function{expected}\n"


def test_inspect_prints_the_manifest(made: Made) -> None:
    said = from_json(run("inspect", made.small, "--json"))
    assert said == json.loads(pt2.read_manifest(made.small).to_json())
    assert said["recipe"] == Recipe.load(made.recipe).to_dict()


def test_check_passes_on_what_compress_wrote(made: Made) -> None:
    said = from_json(run("check", made.small, "--json"))
    result = {"identical": True, "max_difference": 0.0, "tolerance": 1e-4, "passed": True}
    assert {name: said[name] for name in result} == result
    assert (said["target"], said["needs"]) == ("pt2", "slimfx")
    assert said["bytes"] == Path(said["file"]).stat().st_size
    assert said["tokens_per_second"] > 0


def with_another_weight(path: Path, changed: Path) -> None:
    """The same file but for one bit of a weight."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("weights/weight_2"):
                data = bytes([data[0] ^ 0x80]) + data[1:]
            new.writestr(entry.filename, data)


def test_check_exits_with_3_when_a_weight_is_another(tiny: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.pt2"
    with_another_weight(tiny, changed)
    said = run("check", changed, "--json")
    assert said.code == 3
    assert json.loads(said.out)["passed"] is False
    assert run("check", changed).code == 3
    assert run("check", tiny).code == 0


def test_report_writes_a_page_and_says_whether_the_check_passed(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    said = from_json(run("report", tiny, "-o", output, "--json"))
    assert said == {
        **{"file": str(output), "bytes": output.stat().st_size},
        "tiny.pt2 answers as recorded": True,
    }
    assert "<h1>tiny.pt2, compressed by slimfx</h1>" in output.read_text(encoding="utf-8")
    assert run("report", tiny, tiny, "-o", output).code == 0
    assert "<h1>A: tiny.pt2 beside B: tiny.pt2" in output.read_text(encoding="utf-8")


def test_report_exits_with_3_and_still_writes_when_a_weight_is_another(
    tiny: Path, tmp_path: Path
) -> None:
    changed, output = tmp_path / "changed.pt2", tmp_path / "report.html"
    with_another_weight(tiny, changed)
    assert run("report", tiny, changed, "-o", output).code == 3
    assert "OTHER ANSWERS" in output.read_text(encoding="utf-8")


def test_report_measures_the_perplexity_beside_dense(made: Made, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    more = ["--text", made.text, "--samples", "1", "--dense", made.dense]
    assert run("report", made.small, "-o", output, *more).code == 0
    figures = [
        from_json(run("eval", model, "--data", made.text, "--samples", "1", "--json"))["value"]
        for model in (made.small, made.dense)
    ]
    page = output.read_text(encoding="utf-8")
    assert f"<dd>{figures[0]:,.2f}</dd>" in page
    assert f"{figures[1]:,.2f} dense" in page


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_table_names_every_layer_in_full(
    made: Made, little: Path, command: str, columns: str
) -> None:
    line = ["plan", little, "-r", made.recipe] if command == "plan" else ["inspect", made.small]
    with mock.patch.dict(os.environ, {"COLUMNS": columns}):
        said = run(*line)
    assert said.code == 0
    rows = [row.split("│") for row in said.out.splitlines() if row.startswith("│")]
    names = "".join(row[1].strip() for row in rows)
    for layer in pt2.read_manifest(made.small).layers:
        assert layer.name in names


def test_inspect_of_a_program_of_torch_alone_works(tmp_path: Path) -> None:
    torch.export.save(captured("mlp"), tmp_path / "foreign.pt2")
    said = run("inspect", tmp_path / "foreign.pt2")
    assert said.code == 0
    assert from_json(run("inspect", tmp_path / "foreign.pt2", "--json"))["layers"] == []


def test_the_aten_form_can_be_asked_for(tmp_path: Path, made: Made) -> None:
    dense, small = tmp_path / "dense.pt2", tmp_path / "small.pt2"
    pt2.save(captured("mlp"), dense)
    made_before = compressed("mlp", "slim")  # by the function that is replaced
    with mock.patch.object(slimfx, "compress", lambda *rest, **words: made_before):
        said = run("compress", dense, "-o", small, "-r", made.recipe, "--form", "aten", "--json")
    assert from_json(said)["bytes"] == small.stat().st_size
    assert pt2.read_manifest(small).form == "aten"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_an_example(command: str) -> None:
    said = run(command, "--help")
    assert said.code == 0
    assert f"Example: slimfx {command}" in said.out


def test_help_lists_every_command() -> None:
    said = run("--help")
    assert said.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in said.out


@pytest.mark.parametrize(
    "line",
    [
        ["squeeze"],
        ["report"],
        ["report", "a.pt2", "b.pt2", "c.pt2"],
        ["compress", "model"],
        ["plan"],
        ["check"],
        ["plan", "model", "--unknown"],
        ["eval", "model", "--samples", "many"],
        ["generate", "model"],
    ],
)
def test_wrong_usage_exits_with_2(line: list[str]) -> None:
    said = run(*line)
    assert said.code == 2
    assert "Usage: " in said.err
    assert "Traceback" not in said.err


Line = Callable[[Given], list[Any]]


def with_recipe(text: str) -> Line:
    """Compress under a recipe file of this text."""

    def line(given: Given) -> list[Any]:
        (given.folder / "bad.yaml").write_text(text)
        recipe = given.folder / "bad.yaml"
        return ["compress", given.little, "-o", given.output, "-r", recipe]

    return line


def with_data(name: str, text: str | None) -> Line:
    """Compress with calibration data of this text."""

    def line(given: Given) -> list[Any]:
        data = given.folder / name
        if text is not None:
            data.write_text(text)
        return ["compress", given.little, "-o", given.output, "-r", given.recipe, "-d", data]

    return line


def asking(command: str, data: Callable[[bytes], bytes], *more: str) -> Line:
    """A command on an artifact whose bytes went through a function."""

    def line(given: Given) -> list[Any]:
        (given.folder / "bad.pt2").write_bytes(data(given.tiny.read_bytes()))
        return [command, given.folder / "bad.pt2", *more]

    return line


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def refused_by_torch(data: bytes) -> bytes:
    """An artifact whose first weight claims to be longer than its record."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            changed = old.read(entry)
            if entry.filename.endswith("weights_config.json"):
                longer = changed.replace(b'[{"as_int": 32}]', b'[{"as_int": 33}]')
                assert longer != changed
                changed = longer
            new.writestr(entry.filename, changed)
    return target.getvalue()


def a_model_of(name: str, text: str) -> Line:
    """Capture a folder that holds one file."""

    def line(given: Given) -> list[Any]:
        (given.folder / name).write_text(text)
        return ["capture", given.folder, "-o", given.output]

    return line


def a_file(given: Given) -> list[Any]:
    (given.folder / "model.bin").write_text("weights")
    return ["plan", given.folder / "model.bin"]


def a_missing_folder(given: Given) -> list[Any]:
    return ["compress", given.little, "-r", given.recipe, "-o", given.folder / "none" / "x.pt2"]


def a_missing_form(given: Given) -> list[Any]:
    return ["compress", given.little, "-r", given.recipe, "-o", given.output, "--form", "onnx"]


ERRORS: dict[str, tuple[Line, str]] = {
    "no such model": (lambda given: ["plan", given.folder / "none"], "no such folder"),
    "no such artifact": (lambda given: ["plan", given.folder / "none.pt2"], "No such file"),
    "a file is no model": (a_file, "not a folder"),
    "a folder is no model": (a_model_of("text.txt", ""), "it has no config.json"),
    "a config that is no JSON": (a_model_of("config.json", "{"), "config.json"),
    "a config that is a list": (a_model_of("config.json", "[]"), "config.json"),
    "a config of no known model": (
        a_model_of("config.json", '{"model_type": "nope"}'),
        "not a model",
    ),
    "a model of no such dtype": (
        lambda given: ["capture", DEMO, "-o", given.output, "--dtype", "int3"],
        "dtype 'int3'",
    ),
    "no such recipe": (lambda given: ["plan", given.little, "-r", "slimm"], "slimm: "),
    "a recipe that is no file": (
        lambda given: ["plan", given.little, "-r", given.folder],
        "recipe",
    ),
    "a key with a typo": (with_recipe("quantise: {bits: 4}"), "did you mean quantize?"),
    "a value with a typo": (with_recipe("prune: {method: wandda}"), "'wandda' is not one of"),
    "a recipe that is no YAML": (with_recipe("prune: {method: [\n"), "not valid YAML"),
    "a recipe that is binary": (with_recipe("\x00\x01"), "not valid YAML"),
    "a recipe with an object": (with_recipe("!!python/name:os.abort"), "not valid YAML"),
    "a recipe that is a list": (with_recipe("- slim"), "is a mapping"),
    "a rank that is too large": (with_recipe("adapter: {rank: 999}"), "rank 999 is larger than"),
    "a recipe that skips all": (with_recipe("skip: ['*']"), "nothing to compress"),
    "no such data": (with_data("none.txt", None), "none.txt: no such file"),
    "too little data": (with_data("short.txt", "w1 w2 w3"), "one sample needs 64"),
    "data without text": (with_data("rows.jsonl", '{"words": "x"}\n'), "text field"),
    "a truncated artifact": (asking("check", half), "bad.pt2: not a complete .pt2 archive"),
    "a truncated artifact to inspect": (asking("inspect", half), "not a complete .pt2 archive"),
    "a truncated artifact to compress": (
        asking("compress", half, "-o", "x.pt2"),
        "not a complete .pt2 archive",
    ),
    "an artifact torch refuses": (asking("check", refused_by_torch), "bad.pt2: "),
    "a text that is no artifact": (asking("check", lambda data: b"text"), "bad.pt2: "),
    "an empty prompt": (lambda given: ["generate", given.little, ""], "the prompt is empty"),
    "a program that takes no tokens": (
        lambda given: ["generate", given.tiny, "Once"],
        "generation needs a program of input_ids",
    ),
    "an output folder that is missing": (a_missing_folder, "no such folder"),
    "an unknown form": (a_missing_form, "form 'onnx' is not one of op, aten"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_on_standard_error(
    name: str, tmp_path: Path, made: Made, little: Path, tiny: Path
) -> None:
    line, words = ERRORS[name]
    said = run(*line(Given(tmp_path, little, tiny, made.recipe)))
    assert said.code == 1, said.err
    assert words in said.err
    assert said.err.strip().startswith("slimfx: ")
    lines = said.err.strip().splitlines()
    assert len(lines) == 1 or name == "a rank that is too large", said.err  # a line for each layer
    assert all(line.startswith("slimfx: ") for line in lines)
    assert "Traceback" not in said.err
    assert said.out == ""
    assert not (tmp_path / "x.pt2").exists()


def refuse_to_compress(*arguments: Any, **words: Any) -> None:
    raise AssertionError("compressed before the arguments were looked at")


@pytest.mark.parametrize("name", ["an output folder that is missing", "an unknown form"])
def test_what_cannot_be_written_is_refused_before_the_work(
    name: str, tmp_path: Path, made: Made, little: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slimfx, "compress", refuse_to_compress)
    line, words = ERRORS[name]
    said = run(*line(Given(tmp_path, little, tiny, made.recipe)))
    assert said.code == 1
    assert words in said.err
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_prints_the_one_line_and_exits_with_1(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "half.pt2").write_bytes(half(tiny.read_bytes()))
    command = Path(sys.executable).with_name("slimfx")
    done = subprocess.run(
        [command, "check", tmp_path / "half.pt2"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().startswith("slimfx: half.pt2: not a complete .pt2 archive")
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_installed_command_prints_nothing_but_json(tiny: Path) -> None:
    command = Path(sys.executable).with_name("slimfx")
    done = subprocess.run(
        [command, "check", tiny, "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    assert done.stderr.strip() == ""

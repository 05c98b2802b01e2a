"""The report: every byte and every weight of a file, the kernels that select chooses, no damage."""

from __future__ import annotations

import dataclasses
import math
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from models import RECIPES, captured, case, compressed, demo_lm, ids
from slimfx.passes.find_linears import find_linears, storage_key
from slimfx.runtime.manifest import LayerReport, Manifest, attach, manifest_of
from slimfx.runtime.select import Form, Layer, select
from slimfx.runtime.targets import aoti, pt2
from torch.export import ExportedProgram

import slimfx
from slimfx import errors
from slimfx.errors import ArtifactError, SlimError
from slimfx.report import Measures, Report, dense_report, report
from slimfx.report_kernels import GPUS, kernels_of, linears_of
from slimfx.tasks import run_tasks

KINDS = ("mlp", "tied", "qwen2")


def saved(program: ExportedProgram, path: Path, form: str = "op") -> Path:
    pt2.save(program, path, form=form)
    return path


def with_manifest(program: ExportedProgram, **changes: Any) -> ExportedProgram:
    """The same program under another manifest."""
    copied = program.run_decompositions({})
    return attach(copied, dataclasses.replace(manifest_of(program), **changes))


def tensors_of(program: ExportedProgram) -> dict[tuple, int]:
    """Bytes of each storage."""
    held = {**program.constants, **program.state_dict}
    return {storage_key(tensor, name): tensor.nbytes for name, tensor in held.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("report") / "small.pt2"
    return report(saved(compressed("llama", "slim-q"), path))


@pytest.mark.parametrize("form", ["op", "aten"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_parts_are_the_whole_file(tmp_path: Path, recipe: str, form: str) -> None:
    path = saved(compressed("mlp", recipe), tmp_path / "small.pt2", form)
    found = report(path)
    assert found.bytes == path.stat().st_size == sum(part.bytes for part in found.parts)
    assert math.isclose(sum(part.share for part in found.parts), 1)
    assert all(part.bytes > 0 for part in found.parts)
    weights = sum(row.out_features * row.in_features for row in found.manifest.layers)
    own = {part.name: part.bytes for part in found.parts if part.bits is not None}
    assert sum(own.values()) == sum(row.bytes for row in found.manifest.layers)
    assert math.isclose(found.bits_per_weight, 8 * sum(own.values()) / weights)
    assert ("adapters" in own) == (RECIPES[recipe].adapter is not None)
    assert {"codes", "scales"} <= set(own)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_in_the_ledger(tmp_path: Path, kind: str) -> None:
    recipe = dataclasses.replace(RECIPES["slim-q"], skip=("*first*", "*q_proj*", "*lm_head*"))
    program = slimfx.compress(captured(kind), recipe, case(kind).batches)
    found = report(saved(program, tmp_path / "small.pt2"))
    rows = {row.name: row for row in found.weights}
    assert len(rows) == len(found.weights)
    loaded = slimfx.load(tmp_path / "small.pt2")
    assert sum(row.bytes for row in rows.values()) == sum(tensors_of(loaded).values())
    plain = {name for name in {**loaded.state_dict, **loaded.constants} if ".slim_" not in name}
    assert set(rows) == plain | {row.name for row in manifest_of(program).layers}
    for site in find_linears(loaded):
        assert rows[site.fqn].why == manifest_of(program).skipped[site.name] != ""


def test_the_bytes_of_a_layer_are_those_of_its_report(small: Report) -> None:
    rows = {row.name: row for row in small.weights}
    for layer in small.manifest.layers:
        assert rows[layer.name].bytes == layer.bytes
        assert rows[layer.name].shape == f"{layer.out_features} x {layer.in_features}"
        assert rows[layer.name].stored == layer.layout


def test_notes_of_a_layer_are_in_the_ledger(tmp_path: Path) -> None:
    program = compressed("mlp", "slim-q")
    rows = [dataclasses.replace(row, notes=("one", "two")) for row in manifest_of(program).layers]
    path = saved(with_manifest(program, layers=tuple(rows)), tmp_path / "small.pt2")
    assert [row.why for row in report(path).weights[: len(rows)]] == ["one; two"] * len(rows)


def test_a_program_that_others_compressed_has_weights_without_a_report(tmp_path: Path) -> None:
    program = compressed("mlp", "slim-q")
    path = saved(with_manifest(program, layers=()), tmp_path / "imported.pt2")
    found = report(path)
    assert math.isclose(found.bits_per_weight, report_of(program, tmp_path).bits_per_weight)
    shapes = {row.name: (row.shape, row.why) for row in found.weights[:2]}
    why = "no report: slimfx did not compress it itself"
    assert shapes == {"first": ("32 x 16", why), "second": ("8 x 32", why)}
    assert found.kernels and found.to_pandas().empty


def report_of(program: ExportedProgram, folder: Path) -> Report:
    return report(saved(program, folder / "small.pt2"))


def test_the_plan_said_the_same_bits(small: Report) -> None:
    planned = slimfx.plan(captured("llama"), RECIPES["slim-q"])
    assert math.isclose(small.bits_per_weight, planned.bits_per_weight)


def test_kernels_are_those_that_select_chooses(small: Report) -> None:
    cpu = [each for each in small.kernels if each.device == "CPU"]
    assert [(each.linears, each.kernel) for each in cpu] == [
        (len(small.manifest.layers), "linear_cpu")
    ]
    layer = Layer(Form("2:4", 4, 0), (Form("dense", 4, 0),) * 2, torch.float32)
    for device, gpu in GPUS.items():
        rows = [each for each in small.kernels if each.device == device]
        assert rows[0].rows.startswith("1 to ") and rows[-1].rows.endswith(" or more")
        for each in rows:
            assert each.kernel == select(layer, int(each.rows.split()[0]), gpu).kernel
            assert each.linears == len(small.manifest.layers)


def test_linears_go_by_the_names_of_the_layers(small: Report) -> None:
    found = linears_of(compressed("llama", "slim-q"))
    assert list(found) == [row.name for row in small.manifest.layers]


def test_a_reason_is_given_against_each_kernel_for_such_weights(small: Report) -> None:
    for each in small.kernels:
        if each.device in GPUS:
            assert "decode_24: " in each.why_not
            assert ("portable_24: " in each.why_not) == (each.kernel == "expand")
            assert "int4: " not in each.why_not and "bitmask: " not in each.why_not


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layout_has_its_kernels(recipe: str) -> None:
    found = kernels_of(linears_of(compressed("llama", recipe)))
    assert {each.device for each in found} in ({"CPU", "GPU"}, {"CPU", *GPUS})


def test_the_aten_form_has_no_kernels(tmp_path: Path) -> None:
    found = report(saved(compressed("mlp", "slim-q"), tmp_path / "small.pt2", "aten"))
    assert found.kernels == ()
    assert {row.name for row in found.manifest.layers} <= {row.name for row in found.weights}


def test_the_recorded_inputs_are_asked_again(small: Report, tmp_path: Path) -> None:
    assert small.golden.identical and small.passed  # type: ignore[union-attr]
    changed = tmp_path / "changed.pt2"
    with (
        zipfile.ZipFile(saved(compressed("mlp", "slim"), tmp_path / "small.pt2")) as old,
        zipfile.ZipFile(changed, "w") as new,
    ):
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("weights/weight_2"):
                data = bytes([data[0] ^ 0x80]) + data[1:]
            new.writestr(entry.filename, data)
    assert not report(changed).passed


def test_a_program_of_torch_alone_has_a_report(tmp_path: Path) -> None:
    torch.export.save(captured("mlp"), tmp_path / "dense.pt2")
    found = report(tmp_path / "dense.pt2")
    assert "no golden outputs" in str(found.golden) and str(tmp_path) not in str(found.golden)
    assert math.isnan(found.bits_per_weight) and math.isnan(found.snr)
    whys = {row.name: row.why for row in found.weights}
    assert whys["first.weight"] == "a linear that no recipe names"
    assert found.bytes == sum(part.bytes for part in found.parts)


def test_perplexity_is_that_of_evaluate(tmp_path: Path) -> None:
    text = ids(1, 300)
    path = saved(compressed("llama", "slim-q"), tmp_path / "small.pt2")
    found = report(path, Measures(text, samples=3))
    assert found.quality == slimfx.evaluate(slimfx.load(path), text, samples=3)
    dense = dense_report(captured("llama"), "dense", Measures(text, samples=3))
    assert dense.quality == slimfx.evaluate(captured("llama"), text, samples=3)
    assert dense.bytes == sum(tensors_of(captured("llama")).values())


def test_an_encoder_is_compared_with_the_dense_model(tmp_path: Path) -> None:
    batches, dense = case("bert").batches, captured("bert")
    path = saved(compressed("bert", "slim-q"), tmp_path / "small.pt2")
    with pytest.raises(SlimError, match=r"has no perplexity; give the model before compression"):
        report(path, Measures(batches))
    found = report(path, Measures(batches), dense=dense)
    assert found.quality == slimfx.evaluate(slimfx.load(path), batches, dense=dense)
    assert found.quality is not None and 0.5 < found.quality.value < 1
    assert dense_report(dense, "dense", Measures(batches)).quality is None


def test_scores_are_those_of_run_tasks(tmp_path: Path) -> None:
    dense = demo_lm()
    path = saved(dense, tmp_path / "dense.pt2")
    measures = Measures(tasks=["continuation"], limit=4)
    found = report(path, measures)
    assert found.scores == run_tasks(dense, ["continuation"], limit=4) != ()
    assert dense_report(dense, "dense", measures).scores == found.scores


@pytest.mark.parametrize("name", ["", "model.onnx", "model.pte"])
def test_what_is_no_exported_program_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name:
        path.write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"report on the \.pt2"):
        report(path)


def test_machine_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "compiled.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"model/{aoti._RECORD}", b"{}")
    with pytest.raises(ArtifactError, match=r"report on the \.pt2 that it was made from"):
        report(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.pt2: No such file"):
        report(tmp_path / "none.pt2")


@pytest.mark.parametrize(
    "wrong", [{"rank": -1}, {"out_features": 10**400}, {"bytes": 1 << 60}, {"snr": 10**400}]
)
def test_counts_that_are_none_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    program = compressed("mlp", "slim-q")
    rows = [dataclasses.replace(row, **wrong) for row in manifest_of(program).layers]
    path = saved(with_manifest(program, layers=tuple(rows)), tmp_path / "small.pt2")
    with pytest.raises(ArtifactError, match=f"damaged: {next(iter(wrong))} of a layer"):
        report(path)


def test_the_layers_show_in_notebooks_and_as_a_data_frame(small: Report) -> None:
    frame = small.to_pandas()
    assert list(frame.columns) == [item.name for item in dataclasses.fields(LayerReport)]
    assert list(frame["name"]) == [row.name for row in small.manifest.layers]
    assert frame["snr"].median() == small.snr
    html = small._repr_html_()
    assert "<button" not in html
    for row in small.manifest.layers:
        assert (
            f'<th scope="row">{row.name}</th>' in html
            and f'<td class="n">{row.snr:.1f}</td>' in html
        )


def test_the_plan_shows_in_notebooks_and_as_a_data_frame() -> None:
    planned = slimfx.plan(captured("tied"), dataclasses.replace(RECIPES["slim-q"], skip=("c",)))
    frame = planned.to_pandas()
    assert frame["bytes_after"].sum() + planned.other_bytes == planned.bytes_after
    html = planned._repr_html_()
    assert html.count("<tr>") == 1 + len(planned.rows)
    assert "skipped by the recipe" in html and f"{planned.bytes_after:,}" in html


def test_no_layers_make_a_data_frame_with_all_columns() -> None:
    empty = Report("x", 1, Manifest(), (), (), (), "")
    assert list(empty.to_pandas().columns) == [
        item.name for item in dataclasses.fields(LayerReport)
    ]
    assert "<tbody>" in empty._repr_html_()


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, small: Report) -> None:
    monkeypatch.setattr(errors.importlib, "import_module", refuse)
    with pytest.raises(
        SlimError, match=r"pandas is not installed; run: pip install 'slimfx\[noteb"
    ):
        small.to_pandas()


def refuse(name: str) -> None:
    raise ImportError(name)


def test_the_templates_are_in_the_package() -> None:
    found = {item.name for item in (files("slimfx") / "pages").iterdir()}
    assert found >= {"page.html", "page.css", "page.js", "plot.svg", "table.html"}

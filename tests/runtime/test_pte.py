"""`.pte` files: what ExecuTorch answers, with and without a cache, and what is refused."""

import sys
from pathlib import Path

import pytest
import torch
from models import answer, compressed, ids, normal, tiny_llama
from slimfx.passes.inputs import module_of
from slimfx.passes.lower_pte import lower_pte
from slimfx.runtime import sidecar
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.targets import pte
from torch import Tensor
from torch.export import ExportedProgram

import slimfx
from slimfx.errors import ArtifactError, SlimError

pytest.importorskip("executorch", reason="slimfx[executorch] is not installed")

ROWS = 20
PROMPT, TOKENS = 7, 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The MLP in both forms."""
    folder = tmp_path_factory.mktemp("pte")
    for form, recipe in (("xnnpack", "slim"), ("portable", "int4")):
        size, notes = pte.save(compressed("mlp", recipe), folder / form, form=form, batch=ROWS)
        assert size == sum(path.stat().st_size for path in folder.glob(f"{form}*"))
        assert len(notes) == (form == "xnnpack")  # bfloat16 adapters become float32
    return {path.name: path for path in folder.iterdir() if not path.suffix}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportedProgram, Path]:
    """A Llama with a cache, compressed, and its file for XNNPACK."""
    torch.manual_seed(0)
    program = slimfx.capture(tiny_llama(num_hidden_layers=1).eval(), kv_cache=True)
    text = [{"input_ids": ids(1, 1, 24), "cache_position": torch.arange(24)}]
    program = slimfx.compress(program, "slim", text)
    path = tmp_path_factory.mktemp("pte") / "decoder.pte"
    pte.save(program, path)
    return program, path


def reference(program: ExportedProgram, form: str) -> torch.nn.Module:
    """The lowered graph, eagerly."""
    return module_of(lower_pte(program, form=form)[0])


@pytest.mark.parametrize(("form", "recipe"), [("xnnpack", "slim"), ("portable", "int4")])
@pytest.mark.parametrize("rows", [2, 5, ROWS])
def test_the_runtime_answers_as_the_lowered_graph(
    files: dict[str, Path], form: str, recipe: str, rows: int
) -> None:
    program, x = compressed("mlp", recipe), {"x": normal(rows, rows, 16)}
    found = pte.load(files[form])(**x)
    assert isinstance(found, Tensor)
    differences = (found - answer(reference(program, form), x)).abs().amax(-1)
    assert differences.median() < 1e-5  # a row that is rounded elsewhere may differ more
    assert differences.max() < 0.05
    if form == "portable":
        assert (found - answer(program.module(), x)).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["xnnpack", "portable"])
def test_check_repeats_the_golden_outputs(files: dict[str, Path], form: str) -> None:
    result = pte.check(files[form])
    assert result.passed and result.tolerance == pte.TOLERANCES[form]
    assert result.max_difference < 1e-5
    assert pte.check(files[form], tolerance=0.0).passed == result.identical


@pytest.mark.parametrize(("form", "recipe"), [("xnnpack", "slim"), ("portable", "int4")])
def test_a_second_save_gives_the_same_bytes(
    files: dict[str, Path], tmp_path: Path, form: str, recipe: str
) -> None:
    pte.save(compressed("mlp", recipe), tmp_path / form, form=form, batch=ROWS)
    for name in (form, f"{form}.slimfx"):
        assert (tmp_path / name).read_bytes() == (files[form].parent / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [form, f"{form}.slimfx"]


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.99])
def test_a_flipped_byte_is_refused(files: dict[str, Path], tmp_path: Path, place: float) -> None:
    path = copied(files["portable"], tmp_path)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x40
    path.write_bytes(data)
    for read in (pte.load, pte.check):
        with pytest.raises(ArtifactError, match="damaged"):
            read(path)


def test_a_file_without_its_record_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path = copied(files["portable"], tmp_path)
    beside = tmp_path / "portable.slimfx"
    beside.write_bytes(beside.read_bytes()[:-1])
    for _ in range(2):
        for read in (pte.load, pte.check):
            with pytest.raises(ArtifactError, match="not slimfx's record of a pte export"):
                read(path)
        beside.unlink(missing_ok=True)


def copied(path: Path, folder: Path) -> Path:
    for file in path.parent.glob(f"{path.name}*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / path.name


def test_the_manifest_travels_beside_the_file(files: dict[str, Path]) -> None:
    beside = sidecar.read(files["xnnpack"].with_suffix(".slimfx"), "pte")
    assert beside.manifest == manifest_of(compressed("mlp", "slim"))
    assert beside.record["inputs"] == [
        {"name": "x", "dtype": "torch.float32", "sizes": [[2, ROWS], [16, 16]]}
    ]


def test_other_inputs_are_refused_by_name(files: dict[str, Path]) -> None:
    run = pte.load(files["portable"])
    with pytest.raises(ArtifactError, match="the program takes x; y was given"):
        run(y=normal(0, 5, 16))
    with pytest.raises(ArtifactError, match=r"x: torch\.float64, not torch\.float32"):
        run(x=normal(0, 5, 16).double())
    for shape in [(ROWS + 1, 16), (5, 15), (16,)]:
        with pytest.raises(ArtifactError, match=r"exported for \[2..20, 16\]"):
            run(x=normal(0, *shape))


def test_what_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    program = compressed("mlp", "slim")
    with pytest.raises(ArtifactError, match="form 'tflite' is not one of xnnpack, portable"):
        pte.save(program, tmp_path / "a.pte", form="tflite")
    with pytest.raises(ArtifactError, match="batch 1 is below 2, the least"):
        pte.save(program, tmp_path / "a.pte", batch=1)
    with pytest.raises(ArtifactError, match="no such folder"):
        pte.save(program, tmp_path / "none" / "a.pte")
    with pytest.raises(ArtifactError, match="length 0 is below 1, the least"):
        pte.save(compressed("llama", "slim"), tmp_path / "a.pte", length=0)
    assert list(tmp_path.iterdir()) == []


def test_without_executorch_the_extra_is_named(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = [name for name in sys.modules if name.startswith("executorch.")]
    for name in ("executorch", *loaded):
        monkeypatch.setitem(sys.modules, name, None)
    said = r"executorch.* is not installed; run: pip install 'slimfx\[executorch\]'"
    with pytest.raises(SlimError, match=said):
        pte.load(files["portable"])
    with pytest.raises(SlimError, match=said):
        pte.save(compressed("mlp", "slim"), tmp_path / "a.pte")


def test_reading_and_running_says_nothing(
    files: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    pte.check(files["xnnpack"])
    pte.load(files["portable"])(x=normal(0, 2, 16))
    assert capfd.readouterr() == ("", "")


def continuation(run: object) -> tuple[list[int], Tensor]:
    """The prompt in one call, then token after token: the tokens, and their logits."""
    logits = run(input_ids=ids(5, 1, PROMPT), cache_position=torch.arange(PROMPT))  # type: ignore[operator]
    tokens, said = [], [logits]
    for i in range(TOKENS):
        tokens.append(int(logits[0, -1].argmax()))
        logits = run(  # type: ignore[operator]
            input_ids=torch.tensor([tokens[-1:]]), cache_position=torch.tensor([PROMPT + i])
        )
        said.append(logits)
    return tokens, torch.cat(said, dim=1)


@torch.no_grad()
def test_a_cache_remembers_and_a_second_text_starts_anew(
    decoder: tuple[ExportedProgram, Path],
) -> None:
    program, path = decoder
    expected, logits = continuation(reference(program, "xnnpack"))
    run = pte.load(path)
    tokens, said = continuation(run)
    assert tokens == expected and len(set(tokens)) > 5
    assert (said - logits).abs().amax(-1).median() < 1e-5
    again, repeated = continuation(run)
    assert again == tokens and torch.equal(repeated, said)


def test_two_loads_of_a_file_keep_their_own_cache(decoder: tuple[ExportedProgram, Path]) -> None:
    one, other = (pte.load(decoder[1]) for _ in range(2))
    first = {"input_ids": ids(5, 1, PROMPT), "cache_position": torch.arange(PROMPT)}
    one(**first)
    step = {"input_ids": ids(6, 1, 1), "cache_position": torch.tensor([PROMPT])}
    assert not torch.equal(one(**step), other(**step))  # type: ignore[arg-type]
    other(**first)
    assert torch.equal(one(**step), other(**step))  # type: ignore[arg-type]


def test_a_program_of_tokens_is_written_for_some_rows_of_any_length(tmp_path: Path) -> None:
    program = compressed("gpt2", "slim")
    pte.save(program, tmp_path / "gpt2.pte", form="portable", batch=2, length=24)
    run = pte.load(tmp_path / "gpt2.pte")
    for shape in ((1, 2), (2, 11), (2, 24)):
        x = {"input_ids": ids(shape[1], *shape)}
        torch.testing.assert_close(run(**x), answer(program.module(), x), rtol=1e-4, atol=1e-5)

"""The benchmarks' own code: on a tiny layer, in the interpreter, and on a GPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from slimfx.runtime.select import Gpu
from typer.testing import CliRunner

from slimfx import bench_gpu, bench_model_gpu
from slimfx.bench_gpu import GpuRow, layers
from slimfx.bench_gpu import bench_gpu as bench
from slimfx.bench_model_gpu import GpuModelRow
from slimfx.bench_model_gpu import bench_model_gpu as bench_model
from slimfx.cli import app
from slimfx.cli_bench_kernels import _draw, gpu_table
from slimfx.cli_bench_model import gpu_table as model_table
from slimfx.errors import SlimError
from slimfx.gpu_contenders import Layer, contenders

Run = Callable[..., Any]
TINY = Layer("tiny", 128, (32, 16))


def measured(device: str) -> list[dict[str, Any]]:
    """Rows of a tiny layer."""
    return [asdict(row) for row in bench([TINY], (1, 66), device=device, copies=20_000)]


@pytest.fixture(scope="session")
def rows(run: Run) -> list[GpuRow]:
    """Measured where `run` does."""
    return [GpuRow(**row) for row in run(measured)]


def test_every_contender_has_a_sane_row(rows: list[GpuRow]) -> None:
    assert [(row.M, row.name) for row in rows] == [
        (M, name) for M in (1, 66) for name in ("bfloat16", "aten int4", "slim", "slim lora")
    ]
    assert [row.kernel for row in rows] == [
        *("", "", "decode_24", "decode_24", "", "", "portable_24", "portable_24")
    ]
    for row in rows:
        assert row.layer == "tiny 128x48" and row.seconds > 0 and row.error < 0.05
        assert row.gb_per_second == pytest.approx(row.bytes / row.seconds / 1e9)
        base = next(r.seconds for r in rows if (r.M, r.name) == (row.M, "bfloat16"))
        assert row.speedup == pytest.approx(base / row.seconds)
        assert row.note == ("" if row.seconds <= base else "slower than bfloat16")


def test_a_wrong_product_is_not_timed() -> None:
    x = torch.randn(3, TINY.K).bfloat16()
    first, *_ = contenders(TINY, "cpu", 0)
    wrong = replace(first, exact=lambda x: -first.exact(x))
    with pytest.raises(SlimError, match="bfloat16 on tiny 128x48, M=3: its product is"):
        bench_gpu._checked(wrong, TINY, x, first.bind(x)[0]())


def wrong_rows(device: str) -> list[dict[str, Any]]:
    """Rows of contenders of which one is wrong."""
    first, _, *ours = contenders(TINY, device, 0)
    found = [first, replace(ours[0], exact=lambda x: -ours[0].exact(x)), ours[1]]
    return [asdict(row) for row in bench_gpu._rows(TINY, 1, found, device, 1.0)]


def test_what_is_wrong_is_said_and_the_rest_goes_on(run: Run) -> None:
    dense, wrong, last = (GpuRow(**row) for row in run(wrong_rows))
    assert dense.seconds and last.seconds and wrong.seconds is None
    assert wrong.note.startswith("failed: slim on tiny 128x48, M=1: its product is")


def test_the_table_and_the_plot_show_every_layer(rows: list[GpuRow], tmp_path: Any) -> None:
    text = StringIO()
    Console(file=text, width=200).print(gpu_table(rows))
    for word in ("tiny 128x48", "decode_24", "portable_24", "Slower than bfloat16: "):
        assert word in text.getvalue()
    pytest.importorskip("matplotlib")
    _draw(rows, tmp_path / "plot.png", base="bfloat16", ours=("slim", "slim lora"))
    assert (tmp_path / "plot.png").stat().st_size > 1000


def compiled(device: str) -> bool:
    """Every kernel runs once."""
    bench_gpu.compile_kernels([TINY], (1,), device)
    return True


def test_kernels_are_compiled_before_they_are_timed(run: Run) -> None:
    assert run(compiled)


def test_a_failure_of_another_process_is_heard() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    [message] = bench_gpu.compile_in_parallel([TINY], (1,), 1, device="cpu")
    assert "x is on cpu, not on a GPU" in message


def test_no_further_layer_is_begun_when_time_is_over() -> None:
    rows = list(bench([TINY, TINY], (1,), device="cpu", budget=-1.0))
    assert [row.note for row in rows] == ["not measured within -1 seconds"] * 2


def test_the_layers_of_a_model_and_of_none() -> None:
    assert [str(layer) for layer in layers("llama-3-8b")] == [
        *("llama-3-8b gate+up 4096x28672", "llama-3-8b down 14336x4096"),
        *("llama-3-8b q+k+v 4096x6144", "llama-3-8b o 4096x4096"),
    ]
    with pytest.raises(SlimError, match="model 'llama' is not one of llama-2-7b"):
        layers("llama")


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SlimError, match="torch sees no GPU here"):
        list(bench([TINY], (1,)))


def model_rows(device: str) -> list[dict[str, Any]]:
    """Rows of a tiny model."""
    return [asdict(row) for row in bench_model("tiny", (1, 3), device=device)]


@pytest.fixture(scope="session")
def model(run: Run) -> list[GpuModelRow]:
    """Measured where `run` does."""
    return [GpuModelRow(**row) for row in run(model_rows)]


def test_a_tiny_model_runs_compressed_as_a_whole(model: list[GpuModelRow]) -> None:
    assert [(row.name, row.batch) for row in model] == [
        *[("bfloat16", 1), ("bfloat16", 3), ("compressed", 1), ("compressed", 3)]
    ]
    for row in model:
        assert row.seconds == pytest.approx(row.batch / row.tokens_per_second) and row.share > 0
    for dense, small in zip(model[:2], model[2:]):
        assert dense.speedup == 1 and small.left == 0 and dense.note == small.note == ""
        assert small.speedup == pytest.approx(small.tokens_per_second / dense.tokens_per_second)
        assert small.weight_bytes < dense.weight_bytes


def test_the_table_of_a_model_says_how_long_a_step_is(model: list[GpuModelRow]) -> None:
    text = StringIO()
    Console(file=text, width=200).print(model_table(model))
    for row in model:
        assert f"{1e3 * row.seconds:.3f}" in text.getvalue()


@torch.no_grad()
def test_a_compiled_step_is_the_programs_own_and_leaves_nothing() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench_model_gpu.SIZES, "least", (128, 256, 1, 4, 2))
        dense = bench_model_gpu._program("least", 16, device)
        program, left = bench_model_gpu._compressed(dense, Gpu("cuda", 90), device)
    attention = torch.ops.aten.scaled_dot_product_attention.default
    [node] = (node for node in program.graph.nodes if node.target is attention)
    assert left == 0 and len(node.args) == 3 and "attn_mask" not in node.kwargs
    exact = bench_model_gpu.step_of(program, 3, compiled=False)()
    step = bench_model_gpu.step_of(program, 3, compiled=True)
    assert exact.shape == (3, 1, 32000) and exact.abs().max() > 0.5
    torch.testing.assert_close(step(), exact, atol=0.03, rtol=0)
    held = [weakref.ref(tensor) for tensor in (*dense.state_dict.values(), *program.buffers())]
    del dense, program, node, step
    gc.collect()
    assert [ref() for ref in held if ref() is not None] == []


def test_a_size_that_is_none() -> None:
    with pytest.raises(SlimError, match="size '9b' is not one of tiny, 1b, 7b, 8b"):
        list(bench_model("9b"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("kernels --device cuda", "torch sees no GPU here"),
        ("model --device cuda", "torch sees no GPU here"),
        ("kernels --device tpu", "device 'tpu' is neither cpu nor cuda"),
        ("model --device tpu", "device 'tpu' is neither cpu nor cuda"),
        ("model folder --device cuda", "leave the folder out"),
    ],
)
def test_the_command_line_says_what_is_missing(command: str, message: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = CliRunner().invoke(app, ["bench", *command.split()])
    assert isinstance(found.exception, SlimError) and message in str(found.exception)

"""The Triton template of `linear_gpu`: Inductor's own source, run in the interpreter, and what is
left to the op.

Lowering happens on CPU tensors under a driver that only says which GPU there would be; the source
that Inductor would compile is then run by another process, in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gpu_linears import Linear, linear
from slimfx.runtime.gpu_ops import OP
from slimfx.runtime.inductor import compile_graph, gpu_linear
from slimfx.runtime.inductor.gpu_linear import Blocks, blocks, why_no_template, why_the_op
from slimfx.runtime.select import Form
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import ptx

BF16, STORED, INT4 = torch.bfloat16, ("stored",), ("dense", 4)
CASES = {
    "2:4": (5, lambda: linear(("2:4", 4), [72], 260, scales="row", layouts=STORED)),
    "2:4, groups": (20, lambda: linear(("2:4", 4), [40], 128, scales="group", layouts=STORED)),
    "int4, parts": (1, lambda: linear(("dense", 4), [32, 8], 136, layouts=STORED)),
    "package, adapters": (
        5,
        lambda: linear(
            *(("2:4", 4), [32, 48, 40], 260),
            **{"scales": "row", "adapter": INT4, "ranks": [16, 8, 16], "layouts": STORED},
        ),
    ),
    "package, adapters, any rows": (
        70,
        lambda: linear(
            *(("dense", 4), [40], 136),
            **{"scales": "group", "adapter": INT4, "ranks": [12], "layouts": STORED},
        ),
    ),
}
"""In a package there is no op that a template could be left for."""


def given(name: str) -> tuple[Linear, Tensor, Tensor]:
    """A case with its x and bias."""
    M, make = CASES[name]
    made, draw = make(), torch.Generator().manual_seed(M)
    x = torch.randn(M, made.parts[0][0].shape[1], generator=draw)
    return made, x.to(BF16), torch.randn(sum(made.held.rows), generator=draw).to(BF16)


def with_epilogue(x: Tensor, bias: Tensor, *arguments: Any) -> Tensor:
    """What usually follows a linear."""
    return torch.relu(OP(x, *arguments) + bias)


@dataclass(frozen=True)
class Driver:
    """What Inductor asks a GPU's driver while it writes source."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


def sources(name: str) -> list[str]:
    """What Inductor writes for a case, up to where it would compile that."""
    import triton
    from torch._inductor import config
    from torch._inductor.exc import InductorError
    from torch._inductor.graph import GraphLowering
    from triton.backends.compiler import GPUTarget

    triton.runtime.driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
    if "package" in name:
        gpu_linear.why_the_op = lambda held, M: None
    made, x, bias = given(name)
    found: list[str] = []
    GraphLowering.save_output_code = staticmethod(found.append)
    arguments = made.arguments()

    def call(x: Tensor, bias: Tensor) -> Tensor:
        return with_epilogue(x, bias, *arguments)

    with config.patch(force_disable_caches=True, cpu_backend="triton"), torch.no_grad():
        try:
            torch._dynamo.reset()  # or the shapes of earlier cases would make these symbols
            if "any rows" in name:
                torch._dynamo.mark_dynamic(x, 0)
            torch.compile(call, backend=compile_graph)(x, bias)
        except InductorError as error:
            assert "0 compatible backends" in str(error) or "0 active drivers" in str(error), error
    return found


KERNEL = re.compile(r"(@triton\.jit\s+def (triton_\w+)\(.*?)\n''', device_str", re.S)
INPUTS = re.compile(r"(arg.*) = args")
BUFFER = re.compile(r"(buf\d+) = empty_strided_cpu\(\((.*?)\), \(.*?\), (torch\.\w+)\)")
RUN = re.compile(r"(triton_\w+)\.run\((.*), stream")
IMPORTS = """import triton, triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""


def interpreted(work: bytes) -> bytes:
    """What the kernels of a source give for a case, one after the other."""
    source, name = pickle.loads(work)
    ptx.install()
    made, x, bias = given(name)
    module = _module(IMPORTS + "\n".join(body for body, _ in KERNEL.findall(source)))
    given_first = [len(x)] if "any rows" in name else []
    inputs = [*given_first, x, *made.held.stored, bias]
    known: dict[str, Any] = {"torch": torch}
    known |= dict(zip(INPUTS.findall(source)[0].split(", "), inputs, strict=True))
    known |= {size: len(x) for size in re.findall(r"(s\d+) = arg0_1", source)}
    for buffer, shape, dtype in BUFFER.findall(source):
        known[buffer] = torch.full(eval(f"({shape},)", known), torch.nan, dtype=eval(dtype, known))
    for kernel, words in RUN.findall(source):
        *arguments, i, j, k = eval(f"({words},)", known)
        getattr(module, kernel)[(i, j, k)](*arguments)
    return pickle.dumps(known[buffer])


def _module(text: str) -> ModuleType:
    """A module that is found again by whoever looks for its lines, as Triton does."""
    path = Path(tempfile.mkdtemp()) / "generated.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("generated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def writer() -> Iterator[ProcessPoolExecutor]:
    """A process whose Triton has a driver that is none."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def reader() -> Iterator[ProcessPoolExecutor]:
    """A process whose Triton interprets."""
    spawn = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=(1,))
        pool.submit(len, "").result()
    with pool:
        yield pool


@pytest.mark.parametrize("name", CASES)
def test_what_follows_is_in_the_kernel_and_the_numbers_are_right(
    name: str, writer: ProcessPoolExecutor, reader: ProcessPoolExecutor
) -> None:
    [source] = writer.submit(sources, name).result()
    kernels = [kernel for _, kernel in KERNEL.findall(source)]
    assert len(kernels) == (2 if "adapters" in name else 1)  # x L^T, too
    assert "fused_add_linear_gpu_relu" in kernels[-1]
    y = pickle.loads(reader.submit(interpreted, pickle.dumps((source, name))).result())
    made, x, bias = given(name)
    exact = made.exact(x) + bias.double()
    limit = 2**-7 * exact.abs() + 2**-8 * bias.double().abs() + 2e-6 * made.magnitude(x)
    assert ((y.double() - exact.relu()).abs() <= limit).all()
    assert 0.1 < (y == 0).double().mean() < 0.9


@torch.no_grad()
def test_what_has_no_template_is_the_op_as_it_is() -> None:
    made = linear(("2:4", 4), [32, 20], 128, adapter=("dense", 4), ranks=[8, 5])
    x, bias = torch.randn(3, 128), torch.randn(52)
    torch._dynamo.reset()
    run = torch.compile(with_epilogue, backend=compile_graph)
    y = run(x, bias, *made.arguments())
    torch.testing.assert_close(y, with_epilogue(x, bias, *made.arguments()))


def test_why_there_is_no_template() -> None:
    sparse = linear(("2:4", 4), [32], 128, layouts=STORED).held
    assert why_no_template(sparse, BF16) is None
    assert why_no_template(sparse, torch.float32) == "x is torch.float32, not bfloat16 or float16"
    eight = linear(("dense", 8), [32], 128, layouts=STORED).held
    assert why_no_template(eight, BF16) == "no template reads dense values of 8 bits"
    wide = linear(("2:4", 4), [32], 128, adapter=("dense", 8), ranks=[8], layouts=STORED).held
    assert why_no_template(wide, BF16) == "no template adds adapters of dense values of 8 bits"
    short = replace(sparse, forms=(replace(sparse.forms[0], group=24),))
    assert why_no_template(short, BF16) == "groups of 24 inputs, not a multiple of 16"


def test_why_the_op_is_better_as_it_is() -> None:
    sparse = linear(("2:4", 4), [32], 128, layouts=STORED).held
    assert why_the_op(sparse, 20) is None
    assert why_the_op(sparse, 400) == "above 160 rows of x the weight is expanded once"
    assert "rows of x vary" in str(why_the_op(sparse, None))
    adapted = linear(("2:4", 4), [32], 128, adapter=INT4, ranks=[8], layouts=STORED).held
    assert why_no_template(adapted, BF16) is None
    assert "adapters" in str(why_the_op(adapted, 20))
    assert "by the rows that x has" in str(why_the_op(linear(("2:4", 4), [32], 128).held, 20))


def test_blocks_end_where_groups_do() -> None:
    assert blocks(1, Form("2:4", 4, 0))[0] == Blocks(16, 64, 128)
    assert [each.BK for each in blocks(64, Form("2:4", 4, 96))] == [32, 32]
    assert blocks(300, Form("dense", 4, 128))[0] == Blocks(64, 128, 128)
    assert [each.BN for each in blocks(20, Form("2:4", 4, 0), [96, 64])] == [32, 16]

"""`.pte`: a program for ExecuTorch, with its golden outputs and manifest beside it.

form "xnnpack"   compressed linears as int4 weights times inputs rounded to int8, row by row, which
                 XNNPACK runs; the rest in float32
form "portable"  as exact as the program, on ExecuTorch's plain kernels: codes of 4 bits in halves
                 of bytes, unpacked on each call

ExecuTorch reserves memory for the largest inputs a program takes, so that `save` takes limits.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from slimfx.passes.inputs import described, module_of, tensor_inputs
from slimfx.passes.limit_sizes import limit_sizes
from slimfx.passes.lower_pte import FORMS, lower_pte
from slimfx.passes.order_attention import order_attention
from slimfx.runtime import archive, sidecar
from slimfx.runtime.golden import CheckResult, compare
from slimfx.runtime.manifest import manifest_of
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from slimfx.errors import ArtifactError, need

TARGET = "pte"
TOLERANCES = {"xnnpack": 5e-2, "portable": 1e-4}
"""Form -> largest relative difference from the golden outputs. Those of "xnnpack" are of the same
graph with rounded inputs and mostly repeated to 1e-6; where a difference in the last bit moves one
input to the neighbouring code, later layers carry it on, up to what rounding itself costs."""


def save(
    program: ExportedProgram,
    path: str | Path,
    *,
    form: str = "xnnpack",
    batch: int | None = None,
    length: int | None = None,
) -> tuple[int, tuple[str, ...]]:
    """Write a program to `path`; bytes written, and what the user should know.

    The runtime must repeat the outputs of the lowered graph before the file takes its place.

    Args:
        form: "xnnpack" or "portable".
        batch: the most rows at once, by default the fewest that the program takes.
        length: the longest sequence, by default the longest that the program takes.

    Raises:
        ArtifactError: missing folder, unknown form, a limit out of range, no example inputs, or
            something in the program that ExecuTorch does not take.
        SlimError: executorch is not installed.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ArtifactError(f"{path}: no such folder {path.parent}")
    if form not in FORMS:
        raise ArtifactError(f"form {form!r} is not one of {', '.join(FORMS)}")
    if program.example_inputs is None:
        raise ArtifactError(
            f"{path}: the program has no example inputs to record golden outputs of; export it "
            f"with some"
        )
    need("executorch")
    limited = limit_sizes(program, batch=batch, length=length)
    lowered, report = lower_pte(order_attention(limited), form=form)
    inputs, outputs = _golden(lowered)
    record = {"form": form, "inputs": described(limited)}
    with archive.atomic(path) as part:
        part.write_bytes(_converted(lowered, form, path))
        result = compare(_answers(part, record, inputs), list(outputs.values()), TOLERANCES[form])
        if not result.passed:
            raise ArtifactError(
                f"{path}: ExecuTorch's outputs differ from the program's by "
                f"{result.max_difference:.1e}, more than {result.tolerance:.0e}; not written"
            )
    held = sidecar.Sidecar(TARGET, manifest_of(program), record, inputs, outputs)
    beside = _beside(path)
    sidecar.write(beside, held, [path])
    notes = (*report.notes, *_stored_twice(lowered)) if form == "xnnpack" else report.notes
    return path.stat().st_size + beside.stat().st_size, notes


def load(path: str | Path) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The file as a function of the program's inputs, by name, in ExecuTorch's runtime.

    What it remembers from call to call, such as a cache, is its own; load twice for two.

    Raises:
        ArtifactError: missing or damaged file, or one that slimfx did not write; when called, other
            inputs than the file's.
        SlimError: executorch is not installed.
    """
    path = Path(path)
    run = _runner(path, sidecar.read(_beside(path), TARGET).record)

    def called(**inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = run(**inputs)
        return outputs[0] if len(outputs) == 1 else outputs

    return called


def check(path: str | Path, *, tolerance: float | None = None) -> CheckResult:
    """Run a file on its golden inputs; the tolerance is by default that of its form.

    Raises:
        ArtifactError: as `load`.
        SlimError: executorch is not installed.
    """
    path = Path(path)
    held = sidecar.read(_beside(path), TARGET)
    if tolerance is None:
        tolerance = TOLERANCES[held.record["form"]]
    return compare(_answers(path, held.record, held.inputs), list(held.outputs.values()), tolerance)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + sidecar.SUFFIX)


def _golden(program: ExportedProgram) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The example inputs by name, and what the lowered graph answers to them."""
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    with torch.no_grad():
        answers = pytree.tree_leaves(module_of(program)(*args, **kwargs))
    inputs = dict(zip(tensor_inputs(program), tensors, strict=True))
    return inputs, {f"output_{i}": answer for i, answer in enumerate(answers)}


def _stored_twice(program: ExportedProgram) -> Iterator[str]:
    """Weights that a linear shares with another op, such as tied embeddings."""
    aten = torch.ops.aten
    for node in program.graph.nodes:
        readers = {user.target for user in node.users} if node.op == "placeholder" else set()
        if aten.linear.default in readers and aten.embedding.default in readers:
            value = node.meta["val"]
            yield (
                f"{node.name} is stored twice, {value.numel() * value.itemsize:,} bytes more: it "
                f"is an embedding and the weight of a linear, of which XNNPACK keeps its own copy"
            )


def _converted(program: ExportedProgram, form: str, path: Path) -> bytes:
    """The program as ExecuTorch writes it."""
    with _quiet():
        exir = need("executorch.exir")
        partitioner = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
        delegates = [need(partitioner).XnnpackPartitioner()] if form == "xnnpack" else None
        config = exir.EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        try:
            edge = exir.to_edge_transform_and_lower(
                program, partitioner=delegates, compile_config=config
            )
            return bytes(edge.to_executorch().buffer)
        except (RuntimeError, AssertionError, ValueError, TypeError, LookupError) as error:
            raise ArtifactError(f"{path}: ExecuTorch cannot take the program: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ExecuTorch's words to its own developers, and with the root logger as it was."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def _heard(path: Path) -> Iterator[None]:
    """Turn the runtime's error codes into errors that say what its libraries wrote on stderr,
    which nobody sees otherwise.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as words:
            os.dup2(words.fileno(), 2)
            try:
                yield
            except RuntimeError as error:
                words.seek(0)
                lines = words.read().decode(errors="replace").splitlines()
                said = [line for line in lines if "failed" in line and "cpuinfo" not in line]
                raise ArtifactError(
                    f"{path}: ExecuTorch refuses: {'; '.join([str(error), *said[:3]])}"
                ) from error
            finally:
                os.dup2(kept, 2)
    finally:
        os.close(kept)


def _runner(path: Path, record: Mapping[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The file as a function of named tensors."""
    takes = record["inputs"]
    with _quiet(), _heard(path):
        program = need("executorch.runtime").Runtime.get().load_program(path)
        method = program.load_method("forward")

    def run(**inputs: Tensor) -> tuple[Tensor, ...]:
        _check_inputs(inputs, takes)
        values = [inputs[each["name"]].detach() for each in takes]
        row_by_row = [value.clone(memory_format=torch.contiguous_format) for value in values]
        return tuple(method.execute(row_by_row))

    return run


def _answers(
    path: Path, record: Mapping[str, Any], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """What a file answers the first time it is asked."""
    run = _runner(path, record)
    with _heard(path):
        return run(**inputs)


def _check_inputs(inputs: Mapping[str, Tensor], takes: list[dict[str, Any]]) -> None:
    names = [each["name"] for each in takes]
    if set(inputs) != set(names):
        given = ", ".join(inputs) or "nothing"
        raise ArtifactError(f"the program takes {', '.join(names)}; {given} was given")
    for each in takes:
        tensor, sizes = inputs[each["name"]], each["sizes"]
        if str(tensor.dtype) != each["dtype"]:
            raise ArtifactError(f"{each['name']}: {tensor.dtype}, not {each['dtype']}")
        fits = tensor.dim() == len(sizes) and all(
            least <= n <= most for n, (least, most) in zip(tensor.shape, sizes)
        )
        if not fits:
            ranges = ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in sizes)
            raise ArtifactError(
                f"{each['name']}: shape {tuple(tensor.shape)}, exported for [{ranges}]; export "
                f"again with other batch or length"
            )

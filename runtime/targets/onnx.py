"""`.onnx`: a program for ONNX Runtime, its compressed linears as com.microsoft MatMulNBits.

    model.onnx          the graph, and its weights up to 1.5 GB
    model.onnx.data     the weights, where there are more or it is asked for
    model.onnx.slimfx   manifest, tokenizer, golden inputs and outputs, digests of the other two

A language model that was captured with a key-value cache takes and gives the cache as the usual
decoders do: past_key_values.{i}.key and .value in, present.{i}.key and .value out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from slimfx.passes.inputs import described
from slimfx.passes.lower_onnx import LoweredOnnx, lower_onnx
from slimfx.runtime import archive, sidecar
from slimfx.runtime.golden import CheckResult, compare
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.targets.onnx_graph import Face, converted, face_of
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from slimfx.errors import ArtifactError, need

TARGET = "onnx"
TOLERANCES = {1: 1e-4, 4: 2e-2}
"""Accuracy level -> largest relative difference from the golden outputs; at 4 the runtime and the
reference may round an input to neighbouring codes."""
_COARSE = 2e-2
"""The same for a program in float16, which the runtime may add up in another order."""
_RUNTIME_ERRORS = (
    *("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile"),
    *("NotImplemented", "RuntimeException"),
)


def save(
    program: ExportedProgram,
    path: str | Path,
    *,
    accuracy_level: int = 1,
    external_data: bool = False,
) -> tuple[int, tuple[str, ...]]:
    """Write a program to `path`; bytes written, and what the user should know.

    ONNX Runtime must repeat the program's own outputs before the file takes its place.

    Args:
        accuracy_level: 1 multiplies floats; 4 is faster and rounds the inputs of compressed linears
            to eight bits.
        external_data: put the weights into a file of their own, as above 1.5 GB in any case.

    Raises:
        ArtifactError: missing folder, no example inputs, a layer that MatMulNBits does not take, an
            op without ONNX form, or ONNX Runtime answers differently.
        SlimError: onnx, onnxscript or onnxruntime is not installed.
    """
    path = Path(path)
    if program.example_inputs is None:
        raise ArtifactError(
            f"{path}: the program has no example inputs to record golden outputs of; export it "
            f"with some"
        )
    for module in ("onnx", "onnxscript", "onnxruntime"):
        need(module)
    with archive.atomic(path) as part:  # looks at the folder before any work
        face = face_of(program)
        lowered, report = lower_onnx(face.program, accuracy_level=accuracy_level)
        golden = _golden(lowered, face)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            draft = Path(folder) / path.name
            converted(lowered, face, path).save(draft, external_data=external_data)
            _check_draft(draft, path, golden, accuracy_level)
            files = [path]
            if _data(draft).exists() and _data(draft).stat().st_size:  # small tensors stay
                files.append(_data(path))
                with archive.atomic(_data(path)) as other:
                    _data(draft).replace(other)
            draft.replace(part)
    if len(files) == 1:  # an older export's
        _data(path).unlink(missing_ok=True)
    record = {"accuracy_level": accuracy_level, "inputs": described(program)}
    held = sidecar.Sidecar(TARGET, manifest_of(program), record, *golden)
    sidecar.write(_beside(path), held, files)
    size = sum(file.stat().st_size for file in (*files, _beside(path)))
    return size, _notes(report, accuracy_level, face, external=len(files) > 1)


def load(path: str | Path) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The file as a function of the program's inputs, by name, on this machine's processor.

    Raises:
        ArtifactError: missing or damaged file, or one that slimfx did not write; when called, other
            inputs than the file's.
        SlimError: onnxruntime is not installed.
    """
    path = Path(path)
    sidecar.read(_beside(path), TARGET)
    session = _session(path)

    def run(**inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = tuple(_run(session, inputs, path).values())
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def check(path: str | Path, *, tolerance: float | None = None) -> CheckResult:
    """Run a file on its golden inputs; the tolerance is by default that of its accuracy level.

    Raises:
        ArtifactError: as `load`.
        SlimError: onnxruntime is not installed.
    """
    path = Path(path)
    held = sidecar.read(_beside(path), TARGET)
    if tolerance is None:
        tolerance = _tolerance(held.record["accuracy_level"], held.outputs)
    return _compared(_run(_session(path), held.inputs, path), held.outputs, tolerance)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + sidecar.SUFFIX)


def _data(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def _check_draft(
    draft: Path,
    path: Path,
    golden: tuple[dict[str, Tensor], dict[str, Tensor]],
    accuracy_level: int,
) -> None:
    """Refuse a file that is no ONNX or answers differently from the program."""
    need("onnx").checker.check_model(str(draft))
    inputs, outputs = golden
    tolerance = _tolerance(accuracy_level, outputs)
    result = _compared(_run(_session(draft), inputs, path), outputs, tolerance)
    if not result.passed:
        raise ArtifactError(
            f"{path}: ONNX Runtime's outputs differ from the program's by "
            f"{result.max_difference:.1e} of the largest, more than {tolerance:.0e}; not written"
        )


def _notes(
    report: LoweredOnnx, accuracy_level: int, face: Face, *, external: bool
) -> tuple[str, ...]:
    """What the user should read, a sentence each."""
    notes = []
    if report.sparse:
        notes.append(
            f"{len(report.sparse)} sparse matrices are written with their zeros, which MatMulNBits "
            f"cannot leave out: {report.sparse_bytes} bytes, {report.stored_bytes} in a .pt2"
        )
    if report.dense:
        notes.append(
            f"{len(report.dense)} matrices of bfloat16 values are written dense, zeros included, "
            f"and multiplied as floats"
        )
    if accuracy_level == 4 and report.nbits:
        notes.append(
            f"ONNX Runtime rounds the inputs of {len(report.nbits)} compressed products to eight "
            f"bits (accuracy_level 4); with 1 it multiplies floats"
        )
    if external:
        notes.append("the weights lie in a .data file; keep it beside the graph")
    if face.grown:
        notes.append(
            "the cache grows: start with past_key_values of length 0 and give each present back"
        )
    return tuple(notes)


def _golden(program: ExportedProgram, face: Face) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The example inputs by name, and what the program answers to them."""
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    with torch.no_grad():
        answers = pytree.tree_leaves(program.module()(*args, **kwargs))
    return dict(zip(face.inputs, tensors, strict=True)), dict(
        zip(face.outputs, answers, strict=True)
    )


def _session(path: Path) -> Any:
    onnxruntime = need("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with _named_errors(path):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    names = [each.name for each in session.get_inputs()]
    if set(names) != set(inputs):
        raise ArtifactError(
            f"{path}: takes {', '.join(names)}; {', '.join(inputs) or 'nothing'} was given"
        )
    feed = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}
    with _named_errors(path):
        found = session.run(None, feed)
    return {each.name: torch.from_numpy(value) for each, value in zip(session.get_outputs(), found)}


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """ONNX Runtime's exceptions have no common class but Exception."""
    state = need("onnxruntime.capi.onnxruntime_pybind11_state")
    try:
        yield
    except tuple(getattr(state, name) for name in _RUNTIME_ERRORS) as error:
        raise ArtifactError(f"{path}: ONNX Runtime refuses: {error}") from error


def _tolerance(accuracy_level: int, outputs: Mapping[str, Tensor]) -> float:
    short = any(tensor.dtype is torch.float16 for tensor in outputs.values())
    return max(TOLERANCES[accuracy_level], _COARSE if short else 0.0)


def _compared(
    found: Mapping[str, Tensor], golden: Mapping[str, Tensor], tolerance: float
) -> CheckResult:
    """How outputs differ from the golden ones of the same names."""
    return compare([found.get(name) for name in golden], list(golden.values()), tolerance)

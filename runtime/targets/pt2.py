"""`.pt2`: an exported program in torch's own archive, as slimfx ops or as plain ATen.

form "op"    keeps slimfx's ops: needs slimfx to run, is what later targets lower from
form "aten"  the ops written out: runs wherever torch does, with the packed weights as they are
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

import slimfx.runtime.ops  # noqa: F401  op-form programs name these ops
import torch
from slimfx.passes.base import with_state
from slimfx.passes.decompose import decompose
from slimfx.runtime import archive, golden, unread_archive
from slimfx.runtime.golden import CheckResult
from slimfx.runtime.manifest import Manifest, attach, manifest_of
from slimfx.runtime.pack import ascending
from torch._export.verifier import SpecViolationError
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from slimfx.errors import ArtifactError

FORMS = ("op", "aten")
_UNREADABLE = (
    SpecViolationError,
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(ArithmeticError, RecursionError, SyntaxError, NameError, MemoryError),
)
"""What torch raises for a program it cannot read."""

TOLERANCE = 1e-4
"""Largest relative difference from the golden outputs that another machine may show."""


def save(
    program: ExportedProgram, path: str | Path, *, form: str = "op", verify: bool = True
) -> int:
    """Write a program to `path`, whole or not at all, and return the bytes written.

    The file carries the program's manifest, its tokenizer, and the outputs for its example inputs.
    With `verify` it is loaded again and must repeat them before it takes its place.

    Raises:
        ArtifactError: unknown form, no example inputs, no space, or the saved file differs.
    """
    path = Path(path)
    check_target(path, form)
    if program.example_inputs is None:
        raise ArtifactError(
            f"{path}: the program has no example inputs to record golden outputs of; export it "
            f"with some"
        )
    for name, tensor in {**program.state_dict, **program.constants}.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise ArtifactError(
                f"{path}: {name} is a {type(tensor).__name__}, which torch stores as a pickle; "
                f"export the model from plain tensors"
            )
    manifest = replace(manifest_of(program), form=form)
    inputs = program.example_inputs
    unread = unread_archive.left(program)
    stored = _written_out(program, unread) if form == "aten" else program
    own = {
        "manifest.json": manifest.to_json().encode(),
        "golden.safetensors": golden.record(stored, inputs),
    }
    if manifest.tokenizer is not None:
        own["tokenizer.json"] = manifest.tokenizer.encode()
    with archive.atomic(path) as temporary:
        with tempfile.TemporaryFile(dir=path.parent) as raw, temporary.open("wb") as file:
            sink = archive.Sink(raw)
            with warnings.catch_warnings():  # views of one stack, which is written once
                warnings.filterwarnings("ignore", "No complete tensor found in the group")
                torch.export.save(unread_archive.with_stand_ins(stored), sink)  # type: ignore[arg-type]
            sink.finish()
            archive.rewrite(raw, file, own, unread_archive.records(raw, unread))
        if verify and not _check(temporary, TOLERANCE, unread=bool(unread)).identical:
            raise ArtifactError(
                f"{path}: the saved file answers differently from the program; not written"
            )
        return temporary.stat().st_size


def check_target(path: Path, form: str) -> None:
    """Refuse what `save` could not write, before any work is done.

    Raises:
        ArtifactError: unknown form, or the folder is missing.
    """
    if form not in FORMS:
        raise ArtifactError(f"form {form!r} is not one of {', '.join(FORMS)}")
    if not path.parent.is_dir():
        raise ArtifactError(f"{path}: no such folder {path.parent}")


def load(path: str | Path) -> ExportedProgram:
    """Read a program that slimfx or torch.export.save wrote, after looking at what the file holds.

    Raises:
        ArtifactError: missing, damaged or unsafe file, or a program this torch cannot read.
    """
    program, _ = _load(Path(path))
    return program


def check(path: str | Path, *, tolerance: float = TOLERANCE) -> CheckResult:
    """Load a file and replay its golden outputs.

    Raises:
        ArtifactError: as `load`, or the file carries no golden outputs.
    """
    return _check(Path(path), tolerance, unread=False)


def _check(path: Path, tolerance: float, *, unread: bool) -> CheckResult:
    program, recorded = _load(path, unread=unread)
    if recorded is None:
        raise ArtifactError(f"{path}: carries no golden outputs; it was not written by slimfx")
    return golden.replay(program, recorded, tolerance)


def read_manifest(path: str | Path) -> Manifest:
    """What a file says of itself, without loading the program.

    Raises:
        ArtifactError: missing, damaged or unsafe file.
    """
    path = Path(path)
    with _opened(path) as file:
        return _manifest(archive.inspect(file, path.name))


def _manifest(own: dict[str, bytes]) -> Manifest:
    if "manifest.json" not in own:
        return Manifest()
    tokenizer = own.get("tokenizer.json")
    try:
        return Manifest.from_json(
            own["manifest.json"].decode(), None if tokenizer is None else tokenizer.decode()
        )
    except UnicodeDecodeError as error:
        raise ArtifactError(f"the manifest or the tokenizer is not text ({error})") from error


def _written_out(program: ExportedProgram, unread: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """The program without slimfx ops, its unread tensors still unread."""
    if not unread:
        return decompose(program)
    return with_state(decompose(unread_archive.with_stand_ins(program, whole=True)), unread)


def _load(path: Path, *, unread: bool = False) -> tuple[ExportedProgram, bytes | None]:
    with _opened(path) as file:
        own = archive.inspect(file, path.name)
        manifest = _manifest(own)
        try:
            with tempfile.TemporaryFile() as clean:  # only what was looked at reaches torch
                archive.rewrite(file, clean, {}, unread_archive.emptied(file) if unread else {})
                clean.seek(0)
                program = torch.export.load(clean)
        except _UNREADABLE as error:
            raise ArtifactError(
                f"{path.name}: torch {torch.__version__} cannot read this program: {error}"
            ) from error
    _check_state(program, path.name)
    if unread:
        unread_archive.leave_(program, path)
    else:
        _check_indices(program, path.name)
    attach(program, manifest)
    recorded = own.get("golden.safetensors")
    if recorded is not None:
        program.example_inputs = golden.inputs_of(recorded, program)
    return program, recorded


def _check_state(program: ExportedProgram, name: str) -> None:
    """The graph's parameters and persistent buffers are the file's, no more and no less."""
    wanted = {
        str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent)
    }
    held = set(program.state_dict)
    if wanted != held:
        raise ArtifactError(f"{name}: tensors {sorted(wanted ^ held)} are missing, or no one's")


def _check_indices(program: ExportedProgram, name: str) -> None:
    """The stored indices of every 2:4 weight ascend: kernels take that for granted."""
    signature = program.graph_signature
    held = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
    for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.slimfx.linear_24.default
    ):
        indices = program.state_dict.get(held.get(node.args[2].name, ""))
        K = node.args[0].meta["val"].shape[-1]
        if indices is not None and not (indices.dtype is torch.uint8 and ascending(indices, K)):
            raise ArtifactError(
                f"{name}: {held[node.args[2].name]}: the indices of a 2:4 weight do not ascend, "
                f"which no slimfx writes; kernels would read another weight than the reference"
            )


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from error

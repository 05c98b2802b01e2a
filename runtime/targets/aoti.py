"""AOTInductor: a program compiled to machine code, our kernels in it, that needs torch alone.

The package is torch's own `.pt2` of compiled code; `torch._inductor.aoti_load_package` and libtorch
read it. slimfx adds a record of what it was built for, so that `load` can refuse where the code
would crash.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from slimfx.passes.decompose import decompose, slimfx_nodes
from slimfx.passes.inputs import tensor_inputs
from slimfx.passes.lower_cpu import Lowered, lower_cpu
from slimfx.runtime import archive
from torch.export import ExportedProgram

from slimfx.errors import ArtifactError

MARCHES = ("native", "x86-64-v3", "x86-64-v4")
"""What code may be built for: this machine, any with AVX2, any with AVX-512."""
ACCURACIES = ("exact", "int8-activations")
_RECORD = "slimfx/aoti.json"
_NEEDS = {"x86-64-v3": ("avx2",), "x86-64-v4": ("avx2", "avx512_f", "avx512_bw", "avx512_vl")}
_LANES = {"x86-64-v3": 256, "x86-64-v4": 512}


@dataclass(frozen=True)
class Package:
    """What a package was built for and what it takes."""

    march: str
    accuracy: str
    needs: tuple[str, ...]
    """Instruction sets, as torch.cpu.get_capabilities names them."""
    torch: str
    inputs: tuple[dict[str, Any], ...]
    """Name, dtype and [smallest, largest] of each dimension, in order of the call."""
    left: tuple[str, ...] = ()
    """Why compressed linears were written out in ATen, a sentence each."""


def save(
    program: ExportedProgram,
    path: str | Path,
    *,
    march: str = "native",
    accuracy: str = "exact",
) -> tuple[int, Lowered]:
    """Compile a program into a package at `path`; bytes written, and what became of its linears.

    Compressed linears without a kernel are written out in ATen, as the report says.

    Args:
        march: one of `MARCHES`.
        accuracy: "exact", or "int8-activations": compressed linears round each row of their input
            to eight bits, which is faster where the processor multiplies such numbers.

    Raises:
        ArtifactError: unknown march or accuracy, missing folder, torch before 2.12, or the compiler
            failed.
    """
    path = Path(path)
    if march not in MARCHES:
        raise ArtifactError(f"march {march!r} is not one of {', '.join(MARCHES)}")
    if accuracy not in ACCURACIES:
        raise ArtifactError(f"accuracy {accuracy!r} is not one of {', '.join(ACCURACIES)}")
    if path.suffix != ".pt2":
        raise ArtifactError(f"{path}: torch loads compiled packages from files named .pt2 only")
    with archive.atomic(path) as part:  # looks at the folder before any work
        lowered, report = lower_cpu(program, rounded=accuracy == "int8-activations")
        if slimfx_nodes(lowered):
            lowered = decompose(lowered)
        package = Package(
            march=march,
            accuracy=accuracy,
            needs=_needs(march),
            torch=torch.__version__,
            inputs=tuple(_described(program)),
            left=report.left,
        )
        compiled = part.with_suffix(".pt2")
        try:
            _compile(lowered, compiled, march)
            _describe(compiled, package)
            compiled.replace(part)
        finally:
            compiled.unlink(missing_ok=True)
        return part.stat().st_size, report


def _describe(path: Path, package: Package) -> None:
    """Add slimfx's record to a package of torch."""
    with zipfile.ZipFile(path, "a") as file:
        root = file.namelist()[0].partition("/")[0]
        record = zipfile.ZipInfo(f"{root}/{_RECORD}", (1980, 1, 1, 0, 0, 0))
        file.writestr(record, json.dumps(asdict(package), sort_keys=True))


def _compile(program: ExportedProgram, path: Path, march: str) -> None:
    from slimfx.runtime.inductor import kernels
    from torch._inductor import aoti_compile_and_package, config
    from torch._inductor.exc import InductorError

    options: dict[str, Any] = {"freezing": False}
    if hasattr(config.aot_inductor, "enable_line_tables"):  # half the overhead, and paths
        options["aot_inductor.enable_line_tables"] = False
    if march != "native":
        options |= {"cpp.march": march, "cpp.simdlen": _LANES[march]}
    try:
        with kernels(), config.patch(options):
            aoti_compile_and_package(program, package_path=str(path))
    except (InductorError, RuntimeError) as error:
        raise ArtifactError(f"{path.name}: torch could not compile the program: {error}") from error


def load(path: str | Path) -> Callable[..., Any]:
    """The compiled program as a function of the exported program's arguments.

    Raises:
        ArtifactError: no package of slimfx, built for another processor or another torch; when
            called, an input of another dtype, or of a shape outside the exported range.
    """
    package = read(path)
    missing = [name for name in package.needs if not _capabilities().get(name)]
    if missing:
        raise ArtifactError(
            f"{path}: was built for {package.march}, this processor has no {', '.join(missing)}; "
            f"export it with march='x86-64-v3', or on this machine"
        )
    if _minor(package.torch) != _minor(torch.__version__):
        raise ArtifactError(
            f"{path}: was built for torch {package.torch}, this is {torch.__version__}; compiled "
            f"packages hold for one minor version: export it again"
        )
    run = torch._inductor.aoti_load_package(str(path))

    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_inputs([*args, *kwargs.values()], package)
        return run(*args, **kwargs)

    return checked


def read(path: str | Path) -> Package:
    """What a package says of itself, without loading its code.

    Raises:
        ArtifactError: missing or damaged file, or not written by slimfx.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if name.endswith(f"/{_RECORD}")]
            if not names:
                raise ArtifactError(f"{path}: holds no compiled program of slimfx")
            fields: dict[str, Any] = json.loads(file.read(names[0]))
        found: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return Package(**found)
    except (zipfile.BadZipFile, OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: not a complete compiled package ({error})") from error


def _needs(march: str) -> tuple[str, ...]:
    if march != "native":
        return _NEEDS[march]
    wanted = ("avx2", "avx512_f", "avx512_bw", "avx512_vl", "avx512_vnni", "avx512_bf16")
    return tuple(name for name in wanted if _capabilities().get(name))


def _capabilities() -> dict[str, Any]:
    if not hasattr(torch.cpu, "get_capabilities"):
        raise ArtifactError(
            f"torch {torch.__version__} does not say what the processor can do, which compiled "
            f"packages depend on; install torch 2.12 or later"
        )
    return dict(torch.cpu.get_capabilities())


def _minor(version: str) -> str:
    return version.split("+")[0].rpartition(".")[0]


def _described(program: ExportedProgram) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": str(each.dtype), "sizes": [list(size) for size in each.sizes]}
        for name, each in tensor_inputs(program).items()
    ]


def _check_inputs(values: list[Any], package: Package) -> None:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len(tensors) != len(package.inputs):
        names = ", ".join(each["name"] for each in package.inputs)
        raise ArtifactError(f"the program takes {names}; {len(tensors)} tensors were given")
    for tensor, each in zip(tensors, package.inputs):
        if str(tensor.dtype) != each["dtype"]:
            raise ArtifactError(f"{each['name']}: {tensor.dtype}, not {each['dtype']}")
        sizes = each["sizes"]
        fits = tensor.dim() == len(sizes) and all(
            low <= n and (high is None or n <= high) for n, (low, high) in zip(tensor.shape, sizes)
        )
        if not fits:
            ranges = ", ".join(
                str(a) if a == b else f"{a}..{'' if b is None else b}" for a, b in sizes
            )
            raise ArtifactError(
                f"{each['name']}: shape {tuple(tensor.shape)}, exported for [{ranges}]"
            )

"""AOTInductor: a program compiled to machine code, our kernels in it, that needs torch alone.

For the processor, or for the GPU of the machine that it is compiled on.

The package is torch's own `.pt2` of compiled code; `torch._inductor.aoti_load_package` and libtorch
read it. slimfx adds a record of what it was built for, so that `load` can refuse where the code
would crash, the program's manifest and tokenizer, and golden outputs for `check`.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from slimfx.passes.decompose import decompose, slimfx_nodes
from slimfx.passes.inputs import described
from slimfx.passes.lower_cpu import Lowered, lower_cpu
from slimfx.passes.lower_gpu import LoweredGpu
from slimfx.runtime import archive, golden
from slimfx.runtime.golden import CheckResult
from slimfx.runtime.manifest import Manifest, manifest_of
from slimfx.runtime.targets import aoti_gpu
from torch.export import ExportedProgram

from slimfx.errors import ArtifactError

MARCHES = ("native", "x86-64-v3", "x86-64-v4")
"""What code may be built for: this machine, any with AVX2, any with AVX-512."""
ACCURACIES = ("exact", "int8-activations")
TOLERANCE = {"exact": 1e-4, "int8-activations": 1e-2}
"""Largest difference from the golden outputs, relative to the largest of them; a rounding of an
input that falls to the other side is a 254th of its range."""
_RECORD = "slimfx/aoti.json"
_MANIFEST, _TOKENIZER = "slimfx/manifest.json", "slimfx/tokenizer.json"
_GOLDEN = "slimfx/golden.safetensors"
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
    gpu: str = ""
    """What its kernels are for, such as sm_90; "" for the processor."""


def save(
    program: ExportedProgram,
    path: str | Path,
    *,
    march: str = "native",
    accuracy: str = "exact",
    device: str = "cpu",
) -> tuple[int, Lowered | LoweredGpu]:
    """Compile a program into a package at `path`; bytes written, and what became of its linears.

    Compressed linears without a kernel are written out in ATen, as the report says.

    Args:
        march: one of `MARCHES`.
        accuracy: "exact", or "int8-activations": compressed linears round each row of their input
            to eight bits, which is faster where the processor multiplies such numbers.
        device: what the program is to run on, "cpu" or a GPU of this machine such as "cuda".

    Raises:
        ArtifactError: unknown march or accuracy, no such device, missing folder, torch before 2.12,
            a linear that no kernel takes on a GPU, or the compiler failed.
    """
    path = Path(path)
    if march not in MARCHES:
        raise ArtifactError(f"march {march!r} is not one of {', '.join(MARCHES)}")
    if accuracy not in ACCURACIES:
        raise ArtifactError(f"accuracy {accuracy!r} is not one of {', '.join(ACCURACIES)}")
    gpu = aoti_gpu.gpu_name(device, accuracy)
    if path.suffix != ".pt2":
        raise ArtifactError(f"{path}: torch loads compiled packages from files named .pt2 only")
    with archive.atomic(path) as part:  # looks at the folder before any work
        lowered, report = (
            aoti_gpu.lowered_on(device, program)
            if gpu
            else lower_cpu(program, rounded=accuracy == "int8-activations")
        )
        own = _own_records(program, lowered)
        if slimfx_nodes(lowered):
            lowered = decompose(lowered)
        package = Package(
            march=march,
            accuracy=accuracy,
            needs=_needs(march, gpu),
            torch=torch.__version__,
            inputs=tuple(described(program)),
            left=report.left,
            gpu=gpu,
        )
        compiled = part.with_suffix(".pt2")
        try:
            _compile(lowered, compiled, march)
            _rewrite(compiled, part, own | {_RECORD: json.dumps(asdict(package), sort_keys=True)})
        finally:
            compiled.unlink(missing_ok=True)
        return part.stat().st_size, report


def _own_records(program: ExportedProgram, lowered: ExportedProgram) -> dict[str, bytes | str]:
    """What slimfx adds: manifest, tokenizer, and what the package should answer, where the program
    has example inputs of plain tensors.
    """
    manifest = manifest_of(program)
    own: dict[str, bytes | str] = {_MANIFEST: manifest.to_json()}
    if manifest.tokenizer is not None:
        own[_TOKENIZER] = manifest.tokenizer
    inputs = lowered.example_inputs
    given = [] if inputs is None else [*inputs[0], *inputs[1].values()]
    if given and all(isinstance(value, torch.Tensor) for value in given):
        own[_GOLDEN] = golden.record(lowered, inputs)
    return own


def _rewrite(compiled: Path, path: Path, own: dict[str, bytes | str]) -> None:
    """A package of torch with records of ours, without its C++ source, and the same bytes each
    time: no names of temporary files, no serialization id.
    """
    with zipfile.ZipFile(compiled) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            _, _, record = entry.filename.partition("/")
            if record.endswith(".cpp") or record == ".data/serialization_id":
                continue
            with old.open(entry) as source, new.open(_entry(record), "w", force_zip64=True) as to:
                shutil.copyfileobj(source, to, 1 << 20)
        for name, content in sorted(own.items()):
            new.writestr(_entry(name), content)


def _entry(record: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(f"{archive.ROOT}/{record}", (1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    return entry


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
        with kernels(), config.patch(options), warnings.catch_warnings():
            ignored = r"`isinstance\(treespec, LeafSpec"  # torch's
            warnings.filterwarnings("ignore", ignored, FutureWarning)
            aoti_compile_and_package(program, package_path=str(path))
    except (InductorError, RuntimeError) as error:
        raise ArtifactError(f"{path.name}: torch could not compile the program: {error}") from error


def load(path: str | Path) -> Callable[..., Any]:
    """The compiled program as a function of the exported program's arguments.

    Raises:
        ArtifactError: no package of slimfx, damaged, built for another processor or another torch;
            when called, an input of another dtype, or of a shape outside the exported range.
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
    with _opened(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise ArtifactError(f"{path}: damaged, {damaged} is not what was written")
    aoti_gpu.check_gpu(path, package.gpu)
    run = torch._inductor.aoti_load_package(str(path))

    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_inputs([*args, *kwargs.values()], package)
        return aoti_gpu.on_gpu(run, args, kwargs) if package.gpu else run(*args, **kwargs)

    return checked


def check(path: str | Path, *, tolerance: float | None = None) -> CheckResult:
    """Run a package on its recorded inputs and compare with its golden outputs.

    Raises:
        ArtifactError: as `load`, or the package has no golden outputs.
    """
    recorded = _records(path).get(_GOLDEN)
    if recorded is None:
        raise ArtifactError(f"{path}: carries no golden outputs")
    package = read(path)
    own = aoti_gpu.TOLERANCE if package.gpu else TOLERANCE[package.accuracy]
    limit = own if tolerance is None else tolerance
    return golden.replay_call(load(path), recorded, limit)


def is_package(path: str | Path) -> bool:
    """Does a file hold machine code that slimfx wrote, rather than an exported program?"""
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith(f"/{_RECORD}") for name in file.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the program that was compiled; an empty one in packages that have none.

    Raises:
        ArtifactError: as `read`.
    """
    own = _records(path)
    if _MANIFEST not in own:
        return Manifest()
    try:
        tokenizer = own[_TOKENIZER].decode() if _TOKENIZER in own else None
        return Manifest.from_json(own[_MANIFEST].decode(), tokenizer)
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: its manifest or tokenizer is no text ({error})") from error


def read(path: str | Path) -> Package:
    """What a package says of itself, without loading its code.

    Raises:
        ArtifactError: missing or damaged file, or not written by slimfx.
    """
    try:
        fields: dict[str, Any] = json.loads(_records(path)[_RECORD])
        found: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        package = Package(**found)
        texts = (package.march, package.torch, package.gpu, *package.needs)
        if package.accuracy not in ACCURACIES or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"accuracy {package.accuracy!r}, needs {package.needs!r}")
        return package
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a complete compiled package ({error})") from error


def _records(path: str | Path) -> dict[str, bytes]:
    """slimfx's own records by name; that of what it was built for is among them."""
    with _opened(path) as file:
        found = {}
        for name in (_RECORD, _MANIFEST, _TOKENIZER, _GOLDEN):
            entries = [e for e in file.infolist() if e.filename.endswith(f"/{name}")]
            if entries:
                archive.check_ratio(entries[0], str(path))
                found[name] = file.read(entries[0])
    if _RECORD not in found:
        raise ArtifactError(f"{path}: holds no compiled program of slimfx")
    return found


@contextmanager
def _opened(path: str | Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except (
        *(zipfile.BadZipFile, OSError, EOFError, zlib.error),
        *(NotImplementedError, RuntimeError, ValueError),  # packed in an unusual way, encrypted
    ) as error:
        raise ArtifactError(f"{path}: not a complete compiled package ({error})") from error


def _needs(march: str, gpu: str) -> tuple[str, ...]:
    if gpu and not hasattr(torch.cpu, "get_capabilities"):
        return ()  # all that is fast is on the GPU
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

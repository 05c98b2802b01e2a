"""Golden outputs: what a program answered to its example inputs when it was saved, to ask again
anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from slimfx.passes.base import lifted_tensor, written_nodes
from slimfx.runtime.unread import ReadingInterpreter, read
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from slimfx.errors import ArtifactError

_KEPT = 256
"""Elements kept of each output, evenly spaced; a digest stands for the rest."""


@dataclass(frozen=True)
class CheckResult:
    """How the outputs of this machine differ from the golden ones."""

    identical: bool
    """Every output is the same to the bit."""
    max_difference: float
    """Largest difference over the kept elements, relative to the largest golden value."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Identical, or within the tolerance."""
        return self.identical or self.max_difference <= self.tolerance


def record(program: ExportedProgram, inputs: tuple[tuple, dict[str, Any]]) -> bytes:
    """Run a program on (args, kwargs) and store inputs, samples of the outputs and their
    digests.
    """
    flat, _ = pytree.tree_flatten(inputs)
    outputs = _run(program, inputs)
    named = {f"input.{i}": value for i, value in enumerate(flat)}
    tensors = {k: v.clone().contiguous() for k, v in named.items() if isinstance(v, Tensor)}
    plain = {k: v for k, v in named.items() if not isinstance(v, Tensor)}
    tensors |= {f"output.{i}": _sample(t) for i, t in enumerate(outputs)}
    metadata = {
        "plain": json.dumps(plain),
        "digests": json.dumps([_digest(t) for t in outputs]),
        "keywords": json.dumps(list(inputs[1])),
    }
    return ordered(safetensors.torch.save(tensors, metadata=metadata))


def ordered(data: bytes) -> bytes:
    """The same file, its header's keys in order: safetensors keeps metadata in a hash map."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"))
    padded = header.encode() + b" " * (-len(header.encode()) % 8)
    return len(padded).to_bytes(8, "little") + padded + data[8 + length :]


def inputs_of(golden: bytes, program: ExportedProgram) -> tuple[tuple, dict[str, Any]]:
    """The recorded inputs as (args, kwargs)."""
    return _inputs(_parse(golden), program)


def replay(program: ExportedProgram, golden: bytes, tolerance: float) -> CheckResult:
    """Run a program on the recorded inputs and compare.

    Raises:
        ArtifactError: the record is damaged, or the program does not run on its inputs.
    """
    recorded = _parse(golden)
    return _replayed(recorded, lambda: _run(program, _inputs(recorded, program)), tolerance)


def replay_call(run: Callable[..., Any], golden: bytes, tolerance: float) -> CheckResult:
    """The same for code that takes the recorded inputs as keyword arguments, after those without
    a name of their own.

    Raises:
        ArtifactError: as `replay`.
    """
    recorded = _parse(golden)
    named = [recorded.tensors.get(f"input.{i}") for i in range(len(recorded.tensors))]
    values = [value for value in named if value is not None]
    args, names = values[: len(values) - len(recorded.keywords)], recorded.keywords

    def outputs() -> list[Tensor]:
        found = run(*args, **dict(zip(names, values[len(args) :])))
        return [t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]

    return _replayed(recorded, outputs, tolerance)


def _replayed(
    recorded: _Recorded, run: Callable[[], list[Tensor]], tolerance: float
) -> CheckResult:
    expected = [recorded.tensors.get(f"output.{i}") for i in range(len(recorded.digests))]
    try:
        outputs = run()
    except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
        raise ArtifactError(f"the program does not run on its recorded inputs: {error}") from error
    if len(outputs) != len(expected) or any(e is None for e in expected):
        raise ArtifactError(
            f"the program has {len(outputs)} outputs, {len(expected)} were recorded"
        )
    worst = max((_difference(_sample(o), e) for o, e in zip(outputs, expected)), default=0.0)
    same = [_digest(output) for output in outputs] == recorded.digests
    if same and worst > 0:
        raise ArtifactError("the golden outputs are damaged: samples and digests contradict")
    return CheckResult(identical=same, max_difference=worst, tolerance=tolerance)


def compare(
    found: Sequence[Tensor | None], expected: Sequence[Tensor], tolerance: float
) -> CheckResult:
    """How outputs differ from golden ones, in order; one that is missing differs infinitely.

    Raises:
        ArtifactError: another number of them.
    """
    if len(found) != len(expected):
        raise ArtifactError(f"{len(found)} outputs were given, {len(expected)} were recorded")
    pairs = list(zip(found, expected))
    worst = max((_difference(a, b) for a, b in pairs), default=0.0)
    same = all(a is not None and a.dtype is b.dtype and torch.equal(a, b) for a, b in pairs)
    return CheckResult(identical=same, max_difference=worst, tolerance=tolerance)


def _difference(found: Tensor | None, expected: Tensor | None) -> float:
    """Largest difference relative to the largest golden value; infinite where not comparable."""
    if (
        found is None
        or expected is None
        or found.shape != expected.shape
        or found.dtype != expected.dtype
    ):
        return math.inf
    if not found.numel():
        return 0.0
    a, b = found.double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if not (same | (a.isfinite() & b.isfinite())).all():
        return math.inf
    gap = torch.where(same, 0.0, (a - b).abs()).max().item()
    return gap / max(torch.where(b.isfinite(), b.abs(), 0.0).max().item(), 1e-30)


@dataclass(frozen=True)
class _Recorded:
    tensors: dict[str, Tensor]
    plain: dict[str, Any]
    digests: list[str]
    keywords: tuple[str, ...]


def _inputs(recorded: _Recorded, program: ExportedProgram) -> tuple[tuple, dict[str, Any]]:
    tensors = {k: v for k, v in recorded.tensors.items() if k.startswith("input.")}
    values = {**recorded.plain, **tensors}
    names = [f"input.{i}" for i in range(program.call_spec.in_spec.num_leaves)]
    if sorted(values) != sorted(names):
        raise ArtifactError(f"the recorded inputs are {sorted(values)}, the program takes {names}")
    flat = [values[name] for name in names]
    args, kwargs = pytree.tree_unflatten(flat, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def _run(program: ExportedProgram, inputs: tuple[tuple, dict[str, Any]]) -> list[Tensor]:
    if any(tensor.is_meta for tensor in program.state_dict.values()):
        return _run_reading(program, inputs)
    module = program.module()
    for part in module.modules():  # a program that writes to its buffers must not change here
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.clone()
    copies = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = module(*copies[0], **copies[1])
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def _run_reading(program: ExportedProgram, inputs: tuple[tuple, dict[str, Any]]) -> list[Tensor]:
    """The same with no more in memory than the tensors of one node, and what the program writes."""
    specs = program.graph_signature.input_specs
    lifted = [lifted_tensor(program, s) for s in specs if s.kind is not InputKind.USER_INPUT]
    values = [*lifted, *pytree.tree_leaves(inputs)]
    written = {node.name for node in written_nodes(program.graph.nodes)}
    own = [
        read(value).clone() if spec.arg.name in written else value  # type: ignore[union-attr]
        for spec, value in zip(specs, values, strict=True)
    ]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        found = ReadingInterpreter(program.graph_module).run(*own)
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    pairs = zip(kinds, found, strict=True)
    return [v for kind, v in pairs if kind is OutputKind.USER_OUTPUT and isinstance(v, Tensor)]


def _sample(output: Tensor) -> Tensor:
    flat = output.detach().reshape(-1)
    if len(flat) <= _KEPT:
        return flat.clone()
    return flat[torch.linspace(0, len(flat) - 1, _KEPT, dtype=torch.float64).long()].clone()


def _digest(output: Tensor) -> str:
    data = output.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
    kind = f"{output.dtype} {tuple(output.shape)} ".encode()
    return hashlib.sha256(kind + data.tobytes()).hexdigest()


def _parse(golden: bytes) -> _Recorded:
    try:
        tensors = safetensors.torch.load(golden)
        length = int.from_bytes(golden[:8], "little")
        metadata = json.loads(golden[8 : 8 + length])["__metadata__"]
        plain, digests = json.loads(metadata["plain"]), json.loads(metadata["digests"])
        keywords = json.loads(metadata.get("keywords", "[]"))  # format 1.0 had none
    except (
        safetensors.SafetensorError,
        ValueError,
        LookupError,
        TypeError,
        RecursionError,
    ) as error:
        raise ArtifactError(f"the golden outputs are damaged: {error!r}") from error
    if not isinstance(plain, dict) or not (
        isinstance(digests, list) and isinstance(keywords, list)
    ):
        raise ArtifactError("the golden outputs are damaged: inputs or digests are missing")
    return _Recorded(tensors, plain, digests, tuple(map(str, keywords)))

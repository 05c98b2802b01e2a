"""Programs in every form, as generation steps through them: tokens in, the next one's logits out.

with a cache   step([prompt], [0 .. n-1]), then step([token], [n]), ...: all before is remembered
without        the text so far goes through the program for each token, or its last `longest`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx.errors import SlimError
from slimfx.passes.inputs import call_arguments, module_of, tensor_inputs
from slimfx.runtime import sidecar
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.targets import aoti, hf, onnx, pt2, pte

ENDINGS = {"pt2": ".pt2", "onnx": ".onnx", "pte": ".pte"}
"""How the names of files end that a stepper is made of; it is made of folders too."""
_CACHED = ["input_ids", "cache_position"]
_PAST, _PRESENT = "past_key_values.", "present."
_Sizes = tuple[int, int | None]


@dataclass(frozen=True)
class Stepper:
    """A language model in some form, and what its text is made of."""

    run: Callable[..., Tensor]
    """From input_ids [rows, S], and cache_position [S] if it has a cache, as keyword tensors, to
    logits [rows, S, vocabulary]."""
    rows: _Sizes
    """How many it takes at least and at most (None: any number)."""
    length: _Sizes
    """The same of the tokens in a row."""
    cached: bool
    tokenizer: str | None
    """A `tokenizers` JSON document."""
    end: int | None
    """The token that ends a text."""

    @torch.no_grad()
    def step(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of what comes after the last token.

        Args:
            input_ids: [rows, S]; with a cache only the tokens it has not seen.
            cache_position: [S], where these stand in the text; nothing to a program without cache.
        """
        inputs = {"input_ids": input_ids}
        if self.cached:
            inputs["cache_position"] = cache_position
        return self.run(**inputs)[:, -1]


class Reader:
    """A text that grows: remembered by the program's cache, or read again from its beginning."""

    def __init__(self, stepper: Stepper) -> None:
        """Before the first token."""
        self._stepper = stepper
        self._seen = torch.empty(0, 0, dtype=torch.int64)

    def takes(self, tokens: int) -> bool:
        """Is there room for so many more? A program without a cache forgets the beginning."""
        most = self._stepper.length[1]
        return not self._stepper.cached or most is None or self._seen.shape[1] + tokens <= most

    def read(self, tokens: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of the token after these [rows, S], which go on from before."""
        seen = self._seen.shape[1]
        self._seen = torch.cat([self._seen, tokens], dim=1) if seen else tokens
        if self._stepper.cached:
            return self._stepper.step(tokens, torch.arange(seen, self._seen.shape[1]))
        shortest, longest = self._stepper.length
        text = self._seen if longest is None else self._seen[:, -longest:]
        missing = max(shortest - text.shape[1], 0)
        text = torch.cat([text[:, :1].expand(-1, missing), text], dim=1)
        return self._stepper.step(text, torch.arange(text.shape[1]))


def stepper(source: ExportedProgram | str | Path | Stepper) -> Stepper:
    """A program, the file of one, or what is a stepper already.

    Args:
        source: files are exported programs and compiled packages (.pt2), .onnx and .pte; folders
            are those that `export` wrote.

    Raises:
        SlimError: it is not input_ids -> logits, or its runtime is not installed.
        ArtifactError: no such file, or one that cannot run here.
    """
    if isinstance(source, Stepper):
        return source
    if isinstance(source, ExportedProgram):
        return _of_program(source)
    path = Path(source)
    for module in (onnx, pte, hf):
        if (path.is_dir() and module is hf) or path.suffix == ENDINGS.get(module.TARGET):
            return _of_export(path, module.TARGET, module.load)
    return _of_package(path) if aoti.is_package(path) else _of_program(pt2.load(path))


def is_artifact(source: str) -> bool:
    """Is it a file of a program or a folder that `export` wrote, not a model to capture?"""
    path = Path(source)
    return path.suffix in ENDINGS.values() or (path / hf.SIDECAR).is_file()


def _of_program(program: ExportedProgram) -> Stepper:
    described = [asdict(each) for each in tensor_inputs(program).values()]
    cached, rows, length = _face(described)
    module, manifest = module_of(program), manifest_of(program)

    def run(**tensors: Tensor) -> Tensor:
        args, kwargs = call_arguments(program, tensors)
        return module(*args, **kwargs)

    return Stepper(run, rows, length, cached, manifest.tokenizer, manifest.eos_token)


def _of_package(path: Path) -> Stepper:
    """The compiled package of `slimfx.export`."""
    cached, rows, length = _face(aoti.read(path).inputs)
    manifest = aoti.read_manifest(path)
    return Stepper(aoti.load(path), rows, length, cached, manifest.tokenizer, manifest.eos_token)


def _of_export(path: Path, target: str, load: Callable[[Path], Callable[..., Any]]) -> Stepper:
    """A file or folder with a sidecar, which says what the program takes."""
    beside = path / hf.SIDECAR if path.is_dir() else Path(f"{path}{sidecar.SUFFIX}")
    held = sidecar.read(beside, target)
    past = {name: golden for name, golden in held.inputs.items() if name.startswith(_PAST)}
    cached, rows, length = _face(held.record["inputs"])
    run = load(path)
    if past:
        run = _Remembering(run, tuple(held.inputs), tuple(held.outputs), past)
        rows = (1, None)  # a cache that grows is not bound to the rows of the captured one
    return Stepper(run, rows, length, cached, held.manifest.tokenizer, held.manifest.eos_token)


class _Remembering:
    """A program that takes earlier keys and values and gives them back with those it adds."""

    def __init__(
        self,
        run: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        past: Mapping[str, Tensor],
    ) -> None:
        """`past`: such inputs by name, [rows, heads, any number, width]."""
        self._run, self._inputs, self._outputs = run, inputs, outputs
        self._past = {name: golden[:0] for name, golden in past.items()}

    def __call__(self, *, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """Logits; what it remembers from `cache_position` on is forgotten."""
        rows, seen = len(input_ids), int(cache_position[0])
        past = {name: _first(held, rows, seen) for name, held in self._past.items()}
        own = {
            "input_ids": input_ids,
            "attention_mask": input_ids.new_ones(rows, seen + input_ids.shape[1]),
            "position_ids": cache_position.expand(rows, -1),
        }
        given = own | past
        outputs = self._run(**{name: given[name] for name in self._inputs})
        found = dict(zip(self._outputs, outputs, strict=True))
        self._past = {name: found[name.replace(_PAST, _PRESENT)] for name in past}
        return found["logits"]


def _first(held: Tensor, rows: int, seen: int) -> Tensor:
    """The first keys or values of a cache [rows, heads, any number, width]."""
    return held[:, :, :seen] if seen else held.new_empty(rows, held.shape[1], 0, held.shape[3])


def _face(inputs: Sequence[Mapping[str, Any]]) -> tuple[bool, _Sizes, _Sizes]:
    """Has it a cache, how many rows it takes, and how many tokens in each?

    Raises:
        SlimError: it takes something else.
    """
    names = [each["name"] for each in inputs]
    if names not in (["input_ids"], _CACHED):
        raise SlimError(
            f"generation needs a program of input_ids alone, or of input_ids and cache_position; "
            f"this one takes {', '.join(names) or 'no tensors'}"
        )
    rows, length = (tuple(size) for size in inputs[0]["sizes"])
    return names == _CACHED, rows, length

"""What fine-tuning reads: windows of text side by side, or padded documents, in an order that a
seed fixes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx import data
from slimfx.errors import FinetuneError
from slimfx.passes.base import written_buffers
from slimfx.passes.inputs import rows_at_once, tensor_inputs

Batch = dict[str, Tensor]

IGNORED = -100
"""The label of padding."""
_CHARACTERS = 16
"""Characters looked at for each token that is trained on."""


@dataclass(frozen=True)
class Training:
    """How much is trained on, and how."""

    tokens: int = 300_000
    """Trained on in all; text that has fewer is gone through again."""
    length: int = 1024
    """Tokens of a window; a program whose range ends earlier gets its own longest length."""
    accumulate: int = 64
    """Windows whose gradients make one step."""
    rate: float = 0.03
    """Largest change of an adapter in the first step, relative to its root mean square; falls
    linearly to zero."""
    seed: int = 0
    """Of the order of the windows."""
    save_every: int = 10
    """Steps between checkpoints, where there is a folder for them."""

    def __post_init__(self) -> None:
        limits = {"tokens": 1, "length": 2, "accumulate": 1, "save_every": 1, "seed": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise FinetuneError(f"{name} is {getattr(self, name)}, the least is {least}")
        if not 0 < self.rate < 1:
            raise FinetuneError(f"rate is {self.rate}, not between 0 and 1")


def training_batches(
    program: ExportedProgram, source: Any, how: Training, processes: int = 1
) -> list[Batch]:
    """Windows in the order they are trained on, or padded documents, with their labels; a multiple
    of `processes` of them, for which the first are taken twice.

    Raises:
        FinetuneError: no language model, too little text, or tokens the program does not know.
    """
    inputs, known = tensor_inputs(program), vocabulary(program)
    strange = sorted(set(inputs) - {"input_ids", "attention_mask"})
    if "input_ids" not in inputs or strange or known is None or written_buffers(program):
        raise FinetuneError(
            f"the program takes {', '.join(inputs) or 'no tensors'}; fine-tuning needs a language "
            f"model without a cache: input_ids, or input_ids and attention_mask, to logits"
        )
    length, rows = data.longest(program, how.length), rows_at_once(program, 1)
    if "attention_mask" in inputs:
        found = _documents(program, source, how, length, rows)
    else:
        found = _windows(program, source, how, length, rows)
    largest = max((int(batch["input_ids"].max()) for batch in found), default=0)
    if largest >= known:
        raise FinetuneError(
            f"the text has token {largest} and the program knows {known}: it is of another "
            f"tokenizer; capture the model from the folder of its own"
        )
    return found + found[: -len(found) % processes]


def _windows(
    program: ExportedProgram, source: Any, how: Training, length: int, rows: int
) -> list[Batch]:
    stream = data.token_stream(program, source, characters=_CHARACTERS * how.tokens, seed=how.seed)
    windows = stream[: len(stream) // length * length].view(-1, length)
    if not len(windows):
        raise FinetuneError(
            f"the text has {len(stream)} tokens, one window needs {length}; give more text, or set "
            f"the length"
        )
    count = math.ceil(how.tokens / (length * rows)) * rows
    return [
        {"input_ids": part, "labels": part}
        for part in windows[_order(len(windows), count, how.seed)].split(rows)
    ]


def _documents(
    program: ExportedProgram, source: Any, how: Training, length: int, rows: int
) -> list[Batch]:
    padded = data.padded_batches(program, data.documents(source), length, rows)
    found = []
    for batch in padded:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        if len(labels) == rows and (labels[:, 1:] != IGNORED).any():
            found.append({**batch, "labels": labels})
    if not found:
        raise FinetuneError(
            f"the text has no {rows} documents of two tokens or more; give more text"
        )
    chosen, left = [], how.tokens
    for i in _order(len(found), how.tokens, how.seed).tolist():
        if left <= 0:
            break
        chosen.append(found[i])
        left -= int(found[i]["attention_mask"].sum())
    return chosen


def _order(count: int, wanted: int, seed: int) -> Tensor:
    """`wanted` of so many windows, each as often as the others up to one, drawn by the seed."""
    draw = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(count, generator=draw) for _ in range(math.ceil(wanted / count))]
    return torch.cat(passes)[:wanted]


def vocabulary(program: ExportedProgram) -> int | None:
    """How many tokens the program's logits [batch, tokens, V] tell apart; None if it has none."""
    outputs = next(n for n in program.graph.nodes if n.op == "output").args[0]
    value = outputs[0].meta.get("val") if outputs else None
    if not isinstance(value, Tensor) or value.dim() != 3 or not value.is_floating_point():
        return None
    return int(value.shape[-1]) if isinstance(value.shape[-1], int) else None

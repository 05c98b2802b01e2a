"""How good a program is: perplexity of a language model, cosine to the dense model's embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.functional import cosine_similarity, cross_entropy

from slimfx import data
from slimfx.errors import CalibrationError, SlimError
from slimfx.passes.inputs import (
    call_arguments,
    module_of,
    rows_at_once,
    tensor_inputs,
    text_batch,
)

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Quality:
    """One figure, and what it was measured on."""

    metric: str
    """"perplexity" (lower is better) or "cosine" (1 is the dense model itself)."""
    value: float
    samples: int
    """Windows or documents."""
    tokens: int


def evaluate(
    program: ExportedProgram,
    source: Any = None,
    *,
    dense: ExportedProgram | None = None,
    samples: int | None = None,
    length: int = 512,
    progress: Progress | None = None,
) -> Quality:
    """Perplexity on a text, or with `dense` the mean cosine of both programs' embeddings.

    Args:
        source: as in `slimfx.data`; None takes the part of the running Python's English that
            calibration leaves out.
        dense: the program before compression, for encoders.
        samples: how many windows or documents at most.
        length: tokens of a window, at most what the program takes.

    Raises:
        CalibrationError: too little text, or no tokenizer.
        SlimError: perplexity of a program that does not answer with logits.
    """
    if source is None:
        source = data.python_documents()[1]
    size = data.longest(program, length) if "input_ids" in tensor_inputs(program) else length
    tell = progress or (lambda share, what: None)
    if dense is not None:
        if data.is_batches(source):
            batches = list(source)
        else:
            batches = data.padded_batches(program, data.documents(source)[:samples], size, 8)
        return _cosine(program, dense, batches, tell)
    return _perplexity(program, data.token_stream(program, source), size, samples, tell)


@torch.no_grad()
def _perplexity(
    program: ExportedProgram, stream: Tensor, length: int, samples: int | None, tell: Progress
) -> Quality:
    """exp of the mean loss over windows side by side, each window's first token left out."""
    windows = stream[: len(stream) // length * length].view(-1, length)[:samples]
    if not len(windows):
        raise CalibrationError(
            f"the text has {len(stream)} tokens, one window needs {length}; give more text"
        )
    module, rows = module_of(program), rows_at_once(program, 4)
    total, count, done = 0.0, 0, 0
    for batch in windows.split(rows):
        args, kwargs = call_arguments(program, text_batch(program, batch))
        logits = _logits(module(*args, **kwargs), int(stream.max()))[: len(batch), :-1]
        loss = cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")
        total += loss.item()
        count += batch[:, 1:].numel()
        done += len(batch)
        tell(done / len(windows), "perplexity")
    return Quality("perplexity", math.exp(total / count), len(windows), count)


def _logits(output: Any, last: int) -> Tensor:
    """The output, if it can be logits [batch, tokens, V] over tokens up to `last`."""
    shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[2] <= last:
        raise SlimError(
            f"perplexity needs logits [batch, tokens, V] over the text's tokens 0 to {last}; the "
            f"program answers with {shape}. For an encoder give the dense model (dense=, --dense)"
        )
    return output


@torch.no_grad()
def _cosine(
    program: ExportedProgram, dense: ExportedProgram, batches: list[Any], tell: Progress
) -> Quality:
    """Mean cosine between the two programs' embeddings, one for each sample."""
    modules = (module_of(program), module_of(dense))
    found, tokens = [], 0
    for i, batch in enumerate(batches):
        pair = []
        for each, module in zip((program, dense), modules, strict=True):
            args, kwargs = call_arguments(each, batch)
            pair.append(_embedding(module(*args, **kwargs), batch))
        found.append(cosine_similarity(pair[0], pair[1], dim=-1))
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        tokens += int(mask.sum()) if mask is not None else len(pair[0])
        tell((i + 1) / len(batches), "cosine")
    if not found:
        raise CalibrationError("no batch to evaluate was given; one is the least")
    values = torch.cat(found)
    return Quality("cosine", values.double().mean().item(), len(values), tokens)


def _embedding(output: Any, batch: Any) -> Tensor:
    """[batch, D]: the mean over the unmasked tokens of [batch, tokens, D], else all, flattened."""
    output = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(output, Tensor):
        raise SlimError(f"the program answers with {type(output).__name__}, not a tensor")
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if mask is None or output.dim() != 3:
        return output.flatten(1).double()
    weight = mask[..., None].double()
    return (output.double() * weight).sum(1) / weight.sum(1)

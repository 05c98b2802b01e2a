"""Text from a program that maps tokens to logits, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx.data import longest, tokenizer_of
from slimfx.errors import SlimError
from slimfx.passes.inputs import call_arguments, tensor_inputs
from slimfx.runtime.manifest import manifest_of


def generate(
    program: ExportedProgram,
    prompt: str,
    *,
    tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece.

    Args:
        tokens: how many tokens at most; an end token ends earlier.
        temperature: 0 takes the most likely token, higher values sample.
        top_p: sample among the most likely tokens that together have this probability.
        seed: of the sampling; the global random state is not used.

    Raises:
        SlimError: the program does not take input_ids alone, or a value is out of range.
    """
    inputs = tensor_inputs(program)
    if list(inputs) != ["input_ids"]:
        raise SlimError(
            f"generation needs a program of input_ids alone, this one takes {', '.join(inputs)}"
        )
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise SlimError(
            f"temperature {temperature} must not be negative, and top_p {top_p} be in (0, 1]"
        )
    start = tokenizer_of(program).encode(prompt, add_special_tokens=False).ids
    if not start:
        raise SlimError("the prompt is empty; give at least one word")
    stream = _tokens(program, start, temperature, top_p, torch.Generator().manual_seed(seed))
    return _text(program, islice(stream, tokens))


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from logits [vocabulary]."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (
        (logits.float() / temperature).softmax(-1).sort(descending=True, stable=True)
    )
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < top_p, probabilities, torch.zeros(()))
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def _tokens(
    program: ExportedProgram,
    start: list[int],
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """The continuation, token by token, over the longest context the program takes."""
    module = program.module()
    window = longest(program, 1 << 30)
    shortest = tensor_inputs(program)["input_ids"].sizes[-1][0]
    end = manifest_of(program).eos_token
    ids = list(start)
    while True:
        context = ids[-window:]
        context = [context[0]] * (shortest - len(context)) + context
        args, kwargs = call_arguments(program, {"input_ids": torch.tensor([context])})
        token = choose(module(*args, **kwargs)[0, -1], temperature, top_p, generator)
        if token == end:
            return
        yield token
        ids.append(token)


def _text(program: ExportedProgram, tokens: Iterator[int]) -> Iterator[str]:
    """Decode as tokens come; an unfinished character waits for the rest of its bytes."""
    tokenizer = tokenizer_of(program)
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text

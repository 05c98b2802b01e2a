"""Text from a program that maps tokens to logits, one token at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx.data import read_tokenizer
from slimfx.errors import SlimError
from slimfx.stepper import Reader, Stepper, stepper


@dataclass
class Took:
    """What a text took so far."""

    prompt_tokens: int
    tokens: int = 0
    """Chosen so far; the end token counts."""
    prefill_seconds: float = 0.0
    """Until the first token was chosen."""
    decode_seconds: float = 0.0
    """For all the others."""
    ended: str = ""
    """Why the text ended: "tokens", "end token", "stop" or "full" (so is the cache)."""

    def figures(self) -> dict[str, Any]:
        """Counts and tokens a second; the first token is chosen in the prompt's own pass."""
        read, written, more = self.prefill_seconds, self.decode_seconds, self.tokens - 1
        return {
            "prompt_tokens": self.prompt_tokens,
            "prefill_tokens_per_second": round(self.prompt_tokens / read, 1) if read else None,
            "tokens": self.tokens,
            "decode_tokens_per_second": round(more / written, 1) if written else None,
            "ended": self.ended,
        }


class Pieces(Iterator[str]):
    """A text piece by piece; nothing is computed before the next piece is asked for."""

    def __init__(self, pieces: Iterator[str], took: Took) -> None:
        """`took` is kept up to date by whoever makes the pieces."""
        self._pieces, self.took = pieces, took

    def __next__(self) -> str:
        return next(self._pieces)


@overload  # a str is a sequence of str
def generate(  # type: ignore[overload-overlap]
    source: ExportedProgram | str | Path | Stepper,
    prompt: str,
    *,
    tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
) -> Pieces:
    """One prompt: pieces."""


@overload
def generate(
    source: ExportedProgram | str | Path | Stepper,
    prompt: Sequence[str],
    *,
    tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
) -> list[str]:
    """Several prompts: whole texts."""


def generate(
    source: ExportedProgram | str | Path | Stepper,
    prompt: str | Sequence[str],
    *,
    tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
) -> Pieces | list[str]:
    """The continuation of a prompt piece by piece, or of several prompts at once as texts.

    A program with a cache (`capture(..., kv_cache=True)`) reads the prompt once and then each token
    alone; its text ends where the cache is full. One without reads the text again for each token,
    the last tokens of it where it grows too long.

    Args:
        source: a program, a file of one (.pt2, compiled or not, .onnx or .pte), or a stepper, which
            can be used again and again, one text after the other.
        prompt: several prompts must have the same number of tokens: rows share their positions.
        tokens: how many tokens at most; an end token ends earlier.
        temperature: 0 takes the most likely token, higher values sample.
        top_p: sample among the most likely tokens that together have this probability.
        seed: of the sampling, for prompt i it is seed + i; the global random state is not used.
        stop: the text ends before the first of these.

    Raises:
        SlimError: the program is not tokens -> logits, a value is out of range, or prompts are too
            many, too long or of unequal length.
    """
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise SlimError(
            f"temperature {temperature} must not be negative, and top_p {top_p} be in (0, 1]"
        )
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(stops):
        raise SlimError("a stop is empty; give at least one character")
    model = stepper(source)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    ids = _start(model, prompts)
    how = _Sampling(temperature, top_p)
    texts = [_Text(model, stops, seed + i) for i in range(len(prompts))]
    took = Took(prompt_tokens=ids.shape[1])
    steps = _grow(model, texts, ids, how, tokens, took)
    if isinstance(prompt, str):
        return Pieces((pieces[0] for pieces in steps if pieces[0] is not None), took)
    found = [""] * len(prompts)
    for pieces in steps:
        found = [text + (piece or "") for text, piece in zip(found, pieces, strict=True)]
    return found


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


@dataclass(frozen=True)
class _Sampling:
    temperature: float
    top_p: float


class _Text:
    """One text as its tokens come."""

    def __init__(self, model: Stepper, stops: Sequence[str], seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.ended = ""
        self._tokenizer = read_tokenizer(model.tokenizer)
        self._end, self._stops = model.end, stops
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str | None:
        """What there is to show now; None for nothing at the end.

        An unfinished character waits for the rest of its bytes, and what may become a stop for
        more.
        """
        if self.ended:
            return None
        if token == self._end:
            return self.finish("end token")
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        found = [text.find(stop) for stop in self._stops if stop in text]
        if found:
            self.ended = "stop"
            return text[self._shown : min(found)] or None
        if text.endswith("\ufffd"):
            return ""
        return self._show(text, len(text) - self._held(text))

    def finish(self, why: str) -> str | None:
        """What was held back for a stop that does not come any more."""
        self.ended = why
        text = self._tokenizer.decode(self._ids)
        return None if text.endswith("\ufffd") else self._show(text, len(text)) or None

    def _show(self, text: str, until: int) -> str:
        piece = text[self._shown : until]
        self._shown = max(self._shown, until)
        return piece

    def _held(self, text: str) -> int:
        """How many of the last characters begin a stop."""
        longest = max(map(len, self._stops), default=0)
        return next(
            (n for n in range(min(longest, len(text)), 0, -1) if self._begins(text[-n:])), 0
        )

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


def _start(model: Stepper, prompts: list[str]) -> Tensor:
    """The prompts' tokens [rows, S], in as many rows as the program takes at least.

    Raises:
        SlimError: too many prompts, an empty one, one that is too long, or unequal lengths.
    """
    fewest, most = model.rows
    if not prompts or (most is not None and len(prompts) > most):
        raise SlimError(
            f"{len(prompts)} prompts, and the program takes 1 to {most or 'any number'}; capture "
            f"it with batch={len(prompts)}, or give them one by one"
        )
    tokenizer = read_tokenizer(model.tokenizer)
    ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    lengths = sorted(set(map(len, ids)))
    if not lengths[0]:
        raise SlimError("the prompt is empty; give at least one word")
    if len(lengths) > 1:
        raise SlimError(
            f"prompts of {' and '.join(map(str, lengths))} tokens cannot share their positions; "
            f"give prompts of equal length together, or one by one"
        )
    longest = model.length[1]
    if model.cached and longest is not None and lengths[0] > longest:
        raise SlimError(
            f"the prompt has {lengths[0]} tokens, the program takes {model.length[0]} to "
            f"{longest}; shorten it, or capture the model with a larger max_length"
        )
    return torch.tensor(ids + [ids[-1]] * (fewest - len(ids)))


def _grow(
    model: Stepper,
    texts: list[_Text],
    ids: Tensor,
    how: _Sampling,
    tokens: int,
    took: Took,
) -> Iterator[list[str | None]]:
    """What each text has to show, token by token, until all have ended."""
    reader, why = Reader(model), "tokens"
    for i in range(tokens):
        if not reader.takes(ids.shape[1]):
            why = "full"
            break
        began = time.perf_counter()
        logits = reader.read(ids)
        chosen = [
            choose(row, how.temperature, how.top_p, text.generator)
            for row, text in zip(logits, texts)
        ]
        seconds = time.perf_counter() - began
        took.prefill_seconds += seconds if i == 0 else 0.0
        took.decode_seconds += seconds if i else 0.0
        took.tokens += 1
        pieces = [text.add(token) for text, token in zip(texts, chosen, strict=True)]
        took.ended = texts[0].ended
        yield pieces
        if all(text.ended for text in texts):
            return
        ids = torch.tensor([[token] for token in chosen + chosen[-1:] * (len(ids) - len(chosen))])
    pieces = [None if text.ended else text.finish(why) for text in texts]
    took.ended = texts[0].ended
    yield pieces

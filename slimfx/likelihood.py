"""How likely a program finds texts, and the text it finds most likely.

log p(y | x) = sum_i log softmax(program(x, y_1 .. y_(i-1)))[y_i]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from slimfx import data
from slimfx.errors import SlimError, need
from slimfx.passes.inputs import call_arguments, module_of, tensor_inputs, text_batch
from slimfx.runtime.manifest import manifest_of

Row = tuple[int, ...]
Read = Callable[[Sequence[Row]], list[Tensor]]


def loglikelihoods(
    read: Read,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    window: int,
    batch: int,
    tell: Callable[[float], None] = lambda share: None,
) -> list[tuple[float, bool]]:
    """(log p, is it the most likely one?) of each answer after its context.

    Args:
        read: from rows of tokens to the logits [tokens, vocabulary] of each.
        pairs: (context, answer) in tokens; a context may lose its beginning to fit.
        window: tokens of a row at most.

    Raises:
        SlimError: an answer is longer than the window.
    """
    rows: dict[Row, list[int]] = {}  # answers of one token share the row that ends before them
    for i, (context, answer) in enumerate(pairs):
        assert context
        if len(answer) > window:
            raise SlimError(
                f"an answer of {len(answer)} tokens is longer than the {window} that the "
                f"program takes; capture it with a larger max_length"
            )
        row = tuple([*context, *answer][-(window + 1) : -1])
        rows.setdefault(row, []).append(i)
    order = sorted(rows, key=len, reverse=True)  # alike lengths side by side: little padding
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for begin in range(0, len(order), batch):
        chunk = order[begin : begin + batch]
        for row, logits in zip(chunk, read(chunk), strict=True):
            for i in rows[row]:
                found[i] = _score(logits, pairs[i][1])
        tell(min(begin + batch, len(order)) / len(order))
    return found


def _score(logits: Tensor, answer: Sequence[int]) -> tuple[float, bool]:
    """The answer's tokens are those that the last logits [tokens, vocabulary] foretell."""
    target = torch.tensor(list(answer), dtype=torch.int64)
    scores = logits[len(logits) - len(target) :].float().log_softmax(-1)
    likely = bool((scores.argmax(-1) == target).all())
    return scores.gather(-1, target[:, None]).double().sum().item(), likely


class LanguageModel:
    """What lm-eval asks of a language model, without lm-eval."""

    def __init__(self, program: ExportedProgram, batch: int) -> None:
        """Up to `batch` rows at once, at most what the program takes.

        Raises:
            SlimError: the program is not input_ids -> logits, or carries no tokenizer.
        """
        self.read, rows = reader(program)
        self.window = data.longest(program, 1 << 30)
        self.batch = batch if rows is None else min(batch, rows)
        self.tokenizer = data.tokenizer_of(program)
        self.end = manifest_of(program).eos_token
        started = self.tokenizer.encode("").ids
        self.start = started[0] if started else self.end
        self.tell: Callable[[float], None] = lambda share: None
        self.cut = 0

    def prefix(self) -> int:
        """The token before a text that nothing comes before."""
        if self.start is None:
            raise SlimError(
                "the task scores a text from its first token on, and the program's tokenizer has "
                "neither a start nor an end token; choose a task with a prompt"
            )
        return self.start

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Tokens, with the tokenizer's own start token unless the text begins with it."""
        if special is None:
            first = None if self.start is None else self.tokenizer.id_to_token(self.start)
            special = first is None or not text.startswith(first)
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Any]:
        """`loglikelihoods` of these, and how many were cut."""
        self.cut += sum(len(x) + len(y) > self.window + 1 for x, y in pairs)
        return loglikelihoods(
            self.read, pairs, window=self.window, batch=self.batch, tell=self.tell
        )

    def whole(self, texts: Sequence[str]) -> list[float]:
        """log p of whole texts; one that is too long is scored part by part, each token once."""
        utils = need("lm_eval.utils")
        pairs, owner = [], []
        for i, text in enumerate(texts):
            for each in utils.get_rolling_token_windows(
                self.encode(text), self.prefix(), max_seq_len=self.window, context_len=1
            ):
                pairs.append(utils.make_disjoint_window(each))
                owner.append(i)
        found = [0.0] * len(texts)
        for i, (value, _) in zip(owner, self.score(pairs), strict=True):
            found[i] += value
        return found

    def go_on(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """The most likely text after each context, up to the first of the stops it names.

        Args:
            requests: a context and how to go on: `until` (the stops) and `max_gen_toks`.

        Raises:
            SlimError: a request wants sampling, or as many tokens as the program takes in all.
        """
        found = []
        for i, (context, how) in enumerate(requests):
            most, until = int(how.get("max_gen_toks", 256)), how.get("until") or []
            if how.get("do_sample") or self.window <= most:
                raise SlimError(
                    f"the task wants {most} tokens and do_sample={bool(how.get('do_sample'))}; "
                    f"this program takes {self.window} tokens, and tasks run without sampling"
                )
            ids = self.encode(context)
            self.cut += len(ids) > self.window - most
            stops = [until] if isinstance(until, str) else until
            found.append(self._continue(ids[most - self.window :], most, list(filter(None, stops))))
            self.tell((i + 1) / len(requests))
        return found

    def _continue(self, ids: list[int], most: int, stops: list[str]) -> str:
        text, made = "", 0
        while made < most and not any(stop in text for stop in stops):
            token = int(self.read([tuple(ids)])[0][-1].argmax())
            if token == self.end:
                break
            ids, made = [*ids, token], made + 1
            text = self.tokenizer.decode(ids[-made:])
        return text[: min([len(text), *(text.find(stop) for stop in stops if stop in text)])]


def reader(program: ExportedProgram) -> tuple[Read, int | None]:
    """From rows of tokens to the logits [tokens, vocabulary] of each, and how many rows at most.

    Padding is put on the right, where a causal model does not look.

    Raises:
        SlimError: the program is not input_ids -> logits over its tokenizer's vocabulary.
    """
    inputs = tensor_inputs(program)
    names = (["input_ids"], ["input_ids", "cache_position"])
    if list(inputs) not in names or len(inputs["input_ids"].sizes) != 2:
        raise SlimError(
            f"tasks need a program of input_ids -> logits, this one takes "
            f"{', '.join(inputs) or 'no tensors'}; for encoders compare with --dense"
        )
    width = _width(program)
    words = data.tokenizer_of(program).get_vocab_size(with_added_tokens=False)
    if width is None or width < words:
        raise SlimError(
            f"tasks need logits [batch, tokens, vocabulary] of the tokenizer's {words} tokens, "
            f"the program answers with {width or 'another shape'}; capture a causal language model"
        )
    info = inputs["input_ids"]
    (fewest, most), (shortest, _) = info.sizes
    module = module_of(program)

    @torch.no_grad()
    def read(rows: Sequence[Row]) -> list[Tensor]:
        shape = max(fewest, len(rows)), max(shortest, *map(len, rows))
        ids = torch.zeros(shape, dtype=info.dtype)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        args, kwargs = call_arguments(program, text_batch(program, ids))
        logits = module(*args, **kwargs)
        return [logits[i, : len(row)] for i, row in enumerate(rows)]

    return read, most


def _width(program: ExportedProgram) -> int | None:
    """The last dimension of the one output, if that is a tensor [batch, tokens, width]."""
    specs = program.graph_signature.output_specs
    names = [spec.arg.name for spec in specs if spec.kind is OutputKind.USER_OUTPUT]  # type: ignore[union-attr]
    values = [n.meta.get("val") for n in program.graph.nodes if n.name in names]
    if len(names) != 1 or len(values) != 1 or not isinstance(values[0], Tensor):
        return None
    return int(values[0].shape[-1]) if values[0].dim() == 3 else None

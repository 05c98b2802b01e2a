"""What fine-tuning reads: windows and documents, their order, and what is refused."""

from __future__ import annotations

import pytest
import torch
from models import case, compressed, padded, tiny_llama
from slimfx.passes.inputs import call_arguments
from test_finetune import QUICK, TEXT, figures, with_tokenizer
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.functional import cross_entropy

import slimfx
from slimfx import Training
from slimfx.errors import CalibrationError, FinetuneError
from slimfx.training_text import _order, training_batches


def test_windows_come_equally_often_and_in_an_order_of_the_seed() -> None:
    order = _order(5, 12, 3)
    assert [len(set(part.tolist())) for part in order.split(5)] == [5, 5, 2]
    assert torch.equal(order, _order(5, 12, 3))
    assert not torch.equal(order, _order(5, 12, 4))


def with_mask() -> ExportedProgram:
    """A compressed causal model that is told of its padding, with a tokenizer."""
    inputs = padded(1, 2, 16, keep=9)
    shapes = {name: {0: torch.export.Dim("batch", min=1, max=64)} for name in inputs}
    model = tiny_llama().eval()
    program = slimfx.capture(model, inputs, dynamic_shapes={**shapes})
    small = slimfx.compress(program, "slim-q", [padded(2, 4, 16, keep=9)])
    return with_tokenizer(small)


def test_padding_counts_for_nothing() -> None:
    program = with_mask()
    text = ["w5 w9 w2 w40 w7", "w3 w8"]
    how = Training(tokens=7, length=16, accumulate=2, rate=1e-6)
    batches = training_batches(program, text, how)
    assert sorted(int((b["labels"] != -100).sum()) for b in batches) == [2, 5]
    losses = []
    for tokens in ([5, 9, 2, 40, 7], [3, 8]):
        row = torch.zeros(1, 16, dtype=torch.int64)
        row[0, : len(tokens)] = torch.tensor(tokens)
        mask = (torch.arange(16) < len(tokens)).long()[None]
        args, kwargs = call_arguments(program, {"input_ids": row, "attention_mask": mask})
        with torch.no_grad():
            logits = program.module()(*args, **kwargs)[0, : len(tokens) - 1]
        losses.append(cross_entropy(logits, torch.tensor(tokens[1:])).item())
    found = figures(slimfx.finetune(program, text, how=how))
    assert found["loss_first"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_tokens_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(FinetuneError, match=r"token 100 and the program knows 96: .* tokenizer"):
        training_batches(compressed("llama", "slim-q"), TEXT + 5, QUICK)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(CalibrationError, match="carries no tokenizer"):
        training_batches(compressed("llama", "slim-q"), ["w1 w2"], QUICK)


@pytest.mark.parametrize("text", [TEXT[:0], TEXT[:31]])
def test_too_little_text_is_refused(text: Tensor) -> None:
    with pytest.raises(FinetuneError, match=f"the text has {len(text)} tokens, one window needs"):
        training_batches(compressed("llama", "slim-q"), text, QUICK)


def test_no_document_is_refused() -> None:
    with pytest.raises(CalibrationError, match="holds no document"):
        training_batches(with_mask(), [], QUICK)
    with pytest.raises(FinetuneError, match="no 1 documents of two tokens or more"):
        training_batches(with_mask(), ["w1"], QUICK)


@pytest.mark.parametrize("kind", ["mlp", "bert"])
def test_what_is_no_language_model_is_refused(kind: str) -> None:
    program = compressed(kind, "slim-q")
    if kind == "bert":  # whose hidden states look like logits: tokens beyond them give it away
        program = with_tokenizer(program)
    with pytest.raises(FinetuneError, match=r"language model without a cache|another tokenizer"):
        training_batches(program, ["w90 w91 w92"], QUICK)


def test_a_program_with_a_cache_is_refused() -> None:
    program = slimfx.capture(case("llama").model, kv_cache=True, max_length=32)
    small = slimfx.compress(program, "slim-q", torch.stack([TEXT[:16], TEXT[20:36]]))
    with pytest.raises(FinetuneError, match="without a cache"):
        training_batches(small, TEXT, QUICK)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", 0), ("length", 1), ("accumulate", 0), ("save_every", 0), ("rate", 0), ("rate", 1)],
)
def test_impossible_settings_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(FinetuneError, match=f"{name} is {value}"):
        Training(**{name: value})

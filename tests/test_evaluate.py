"""evaluate: perplexity and cosine as a reader would compute them by hand."""

from __future__ import annotations

import math

import pytest
import torch
from models import (
    captured,
    case,
    compressed,
    compressed_demo_lm,
    demo_lm,
    ids,
    normal,
    padded,
    tiny_bert,
    tiny_llama,
    word_tokenizer,
)
from slimfx.runtime.manifest import Manifest, attach
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx
from slimfx import data
from slimfx.errors import CalibrationError, SlimError


def perplexity(program: ExportedProgram, stream: Tensor, length: int) -> float:
    """The reference: one window at a time, one token at a time."""
    module, total, count = program.module(), 0.0, 0
    for start in range(0, len(stream) - length + 1, length):
        window = stream[start : start + length]
        with torch.no_grad():
            scores = module(input_ids=window[None])[0].double().log_softmax(-1)
        for place in range(1, length):
            total -= scores[place - 1, window[place]].item()
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("rows", [40, 64])
def test_perplexity_is_that_of_a_loop_over_tokens(rows: int) -> None:
    stream = ids(1, 7 * rows + 13)
    found = slimfx.evaluate(captured("llama"), stream, length=rows)
    assert (found.metric, found.samples, found.tokens) == ("perplexity", 7, 7 * (rows - 1))
    assert math.isclose(found.value, perplexity(captured("llama"), stream, rows), rel_tol=1e-5)


def test_perplexity_of_the_demo_model_on_english_is_that_of_the_loop() -> None:
    program = demo_lm()
    documents = data.python_documents()[1]
    stream = data.token_stream(program, documents[:2])[: 3 * 50]
    found = slimfx.evaluate(program, stream, length=50)
    assert math.isclose(found.value, perplexity(program, stream, 50), rel_tol=1e-5)
    assert 20 < found.value < 200  # English: 4096 would be a guess


def test_compression_costs_little_of_it_and_joint_less_than_slim() -> None:
    stream = data.token_stream(demo_lm(), data.python_documents()[1][:2])[: 6 * 64]
    dense = slimfx.evaluate(demo_lm(), stream, length=64).value
    joint, slim = (
        slimfx.evaluate(compressed_demo_lm(preset), stream, length=64).value
        for preset in ("joint", "slim")
    )
    assert dense < joint < 2 * dense  # seen: 24 and 39
    assert joint < slim < 3 * dense  # seen: 65


def test_samples_and_length_limit_the_windows() -> None:
    stream = ids(1, 500)
    found = slimfx.evaluate(captured("llama"), stream, samples=3, length=20)
    assert (found.samples, found.tokens) == (3, 3 * 19)
    assert math.isclose(found.value, perplexity(captured("llama"), stream[:60], 20), rel_tol=1e-5)
    longest = slimfx.evaluate(captured("llama"), stream, length=512)
    assert (longest.samples, longest.tokens) == (500 // 64, 500 // 64 * 63)


def test_text_goes_through_the_tokenizer_with_end_tokens() -> None:
    program = attach(
        slimfx.capture(tiny_llama().eval()), Manifest(tokenizer=word_tokenizer(), eos_token=95)
    )
    texts = [" ".join(f"w{1 + (3 * i + j) % 90}" for j in range(15)) for i in range(4)]
    stream = torch.tensor(
        [token for text in texts for token in [*(int(w[1:]) for w in text.split()), 95]]
    )
    found = slimfx.evaluate(program, texts, length=16)
    assert found == slimfx.evaluate(program, stream, length=16)
    assert found.samples == 4


def test_too_little_text_names_both_numbers() -> None:
    with pytest.raises(CalibrationError, match="has 30 tokens, one window needs 64"):
        slimfx.evaluate(captured("llama"), ids(1, 30))


def test_no_batch_at_all_is_too_little_as_well() -> None:
    with pytest.raises(CalibrationError):
        slimfx.evaluate(captured("bert"), [], dense=captured("bert"))


def test_a_program_without_a_tokenizer_cannot_read_text() -> None:
    with pytest.raises(CalibrationError, match="no tokenizer"):
        slimfx.evaluate(captured("llama"), ["w1 w2"])


@pytest.mark.parametrize("kind", ["bert", "llama", "vit", "mlp", "encoder layer"])
def test_a_program_has_cosine_one_with_itself(kind: str) -> None:
    batches = case(kind).batches
    found = slimfx.evaluate(captured(kind), batches, dense=captured(kind))
    assert found.metric == "cosine"
    assert found.value == pytest.approx(1, abs=1e-12)
    assert found.samples == sum(len(next(iter(batch.values()))) for batch in batches)


def test_cosine_is_that_of_the_means_over_tokens_that_count() -> None:
    small, dense = compressed("bert", "slim"), captured("bert")
    batches = [padded(5, 4, 20, keep=7), padded(6, 3, 12, keep=5)]
    expected, tokens = [], 0
    for batch in batches:
        mask = batch["attention_mask"]
        outputs = [p.module()(**batch).detach().double() for p in (small, dense)]
        for row in range(len(mask)):
            one, two = (out[row][mask[row] == 1].mean(0) for out in outputs)
            expected.append(float(one @ two / (one.norm() * two.norm())))
            tokens += int(mask[row].sum())
    found = slimfx.evaluate(small, batches, dense=dense)
    assert found.value == pytest.approx(sum(expected) / 7, rel=1e-9)
    assert (found.samples, found.tokens) == (7, tokens)
    assert found.value < 0.999


def test_cosine_does_not_look_at_what_stands_in_the_padding() -> None:
    small, dense = compressed("bert", "slim"), captured("bert")
    batch = padded(5, 4, 20, keep=7)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 9)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    first, second = (slimfx.evaluate(small, [b], dense=dense).value for b in (batch, other))
    assert first == pytest.approx(second, abs=1e-6)


def test_cosine_from_text_uses_the_tokenizer_and_its_mask() -> None:
    program = attach(slimfx.capture(tiny_bert().eval()), Manifest(tokenizer=word_tokenizer()))
    texts = [" ".join(["w3", "w5"] * n) for n in (2, 5, 9)]
    found = slimfx.evaluate(program, texts, dense=program, length=16)
    assert (found.samples, found.tokens) == (3, 4 + 10 + 16)
    limited = slimfx.evaluate(program, texts, dense=program, length=16, samples=2)
    assert (limited.samples, limited.tokens) == (2, 14)


def test_an_output_that_is_no_tensor_is_refused() -> None:
    program = torch.export.export(Named(), (normal(1, 4, 16),))
    with pytest.raises(SlimError, match="answers with dict, not a tensor"):
        slimfx.evaluate(program, [normal(1, 4, 16)], dense=program)


class Named(nn.Module):
    """Answers with a mapping."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x * 2}


@pytest.mark.parametrize("metric", ["perplexity", "cosine"])
def test_progress_rises_to_one(metric: str) -> None:
    told: list[tuple[float, str]] = []

    def progress(share: float, what: str) -> None:
        told.append((share, what))

    if metric == "perplexity":
        slimfx.evaluate(captured("llama"), ids(1, 500), length=50, progress=progress)
    else:
        one = captured("bert")
        slimfx.evaluate(one, case("bert").batches, dense=one, progress=progress)
    shares = [share for share, _ in told]
    assert len(shares) > 1 and shares == sorted(set(shares)) and shares[-1] == 1
    assert {what for _, what in told} == {metric}


def test_perplexity_of_an_encoder_asks_for_the_dense_model() -> None:
    with pytest.raises(SlimError, match=r"needs logits .* answers with \[.*dense="):
        slimfx.evaluate(captured("bert"), ids(1, 60), length=20)


def test_evaluating_changes_neither_program_nor_random_state() -> None:
    program, state = captured("llama"), torch.get_rng_state()
    graph = str(program.graph)
    slimfx.evaluate(program, ids(1, 200), length=20)
    assert str(program.graph) == graph and torch.equal(torch.get_rng_state(), state)

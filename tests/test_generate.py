"""generate: greedy text is the argmax loop, sampling is the seed's, mistakes are named."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import captured, demo_lm, tiny_llama, word_tokenizer
from slimfx.runtime.manifest import Manifest, attach
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx
from slimfx import cli
from slimfx.data import tokenizer_of
from slimfx.errors import CalibrationError, SlimError
from slimfx.generate import _Text, choose, generate
from slimfx.stepper import Stepper, stepper


def speaker() -> nn.Module:
    """Always the same tiny Llama."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_llama().eval()


@pytest.fixture(scope="module")
def words() -> ExportedProgram:
    """The speaker with words w0 to w95."""
    return attach(slimfx.capture(speaker()), Manifest(tokenizer=word_tokenizer()))


def greedy(program: ExportedProgram, start: list[int], tokens: int) -> list[int]:
    """The reference: the whole text again for each token."""
    module, found = program.module(), list(start)
    for _ in range(tokens):
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([found]))
        found.append(int(logits[0, -1].argmax()))
    return found[len(start) :]


def text_of(words: list[int]) -> str:
    return " ".join(f"w{word}" for word in words)


def test_greedy_text_of_the_demo_model_is_the_argmax_loop() -> None:
    program = demo_lm()
    tokenizer = tokenizer_of(program)
    start = tokenizer.encode("The module provides", add_special_tokens=False).ids
    expected = tokenizer.decode(greedy(program, start, 12))
    assert "".join(generate(program, "The module provides", tokens=12)) == expected
    assert len(expected) > 20


def test_greedy_words_of_a_tiny_model_are_the_argmax_loop(words: ExportedProgram) -> None:
    found = "".join(generate(words, "w3 w1 w4 w15", tokens=20))
    assert found == text_of(greedy(words, [3, 1, 4, 15], 20))


def test_text_comes_piece_by_piece(words: ExportedProgram) -> None:
    stream = generate(words, "w3 w1", tokens=6)
    pieces = [next(stream) for _ in range(6)]
    assert all(piece.strip() for piece in pieces)
    with pytest.raises(StopIteration):
        next(stream)


def test_a_context_beyond_the_longest_slides(words: ExportedProgram) -> None:
    start = [1 + i % 90 for i in range(62)]
    found = "".join(generate(words, text_of(start), tokens=5)).split()
    ids = list(start)
    for word in found:
        assert word == text_of(greedy(words, ids[-64:], 1))
        ids.append(int(word[1:]))
    assert len(ids) == 67


def sample(program: ExportedProgram, seed: int, **how: float) -> str:
    return "".join(generate(program, "w3 w1", tokens=12, temperature=1.0, seed=seed, **how))


def test_sampling_repeats_with_its_seed_and_differs_with_another(words: ExportedProgram) -> None:
    torch.manual_seed(1)
    first = sample(words, 5)
    torch.manual_seed(2)
    assert sample(words, 5) == first
    assert len({sample(words, seed) for seed in range(4)}) > 1


def test_sampling_leaves_the_global_random_state_alone(words: ExportedProgram) -> None:
    def state() -> tuple:
        return (
            torch.get_rng_state().tolist(),
            numpy.random.get_state()[1].tolist(),
            random.getstate(),
        )

    before = state()
    sample(words, 5, top_p=0.9)
    assert state() == before


def test_a_tiny_top_p_or_temperature_is_greedy(words: ExportedProgram) -> None:
    expected = text_of(greedy(words, [3, 1], 12))
    assert sample(words, 5, top_p=1e-6) == expected
    cold = generate(words, "w3 w1", tokens=12, temperature=1e-4, seed=5)
    assert "".join(cold) == expected


def test_an_end_token_ends_the_text(words: ExportedProgram) -> None:
    expected = greedy(words, [3, 1, 4], 20)
    end = next(token for i, token in enumerate(expected) if i > 2 and token not in expected[:i])
    manifest = Manifest(tokenizer=word_tokenizer(), eos_token=end)
    program = attach(slimfx.capture(speaker()), manifest)
    found = "".join(generate(program, "w3 w1 w4", tokens=20))
    assert found == text_of(expected[: expected.index(end)])


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every token that is computed, used or not."""
    seen: list[int] = []

    def counted(*args: object) -> int:
        seen.append(choose(*args))
        return seen[-1]

    monkeypatch.setattr(sys.modules["slimfx.generate"], "choose", counted)
    return seen


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_no_more_tokens_are_computed_than_asked_for(
    tokens: int, words: ExportedProgram, chosen: list[int]
) -> None:
    found = list(generate(words, "w3 w1", tokens=tokens))
    assert len(found) == tokens
    assert len(chosen) == tokens


def test_nothing_is_computed_before_the_first_piece_is_asked_for(
    words: ExportedProgram, chosen: list[int]
) -> None:
    stream = generate(words, "w3 w1", tokens=3)
    assert chosen == []
    next(stream)
    assert len(chosen) == 1


def test_a_prompt_shorter_than_the_program_takes_is_enough(words: ExportedProgram) -> None:
    assert len("".join(generate(words, "w7", tokens=3)).split()) == 3


def shown(program: ExportedProgram, tokens: list[int], *stops: str) -> list[str]:
    """What a text shows as these tokens come."""
    text = _Text(stepper(program), stops, 0)
    pieces = [text.add(token) for token in tokens]
    last = None if text.ended else text.finish("tokens")
    return [piece for piece in [*pieces, last] if piece is not None]


def test_characters_of_several_bytes_come_whole() -> None:
    program = demo_lm()
    tokenizer = tokenizer_of(program)
    text = "naïve → 日本 ✓ done"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(tokens) > len(text.split())
    pieces = shown(program, tokens)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


MISTAKES: dict[str, tuple[dict, str]] = {
    "temperature": ({"temperature": -0.5}, "temperature -0.5"),
    "top_p of nothing": ({"top_p": 0.0}, "top_p 0.0"),
    "top_p above all": ({"top_p": 1.5}, "top_p 1.5"),
    "top_p that is no number": ({"top_p": float("nan")}, "top_p nan"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_value_out_of_range_is_named_at_once(mistake: str, words: ExportedProgram) -> None:
    how, message = MISTAKES[mistake]
    with pytest.raises(SlimError, match=message):
        generate(words, "w1 w2", **how)


def test_a_temperature_that_is_no_number_is_refused(words: ExportedProgram) -> None:
    with pytest.raises(SlimError, match="temperature nan"):
        generate(words, "w1 w2", temperature=float("nan"))


def test_an_empty_prompt_is_refused_at_once(words: ExportedProgram) -> None:
    for prompt in ("", "   "):
        with pytest.raises(SlimError, match="the prompt is empty"):
            generate(words, prompt)


def test_a_program_of_other_inputs_is_refused_with_their_names() -> None:
    with pytest.raises(SlimError, match="this one takes input_ids, attention_ma"):
        generate(captured("bert"), "w1")
    with pytest.raises(SlimError, match="this one takes pixel_values"):
        generate(captured("vit"), "w1")


def test_a_program_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no tokenizer"):
        generate(captured("llama"), "w1")


def draws(logits: Tensor, temperature: float, top_p: float, times: int) -> Counter:
    generator = torch.Generator().manual_seed(0)
    return Counter(choose(logits, temperature, top_p, generator) for _ in range(times))


def test_sampling_follows_the_softmax_at_its_temperature() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        found = draws(logits, temperature, 1.0, 4000)
        expected = (logits / temperature).softmax(-1)
        for token, share in enumerate(expected.tolist()):
            assert abs(found[token] / 4000 - share) < 0.03


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    st.floats(0.01, 1.0),
)
def test_only_the_likeliest_tokens_that_reach_top_p_are_drawn(
    tenths: list[int], top_p: float
) -> None:
    logits = torch.tensor(tenths) / 10
    probabilities = logits.double().softmax(-1)
    allowed, held = set(), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if held >= top_p + 1e-6:
            break
        allowed.add(token)
        held += probabilities[token].item()
    assert set(draws(logits, 1.0, top_p, 60)) <= allowed


def test_temperature_zero_takes_the_first_of_equal_maxima() -> None:
    logits = torch.tensor([0.0, 3.0, 3.0, 1.0])
    assert {choose(logits, 0.0, top_p, torch.Generator()) for top_p in (0.1, 1.0)} == {1}


@cache
def remembering(batch: int = 1) -> ExportedProgram:
    """The speaker with words and a cache of 64 tokens."""
    program = slimfx.capture(speaker(), kv_cache=True, batch=batch)
    return attach(program, Manifest(tokenizer=word_tokenizer()))


def test_a_program_with_a_cache_says_the_same_and_reads_each_token_once(
    words: ExportedProgram,
) -> None:
    program = remembering()
    shapes: list[tuple[int, list[int]]] = []
    model = stepper(program)

    def run(**tensors: Tensor) -> Tensor:
        shapes.append((tensors["input_ids"].shape[1], tensors["cache_position"].tolist()))
        return model.run(**tensors)

    found = "".join(generate(dataclasses.replace(model, run=run), "w3 w1 w4 w15", tokens=20))
    assert found == "".join(generate(words, "w3 w1 w4 w15", tokens=20))
    assert shapes == [(4, [0, 1, 2, 3]), *((1, [i]) for i in range(4, 23))]
    assert not any(t.any() for name, t in program.state_dict.items() if "kv_cache" in name)


def test_the_same_stepper_starts_anew_for_each_text() -> None:
    model = stepper(remembering())
    texts = ["".join(generate(model, prompt, tokens=9)) for prompt in ("w3 w1", "w9", "w3 w1")]
    assert texts[0] == texts[2] != texts[1]


def test_sampling_with_a_cache_is_sampling_without(words: ExportedProgram) -> None:
    assert sample(remembering(), 5, top_p=0.9) == sample(words, 5, top_p=0.9)


def test_what_a_text_took_is_counted(words: ExportedProgram) -> None:
    pieces = generate(remembering(), "w3 w1 w4", tokens=5)
    assert (pieces.took.prompt_tokens, pieces.took.tokens, pieces.took.ended) == (3, 0, "")
    next(pieces)
    first = pieces.took.prefill_seconds
    assert (pieces.took.tokens, pieces.took.decode_seconds) == (1, 0.0)
    assert len(list(pieces)) == 4
    figures = pieces.took.figures()
    assert pieces.took.prefill_seconds == first > 0
    assert (figures["tokens"], figures["ended"]) == (5, "tokens")
    assert figures["prefill_tokens_per_second"] == pytest.approx(3 / first, abs=0.06)
    seconds = pieces.took.decode_seconds
    assert figures["decode_tokens_per_second"] == pytest.approx(4 / seconds, abs=0.06)


def test_a_text_ends_where_the_cache_is_full() -> None:
    prompt = text_of([1 + i % 90 for i in range(60)])
    pieces = generate(remembering(), prompt, tokens=50)
    assert len(list(pieces)) == 5  # the last of them needs no place any more
    assert pieces.took.ended == "full"
    assert len("".join(generate(remembering(), prompt, tokens=5)).split()) == 5


@pytest.mark.parametrize("batch", [1, 2])
def test_a_prompt_longer_than_the_cache_is_refused_with_the_range(batch: int) -> None:
    with pytest.raises(SlimError, match="the prompt has 65 tokens, the program takes 1 to 64"):
        generate(remembering(batch), text_of([7] * 65))
    assert len(list(generate(remembering(batch), text_of([7] * 64), tokens=3))) == 1


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 3}])
def test_prompts_of_equal_length_go_together(how: dict, words: ExportedProgram) -> None:
    prompts = ["w3 w1 w4", "w9 w2 w6"]
    alone = []
    for i, prompt in enumerate(prompts):
        own = {**how, "seed": how["seed"] + i} if how else {}
        alone.append("".join(generate(words, prompt, tokens=12, **own)))
    assert generate(words, prompts, tokens=12, **how) == alone
    assert generate(remembering(2), prompts, tokens=12, **how) == alone
    assert generate(remembering(2), prompts[:1], tokens=12, **how) == alone[:1]
    assert "".join(generate(remembering(2), prompts[0], tokens=12, **how)) == alone[0]


def test_rows_end_one_by_one(words: ExportedProgram) -> None:
    prompts = ["w3 w1 w4", "w9 w2 w6"]
    texts = [greedy(words, list(map(int, p.replace("w", "").split())), 12) for p in prompts]
    [end] = [next(t for t in texts[0][3:] if t not in texts[0][:3] + texts[1])]
    manifest = Manifest(tokenizer=word_tokenizer(), eos_token=end)
    model = dataclasses.replace(stepper(remembering(2)), end=manifest.eos_token)
    cut = texts[0][: texts[0].index(end)]
    assert generate(model, prompts, tokens=12) == [text_of(cut), text_of(texts[1])]


PROMPTS: dict[str, tuple[int, list[str], str]] = {
    "none": (1, [], "0 prompts, and the program takes 1"),
    "too many": (1, ["w1", "w2"], r"2 prompts, and the program takes 1 to 1; capture it with ba"),
    "unequal": (2, ["w1 w2", "w3"], "prompts of 1 and 2 tokens cannot share their positions"),
    "an empty one": (2, ["w1", ""], "the prompt is empty"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_cannot_go_together_are_refused(case: str) -> None:
    batch, prompts, message = PROMPTS[case]
    with pytest.raises(SlimError, match=message):
        generate(remembering(batch), prompts)


def test_a_text_ends_before_a_stop(words: ExportedProgram) -> None:
    whole = "".join(generate(words, "w3 w1 w4", tokens=20))
    middle = len(whole) // 2
    for stop in (whole[middle : middle + 3], whole[middle : middle + 9]):
        pieces = generate(words, "w3 w1 w4", tokens=20, stop=["no such text", stop])
        assert "".join(pieces) == whole[: whole.index(stop)]
        assert pieces.took.ended == "stop"
        assert pieces.took.tokens < 20


def test_what_may_become_a_stop_waits(words: ExportedProgram) -> None:
    tokens = [3, 1, 4]
    assert shown(words, tokens) == ["w3", " w1", " w4"]
    assert shown(words, tokens, "w1 w5") == ["w3", " ", "w1 w4"]
    assert shown(words, tokens, "w4 w9") == ["w3", " w1", " ", "w4"]
    assert shown(words, tokens, " w1 w4") == ["w3", ""]
    assert shown(words, tokens, "4 ", "w3") == []


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_an_empty_stop_is_refused(stop: str | list[str], words: ExportedProgram) -> None:
    if stop == "":
        assert len(list(generate(words, "w1", tokens=2, stop=[]))) == 2
    with pytest.raises(SlimError, match="a stop is empty"):
        generate(words, "w1 w2", stop=stop)


def test_anything_that_takes_tokens_and_positions_can_speak() -> None:
    """What a runtime's file gives: a function of keyword tensors. This one counts upwards."""

    def run(*, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        assert cache_position.shape == input_ids.shape[1:]
        return torch.nn.functional.one_hot(input_ids + 1, 96).float()

    model = Stepper(run, (1, 1), (1, 8), True, word_tokenizer(), end=12)
    assert "".join(generate(model, "w6 w7", tokens=9)) == "w8 w9 w10 w11"
    assert "".join(generate(model, "w1 w7", tokens=3)) == "w8 w9 w10"


def test_the_command_prints_text_and_speed(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "cached.pt2"
    slimfx.save(remembering(), path, verify=False)
    expected = "".join(generate(path, "w3 w1", tokens=4))
    cli.app(["generate", str(path), "w3 w1", "--tokens", "4"], standalone_mode=False)
    out, err = capfd.readouterr()
    assert out == f"w3 w1{expected}\n"
    assert "prompt tokens: 2, prefill tokens per second: " in err and "ended: tokens" in err
    line = ["generate", str(path), "w3 w1", "--tokens", "4", "--stop", "w999", "--json"]
    cli.app(line, standalone_mode=False)
    said = json.loads(capfd.readouterr().out)
    assert (said["text"], said["tokens"], said["prompt_tokens"]) == (expected, 4, 2)
    assert said["decode_tokens_per_second"] > 0

"""Tasks of lm-eval: the same figures as the eager model, whatever form the program has."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from models import (
    DEMO,
    LONGEST,
    QUICK,
    Rows,
    captured,
    case,
    demo_lm,
    ids,
    tiny_llama,
    word_tokenizer,
)
from slimfx.runtime.manifest import Manifest, attach, manifest_of
from torch import Tensor, nn
from torch.export import ExportedProgram
from typer.testing import CliRunner

import slimfx
from slimfx import cli, continuation, data, tasks
from slimfx.errors import CalibrationError, SlimError
from slimfx.likelihood import LanguageModel
from slimfx.recipe import Recipe

SENTENCE = "The {} value that a caller gives is returned when the {} list of names is empty."
Pairs = list[tuple[list[int], list[int]]]


def expected(model: nn.Module, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """The reference: one token at a time, each with all that stands before it."""
    total, likely = 0.0, True
    for i, token in enumerate(answer):
        row = torch.tensor([[*context, *answer[:i]][-LONGEST:]])
        with torch.no_grad():
            scores = model(row).logits[0, -1].double().log_softmax(-1)
        total += scores[token].item()
        likely &= int(scores.argmax()) == token
    return total, likely


def same(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> None:
    assert [likely for _, likely in found] == [likely for _, likely in wanted]
    assert torch.allclose(
        torch.tensor([value for value, _ in found]).double(),
        torch.tensor([value for value, _ in wanted]).double(),
        rtol=1e-5,
    )


def with_words(program: ExportedProgram, end: int | None = 0) -> ExportedProgram:
    """The program with the tokenizer of words w0 to w95."""
    return attach(program, Manifest(tokenizer=word_tokenizer(), eos_token=end))


@cache
def llama() -> ExportedProgram:
    """A tiny program with words, nobody else's."""
    return with_words(slimfx.capture(case("llama").model))


def scored(program: ExportedProgram, pairs: Pairs, batch: int) -> list[tuple[float, bool]]:
    return LanguageModel(program, batch).score(pairs)


def some_pairs() -> Pairs:
    """Contexts and answers of every length, three after one context, one the likeliest."""
    tokens = ids(7, 400).tolist()
    cuts = [(0, 1, 1), (5, 9, 4), (30, 3, 12), (60, 20, 1), (90, 40, 20), (160, 2, 62)]
    pairs = [(tokens[i : i + n], tokens[i + n : i + n + m]) for i, n, m in cuts]
    context = tokens[200:210]
    pairs += [(context, [token]) for token in (3, 4, 5)]
    with torch.no_grad():
        best = int(case("llama").model(torch.tensor([context])).logits[0, -1].argmax())
    return [*pairs, (context, [best])]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_likelihoods_are_those_of_a_loop_over_tokens(batch: int) -> None:
    pairs = some_pairs()
    wanted = [expected(case("llama").model, *pair) for pair in pairs]
    assert [likely for _, likely in wanted].count(True) == 1
    same(scored(llama(), pairs, batch), wanted)


def test_answers_of_one_token_after_one_context_are_read_once() -> None:
    model = LanguageModel(llama(), 1)
    read, calls = model.read, []
    model.read = lambda rows: calls.append(rows) or read(rows)
    model.score(some_pairs())
    assert len(calls) == 7  # ten pairs, four of them alike up to the answer


def test_a_context_that_is_too_long_loses_its_beginning_and_is_counted() -> None:
    tokens = ids(8, 90).tolist()
    model = LanguageModel(llama(), 4)
    found = model.score([(tokens[:80], tokens[80:]), (tokens[:5], tokens[5:9])])
    whole = case("llama").model(torch.tensor([tokens[-LONGEST - 1 : -1]])).logits[0]
    scores = whole.double().log_softmax(-1)[-10:]
    wanted = scores.gather(-1, torch.tensor(tokens[80:])[:, None]).sum().item()
    assert math.isclose(found[0][0], wanted, rel_tol=1e-5)
    assert model.cut == 1


def test_an_answer_longer_than_the_window_is_refused() -> None:
    with pytest.raises(SlimError, match="an answer of 65 tokens is longer than the 64"):
        scored(llama(), [([1], ids(1, 65).tolist())], 4)


def test_a_program_of_fixed_sizes_is_padded_up_to_them() -> None:
    model = case("llama").model
    fixed = torch.export.export(Logits(model), (), {"input_ids": ids(1, 3, 24)}, strict=False)
    pairs = [(context[-8:], answer[:8]) for context, answer in some_pairs()]
    same(scored(with_words(fixed), pairs, 8), scored(llama(), pairs, 8))
    assert LanguageModel(with_words(fixed), 8).batch == 3


class Logits(nn.Module):
    """The first output of a Hugging Face model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


@pytest.mark.parametrize("length", [1, 20, LONGEST, LONGEST + 1, 150])
def test_a_whole_text_is_scored_once_for_each_token(length: int) -> None:
    tokens = ids(9, length).tolist()
    found = LanguageModel(llama(), 4).whole(["", words(tokens)])
    window, total = [0, *tokens][:LONGEST], 0.0
    total += expected(case("llama").model, window[:1], tokens[:LONGEST])[0]
    for begin in range(LONGEST, length, LONGEST):  # the last window reaches back to be full
        end = min(begin + LONGEST, length)
        context = tokens[end - LONGEST - 1 : begin]
        with torch.no_grad():
            row = torch.tensor([[*context, *tokens[begin:end]][:-1]])
            scores = case("llama").model(row).logits[0].double().log_softmax(-1)
        target = torch.tensor(tokens[begin:end])
        total += scores[len(context) - 1 :].gather(-1, target[:, None]).sum().item()
    assert found[0] == 0.0
    assert math.isclose(found[1], total, rel_tol=1e-5)


def test_going_on_is_greedy_and_ends_before_a_stop() -> None:
    model = LanguageModel(demo_lm(), 4)
    context = "The function returns"
    text = "".join(slimfx.generate(demo_lm(), context, tokens=12))
    ask = {"max_gen_toks": 12, "until": []}
    stop = text[9:12]
    wanted = [text, text[: text.find(stop)]]
    assert model.go_on([(context, ask), (context, {**ask, "until": [stop]})]) == wanted
    assert model.go_on([(context, {**ask, "until": stop})]) == wanted[1:]
    assert 0 < len(wanted[1]) < len(wanted[0])


def test_going_on_ends_at_the_end_token_and_leaves_room_for_the_answer() -> None:
    context = ids(3, 100).tolist()
    first = int(case("llama").model(torch.tensor([context[-54:]])).logits[0, -1].argmax())
    program = with_words(slimfx.capture(case("llama").model), end=first)
    model = LanguageModel(program, 4)
    assert model.go_on([(words(context), {"max_gen_toks": 10})]) == [""]
    assert model.cut == 1
    model = LanguageModel(llama(), 4)
    read, lengths = model.read, []
    model.read = lambda rows: lengths.append(len(rows[0])) or read(rows)
    assert model.go_on([(words(context), {"max_gen_toks": 10})]) != [""]
    assert lengths == list(range(54, 54 + len(lengths)))


@pytest.mark.parametrize("how", [{"do_sample": True, "max_gen_toks": 5}, {}, {"max_gen_toks": 64}])
def test_sampling_and_answers_as_long_as_the_program_are_refused(how: dict[str, Any]) -> None:
    with pytest.raises(SlimError, match="takes 64 tokens, and tasks run without sampling"):
        LanguageModel(llama(), 4).go_on([("w1 w2", how)])


def test_a_start_token_of_the_tokenizer_is_put_once() -> None:
    tokenizer = tokenizers.Tokenizer.from_str(word_tokenizer())
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="w7 $A", special_tokens=[("w7", 7)]
    )
    program = attach(
        slimfx.capture(case("llama").model), Manifest(tokenizer=tokenizer.to_str(), eos_token=9)
    )
    model = LanguageModel(program, 4)
    assert model.encode("w3 w4") == model.encode("w7 w3 w4") == [7, 3, 4]
    assert model.encode("w3", False) == [3]
    assert (model.prefix(), model.end) == (7, 9)
    assert LanguageModel(llama(), 4).prefix() == 0


# ---------------------------------------------------------------------- the task of our own


def test_items_are_the_same_each_time_and_fit_their_description() -> None:
    found = continuation.items()
    assert found == continuation.items()
    assert 100 <= len(found) <= continuation.ITEMS
    text = " ".join(" ".join(data.python_documents()[1]).split())
    for item in found:
        assert len(set(item["choices"])) == 4
        assert len(item["start"].split()) == continuation.START
        assert {len(choice.split()) for choice in item["choices"]} == {continuation.END}
        assert f"{item['start']} {item['choices'][item['answer']]}" in text
    answers = [item["answer"] for item in found]
    assert all(answers.count(place) > len(found) / 8 for place in range(4))
    assert len({item["start"] for item in found}) > 0.95 * len(found)


def test_items_of_given_documents_take_their_sentences_alone() -> None:
    texts = [
        "\n\n".join(SENTENCE.format(f"first{a}", f"next{a}") for a in "abcde"),
        "Too short. 1 2 3 4 are no words at all, and neither is x == y or f(x).",
    ]
    found = continuation.items(texts)
    assert len(found) == 5
    for item in found:
        assert item["start"].startswith("The first")
        name = item["start"].split()[1].removeprefix("first")
        right = item["choices"][item["answer"]]
        assert right == f"returned when the next{name} list of"
        assert sum(f"next{name} " in choice for choice in item["choices"]) == 1


# ---------------------------------------------------------------------- the harness


class Eager(TemplateLM):
    """The transformers model with its own tokenizer, one request at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
        self.own = transformers.AutoTokenizer.from_pretrained(DEMO)

    @property
    def eot_token_id(self) -> int:
        return self.own.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
        return self.own.encode(string)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        found = []
        for _, context, answer in requests:
            with torch.no_grad():
                logits = self.model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
            scores = logits[len(context) - 1 : -1]
            target = torch.tensor(answer)
            likely = bool((scores.argmax(-1) == target).all())
            found.append((scores.gather(-1, target[:, None]).sum().item(), likely))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError


FEW = 40


def ours(program: ExportedProgram, **words: Any) -> tuple[tasks.TaskScore, ...]:
    return tasks.run_tasks(program, ["continuation"], **{"limit": FEW, **words})


def test_figures_are_those_of_the_eager_model(tmp_path: Path) -> None:
    task = lm_eval.api.task.ConfigurableTask(config=continuation.config())
    said = evaluate(Eager(), {"tasks": {"continuation": task}}, limit=FEW)
    figures = said["results"]["continuation"]
    found = ours(demo_lm())
    for score in found:
        assert score.value == figures[f"{score.metric},none"]
        assert score.stderr == figures[f"{score.metric}_stderr,none"]
        assert (score.samples, score.cut) == (FEW, 0)
    assert [score.metric for score in found] == ["acc", "acc_norm"]
    slimfx.save(demo_lm(), tmp_path / "dense.pt2")
    assert ours(slimfx.load(tmp_path / "dense.pt2")) == ours(demo_lm(), batch=1) == found


def test_a_compressed_program_has_the_same_figures_in_both_forms(tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        Recipe.preset("wanda"), calibration=QUICK, skip=("lm_head", "*.layers.[1-5].*")
    )
    small = slimfx.compress(demo_lm(), recipe)
    found = ours(small)
    for form in ("op", "aten"):
        path = tmp_path / f"{form}.pt2"
        slimfx.save(small, path, form=form)
        assert ours(slimfx.load(path)) == found
    pairs = [(ids(1, 9).tolist(), ids(2, 5).tolist())]
    assert scored(small, pairs, 1) != scored(demo_lm(), pairs, 1)


def test_the_dense_model_is_above_chance() -> None:
    acc, norm = ours(demo_lm(), limit=None)
    assert acc.samples == len(continuation.items())
    assert acc.value > 0.25 + 4 * acc.stderr  # seen: 0.457 +- 0.029
    assert norm.value > 0.25 + 4 * norm.stderr  # seen: 0.470 +- 0.029


def test_a_model_that_knows_nothing_is_at_chance() -> None:
    program = slimfx.capture(tiny_llama(vocab_size=4096).eval())
    acc, _ = ours(attach(program, manifest_of(demo_lm())), limit=None)
    assert abs(acc.value - 0.25) < 5 * acc.stderr


@pytest.fixture
def six_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the thousands of tasks that lm-eval lists only these, which takes less time."""
    folder = Path(lm_eval.tasks.__file__).parent
    names = ("mmlu/default", "piqa", "arc", "winogrande", "openbookqa")
    known = partial(
        lm_eval.tasks.TaskManager,
        include_defaults=False,
        include_path=[folder / name for name in names],
    )
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", known)


def fake_load(path: str, name: str | None = None, **_: Any) -> Any:
    """Two documents of each split, with the columns of the six data sets."""
    ask = [SENTENCE.format(word, word) for word in ("first", "second")]
    four = [["one", "no value", "the name", "four"]] * 2
    letters = [{"text": each, "label": list("ABCD")} for each in four]
    rows = {
        "cais/mmlu": {"question": ask, "choices": four, "answer": [0, 3]},
        "baber/piqa": {
            "goal": ask,
            "sol1": ["an int"] * 2,
            "sol2": ["zzz qq"] * 2,
            "label": [0, 0],
        },
        "allenai/ai2_arc": {"question": ask, "choices": letters, "answerKey": ["A", "D"]},
        "allenai/openbookqa": {"question_stem": ask, "choices": letters, "answerKey": ["B", "C"]},
        "allenai/winogrande": {
            "sentence": ["The file is open because _ is in use."] * 2,
            "option1": ["the file"] * 2,
            "option2": ["zzz"] * 2,
            "answer": ["1", "2"],
        },
    }[path]
    return {
        part: datasets.Dataset.from_dict(rows) for part in ("train", "validation", "test", "dev")
    }


@pytest.mark.usefixtures("six_tasks")
def test_zero_shot_is_the_six_tasks_of_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", fake_load)
    found = tasks.run_tasks(demo_lm(), ["zero-shot", "piqa"], batch=16, limit=2)
    assert [(score.task, score.metric) for score in found] == [
        ("mmlu", "acc"),
        *((task, metric) for task in ("piqa", "arc_easy", "arc_challenge")
          for metric in ("acc", "acc_norm")),
        ("winogrande", "acc"),
        ("openbookqa", "acc"),
        ("openbookqa", "acc_norm"),
    ]  # fmt: skip
    assert found[0].samples == 2 * 57
    assert {score.samples for score in found[1:]} == {2}
    assert all(0 <= score.value <= 1 and score.stderr is not None for score in found)
    model, right = Eager(), []
    for row in fake_load("baber/piqa")["validation"]:
        asked = [
            (f"Question: {row['goal']}\nAnswer:", f" {row[name]}") for name in ("sol1", "sol2")
        ]
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
        (one, _), (two, _) = model.loglikelihood(requests, disable_tqdm=True)
        right.append(float((one < two) == row["label"]))
    assert found[1].value == sum(right) / 2


def test_lm_eval_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    logger, bar = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level = logger.level
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    graph = str(llama().graph)
    ours(llama(), limit=2)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert now == states
    assert (logger.level, lm_eval.api.task.tqdm) == (level, bar)
    assert str(llama().graph) == graph


def test_progress_rises_to_one() -> None:
    told: list[tuple[float, str]] = []
    ours(demo_lm(), limit=9, progress=lambda share, what: told.append((share, what)))
    shares = [share for share, _ in told]
    assert len(shares) > 3 and shares == sorted(shares) and shares[-1] == 1
    assert {what for _, what in told} == {"read continuation", "continuation"}


# ---------------------------------------------------------------------- refusals


def offline(*_: Any, **__: Any) -> None:
    raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")


@pytest.mark.usefixtures("six_tasks")
def test_data_out_of_reach_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(SlimError, match=r"^piqa: .*'baber/piqa'.*HF_HOME.*continuation, which"):
        tasks.run_tasks(llama(), ["continuation", "piqa"])
    with pytest.raises(CalibrationError, match=r"^wikitext2 is Salesforce/wikitext.*HF_HOME"):
        tasks.wikitext2()


@pytest.mark.usefixtures("six_tasks")
def test_an_unknown_task_is_named() -> None:
    with pytest.raises(SlimError, match=r"^piqqa: no task of that name; use continuation, zero-"):
        tasks.run_tasks(llama(), ["piqqa"])


def test_a_task_that_cannot_be_run_here_is_refused() -> None:
    def missing(names: list[str]) -> Any:
        raise ImportError("No module named 'antlr'")

    code = {"tasks": {"x": SimpleNamespace(UNSAFE_CODE=True)}}
    for load, words in [
        (missing, "x: the task needs a package"),
        (lambda names: code, "x: the ta"),
    ]:
        with pytest.raises(SlimError, match=words):
            tasks._load_one(SimpleNamespace(all_tasks=["x"], load=load), "x")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", "this one takes input_ids, attention_mask"),
        ("mlp", "this one takes x"),
        ("llama", "no tokenizer"),
    ],
)
def test_a_program_that_is_no_language_model_is_refused(kind: str, words: str) -> None:
    with pytest.raises(SlimError, match=words):
        ours(captured(kind))


class Narrow(Rows):
    """From tokens to vectors that are no logits."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(nn.functional.one_hot(input_ids, 16).float())


def test_an_output_narrower_than_the_vocabulary_is_refused() -> None:
    program = torch.export.export(Narrow(), (), {"input_ids": ids(1, 2, 4) % 16})
    with pytest.raises(SlimError, match="tokenizer's 96 tokens, the program answers with 8"):
        ours(with_words(program))


def test_a_text_without_context_needs_a_start_or_end_token() -> None:
    model = LanguageModel(with_words(slimfx.capture(case("llama").model), end=None), 4)
    assert model.score([([1, 2], [3])])
    with pytest.raises(SlimError, match="neither a start nor an end token"):
        model.whole(["w1 w2"])


@pytest.mark.parametrize("words", [{"limit": 0}, {"batch": 0}])
def test_a_limit_or_batch_of_nothing_is_refused(words: dict[str, int]) -> None:
    with pytest.raises(SlimError, match="must be 1 or more"):
        ours(llama(), **words)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SlimError, match=r"pip install 'slimfx\[eval\]'"):
        ours(llama())


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny program with words, saved."""
    path = tmp_path_factory.mktemp("tasks") / "llama.pt2"
    slimfx.save(llama(), path)
    return str(path)


def test_the_command_prints_scores_as_json_and_as_a_table(file: str) -> None:
    line = ["eval", file, "--tasks", "continuation", "--limit", "5", "--batch", "3"]
    found = ours(slimfx.load(file), limit=5)
    said = CliRunner().invoke(cli.app, [*line, "--json"])
    assert json.loads(said.stdout)["tasks"] == [
        {
            "task": "continuation",
            "metric": score.metric,
            "value": score.value,
            "stderr": score.stderr,
            "samples": 5,
            "cut": 0,
        }
        for score in found
    ]
    table = CliRunner().invoke(cli.app, line).stdout
    for score in found:
        assert score.metric in table and f"{score.value:.4f}" in table


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--tasks", "continuation", "--data", "x.txt"], 2, "--tasks goes without"),
        (["--tasks", "continuation", "--samples", "3"], 2, "--tasks goes without"),
        (["--limit", "3"], 2, "--limit is for --tasks"),
        (["--tasks", ","], 1, "no task is named"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(
    file: str, more: list[str], code: int, words: str
) -> None:
    said = CliRunner().invoke(cli.app, ["eval", file, *more])
    assert said.exit_code == code
    assert words in (said.stderr if code == 2 else str(said.exception))


def test_the_command_takes_wikitext2_as_the_papers_do(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["", " w3 w4 \n", *(" ".join(["w5", "w6"] * n) for n in range(1, 20))]
    datasets.Dataset.from_dict({"text": lines}).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(tasks, "WIKITEXT2", str(tmp_path / "saved"))
    assert tasks.wikitext2() == ["\n\n".join(lines)]
    line = ["eval", file, "--data", "wikitext2", "--length", "30", "--json"]
    said = json.loads(CliRunner().invoke(cli.app, line).stdout)
    stream = torch.tensor([3, 4, *[5, 6] * 190, 0])
    wanted = slimfx.evaluate(slimfx.load(file), stream, length=30)
    assert said == {"metric": "perplexity", **dataclasses.asdict(wanted)}
    assert said["samples"] == 383 // 30


def test_the_command_line_starts_without_lm_eval() -> None:
    script = "import slimfx.cli, sys; print('lm_eval' in sys.modules, 'datasets' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["False", "False"]

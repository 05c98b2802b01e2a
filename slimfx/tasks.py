"""Scores on the tasks of lm-eval, for any program that maps tokens to logits.

Prompts, examples in them and metrics are lm-eval's own, so the figures compare with those that it
gives for the same model elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from slimfx import continuation, data
from slimfx.errors import CalibrationError, SlimError, need
from slimfx.likelihood import LanguageModel

Progress = Callable[[float, str], None]

GROUPS = {
    "zero-shot": ("mmlu", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa"),
}
"""Names of ours for several tasks: the six of the papers on one-shot compression."""

WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1:test"

_SEED = 1234  # lm-eval's own, so that few-shot prompts are the same as there
_RESAMPLES = 1000  # for metrics whose standard error has no formula


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task, or of a group that lm-eval averages."""

    task: str
    metric: str
    """As lm-eval names it: "acc", or "acc_norm", for which the endings' lengths are divided out."""
    value: float
    stderr: float | None
    """None where lm-eval gives none."""
    samples: int
    """Documents, of all subtasks together."""
    cut: int
    """Requests whose beginning was left out, because the program takes no longer text."""


def run_tasks(
    program: ExportedProgram,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> tuple[TaskScore, ...]:
    """Score a program of input_ids -> logits, every metric of every task in order.

    Args:
        tasks: "continuation", which needs no data (see `slimfx.continuation`), "zero-shot", which
            stands for `GROUPS["zero-shot"]`, or any name that lm-eval knows.
        limit: documents of each task at most, subtasks counted each; all by default.
        batch: rows at once, at most what the program takes.

    Raises:
        SlimError: lm-eval is missing, no such task, its data cannot be read, or the program is
            not one of a language model with its tokenizer.
    """
    if batch < 1 or (limit is not None and limit < 1):
        raise SlimError(f"batch {batch} and limit {limit} must be 1 or more")
    if not tasks:
        raise SlimError(f"no task is named; the one without data is {continuation.NAME}")
    need("lm_eval")
    lm_evaluate = need("lm_eval.evaluator").evaluate
    names = list(dict.fromkeys(each for name in tasks for each in GROUPS.get(name, (name,))))
    tell = progress or (lambda share, what: None)
    model = LanguageModel(program, batch)
    found: list[TaskScore] = []
    with _undisturbed():
        loaded = _load(names, tell)
        for i, name in enumerate(names):
            model.cut = 0
            model.tell = _part(tell, i, len(names), name)
            result = lm_evaluate(
                _as_lm(model),
                loaded[name],
                limit=limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
            )
            found += _scores(name, result, model.cut)
    return tuple(found)


def _part(tell: Progress, i: int, count: int, name: str) -> Callable[[float], None]:
    return lambda share: tell((i + share) / count, name)


def wikitext2() -> list[str]:
    """The test text of WikiText-2 as the papers take it: one document, lines parted by "\\n\\n".

    Raises:
        CalibrationError: `datasets` can neither fetch it nor find it in its cache.
    """
    try:
        return ["\n\n".join(data.documents(WIKITEXT2))]
    except CalibrationError as error:
        raise CalibrationError(
            f"wikitext2 is {WIKITEXT2}, which cannot be read ({error.__cause__}); fetch it once "
            f"where huggingface.co can be reached and bring that cache (HF_HOME)"
        ) from error


def _as_lm(model: LanguageModel) -> Any:
    """The model as lm-eval wants to be handed one."""

    class ProgramLM(need("lm_eval.api.model").TemplateLM):  # type: ignore[misc]
        """Asks the model; lm-eval's bars stay away."""

        @property
        def eot_token_id(self) -> int:
            return model.prefix() if model.end is None else model.end

        @property
        def prefix_token_id(self) -> int:
            return model.prefix()

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return model.encode(string, add_special_tokens)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            return model.score([(context, end) for _, context, end in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            return model.whole([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            return model.go_on([request.args for request in requests])

    return ProgramLM()


def _load(names: Sequence[str], tell: Progress) -> dict[str, Any]:
    """Each task with its data, as lm-eval's `evaluate` takes it.

    Raises:
        SlimError: no such task, or one that cannot be run here.
    """
    ConfigurableTask = need("lm_eval.api.task").ConfigurableTask
    TaskManager = need("lm_eval.tasks").TaskManager
    loaded: dict[str, Any] = {}
    manager = None
    for name in names:
        tell(0.0, f"read {name}")
        if name == continuation.NAME:
            loaded[name] = {"tasks": {name: ConfigurableTask(config=continuation.config())}}
        else:
            manager = manager or TaskManager()
            loaded[name] = _load_one(manager, name)
    return loaded


def _load_one(manager: Any, name: str) -> Any:
    if name not in manager.all_tasks:
        raise SlimError(
            f"{name}: no task of that name; use {continuation.NAME}, {', '.join(GROUPS)}, or one "
            f"of `lm-eval ls tasks`"
        )
    try:
        loaded = manager.load([name])
    except ImportError as error:
        raise SlimError(f"{name}: the task needs a package ({error}); install it") from error
    except (OSError, ValueError) as error:
        raise SlimError(
            f"{name}: the task's data cannot be read ({error}); fetch it once where "
            f"huggingface.co can be reached and bring that cache (HF_HOME), or use "
            f"{continuation.NAME}, which needs none"
        ) from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise SlimError(
                f"{name}: the task runs what the model writes, or shows it pictures; choose "
                f"one of text that runs nothing"
            )
        task.set_fewshot_seed(seed=_SEED)
    return loaded


def _scores(name: str, result: Any, cut: int) -> list[TaskScore]:
    """A group's own averages, or every task's figures where it has none."""
    figures = result["results"]
    sizes = {task: size["effective"] for task, size in result["n-samples"].items()}
    wanted = {name: sum(sizes.values())} if name in result.get("groups", {}) else sizes
    return [
        TaskScore(
            task=task,
            metric=key.removesuffix(",none"),
            value=float(value),
            stderr=_number(figures[task].get(key.replace(",", "_stderr,", 1))),
            samples=samples,
            cut=cut,
        )
        for task, samples in wanted.items()
        for key, value in figures[task].items()
        if "," in key and "_stderr," not in key
    ]


def _number(value: Any) -> float | None:
    return None if value is None or isinstance(value, str) else float(value)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """lm-eval without bars and remarks, its prints on standard error, seeded as it seeds itself;
    afterwards the global random states are what they were.
    """
    building: Any = need("lm_eval.api.task")
    logger, bar = logging.getLogger("lm_eval"), building.tqdm
    level, states = logger.level, (random.getstate(), np.random.get_state())
    logger.setLevel(logging.ERROR)
    building.tqdm = partial(bar, disable=True)
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(sys.stderr):
            random.seed(0)
            np.random.seed(_SEED)
            torch.manual_seed(_SEED)
            yield
    finally:
        building.tqdm = bar
        logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])

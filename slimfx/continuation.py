"""A multiple-choice task that needs no data but the running Python: which words go on with it?

An item is the first words of an English sentence from the documentation that every Python brings,
out of the part that calibration leaves out, with four endings of as many words each. One is the
sentence's own, the others are cut from other sentences at the same place. Chance is one in four.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from slimfx import data
from slimfx.errors import need

NAME = "continuation"
START = 8
"""Words that are given."""
END = 6
"""Words of every ending."""
ITEMS = 300
"""Items at most; a standard error of about 0.03."""
_CHOICES = 4
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*[,;]?")


def items(documents: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The items, each with its `start`, four `choices` and the `answer`, an index of choices.

    The same documents give the same items: the wrong endings and the order are drawn with a fixed
    seed. By default the documents are the running Python's, so figures of two releases of Python
    differ by more than the model.
    """
    texts = data.python_documents()[1] if documents is None else documents
    pairs = _pairs(texts)
    draw = random.Random(0)
    found = []
    for start, end in draw.sample(pairs, min(ITEMS, len(pairs))):
        others = draw.sample([other for _, other in pairs if other != end], _CHOICES - 1)
        answer = draw.randrange(_CHOICES)
        choices = [*others[:answer], end, *others[answer:]]
        found.append({"start": start, "choices": choices, "answer": answer})
    return found


def _pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(start, end) of every sentence that is long enough, plain words only, no end twice."""
    ends: dict[str, str] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", " ".join(paragraph.split())):
                words = sentence.split()[: START + END]
                words[-1:] = [word.rstrip(".") for word in words[-1:]]
                if len(words) == START + END and all(map(_WORD.fullmatch, words)):
                    ends.setdefault(" ".join(words[START:]), " ".join(words[:START]))
    return [(start, end) for end, start in ends.items()]


def config() -> dict[str, Any]:
    """The task as lm-eval's `ConfigurableTask` takes it, with its items in memory."""
    return {
        "task": NAME,
        "custom_dataset": _dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_text": "start",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }


def _dataset(**_: Any) -> dict[str, Any]:
    return {"test": need("datasets").Dataset.from_list(items())}

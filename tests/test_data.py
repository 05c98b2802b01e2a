"""data: the same windows from every kind of source, and errors that name the numbers."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from models import captured, demo_lm, ids, normal, tiny_bert, tiny_llama, word_tokenizer
from slimfx.runtime.manifest import Manifest, attach
from torch import Tensor
from torch.export import ExportedProgram

import slimfx
from slimfx import data
from slimfx.errors import CalibrationError, SlimError
from slimfx.recipe import Calibration, Recipe

DOCUMENTS = [" ".join(f"w{(7 * i + j) % 90 + 1}" for j in range(20 + i)) for i in range(30)]
"""Texts of 20 to 49 words of the tiny vocabulary."""
HOW = Calibration(samples=6, length=24, batch=4, seed=3)


def tokens_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.fixture(scope="module")
def decoder() -> ExportedProgram:
    """A tiny Llama with the word tokenizer and an end token."""
    return attach(slimfx.capture(tiny_llama()), Manifest(tokenizer=word_tokenizer(), eos_token=95))


@pytest.fixture(scope="module")
def encoder() -> ExportedProgram:
    """A tiny BERT with the word tokenizer."""
    return attach(slimfx.capture(tiny_bert()), Manifest(tokenizer=word_tokenizer()))


def write_text(path: Path) -> Path:
    path.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    return path


def write_lines(path: Path, opener: Callable[..., Any] = open) -> Path:
    with opener(path, "wt", encoding="utf-8") as file:
        for text in DOCUMENTS:
            file.write(json.dumps({"text": text, "other": 1}) + "\n")
    return path


def write_dataset(path: Path) -> Path:
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(path)
    return path


SOURCES: dict[str, Callable[[Path], Any]] = {
    "list": lambda folder: DOCUMENTS,
    "tuple": lambda folder: tuple(DOCUMENTS),
    "text": lambda folder: write_text(folder / "a.txt"),
    "text by name": lambda folder: str(write_text(folder / "a.txt")),
    "text without suffix": lambda folder: write_text(folder / "README"),
    "blank lines of spaces": lambda folder: _blank(folder / "a.txt"),
    "jsonl": lambda folder: write_lines(folder / "a.jsonl"),
    "ndjson": lambda folder: write_lines(folder / "a.ndjson"),
    "jsonl.gz": lambda folder: write_lines(folder / "a.jsonl.gz", gzip.open),
    "jsonl.bz2": lambda folder: write_lines(folder / "a.jsonl.bz2", bz2.open),
    "jsonl.xz": lambda folder: write_lines(folder / "a.jsonl.xz", lzma.open),
    "dataset": lambda folder: write_dataset(folder / "saved"),
    "dataset by name": lambda folder: str(write_dataset(folder / "saved")),
}


def _blank(path: Path) -> Path:
    path.write_text("\n\n" + "\n \t\n\n".join(DOCUMENTS) + "\n\n \n", encoding="utf-8")
    return path


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_holds_the_same_documents_and_gives_the_same_windows(
    source: str, tmp_path: Path, decoder: ExportedProgram
) -> None:
    made = SOURCES[source](tmp_path)
    assert data.documents(made) == DOCUMENTS
    found = data.batches(decoder, made, HOW)
    expected = data.batches(decoder, DOCUMENTS, HOW)
    assert [len(batch) for batch in found] == [4, 2]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_compressed_text_file_is_read_as_text(tmp_path: Path) -> None:
    for suffix, opener in ((".gz", gzip.open), (".xz", lzma.open), (".bz2", bz2.open)):
        path = tmp_path / f"a.txt{suffix}"
        with opener(path, "wt", encoding="utf-8") as file:
            file.write("\n\n".join(DOCUMENTS))
        assert data.documents(path) == DOCUMENTS


def test_documents_are_parted_by_the_end_token(decoder: ExportedProgram) -> None:
    found = data.token_stream(decoder, DOCUMENTS[:3])
    expected = [token for text in DOCUMENTS[:3] for token in [*tokens_of(text), 95]]
    assert found.dtype is torch.int64 and found.tolist() == expected


def test_without_an_end_token_documents_follow_each_other(encoder: ExportedProgram) -> None:
    expected = [token for text in DOCUMENTS for token in tokens_of(text)]
    assert data.token_stream(encoder, DOCUMENTS).tolist() == expected


def test_windows_are_drawn_from_the_stream(decoder: ExportedProgram) -> None:
    stream = data.token_stream(decoder, DOCUMENTS)
    windows = torch.cat(data.batches(decoder, DOCUMENTS, HOW))
    assert windows.shape == (6, 24) and windows.dtype is torch.int64
    places = stream.unfold(0, 24, 1)
    assert all((places == window).all(1).any() for window in windows)


def test_one_seed_gives_one_set_of_windows_and_another_seed_another(
    decoder: ExportedProgram,
) -> None:
    torch.manual_seed(1)
    one = torch.cat(data.batches(decoder, DOCUMENTS, HOW))
    torch.manual_seed(2)
    again = torch.cat(data.batches(decoder, DOCUMENTS, HOW))
    other = torch.cat(data.batches(decoder, DOCUMENTS, Calibration(6, 24, 4, seed=4)))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_batch_size_changes_no_window(decoder: ExportedProgram) -> None:
    one = data.batches(decoder, DOCUMENTS, Calibration(6, 24, batch=1, seed=3))
    assert len(one) == 6
    assert torch.equal(torch.cat(one), torch.cat(data.batches(decoder, DOCUMENTS, HOW)))


def test_only_as_many_documents_are_tokenized_as_are_asked_for(decoder: ExportedProgram) -> None:
    some = data.token_stream(decoder, DOCUMENTS, characters=400, seed=1)
    same = data.token_stream(decoder, DOCUMENTS, characters=400, seed=1)
    other = data.token_stream(decoder, DOCUMENTS, characters=400, seed=2)
    assert torch.equal(some, same) and not torch.equal(some, other)
    lengths = [len(text) for text in DOCUMENTS]
    texts = " ".join(f"w{token}" for token in some.tolist()).split("w95")
    held = [text.strip() for text in texts if text.strip()]
    assert set(held) <= set(DOCUMENTS)
    assert held == [text for text in DOCUMENTS if text in held]  # in their own order
    assert 400 <= sum(map(len, held)) < 400 + max(lengths)


def test_a_row_of_tokens_is_cut_into_windows(decoder: ExportedProgram) -> None:
    row = torch.arange(200) % 90
    for tokens in (row, row.int()):
        windows = torch.cat(data.batches(decoder, tokens, HOW))
        assert windows.shape == (6, 24) and windows.dtype is torch.int64
        steps = (windows[:, 1:] - windows[:, :-1]) % 90
        assert (steps == 1).all()


def test_rows_of_tokens_are_the_samples_themselves(decoder: ExportedProgram) -> None:
    rows = ids(1, 10, 17)
    found = data.batches(decoder, rows, HOW)
    assert [batch.shape for batch in found] == [(4, 17), (4, 17), (2, 17)]
    assert torch.equal(torch.cat(found), rows)


def test_ready_batches_are_taken_as_they_are(encoder: ExportedProgram) -> None:
    made = [{"input_ids": ids(i, 2, 8), "attention_mask": torch.ones(2, 8)} for i in range(3)]
    assert data.batches(encoder, made, HOW) == made
    assert data.batches(encoder, iter(made), HOW) == made
    assert data.batches(captured("mlp"), [normal(1, 4, 16)], HOW)[0].shape == (4, 16)


def test_an_encoder_gets_padded_documents_with_their_mask(encoder: ExportedProgram) -> None:
    found = data.batches(encoder, DOCUMENTS, Calibration(samples=6, length=22, batch=4))
    assert [batch["input_ids"].shape for batch in found] == [(4, 22), (2, 22)]
    rows = torch.cat([batch["input_ids"] for batch in found]).tolist()
    masks = torch.cat([batch["attention_mask"] for batch in found]).tolist()
    for text, row, mask in zip(DOCUMENTS[:6], rows, masks, strict=True):
        kept = tokens_of(text)[:22]
        assert row[: len(kept)] == kept
        assert mask == [1] * len(kept) + [0] * (22 - len(kept))
    assert sum(map(sum, masks)) < 6 * 22


def test_a_sample_is_never_longer_than_the_program_takes(
    decoder: ExportedProgram, encoder: ExportedProgram
) -> None:
    long = Calibration(samples=2, length=5000)
    assert data.longest(decoder, 5000) == 64 and data.longest(decoder, 10) == 10
    assert data.batches(decoder, DOCUMENTS, long)[0].shape == (2, 64)
    assert data.batches(encoder, DOCUMENTS, long)[0]["input_ids"].shape == (2, 64)


def test_too_little_text_names_both_numbers_and_the_line_that_helps(
    decoder: ExportedProgram,
) -> None:
    with pytest.raises(CalibrationError) as caught:
        data.batches(decoder, ["w1 w2 w3 w4", "w5 w6"], HOW)
    text = str(caught.value)
    assert "has 8 tokens, one sample needs 24" in text
    line = yaml.safe_load(re.search(r"calibration: \{.*?\}", text).group())
    how = Recipe.from_dict(line).calibration
    assert data.batches(decoder, ["w1 w2 w3 w4", "w5 w6"], how)[0].shape[1] == 8


@pytest.mark.parametrize("source", [[""], ["", ""], torch.zeros(3, dtype=torch.int64)])
def test_no_text_at_all_is_too_little(source: Any, decoder: ExportedProgram) -> None:
    with pytest.raises(CalibrationError, match=r"has [0-3] tokens, one sample needs 24"):
        data.batches(decoder, source, HOW)


def test_a_text_file_without_a_word_holds_no_document(
    tmp_path: Path, encoder: ExportedProgram, decoder: ExportedProgram
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n \n\n", encoding="utf-8")
    assert data.documents(path) == []
    with pytest.raises(CalibrationError, match="holds no document"):
        data.batches(encoder, path, HOW)
    with pytest.raises(CalibrationError, match="has 0 tokens"):
        data.batches(decoder, path, HOW)


@pytest.mark.parametrize("name", ["absent.txt", "./absent", "/absent/a.jsonl", "a/absent.jsonl.gz"])
def test_a_missing_file_is_named(name: str, decoder: ExportedProgram) -> None:
    with pytest.raises(CalibrationError, match=f"^{re.escape(name)}: no such file"):
        data.batches(decoder, name, HOW)


@pytest.mark.parametrize(
    "line", ['{"body": "x"}', "[1, 2]", '"text"', "{", '{"text": null}', '{"text": 3}', "7"]
)
def test_json_lines_without_a_text_are_refused_by_name(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"a\.jsonl: .*text"):
        data.documents(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.xz", "a.jsonl.bz2", "a.txt"])
def test_a_file_that_is_no_text_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x00\xff\xfe not a compressed file, nor UTF-8 \xff")
    with pytest.raises(CalibrationError, match=re.escape(name)):
        data.documents(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.bz2"])
def test_a_truncated_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    openers = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    path = write_lines(tmp_path / name, openers[Path(name).suffix])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CalibrationError, match=re.escape(name)):
        data.documents(path)


def test_a_dataset_without_a_text_column_names_the_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": ["a"], "label": [1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(CalibrationError, match=r"body.*label.*none called text"):
        data.documents(tmp_path / "saved")


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no dataset of that name could be read"):
        data.documents(tmp_path)


def test_a_program_without_a_tokenizer_says_what_to_do() -> None:
    with pytest.raises(CalibrationError, match=r"carries no tokenizer; .* tokens as a tensor"):
        data.batches(captured("llama"), DOCUMENTS, HOW)
    assert data.batches(captured("llama"), ids(1, 100), HOW)[0].shape == (4, 24)


@pytest.mark.parametrize("source", [None, ["text"], torch.zeros(100)])
def test_a_program_of_other_inputs_asks_for_batches(source: Any) -> None:
    with pytest.raises(CalibrationError, match=r"takes pixel_values, not input_ids; .*batches"):
        data.batches(captured("vit"), source, HOW)


def test_a_row_of_tokens_is_no_source_for_an_encoder_and_the_error_says_so() -> None:
    with pytest.raises(SlimError):
        slimfx.compress(captured("bert"), "slim", ids(1, 400))


def test_the_english_of_python_comes_in_two_parts_that_share_nothing() -> None:
    calibration, held_out = data.python_documents()
    assert not set(calibration) & set(held_out)
    assert sum(map(len, calibration)) > 200_000 and sum(map(len, held_out)) > 200_000
    paragraphs = [
        {p.strip() for text in part for p in re.split(r"\n\s*\n", text) if len(p) > 200}
        for part in (calibration, held_out)
    ]
    assert len(paragraphs[1]) > 100
    assert not paragraphs[0] & paragraphs[1]
    assert data.documents(None) == calibration


def test_no_source_means_windows_of_that_english() -> None:
    program = demo_lm()
    [windows] = data.batches(program, None, Calibration(samples=2, length=64))
    text = data.tokenizer_of(program).decode(windows[0].tolist(), skip_special_tokens=False)
    middle = max(text.split("<|"), key=len)[20:120]
    assert len(middle) > 40
    assert any(middle in document for document in data.python_documents()[0])


def test_the_digest_is_of_the_values_in_call_order(encoder: ExportedProgram) -> None:
    x, mask = ids(1, 2, 8), torch.ones(2, 8, dtype=torch.int64)
    named = [{"attention_mask": mask, "input_ids": x}]
    first = data.digest(encoder, named)
    assert first == data.digest(encoder, [(x, mask)])
    assert first == data.digest(encoder, [{"input_ids": x, "attention_mask": mask}])
    changed: Tensor = mask.clone()
    changed[1, 3] = 0
    assert first != data.digest(encoder, [(x, changed)])
    assert len(first) == 64

"""Text and tensors for calibration and evaluation.

A source is None (the English of the running Python), a text file, a JSONL file with a `text` field
(either may end in .gz, .bz2 or .xz), a folder or name that `datasets` knows, a list of strings, a
tensor of tokens, or a list of ready batches.
"""

from __future__ import annotations

import ast
import bz2
import gzip
import hashlib
import json
import lzma
import re
import sysconfig
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx.errors import ArtifactError, CalibrationError, need
from slimfx.passes.inputs import flat_inputs, rows_at_once, tensor_inputs, text_batch
from slimfx.recipe import Calibration
from slimfx.runtime.manifest import manifest_of

Batch = Any
"""A tensor, a tuple of tensors in call order, or a mapping from input name to tensor."""

_CHARACTERS = 64
"""Characters looked at for each calibration token: ample, and bounded for any source."""

_RATIO = 50
"""Characters for each byte of a file; more is a bomb."""

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def batches(program: ExportedProgram, source: Any, how: Calibration) -> list[Batch]:
    """Calibration batches for a program.

    Documents become padded samples with their mask when the program has an `attention_mask`, and
    otherwise windows drawn from the concatenated tokens, at places that `how.seed` fixes. A program
    with a cache reads each window from its first position on.

    Raises:
        CalibrationError: no such source, no tokenizer, or too little text.
    """
    if isinstance(source, Mapping):
        return [source]
    if is_batches(source):
        return list(source)
    inputs = tensor_inputs(program)
    if "input_ids" not in inputs:
        raise CalibrationError(
            f"the program takes {', '.join(inputs) or 'no tensors'}, not input_ids; give "
            f"calibration as a list of batches (tensors, or mappings from input name to tensor)"
        )
    if isinstance(source, Tensor) and source.dim() == 2:
        return _rows(program, source, how.batch)
    length = longest(program, how.length)
    if "attention_mask" in inputs:
        return padded_batches(program, documents(source)[: how.samples], length, how.batch)
    characters = _CHARACTERS * how.samples * length
    stream = token_stream(program, source, characters=characters, seed=how.seed)
    fewest, rows = rows_at_once(program, 1), rows_at_once(program, how.batch)
    left = how.samples % rows
    samples = how.samples + (fewest - left if 0 < left < fewest else 0)
    windows = random_windows(stream, samples=samples, length=length, seed=how.seed)
    return _rows(program, windows, how.batch)


def _rows(program: ExportedProgram, ids: Tensor, size: int) -> list[Batch]:
    """Rows of tokens, so many at once as the program takes."""
    parts, fewest = list(ids.split(rows_at_once(program, size))), rows_at_once(program, 1)
    if len(parts[-1]) < fewest:
        raise CalibrationError(
            f"{len(parts[-1])} of {len(ids)} rows of tokens are left over, and the program takes "
            f"{fewest} at once; give a multiple of that"
        )
    if "cache_position" not in tensor_inputs(program):
        return parts
    return [text_batch(program, part) for part in parts]


def longest(program: ExportedProgram, length: int) -> int:
    """`length`, or the longest sequence the program takes if that is shorter."""
    limit = tensor_inputs(program)["input_ids"].sizes[-1][1]
    return length if limit is None else min(length, limit)


def token_stream(
    program: ExportedProgram, source: Any, *, characters: int | None = None, seed: int = 0
) -> Tensor:
    """The tokens of a source in one int64 row, documents parted by the end token if there is one.

    With `characters`, documents are drawn (by `seed`) until they hold that many.
    """
    if isinstance(source, Tensor):
        return source.flatten().long()
    manifest = manifest_of(program)
    tokenizer = tokenizer_of(program)
    parts = [] if manifest.eos_token is None else [manifest.eos_token]
    stream: list[int] = []
    texts = documents(source)
    if characters is not None:
        texts = _draw(texts, characters, seed)
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        stream += encoding.ids + parts
    return torch.tensor(stream, dtype=torch.int64)


def _draw(texts: list[str], characters: int, seed: int) -> list[str]:
    """Random documents that together hold so many characters, in their own order."""
    chosen, held = [], 0
    for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist():
        if held >= characters:
            break
        chosen.append(i)
        held += len(texts[i])
    return [texts[i] for i in sorted(chosen)]


def random_windows(stream: Tensor, *, samples: int, length: int, seed: int) -> Tensor:
    """`samples` windows of `length` tokens, int64 [samples, length]."""
    if len(stream) < length:
        raise CalibrationError(
            f"calibration text has {len(stream)} tokens, one sample needs {length}; give more "
            f"text or set calibration: {{length: {max(len(stream), 2)}}}"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - length + 1, (samples,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


def padded_batches(
    program: ExportedProgram, texts: Sequence[str], length: int, size: int
) -> list[dict[str, Tensor]]:
    """Texts as batches of input_ids and attention_mask [size, length], cut and padded."""
    if not texts:
        raise CalibrationError("the text holds no document; give a source with text in it")
    tokenizer = tokenizer_of(program)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encodings = tokenizer.encode_batch(list(texts))
    ids = torch.tensor([e.ids for e in encodings])
    mask = torch.tensor([e.attention_mask for e in encodings])
    pairs = zip(ids.split(size), mask.split(size), strict=True)
    return [{"input_ids": i, "attention_mask": m} for i, m in pairs]


def documents(source: Any) -> list[str]:
    """The documents of a source; a plain text file is cut into paragraphs at blank lines."""
    if source is None:
        return python_documents()[0]
    if isinstance(source, Tensor):
        raise CalibrationError(
            "a row of tokens does not say where documents end; give this program texts, or "
            "batches of input_ids and attention_mask"
        )
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return list(source)
    path = Path(source)
    if path.is_file():
        return _read(path)
    if path.is_dir() or not (path.suffix or str(source).startswith((".", "/"))):
        return _from_datasets(str(source))
    raise CalibrationError(f"{source}: no such file")


def _read(path: Path) -> list[str]:
    opener = _OPENERS.get(path.suffix, open)
    name = path.name.removesuffix(path.suffix) if path.suffix in _OPENERS else path.name
    try:
        longest = _RATIO * path.stat().st_size + (1 << 20)
        with opener(path, "rt", encoding="utf-8") as file:
            text = file.read(longest)
            if file.read(1):
                raise ValueError(f"more than {longest} characters are packed into it")
        if name.endswith((".jsonl", ".ndjson")):
            return [_text(json.loads(line)["text"]) for line in text.split("\n") if line.strip()]
        return [p for p in re.split(r"\n\s*\n", text) if p.strip()]
    except (
        *(OSError, EOFError, ValueError, KeyError, TypeError, lzma.LZMAError, zlib.error),
        RecursionError,
    ) as error:
        raise CalibrationError(
            f"{path}: not text, nor JSON lines with a text field ({error})"
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is {value!r}")
    return value


def _from_datasets(name: str) -> list[str]:
    """`path-or-name[:configuration[:split]]`, the split defaulting to train."""
    datasets = need("datasets")
    base, _, rest = name.partition(":")
    configuration, _, split = rest.partition(":")
    try:
        if (Path(base) / "dataset_info.json").exists():
            data = datasets.load_from_disk(base)
        else:
            data = datasets.load_dataset(base, configuration or None, split=split or "train")
    except (OSError, ValueError, ConnectionError) as error:
        raise CalibrationError(
            f"{name}: no such file, and no dataset of that name could be read ({error})"
        ) from error
    if "text" not in data.column_names:
        raise CalibrationError(f"{name}: has columns {data.column_names}, none called text")
    return list(data["text"])


@cache
def python_documents() -> tuple[list[str], list[str]]:
    """English that comes with every Python, as (calibration, held out).

    Language topics and the docstrings of the standard library; every fourth document is held out.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)]
        texts.append("\n\n".join(filter(None, map(ast.get_docstring, [tree, *nodes]))))
    seen: set[str] = set()
    found = []
    for text in texts:  # topics repeat one another; the two parts must not
        paragraphs = [p for p in re.split(r"\n\s*\n", text) if p.strip() not in seen]
        seen.update(p.strip() for p in paragraphs)
        if sum(map(len, paragraphs)) > 400:
            found.append("\n\n".join(paragraphs))
    return [text for i, text in enumerate(found) if i % 4 != 3], found[3::4]


def tokenizer_of(program: ExportedProgram):  # type: ignore[no-untyped-def]
    """A fresh `tokenizers.Tokenizer` from the program's manifest."""
    return read_tokenizer(manifest_of(program).tokenizer)


def read_tokenizer(text: str | None):  # type: ignore[no-untyped-def]
    """A `tokenizers.Tokenizer` of its JSON document.

    Raises:
        CalibrationError: there is none.
        ArtifactError: it cannot be read.
    """
    if text is None:
        raise CalibrationError(
            "the program carries no tokenizer; capture it from a folder that has one, or give "
            "tokens as a tensor"
        )
    try:
        tokenizer = need("tokenizers").Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ArtifactError(f"the program's tokenizer cannot be read ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def digest(program: ExportedProgram, data: Iterable[Batch]) -> str:
    """SHA-256 over the values of all batches in call order."""
    sha = hashlib.sha256()
    for batch in data:
        for value in flat_inputs(program, batch):
            if isinstance(value, Tensor):
                sha.update(
                    value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                )
    return sha.hexdigest()


def is_batches(source: Any) -> bool:
    """Is the source ready for a program, rather than text or tokens to be cut?"""
    if isinstance(source, str | Path | Tensor | None):
        return False
    return not (
        isinstance(source, Sequence) and source and all(isinstance(item, str) for item in source)
    )

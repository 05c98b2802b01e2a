"""Compile a model for runner: package.pt2, vocabulary.txt and, on stdout, the prompt's token ids.

python examples/cpp_runner/prepare.py small.pt2 runner-model "The function returns"
"""

import json
import sys
from pathlib import Path

from slimfx.runtime.manifest import manifest_of
from tokenizers import Tokenizer

import slimfx


def main(model: str, folder: str, prompt: str) -> None:
    """Take a .pt2 that slimfx saved, or a Hugging Face folder as it is."""
    program = slimfx.load(model) if model.endswith(".pt2") else slimfx.capture(model)
    manifest = manifest_of(program)
    if manifest.tokenizer is None:
        raise slimfx.SlimError(f"{model}: comes without a tokenizer")
    lines = vocabulary(manifest.tokenizer, manifest.eos_token)
    ids = Tokenizer.from_str(manifest.tokenizer).encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise slimfx.SlimError("the prompt is empty; give at least one word")
    output = Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    (output / "vocabulary.txt").write_text("".join(f"{line}\n" for line in lines))
    slimfx.export(program, "aoti", output / "package.pt2")
    print(*ids)


def vocabulary(tokenizer: str, end: int | None) -> list[str]:
    """Each token's bytes in hex, by id: none for special tokens, "end" for the one that ends."""
    described = json.loads(tokenizer)
    if described["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(described["decoder"]):
        raise slimfx.SlimError("the tokenizer is not byte-level BPE, the only kind runner prints")
    printed = {chr(i): i for i in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    rest = [i for i in range(256) if i not in printed.values()]
    byte = printed | {chr(256 + k): i for k, i in enumerate(rest)}
    found = {
        each["id"]: b"" if each["special"] else each["content"].encode()
        for each in described["added_tokens"]
    }
    for word, i in described["model"]["vocab"].items():
        if i not in found:
            found[i] = bytes(byte[character] for character in word)
    lines = [found.get(i, b"").hex() for i in range(max(found) + 1)]
    if end is not None:
        lines[end] = "end"
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: prepare.py MODEL.pt2-or-folder OUT_FOLDER PROMPT")
    try:
        main(*sys.argv[1:])
    except slimfx.SlimError as error:
        sys.exit(f"error: {error}")

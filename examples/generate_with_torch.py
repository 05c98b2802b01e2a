"""Continue a text from an ATen-form .pt2 with torch and a tokenizer alone: slimfx is not needed.

python examples/generate_with_torch.py demo-artifacts/slim.pt2 "The function returns"
"""

import logging
import sys
import time
import zipfile

import torch
from tokenizers import Tokenizer

logging.disable(logging.WARNING)


def main(path: str, prompt: str, tokens: int = 90) -> None:
    """Sample `tokens` tokens after `prompt`, from the 40 most likely ones each time."""
    with zipfile.ZipFile(path) as archive:
        tokenizer = Tokenizer.from_str(archive.read("model/slimfx/tokenizer.json").decode())
    model = torch.export.load(path).module()
    loaded = {"slimfx", "transformers"} & set(sys.modules)
    assert not loaded, f"this process imported {loaded}"

    ids = tokenizer.encode(prompt).ids
    generator = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(input_ids=torch.tensor([ids]))[0, -1]
            likely, which = (logits / 0.8).topk(40)
            ids.append(int(which[torch.multinomial(likely.softmax(-1), 1, generator=generator)]))
    seconds = time.perf_counter() - began
    print(tokenizer.decode(ids))
    print(f"[{tokens / seconds:.1f} tokens/s; slimfx and transformers were not imported]")


if __name__ == "__main__":
    main(*sys.argv[1:3])

"""Export a Hugging Face folder with an adapter, and load it with transformers and peft.

python examples/to_hf.py [FOLDER]      (needs slimfx[hf]; vLLM: docs/huggingface.md)
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import slimfx

HERE = Path(__file__).parent


def main(folder: str = ".") -> None:
    """Write the folder and print twenty greedy tokens of it."""
    small = slimfx.compress(slimfx.capture(HERE / "demo_lm"), HERE / "quick.yaml")
    path = Path(folder) / "small-hf"
    written = slimfx.export(small, "hf", path)
    print(f"{written.bytes / 1e6:.1f} MB", *written.notes, sep="\n")

    unpacked = CompressedTensorsConfig(dequantize=True)
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=unpacked)
    model = PeftModel.from_pretrained(base, path / "adapter").eval()
    ids = torch.tensor([[455, 1021, 332]])
    with torch.no_grad():
        found = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)
    print(*found[0, 3:].tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])

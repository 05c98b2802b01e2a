"""Compile to machine code with slimfx's kernels in it, and run that with torch alone.

python examples/to_aoti.py [FOLDER]      (needs g++ here, not where the package runs)
"""

import sys
from pathlib import Path

import torch

import slimfx

HERE = Path(__file__).parent


def main(folder: str = ".") -> None:
    """Write the package and print twenty greedy tokens of it."""
    dense = slimfx.capture(HERE / "demo_lm", kv_cache=True, max_length=256)
    small = slimfx.compress(dense, HERE / "quick.yaml")
    path = Path(folder) / "small-aoti.pt2"
    written = slimfx.export(small, "aoti", path, march="native")
    print(f"{written.bytes / 1e6:.1f} MB, {written.linears} linears in {written.kernels} kernels")

    step = torch._inductor.aoti_load_package(str(path))  # in any process, on such a processor
    ids, found = torch.tensor([[455, 1021, 332]]), []
    position = torch.arange(ids.shape[1])
    for _ in range(20):
        ids = step(input_ids=ids, cache_position=position)[:, -1:].argmax(-1)
        position = position[-1:] + 1
        found.append(int(ids))
    print(*found)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Export for phones and other devices, and run the file in ExecuTorch's own runtime.

python examples/to_pte.py [FOLDER]      (needs slimfx[executorch])
"""

import sys
from pathlib import Path

import torch

import slimfx

HERE = Path(__file__).parent


def main(folder: str = ".") -> None:
    """Write the file and print twenty greedy tokens of it."""
    from executorch.runtime import Runtime

    dense = slimfx.capture(HERE / "demo_lm", kv_cache=True, max_length=128)
    small = slimfx.compress(dense, HERE / "quick.yaml")
    path = Path(folder) / "small.pte"
    written = slimfx.export(small, "pte", path)
    print(f"{written.bytes / 1e6:.1f} MB", *written.notes, sep="\n")

    step = Runtime.get().load_program(path).load_method("forward")
    ids, found = torch.tensor([[455, 1021, 332]]), []
    position = torch.arange(ids.shape[1])
    for _ in range(20):
        ids = step.execute([ids, position])[0][:, -1:].argmax(-1)
        position = position[-1:] + 1
        found.append(int(ids))
    print(*found)


if __name__ == "__main__":
    main(*sys.argv[1:])

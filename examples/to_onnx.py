"""Export for ONNX Runtime, and run the file without torch.

python examples/to_onnx.py [FOLDER]      (needs slimfx[onnx])
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

import slimfx

HERE = Path(__file__).parent


def main(folder: str = ".") -> None:
    """Write the file and print twenty greedy tokens of it."""
    small = slimfx.compress(slimfx.capture(HERE / "demo_lm"), HERE / "quick.yaml")
    path = Path(folder) / "small.onnx"
    written = slimfx.export(small, "onnx", path)
    print(f"{written.bytes / 1e6:.1f} MB", *written.notes, sep="\n")

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ids = np.array([[455, 1021, 332]])
    for _ in range(20):
        (logits,) = session.run(None, {"input_ids": ids})
        ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], axis=1)
    print(*ids[0, 3:])


if __name__ == "__main__":
    main(*sys.argv[1:])

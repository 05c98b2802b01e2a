"""A decoder with a key-value cache: compress it, write it, and continue a text from the file.

python examples/decoder.py [FOLDER]
"""

import sys
from pathlib import Path

import slimfx

HERE = Path(__file__).parent


def main(folder: str = ".") -> None:
    """Print the continuation and how fast it came."""
    dense = slimfx.capture(HERE / "demo_lm", kv_cache=True, max_length=256)
    small = slimfx.compress(dense, HERE / "quick.yaml")
    path = Path(folder) / "decoder.pt2"
    print(f"{slimfx.save(small, path) / 1e6:.1f} MB")

    pieces = slimfx.generate(path, "The function returns", tokens=40, temperature=0.8, top_p=0.9)
    print("The function returns", *pieces, sep="")
    print(pieces.took.figures())


if __name__ == "__main__":
    main(*sys.argv[1:])

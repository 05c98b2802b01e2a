"""Export for torch alone, and continue a text without slimfx.

python examples/to_pt2.py [FOLDER]
"""

import subprocess
import sys
from pathlib import Path

import slimfx

HERE = Path(__file__).parent


def main(folder: str = ".") -> None:
    """Write the file, and run `generate_with_torch.py` on it in a process of its own."""
    small = slimfx.compress(slimfx.capture(HERE / "demo_lm"), HERE / "quick.yaml")
    path = Path(folder) / "small-aten.pt2"
    print(f"{slimfx.export(small, 'pt2', path).bytes / 1e6:.1f} MB")
    script = HERE / "generate_with_torch.py"
    subprocess.run([sys.executable, script, path, "The function returns"], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

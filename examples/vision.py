"""A vision transformer, calibrated on batches of images.

python examples/vision.py

The model and the images are random here: put yours in their place.
"""

from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

import slimfx

HERE = Path(__file__).parent


def main() -> None:
    """Print the layers and how near the logits stay to the dense model's."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768
    )
    model = ViTForImageClassification(config).eval()
    images = torch.rand(32, 3, 224, 224) * 2 - 1

    dense = slimfx.capture(model, {"pixel_values": images[:2]})
    batches = [{"pixel_values": images[i : i + 8]} for i in range(0, 24, 8)]
    small = slimfx.compress(dense, HERE / "quick.yaml", batches)
    print(f"{slimfx.plan(dense, HERE / 'quick.yaml').bits_per_weight:.2f} bits a weight")

    with torch.no_grad():
        before, after = (p.module()(pixel_values=images[24:]) for p in (dense, small))
    print(f"cosine {torch.cosine_similarity(before, after).mean():.3f}")


if __name__ == "__main__":
    main()

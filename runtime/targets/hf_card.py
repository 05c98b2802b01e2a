"""What a Hugging Face folder says of itself: the model card, and sentences for its writer."""

from __future__ import annotations

import json

from slimfx.runtime.manifest import Manifest
from slimfx.runtime.targets.hf_layers import Layer

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for max_lora_rank (vllm/config/lora.py)."""


def card(layers: tuple[Layer, ...], manifest: Manifest, *, tensor_bytes: int, causal: bool) -> str:
    """README.md of the folder.

    Args:
        tensor_bytes: of all tensors, adapters included.
        causal: the model predicts tokens.
    """
    parts = [
        _HEAD.format(bytes=tensor_bytes),
        _method(manifest),
        "## Layers\n\n" + _table(layers, manifest),
        _load(layers, "AutoModelForCausalLM" if causal else "AutoModel"),
        _serve(layers),
    ]
    return "\n".join(part.rstrip() + "\n" for part in parts)


_HEAD = """---
library_name: transformers
tags: [slimfx, compressed-tensors, pack-quantized, peft, lora]
---

# Compressed model

Written by slimfx: quantized weights (compressed-tensors, pack-quantized) in this folder and the
low-rank adapters that make up for the loss in `adapter/`. Without its adapter the model is not the
one that was measured. {bytes} bytes of tensors.
"""


def _method(manifest: Manifest) -> str:
    lines = ["## Method", ""]
    if manifest.calibration:
        said = ", ".join(f"{key} {value}" for key, value in sorted(manifest.calibration.items()))
        lines.append(f"Calibration: {said}.")
    if manifest.versions:
        said = ", ".join(f"{key} {value}" for key, value in sorted(manifest.versions.items()))
        lines.append(f"Made with {said}.")
    if manifest.recipe is not None:
        recipe = json.dumps(manifest.recipe, indent=1, sort_keys=True)
        lines += ["", "The recipe:", "", "```json", recipe, "```"]
    else:
        lines.append("The program carries no recipe: it was imported, or not compressed by slimfx.")
    return "\n".join(lines)


def _table(layers: tuple[Layer, ...], manifest: Manifest) -> str:
    measured = {report.name.removeprefix("model."): report for report in manifest.layers}
    lines = [
        "| layer | out x in | compressed as | stored as | rank | SNR (dB) | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in layers:
        report = measured.get(layer.name)
        snr = "" if report is None else f"{report.snr:.1f}"
        notes = "; ".join((*layer.notes, *(() if report is None else report.notes)))
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        cells = (layer.name, shape, layer.layout, _stored(layer), str(layer.rank), snr, notes)
        lines.append(f"| {' | '.join(cells)} |")
    skipped = [f"`{name.removeprefix('model.')}` ({why})" for name, why in manifest.skipped.items()]
    if skipped:
        lines += ["", f"Left as they are: {', '.join(sorted(skipped))}."]
    return "\n".join(lines)


def _stored(layer: Layer) -> str:
    if layer.scheme is None:
        return "floats"
    groups = "rows" if layer.scheme.group is None else f"groups of {layer.scheme.group}"
    return f"int{layer.scheme.bits}, {groups}"


def _load(layers: tuple[Layer, ...], auto: str) -> str:
    schemes = {layer.scheme for layer in layers if layer.scheme is not None}
    adapted = any(layer.rank for layer in layers)
    lines = ["## With transformers and peft", "", "```python"]
    lines += ["from peft import PeftModel"] if adapted else []
    if len(schemes) == 1:
        lines += [
            f"from transformers import {auto}, CompressedTensorsConfig",
            "",
            "dense = CompressedTensorsConfig(dequantize=True)",
            f'model = {auto}.from_pretrained("FOLDER", quantization_config=dense)',
        ]
    else:
        lines += [
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("FOLDER")',
        ]
    if len(schemes) > 1:
        lines.append("model(input_ids)  # decompresses the weights, which peft needs")
    if adapted:
        lines.append('model = PeftModel.from_pretrained(model, "FOLDER/adapter")')
    lines += ["```", "", "transformers computes with dense weights: what is saved is disk."]
    return "\n".join(lines)


def _serve(layers: tuple[Layer, ...]) -> str:
    largest = max((layer.rank for layer in layers), default=0)
    lines = ["## With vLLM", ""]
    fits = next((rank for rank in RANKS if rank >= largest), None)
    if largest and fits is None:
        lines.append(
            f"vLLM serves adapters up to rank {RANKS[-1]}; this folder's have {largest}, so that "
            f"it can serve the base alone."
        )
    elif largest:
        lines += [
            "```",
            f"vllm serve FOLDER --enable-lora --max-lora-rank {fits} --lora-modules "
            f"slim=FOLDER/adapter",
            "```",
            "",
            "Ask for the model `slim`; `FOLDER` alone answers without its adapters. Add",
            "`--tensor-parallel-size N` for N GPUs.",
        ]
    else:
        lines += ["```", "vllm serve FOLDER", "```"]
    lines += ["", "Zeros of 2:4-sparse weights are stored as codes and not used as such there."]
    return "\n".join(lines)


def sentences(layers: tuple[Layer, ...]) -> list[str]:
    """What the user should read before deploying the folder."""
    ranks = sorted({layer.rank for layer in layers if layer.rank})
    said = []
    sparse = sum(layer.layout.startswith("2:4") for layer in layers)
    if sparse:
        said.append(f"{sparse} layers are 2:4-sparse; the format stores their zeros as codes")
    for note in dict.fromkeys(note for layer in layers for note in layer.notes):
        said.append(f"{note} ({sum(note in layer.notes for layer in layers)} layers)")
    groups = {layer.scheme.group for layer in layers if layer.scheme and layer.scheme.group}
    for group in sorted(groups - {32, 64, 128}):
        said.append(f"groups of {group} inputs load in transformers; vLLM has kernels for none")
    if len({layer.scheme for layer in layers if layer.scheme}) > 1:
        said.append(
            "the layers have several schemes; load the folder without dequantize=True, and run it "
            "once before peft takes it"
        )
    if len(ranks) > 1:
        said.append(f"adapters of rank {ranks[0]} to {ranks[-1]} are padded with zeros to the last")
    if ranks and ranks[-1] > RANKS[-1]:
        said.append(
            f"adapters of rank {ranks[-1]} exceed vLLM's largest max_lora_rank ({RANKS[-1]}; it "
            f"takes {', '.join(map(str, RANKS))}); compress with a smaller rank to serve them there"
        )
    return said

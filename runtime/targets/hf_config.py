"""The configuration files of a Hugging Face folder: what compressed-tensors and PEFT read."""

from __future__ import annotations

from typing import Any

from slimfx.passes.find_linears import find_linears
from slimfx.runtime.targets.hf_layers import Layer, Scheme, own_name
from torch.export import ExportedProgram


def quantization_config(program: ExportedProgram, layers: tuple[Layer, ...]) -> dict[str, Any]:
    """What compressed-tensors reads: a group of layers for each scheme.

    One scheme alone is for every Linear that is not ignored; several name their layers.
    """
    schemes: dict[Scheme, list[str]] = {}
    for layer in layers:
        if layer.scheme is not None:
            schemes.setdefault(layer.scheme, []).append(layer.name)
    coded = {name for names in schemes.values() for name in names}
    dense = [layer.name for layer in layers if layer.name not in coded]
    dense += [own_name(site.name) for site in find_linears(program)]
    groups = {}
    for i, (scheme, names) in enumerate(schemes.items()):
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if scheme.group is None else "group",
                "group_size": scheme.group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def adapter_config(layers: tuple[Layer, ...], *, causal: bool) -> dict[str, Any]:
    """For PEFT and vLLM; modules by their whole names, since others may end alike."""
    rank = max(layer.rank for layer in layers)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else "FEATURE_EXTRACTION",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(layer.name for layer in layers if layer.rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }

"""Read a PEFT LoRA folder: adapter_config.json and adapter_model.safetensors.

    y += (alpha / r) B (A x)        alpha / sqrt(r) with use_rslora

becomes L = A and R = (alpha / r) B; ranks that are zeros in both, at the end, are left out.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimfx.runtime.checkpoints.files import read_json, read_safetensors
from slimfx.runtime.checkpoints.linears import adapter, as_mapping, take_floats
from torch import Tensor

from slimfx.errors import ArtifactError

_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PLAIN = re.compile(r"[\w.-]+")
_REFUSED = ("use_dora", "fan_in_fan_out", "modules_to_save", "trainable_token_indices")
"""Settings that make an adapter more than B (A x)."""


def read_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (L [r, K], R [N, r]).

    Raises:
        ArtifactError: missing or damaged files, or an adapter that is more than two matrices.
    """
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ArtifactError(f"{folder}: peft_type {config.get('peft_type')!r}, not 'LORA'")
    for key in _REFUSED:
        if config.get(key):
            raise ArtifactError(
                f"{folder}: {key} is {config[key]!r}, which slimfx's adapters cannot express; "
                f"merge it into the model"
            )
    if config.get("bias", "none") != "none":
        raise ArtifactError(f"{folder}: bias is {config['bias']!r}; merge it into the model")
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    unknown = sorted(key for key in tensors if not _NAME.fullmatch(key))
    if unknown:
        raise ArtifactError(f"{folder}: {unknown[0]} is no lora_A or lora_B of a linear")
    names = dict.fromkeys(_NAME.fullmatch(key)[1] for key in tensors)  # type: ignore[index]
    return {name: _pair(name, config, tensors) for name in names}


def _pair(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    L = take_floats(tensors, f"base_model.model.{name}.lora_A.weight", -1, -1)
    R = take_floats(tensors, f"base_model.model.{name}.lora_B.weight", -1, L.shape[0])
    factor = _factor(name, config)
    if factor != 1:
        R = R.float() * factor
    held = ((L != 0).any(1) | (R != 0).any(0)).nonzero()
    rank = int(held.max()) + 1 if len(held) else 1
    return adapter(name, L[:rank]), adapter(name, R[:, :rank])


def _factor(name: str, config: Mapping[str, Any]) -> float:
    """What B is multiplied by."""
    rank = _of_module(name, config, "rank_pattern", "r")
    alpha = _of_module(name, config, "alpha_pattern", "lora_alpha")
    if not rank > 0 or not math.isfinite(alpha):
        raise ArtifactError(f"{name}: adapter of rank {rank} and alpha {alpha}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(name: str, config: Mapping[str, Any], pattern: str, default: str) -> float:
    """A setting of one module: the first name in `pattern` that its own ends in."""
    own = as_mapping(config.get(pattern) or {}, pattern)
    regex = next((key for key in own if not _PLAIN.fullmatch(key)), None)
    if regex is not None:
        raise ArtifactError(f"{pattern}: {regex!r} is a regular expression; give modules by name")
    values = [own[key] for key in own if f".{name}".endswith(f".{key}")]
    value = values[0] if values else config.get(default)
    if not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
        raise ArtifactError(f"{name}: adapter_config.json has {default} {value!r}, not a number")
    return value

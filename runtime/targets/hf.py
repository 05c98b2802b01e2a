"""A Hugging Face folder: pack-quantized weights (compressed-tensors) and a PEFT adapter.

    config.json           the captured model's, with a quantization_config
    model.safetensors     codes and scales of compressed linears, every other parameter as it is;
                          model-0000i-of-0000n.safetensors and an index above 5 GB
    adapter/              the low-rank adapters, alpha = r, so that both add B (A x) as it is
    tokenizer.json, ...   what the captured folder had
    README.md             the model card
    model.slimfx          golden outputs and the digests of all other files

Nothing but safetensors and JSON is needed to write it; transformers, compressed-tensors and peft
load it, and vLLM serves it (docs/huggingface.md).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from slimfx.passes.base import edit, written_buffers
from slimfx.passes.find_linears import PREFIX, storage_key
from slimfx.passes.inputs import described
from slimfx.runtime import archive, sidecar
from slimfx.runtime.golden import CheckResult, compare
from slimfx.runtime.manifest import Manifest, manifest_of
from slimfx.runtime.sidecar import Sidecar
from slimfx.runtime.targets.hf_card import card, sentences
from slimfx.runtime.targets.hf_config import adapter_config, quantization_config
from slimfx.runtime.targets.hf_folder import check_place, new_folder
from slimfx.runtime.targets.hf_layers import ROOT, Layer, own_name, read_layers
from torch import Tensor
from torch.export import ExportedProgram

from slimfx.errors import ArtifactError, need

TARGET = "hf"
SIDECAR = "model.slimfx"
ADAPTER = "adapter"
TOLERANCES = {torch.float32: 1e-4}
"""Largest relative difference from the golden outputs, for a model that computes in a dtype."""
_ROUNDED_TOLERANCE = 3e-2
"""The same for 16-bit floats, which the runtimes add up in another order."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD = 5 * 10**9


def save(
    program: ExportedProgram, path: str | Path, *, dtype: str | None = None
) -> tuple[int, tuple[str, ...]]:
    """Write a folder, whole or not at all; returns its bytes and what the user should read.

    Args:
        path: a new folder, an empty one, or one that `save` wrote, which is replaced.
        dtype: "bfloat16" or "float16" to round parameters and adapters of floats; scales keep the
            dtype that the program computes in, so that codes * scales stay exact.

    Raises:
        ArtifactError: the program was not captured from a Hugging Face folder, a layer cannot be
            expressed, or `path` holds something else.
    """
    path = Path(path)
    manifest = manifest_of(program)
    if dtype is not None and dtype not in _DTYPES:
        raise ArtifactError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    check_place(path, SIDECAR, TARGET)
    _check_model_files(path, manifest)
    kept = sorted(name for name in written_buffers(program) if not name.startswith(ROOT))
    if kept:
        raise ArtifactError(
            f"{path}: the program writes to {kept[0]}, and a folder holds a model without memory; "
            f"capture it without kv_cache and compress that"
        )
    stored = program if dtype is None else _rounded(program, _DTYPES[dtype])
    parts = _parts(stored, manifest, None if dtype is None else _DTYPES[dtype])
    inputs, output = _golden(stored)
    with new_folder(path, SIDECAR, TARGET) as folder:
        files = _write(folder, parts, manifest)
        record = {
            "compute": _name(parts.compute),
            "causal": parts.causal,
            "inputs": described(program),
        }
        beside = Sidecar(TARGET, manifest, record, inputs, {"output": output})
        sidecar.write(folder / SIDECAR, beside, files)
        size = sum(file.stat().st_size for file in (*files, folder / SIDECAR))
    return size, tuple(sentences(parts.layers))


def load(path: str | Path) -> Callable[..., Tensor]:
    """The folder as transformers and peft run it: takes the program's inputs by name.

    Raises:
        ArtifactError: a missing, damaged or foreign folder, or one they cannot load.
        SlimError: transformers, compressed-tensors or peft is not installed.
    """
    path = Path(path)
    return _answers(path, sidecar.read(path / SIDECAR, TARGET))


def _answers(path: Path, beside: Sidecar) -> Callable[..., Tensor]:
    compute, causal = _recorded(path, beside)
    model = _model(path, beside, compute, causal)
    fixed = {"use_cache": False} if causal else {}

    def answer(**inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return model(**inputs, **fixed)[0]

    return answer


def check(path: str | Path, *, tolerance: float | None = None) -> CheckResult:
    """Load a folder, ask its golden inputs, and compare.

    Args:
        tolerance: by default 1e-4 for a model that computes in float32, 3e-2 for 16-bit floats.

    Raises:
        ArtifactError, SlimError: as `load`.
    """
    path = Path(path)
    beside = sidecar.read(path / SIDECAR, TARGET)
    if tolerance is None:
        tolerance = TOLERANCES.get(_recorded(path, beside)[0], _ROUNDED_TOLERANCE)
    found = _answers(path, beside)(**beside.inputs)
    return compare([found], [beside.outputs["output"]], tolerance)


def _check_model_files(path: Path, manifest: Manifest) -> None:
    """They may come from a file that someone else made."""
    if "config.json" not in manifest.model_files:
        raise ArtifactError(
            f"{path}: the program knows no config.json; capture it from a Hugging Face folder "
            f"(slimfx.capture('folder')) and compress it again"
        )
    for name, content in manifest.model_files.items():
        if Path(name).name != name or not name.endswith(".json") or not isinstance(content, dict):
            raise ArtifactError(
                f"{path}: the program brings {name!r}, which is no JSON file of a model folder"
            )


@dataclass(frozen=True)
class _Parts:
    """What goes into a folder."""

    layers: tuple[Layer, ...]
    weights: dict[str, Tensor]
    """Every tensor of the model, by its own name."""
    adapter: dict[str, Tensor]
    config: dict[str, Any]
    compute: torch.dtype
    causal: bool


def _parts(program: ExportedProgram, manifest: Manifest, dtype: torch.dtype | None) -> _Parts:
    layers = read_layers(program)
    weights = _parameters(program, dtype)
    for layer in layers:
        weights |= layer.tensors
    _check_form(program, layers)
    output = _output(program)
    config = dict(manifest.model_files["config.json"])
    causal = output.shape[-1] == config.get("vocab_size")
    config["dtype"] = _name(dtype or output.dtype)
    config.pop("torch_dtype", None)  # its name before transformers 4.56; two could contradict
    config.pop("quantization_config", None)
    if any(layer.scheme for layer in layers):
        config["quantization_config"] = quantization_config(program, layers)
    adapter = _adapter(layers, dtype)
    return _Parts(layers, weights, adapter, config, output.dtype, causal)


def _check_form(program: ExportedProgram, layers: tuple[Layer, ...]) -> None:
    """No stored matrix belongs to an op that is not there any more."""
    known = {f"{ROOT}{layer.name}" for layer in layers}
    stored = (name for name in program.state_dict if f".{PREFIX}" in name)
    other = next((name for name in stored if name.rpartition(f".{PREFIX}")[0] not in known), None)
    if other is not None:
        raise ArtifactError(
            f"{own_name(other)}: no linear of the program reads it; the program was written out "
            f"in ATen or lowered, load or compress it in form 'op'"
        )


def _output(program: ExportedProgram) -> Any:
    (result,) = next(node for node in program.graph.nodes if node.op == "output").args
    return result[0].meta["val"]  # type: ignore[index,union-attr]


def _parameters(program: ExportedProgram, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What is not a part of a compressed linear, each storage under its first name."""
    found: dict[tuple, tuple[str, Tensor]] = {}
    for key, tensor in program.state_dict.items():
        if f".{PREFIX}" not in key:
            found.setdefault(storage_key(tensor, key), (own_name(key), tensor.detach()))
    return {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in found.values()
    }


def _rounded(program: ExportedProgram, dtype: torch.dtype) -> ExportedProgram:
    """The program with parameters and adapters as `dtype` would store them, in their own dtypes."""
    change = edit(program)
    made: dict[tuple, Tensor] = {}  # tied parameters stay one
    for name, tensor in change.state_dict.items():
        _, found, part = name.rpartition(f".{PREFIX}")
        if tensor.is_floating_point() and (not found or part in ("L", "R")):
            key = storage_key(tensor, name)
            if key not in made:
                made[key] = tensor.detach().to(dtype).to(tensor.dtype)
                _check_range(name, tensor, made[key], dtype)
            parameter = isinstance(tensor, torch.nn.Parameter)
            change.state_dict[name] = (
                torch.nn.Parameter(made[key], False) if parameter else made[key]
            )
    return change.finish()


def _check_range(name: str, tensor: Tensor, rounded: Tensor, dtype: torch.dtype) -> None:
    if tensor.isfinite().all() and not rounded.isfinite().all():
        raise ArtifactError(
            f"{name}: its largest value, {tensor.abs().max():.3g}, is beyond {_name(dtype)}; use "
            f"dtype bfloat16, or none"
        )


def _adapter(layers: tuple[Layer, ...], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors of the PEFT adapter, all of the largest rank.

    Smaller ones are padded with zeros: vLLM ignores rank_pattern, and PEFT refuses a tensor whose
    rank is neither r nor in it.
    """
    largest = max((layer.rank for layer in layers), default=0)
    found = {}
    for layer in layers:
        if layer.A is not None and layer.B is not None:
            short = largest - layer.rank
            A = torch.nn.functional.pad(layer.A, (0, 0, 0, short))
            B = torch.nn.functional.pad(layer.B, (0, short))
            for part, tensor in (("A", A), ("B", B)):
                key = f"base_model.model.{layer.name}.lora_{part}.weight"
                rounds = dtype is not None and not layer.coded
                found[key] = (tensor.to(dtype) if rounds else tensor).contiguous()
    return found


def _golden(program: ExportedProgram) -> tuple[dict[str, Tensor], Tensor]:
    """The example inputs by name, and what the program answers to them."""
    args, inputs = program.example_inputs or ((), {})
    if args or not inputs or not all(isinstance(value, Tensor) for value in inputs.values()):
        raise ArtifactError(
            "the program has no named example inputs to record golden outputs of; capture it from "
            "a Hugging Face folder, which names them"
        )
    with torch.no_grad():
        output = program.module()(**{name: value.clone() for name, value in inputs.items()})
    if not isinstance(output, Tensor):
        raise ArtifactError(
            f"the program answers with a {type(output).__name__}, not with one tensor; capture it "
            f"from a Hugging Face folder"
        )
    return dict(inputs), output


def _write(folder: Path, parts: _Parts, manifest: Manifest) -> list[Path]:
    """Everything but the sidecar; the files written."""
    shards = _shards(parts.weights)
    names = [_shard_name(i, len(shards)) for i in range(len(shards))]
    files: dict[str, bytes | Mapping[str, Tensor]] = {}
    files |= {name: _json(content) for name, content in manifest.model_files.items()}
    files |= dict(zip(names, shards))
    if len(shards) > 1:
        files["model.safetensors.index.json"] = _json(_index(names, shards))
    files["config.json"] = _json(parts.config)
    files["README.md"] = card(
        parts.layers, manifest, tensor_bytes=_bytes(parts), causal=parts.causal
    ).encode()
    if manifest.tokenizer is not None:
        files["tokenizer.json"] = manifest.tokenizer.encode()
    if parts.adapter:
        (folder / ADAPTER).mkdir()
        files[f"{ADAPTER}/adapter_model.safetensors"] = parts.adapter
        files[f"{ADAPTER}/adapter_config.json"] = _json(
            adapter_config(parts.layers, causal=parts.causal)
        )
    for name, content in files.items():
        with archive.atomic(folder / name) as part:
            if isinstance(content, bytes):
                part.write_bytes(content)
            else:
                safetensors.torch.save_file(dict(content), part, metadata={"format": "pt"})
    return [folder / name for name in files]


def _shards(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in files of at most 5 GB, in order."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > _SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    return shards


def _shard_name(i: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"


def _index(names: list[str], shards: list[dict[str, Tensor]]) -> dict[str, Any]:
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    places = {key: name for name, shard in zip(names, shards) for key in shard}
    return {"metadata": {"total_size": total}, "weight_map": places}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(parts: _Parts) -> int:
    held = (*parts.weights.values(), *parts.adapter.values())
    return sum(tensor.nbytes for tensor in held)


def _recorded(path: Path, beside: Sidecar) -> tuple[torch.dtype, bool]:
    """What the model computes in, and whether it predicts tokens."""
    compute, causal = (beside.record.get(key) for key in ("compute", "causal"))
    if compute not in _DTYPES or not isinstance(causal, bool) or "output" not in beside.outputs:
        raise ArtifactError(f"{path}: {SIDECAR} is damaged; export the program again")
    return _DTYPES[compute], causal


def _model(path: Path, beside: Sidecar, compute: torch.dtype, causal: bool) -> Any:
    """The loaded model, its adapter on top."""
    transformers = need("transformers")
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    options: dict[str, Any] = {"dtype": compute}
    several = quantization is not None and len(quantization["config_groups"]) > 1
    if quantization is not None:
        need("compressed_tensors")
        if not several:  # transformers dequantizes every layer by the first scheme
            options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    peft = need("peft") if (path / ADAPTER).is_dir() else None
    try:
        with _quiet():
            model = auto.from_pretrained(path, **options).eval()
            if several:  # weights are decompressed by the first call, and peft looks for them
                with torch.no_grad():
                    model(**beside.inputs)
            if peft is not None:
                model = peft.PeftModel.from_pretrained(
                    model, path / ADAPTER, autocast_adapter_dtype=False
                )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise ArtifactError(f"{path}: transformers cannot load it ({error})") from error
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries tell each other's developers, and without what transformers says
    to `dequantize`, which the folder cannot ask for itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
        yield

"""A compressed checkpoint of another library as a program of slimfx."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
from torch.export import ExportedProgram

from slimfx.capture import capture
from slimfx.errors import ArtifactError, CaptureError
from slimfx.passes.find_linears import Site, find_linears, storage_key
from slimfx.passes.replace_linears import replace_linears
from slimfx.runtime.checkpoints.checkpoint import Checkpoint, read_checkpoint
from slimfx.runtime.manifest import LayerReport, Manifest, attach, manifest_of
from slimfx.runtime.pack import PackedLinear
from slimfx.runtime.targets.hf_layers import ROOT, layout

_BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "special_tokens_map.json",
)
"""Files that `capture` reads beside config.json."""


def import_checkpoint(
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    max_length: int | None = None,
    kv_cache: bool = False,
    batch: int = 1,
) -> ExportedProgram:
    """Read a compressed Hugging Face folder; codes stay what they are, bit for bit.

    The model is captured as transformers loads it, with dense weights in a temporary folder in
    place of the compressed ones (bfloat16: 2 bytes a weight of disk), which then take their place.

    Args:
        folder: compressed-tensors' pack-quantized weights (what `export(..., "hf")` writes is
            read with its adapter), GPTQ, or what the SLiM paper's code saves.
        adapter: a PEFT LoRA folder; by default `folder`/adapter, where there is one.
        dtype: floating-point type the program computes in.
        max_length, kv_cache, batch: as `capture` takes them.

    Raises:
        ArtifactError: a damaged folder, or a checkpoint that slimfx's layouts cannot express.
        CaptureError: transformers cannot load it, or torch.export cannot trace it.
    """
    folder = Path(folder)
    checkpoint = read_checkpoint(folder, None if adapter is None else Path(adapter))
    with _dense(folder, checkpoint) as dense:
        try:
            program = capture(
                dense, max_length=max_length, dtype=dtype, kv_cache=kv_cache, batch=batch
            )
        except CaptureError as error:  # the caller knows the folder it gave
            raise ArtifactError(str(error).replace(str(dense), str(folder))) from error
    sites = find_linears(program)
    packed = _placed(folder, checkpoint, {site.fqn: site for site in sites})
    _check_parameters(folder, checkpoint, program)
    compressed = replace_linears(program, sites, packed)
    for note in checkpoint.notes:
        warnings.warn(f"{folder}: {note}", stacklevel=2)
    skipped = {site.name: "not compressed in the checkpoint" for site in sites}
    skipped = {name: why for name, why in skipped.items() if name not in packed}
    return attach(compressed, _manifest(checkpoint, manifest_of(program), skipped))


@contextmanager
def _dense(folder: Path, checkpoint: Checkpoint) -> Iterator[Path]:
    """A temporary folder of the same model, zeros where its compressed weights will be."""
    dense = {name: tensor.contiguous() for name, tensor in checkpoint.parameters.items()}
    for name, linear in checkpoint.linears.items():
        dense[f"{name}.weight"] = torch.zeros(linear.shape, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for name in _BESIDE:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, place / name)
        (place / "config.json").write_text(json.dumps(dict(checkpoint.config)), encoding="utf-8")
        metadata = {"format": "pt"}
        safetensors.torch.save_file(dense, place / "model.safetensors", metadata=metadata)
        yield place


def _placed(
    folder: Path, checkpoint: Checkpoint, sites: Mapping[str, Site]
) -> dict[str, PackedLinear]:
    """The compressed linears by the names of the program's sites."""
    placed = {}
    for name, linear in checkpoint.linears.items():
        site = sites.get(f"{ROOT}{name}.weight")
        if site is None or site.transposed:
            raise ArtifactError(
                f"{folder}: {name} is not a torch.nn.Linear of the model that config.json makes "
                f"({checkpoint.config.get('architectures')}); slimfx puts compressed weights "
                f"nowhere else"
            )
        if site.other_readers:
            raise ArtifactError(
                f"{folder}: {name} is compressed, and its weight is also read by "
                f"{', '.join(site.other_readers)} (tied); set tie_word_embeddings to false in "
                f"config.json if the folder has both"
            )
        placed[site.name] = linear.packed
    return placed


def _check_parameters(folder: Path, checkpoint: Checkpoint, program: ExportedProgram) -> None:
    """Every parameter of the program came from the folder: transformers makes up what is missing.

    A tied one may have come under its other name; a cache is the program's own.
    """
    given = {f"{ROOT}{name}" for name in checkpoint.parameters}
    given |= {f"{ROOT}{name}.weight" for name in checkpoint.linears}
    keys = {name: storage_key(tensor, name) for name, tensor in program.state_dict.items()}
    known = {keys[name] for name in given & keys.keys()}
    own = {name: key for name, key in keys.items() if name.startswith(ROOT)}
    missing = sorted(name for name, key in own.items() if key not in known)
    if missing:
        raise ArtifactError(
            f"{folder}: {missing[0].removeprefix(ROOT)} is not in the checkpoint, so that "
            f"transformers made it up ({len(missing)} parameters); download the folder again"
        )


def _manifest(checkpoint: Checkpoint, captured: Manifest, skipped: Mapping[str, str]) -> Manifest:
    """What the folder says of itself if slimfx wrote it, else which versions read it."""
    if checkpoint.manifest is not None:
        reports = checkpoint.manifest.layers
        layers = tuple(_as_read(checkpoint, report) for report in reports)
        return replace(checkpoint.manifest, layers=layers, model_files=captured.model_files)
    return replace(
        captured,
        skipped=skipped,
        calibration={"imported": checkpoint.kind},
        versions={
            "slimfx": version("slimfx"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )


def _as_read(checkpoint: Checkpoint, report: LayerReport) -> LayerReport:
    """The report of a layer with what the folder stored it as, which may be larger."""
    linear = checkpoint.linears.get(report.name.removeprefix(ROOT))
    if linear is None:
        return report
    stored = layout(linear.packed.weight).name
    return replace(report, layout=stored, bytes=_bytes(linear.packed))


def _bytes(packed: PackedLinear) -> int:
    """Of all tensors of a compressed linear but its bias, which it had before."""
    parts = (packed.weight, packed.L, packed.R, packed.input_scale)
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    for part in parts:
        if part is not None and not isinstance(part, torch.Tensor):
            tensors += [held for held in vars(part).values() if isinstance(held, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)

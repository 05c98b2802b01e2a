"""Hostile model folders: safetensors, compressed checkpoints, adapters, configurations.

Each is a good folder with something put in its place, and is refused with an error of slimfx, in
little time and memory.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import tiny_llama
from slimfx.runtime.checkpoints.checkpoint import read_checkpoint
from test_import_checkpoint import (
    ARGS,
    GROUP,
    NAME,
    gptq,
    pack_quantized,
    settings,
    slim,
    weights_of,
    write,
)
from torch import Tensor
from trust import bounded, trying

import slimfx
from slimfx.errors import SlimError
from slimfx.import_checkpoint import import_checkpoint

Folder = Callable[[Path], Any]
WEIGHTS = "model.safetensors"


class Payload:
    """Unpickled, it makes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers logs what it cannot read."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, none hostile."""
    root = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=1, tie_word_embeddings=False)
    model.save_pretrained(root / "dense")
    made, rest = weights_of(root / "dense", torch.bfloat16)
    parts, _ = slim(made, lambda weight: (weight.scale * 7).bfloat16())
    kinds: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
        "packed": (pack_quantized(made), {"quantization_config": settings()}),
        "gptq": (
            gptq(made, 7),
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP}},
        ),
        "slim": (parts, {}),
    }
    for kind, (tensors, config) in kinds.items():
        write(root / kind, root / "dense", {**rest, **tensors}, **config)
    (root / "slim" / "args.json").write_text(json.dumps(ARGS))
    _with_adapter(root)
    return {path.name: path for path in root.iterdir()}


def _with_adapter(root: Path) -> None:
    shutil.copytree(root / "packed", root / "adapted")
    (root / "adapted" / "adapter").mkdir()
    name = f"base_model.model.{NAME}"
    lora = {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(32, 4)}
    safetensors.torch.save_file(lora, root / "adapted/adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "none"}
    (root / "adapted/adapter/adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["packed", "gptq", "slim", "adapted"])
def test_the_folders_that_are_forged_below_are_good(good: dict[str, Path], kind: str) -> None:
    assert NAME in read_checkpoint(good[kind]).linears


def refused(folder: Path, ask: Callable[[Path], Any] = read_checkpoint) -> None:
    """One error of slimfx, soon and in little memory, and no code that ran."""
    with trying("hostile files"):
        with bounded(), pytest.raises(SlimError):
            ask(folder)
        assert not (folder.parent / "marker").exists()


def forged(good: Path, tmp_path: Path, forge: Folder) -> Path:
    folder = tmp_path / "hostile"
    shutil.copytree(good, folder)
    forge(folder)
    return folder


# safetensors


def raw(header: Any, data: bytes = bytes(64), *, claim: int | None = None) -> bytes:
    """A safetensors file of this header, which may claim to be longer."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claim is None else claim) + text + data


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16), **more: Any) -> Any:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


TWO = {**entry(offsets=(0, 16)), "b": entry(offsets=(8, 24))["a"]}
GAP = {**entry(offsets=(0, 16)), "b": entry(offsets=(32, 48))["a"]}
FILES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "a header of an exabyte": raw(b"{}", claim=1 << 60),
    "a header of 2 ** 64 - 1": raw(b"{}", claim=(1 << 64) - 1),
    "a header of 2 ** 63": raw(b"{}", claim=1 << 63),
    "a header of 200 megabytes": raw(b"{}", claim=200 << 20),
    "a header beyond the file": raw(b"{}", b"", claim=64),
    "a list": raw([]),
    "a number": raw(7),
    "null": raw(None),
    "deep lists": raw(b"[" * 100_000),
    "deep objects": raw(b'{"a":' * 100_000),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "half a header": raw(b'{"a": {"dtype"'),
    "overlapping tensors": raw(TWO, bytes(24)),
    "a hole between tensors": raw(GAP, bytes(48)),
    "bytes behind the tensors": raw(entry(), bytes(999)),
    "bytes missing": raw(entry(), bytes(8)),
    "an unknown dtype": raw(entry("F12"), bytes(16)),
    "a dtype of null": raw(entry(None), bytes(16)),
    "a wider dtype": raw(entry("F64"), bytes(16)),
    "a narrower dtype": raw(entry("F16"), bytes(16)),
    "a longer shape": raw(entry(shape=(5,)), bytes(16)),
    "a shorter shape": raw(entry(shape=(3,)), bytes(16)),
    "a negative shape": raw(entry(shape=(-4,)), bytes(16)),
    "a shape of text": raw(entry(shape="4"), bytes(16)),
    "a shape of fractions": raw(entry(shape=(4.5,)), bytes(16)),
    "a shape that overflows": raw(entry(shape=(1 << 32, 1 << 32)), bytes(16)),
    "a shape that overflows to four": raw(entry(shape=(1 << 63, 2, 4)), bytes(16)),
    "a shape of 2 ** 62": raw(entry(shape=(1 << 62,)), bytes(16)),
    "offsets backwards": raw(entry(offsets=(16, 0)), bytes(16)),
    "offsets of three": raw(entry(offsets=(0, 8, 16)), bytes(16)),
    "negative offsets": raw(entry(offsets=(-16, 0)), bytes(16)),
    "offsets beyond the file": raw(entry(offsets=(1 << 40, (1 << 40) + 16)), bytes(16)),
    "offsets of 64 bits": raw(entry(offsets=((1 << 64) - 16, 1 << 64)), bytes(16)),
    "no shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)),
    "an entry of null": raw({"a": None}, bytes(16)),
    "metadata of numbers": raw({"__metadata__": {"a": 1}}, b""),
    "metadata of a list": raw({"__metadata__": []}, b""),
    "a pickle": pickle.dumps({"a": 1}),
    "a zip": b"PK\x03\x04" + bytes(64),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_safetensors_is_refused(tmp_path: Path, good: dict[str, Path], name: str) -> None:
    refused(forged(good["packed"], tmp_path, lambda f: (f / WEIGHTS).write_bytes(FILES[name])))


# what the tensors of a checkpoint may be


def tensor(part: str, make: Callable[[Tensor], Tensor]) -> Folder:
    """Another tensor of the layer."""

    def forge(folder: Path) -> None:
        held = safetensors.torch.load_file(folder / WEIGHTS)
        key = f"{NAME}.{part}"
        held[key] = make(held[key]).contiguous()
        safetensors.torch.save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return forge


def scaled(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, value, dtype=dtype)


def shape_of(*sizes: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.tensor(sizes)


PACKED: dict[str, Folder] = {
    "rows of -1": tensor("weight_shape", shape_of(-1, 64)),
    "columns of -1": tensor("weight_shape", shape_of(32, -1)),
    "rows of 2 ** 62": tensor("weight_shape", shape_of(1 << 62, 64)),
    "columns of 2 ** 62": tensor("weight_shape", shape_of(32, 1 << 62)),
    "no rows": tensor("weight_shape", shape_of(0, 64)),
    "no columns": tensor("weight_shape", shape_of(32, 0)),
    "three sizes": tensor("weight_shape", shape_of(32, 64, 1)),
    "sizes of floats": tensor("weight_shape", lambda t: t.double()),
    "sizes of a complex number": tensor("weight_shape", lambda t: t.to(torch.complex64)),
    "other columns": tensor("weight_shape", shape_of(32, 48)),
    "other rows": tensor("weight_shape", shape_of(16, 64)),
    "words of one dimension": tensor("weight_packed", lambda t: t.flatten()),
    "words of five dimensions": tensor("weight_packed", lambda t: t[None, None, None]),
    "words of 64 bits": tensor("weight_packed", lambda t: t.long()),
    "words of floats": tensor("weight_packed", lambda t: t.float()),
    "no words": tensor("weight_packed", lambda t: t[:, :0]),
    "no rows of words": tensor("weight_packed", lambda t: t[:0]),
    "no scales": tensor("weight_scale", lambda t: t[:, :0]),
    "no rows of scales": tensor("weight_scale", lambda t: t[:0]),
    "scales of integers": tensor("weight_scale", lambda t: t.int()),
    "scales of NaN": tensor("weight_scale", scaled(float("nan"))),
    "scales of infinity": tensor("weight_scale", scaled(float("inf"))),
    "scales that bfloat16 makes infinite": tensor("weight_scale", scaled(3.4e38)),
    "scales of 1e300": tensor("weight_scale", scaled(1e300, torch.float64)),
    "scales of four dimensions": tensor("weight_scale", lambda t: t[None, None]),
    "too many scales": tensor("weight_scale", lambda t: t.repeat(1, 100)),
}
GPTQ: dict[str, Folder] = {
    "no codes": tensor("qweight", lambda t: t[:0]),
    "no outputs": tensor("qweight", lambda t: t[:, :0]),
    "codes of one dimension": tensor("qweight", lambda t: t.flatten()),
    "codes of bytes": tensor("qweight", lambda t: t.to(torch.uint8)),
    "no zero points": tensor("qzeros", lambda t: t[:0]),
    "zero points of another width": tensor("qzeros", lambda t: t[:, :1]),
    "zero points that differ": tensor("qzeros", lambda t: t + 1),
    "an order out of range": tensor("g_idx", lambda t: t + (1 << 30)),
    "a negative order": tensor("g_idx", lambda t: -t - 1),
    "an order that is turned": tensor("g_idx", lambda t: t.flip(0)),
    "an order that is too long": tensor("g_idx", lambda t: t.repeat(2)),
    "an order of two dimensions": tensor("g_idx", lambda t: t[None]),
    "an order of NaN": tensor("g_idx", lambda t: t * float("nan")),
    "no scales": tensor("scales", lambda t: t[:0]),
    "scales of NaN": tensor("scales", scaled(float("nan"))),
    "scales that bfloat16 makes infinite": tensor("scales", scaled(3.4e38)),
    "scales of other outputs": tensor("scales", lambda t: t[:, :5]),
    "scales that do not divide": tensor("scales", lambda t: t[:3]),
}
SLIM: dict[str, Folder] = {
    "codes of 9": tensor("weight", lambda t: t * 9),
    "a weight of NaN": tensor("weight", scaled(float("nan"), torch.bfloat16)),
    "a weight without inputs": tensor("weight", lambda t: t[:, :0]),
    "a weight without outputs": tensor("weight", lambda t: t[:0]),
    "a weight of one dimension": tensor("weight", lambda t: t.flatten()),
    "a weight of integers": tensor("weight", lambda t: t.to(torch.int8)),
    "a factor of zero": tensor("quantization_scaling_factor", lambda t: t[:1, :1] * 0),
    "a factor of NaN": tensor("quantization_scaling_factor", scaled(float("nan"))),
    "a factor of 1e-45": tensor("quantization_scaling_factor", lambda t: torch.full((1, 1), 1e-45)),
    "no factor": tensor("quantization_scaling_factor", lambda t: t[:, :0]),
    "an adapter of no rank": tensor("lora_left", lambda t: t[:, :0]),
    "an adapter of NaN": tensor("lora_left", scaled(float("nan"))),
    "an adapter of other inputs": tensor("lora_left", lambda t: t[:7]),
    "an adapter of other ranks": tensor("lora_right", lambda t: t.repeat(3, 1)),
    "an adapter of 1e300": tensor("lora_right", scaled(1e300, torch.float64)),
}
CHECKPOINTS = [
    *(("packed", name, forge) for name, forge in PACKED.items()),
    *(("gptq", name, forge) for name, forge in GPTQ.items()),
    *(("slim", name, forge) for name, forge in SLIM.items()),
]


@pytest.mark.parametrize(
    ("kind", "forge"),
    [(k, f) for k, _, f in CHECKPOINTS],
    ids=[f"{k} {n}" for k, n, _ in CHECKPOINTS],
)
def test_a_checkpoint_whose_tensors_lie_is_refused(
    tmp_path: Path, good: dict[str, Path], kind: str, forge: Folder
) -> None:
    refused(forged(good[kind], tmp_path, forge))


# settings


def settings_of(file: str, **changes: Any) -> Folder:
    """Other keys of a JSON file."""

    def forge(folder: Path) -> None:
        path = folder / file
        own = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**own, **changes}))

    return forge


def text_of(file: str, data: bytes) -> Folder:
    return lambda folder: (folder / file).write_bytes(data)


BAD_JSON = {
    "nothing": b"",
    "a list": b"[]",
    "half": b'{"a": ',
    "deep": b"[" * 100_000,
    "deep and closed": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
}
JSON_FILES = [
    ("packed", "config.json"),
    ("slim", "args.json"),
    ("adapted", "adapter/adapter_config.json"),
]


@pytest.mark.parametrize("text", BAD_JSON)
@pytest.mark.parametrize(("kind", "file"), JSON_FILES)
def test_settings_that_are_no_json_mapping_are_refused(
    tmp_path: Path, good: dict[str, Path], kind: str, file: str, text: str
) -> None:
    refused(forged(good[kind], tmp_path, text_of(file, BAD_JSON[text])))


def quantized(**changes: Any) -> Folder:
    return settings_of("config.json", quantization_config={**settings(), **changes})


ADAPTER = "adapter/adapter_config.json"
LORA = "adapter/adapter_model.safetensors"


def lora(A: Tensor, B: Tensor, name: str = NAME) -> Folder:
    """Another adapter."""
    held = {f"base_model.model.{name}.lora_{k}.weight": t for k, t in (("A", A), ("B", B))}
    return lambda folder: safetensors.torch.save_file(held, folder / LORA)


ones = torch.ones
SETTINGS: dict[str, tuple[str, Folder]] = {
    "a method of a list": ("packed", quantized(quant_method=["gptq"])),
    "a method of a mapping": ("packed", quantized(quant_method={})),
    "groups of a list": ("packed", quantized(config_groups=[])),
    "groups of null": ("packed", quantized(config_groups=None)),
    "no groups": ("packed", quantized(config_groups={})),
    "a group of text": ("packed", quantized(config_groups={"a": "x"})),
    "a group without weights": ("packed", quantized(config_groups={"a": {}})),
    "settings of a list": ("packed", settings_of("config.json", quantization_config=[])),
    "settings of text": ("packed", settings_of("config.json", quantization_config="gptq")),
    "bits of a list": (
        "gptq",
        settings_of("config.json", quantization_config={"quant_method": "gptq", "bits": [4]}),
    ),
    "bits of 2 ** 70": (
        "gptq",
        settings_of("config.json", quantization_config={"quant_method": "gptq", "bits": 1 << 70}),
    ),
    "a format of a list": (
        "gptq",
        settings_of(
            "config.json",
            quantization_config={"quant_method": "gptq", "bits": 4, "checkpoint_format": [1]},
        ),
    ),
    "an alpha of 10 ** 400": ("adapted", settings_of(ADAPTER, lora_alpha=10**400)),
    "an alpha of infinity": ("adapted", settings_of(ADAPTER, lora_alpha=float("inf"))),
    "an alpha of NaN": ("adapted", settings_of(ADAPTER, lora_alpha=float("nan"))),
    "an alpha of 1e308": ("adapted", settings_of(ADAPTER, lora_alpha=1e308)),
    "an alpha of text": ("adapted", settings_of(ADAPTER, lora_alpha="16")),
    "a rank of zero": ("adapted", settings_of(ADAPTER, r=0)),
    "a rank of -1": ("adapted", settings_of(ADAPTER, r=-1)),
    "a rank of NaN": ("adapted", settings_of(ADAPTER, r=float("nan"))),
    "a rank of 10 ** 400": ("adapted", settings_of(ADAPTER, r=10**400)),
    "a pattern of a list": ("adapted", settings_of(ADAPTER, rank_pattern=[1])),
    "a pattern that backtracks": ("adapted", settings_of(ADAPTER, rank_pattern={"(a+)+$": 1})),
    "a pattern of null": ("adapted", settings_of(ADAPTER, alpha_pattern={NAME: None})),
    "an adapter of another kind": ("adapted", settings_of(ADAPTER, peft_type="IA3")),
    "an adapter of DoRA": ("adapted", settings_of(ADAPTER, use_dora=True)),
    "an adapter that is turned": ("adapted", settings_of(ADAPTER, fan_in_fan_out=True)),
    "an adapter with modules": ("adapted", settings_of(ADAPTER, modules_to_save=["lm_head"])),
    "an adapter of no rank": ("adapted", lora(ones(0, 64), ones(32, 0))),
    "an adapter of other ranks": ("adapted", lora(ones(4, 64), ones(32, 5))),
    "an adapter of other inputs": ("adapted", lora(ones(4, 63), ones(32, 4))),
    "an adapter of other outputs": ("adapted", lora(ones(4, 64), ones(33, 4))),
    "an adapter of three dimensions": ("adapted", lora(ones(4, 64, 1), ones(32, 4))),
    "an adapter of integers": ("adapted", lora(ones(4, 64).int(), ones(32, 4))),
    "an adapter of no inputs": ("adapted", lora(ones(4, 0), ones(32, 4))),
    "an adapter for no layer": ("adapted", lora(ones(4, 64), ones(32, 4), "model.evil")),
    "an adapter whose name climbs": ("adapted", lora(ones(4, 64), ones(32, 4), "../../evil")),
    "an adapter that is a pickle": ("adapted", text_of(LORA, pickle.dumps(1))),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_lie_are_refused(tmp_path: Path, good: dict[str, Path], name: str) -> None:
    kind, forge = SETTINGS[name]
    refused(forged(good[kind], tmp_path, forge))


# where weights lie


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    payload = {"a": Payload(folder.parent / "marker")}
    torch.save(payload, folder / "pytorch_model.bin")
    torch.save(payload, folder / "adapter_model.bin")


def index(places: Any) -> Folder:
    """The weights in two files, said to be in `places`."""

    def forge(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        shutil.copy(folder / "part.safetensors", folder.parent / "outside.safetensors")
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / f"{WEIGHTS}.index.json").write_text(text)

    return forge


PLACES: dict[str, Folder] = {
    "a pickle": pickled,
    "outside": index({"a": "../outside.safetensors"}),
    "absolute": index({"a": "/etc/passwd"}),
    "a pickle in the index": index({"a": "pytorch_model.bin"}),
    "missing": index({"a": "none.safetensors"}),
    "a folder": index({"a": "."}),
    "the one above": index({"a": ".."}),
    "nothing": index({"a": ""}),
    "a zero byte": index({"a": "part\0.safetensors"}),
    "a name of a megabyte": index({"a": "x" * (1 << 20)}),
    "a number": index({"a": 1}),
    "a list": index([1]),
    "null": index(None),
    "a tensor that is not there": index({"evil": "part.safetensors"}),
}


@pytest.mark.parametrize("name", PLACES)
def test_weights_that_lie_elsewhere_are_refused(
    tmp_path: Path, good: dict[str, Path], name: str
) -> None:
    refused(forged(good["packed"], tmp_path, PLACES[name]))


# what transformers reads


CODE = {
    "AutoConfig": "evil.Config",
    "AutoModel": "evil.Model",
    "AutoModelForCausalLM": "evil.Model",
}


def coded(**changes: Any) -> Folder:
    """Python beside the weights, and settings that ask for it."""

    def forge(folder: Path) -> None:
        marker = folder.parent / "marker"
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
        settings_of("config.json", auto_map=CODE, **changes)(folder)

    return forge


CONFIGS: dict[str, Folder] = {
    "a model of its own": coded(model_type="evil", trust_remote_code=True),
    "no model": coded(model_type=None),
    "a model of a list": settings_of("config.json", model_type=["llama"]),
    "a model of a path": settings_of("config.json", model_type="../../evil"),
    "code of another repository": settings_of(
        "config.json", model_type="evil", auto_map={"AutoConfig": "a/b--c.D"}
    ),
    "an activation that is code": settings_of("config.json", hidden_act="__import__('os')"),
    "a dtype that is code": settings_of("config.json", dtype="__import__('os')", torch_dtype="x"),
    "heads of zero": settings_of("config.json", num_attention_heads=0),
    "a width of -1": settings_of("config.json", hidden_size=-1),
    "a width of text": settings_of("config.json", hidden_size="wide"),
    "a vocabulary of 2 ** 40": settings_of("config.json", vocab_size=1 << 40),
    "a width of 2 ** 40": settings_of("config.json", intermediate_size=1 << 40),
    "another width": settings_of("config.json", intermediate_size=48),
    "a quantization of a list": settings_of("config.json", quantization_config=[1]),
    "a quantization that loads a package": settings_of(
        "config.json", quantization_config={"quant_method": "gptq", "bits": 4}
    ),
    "architectures of a number": settings_of("config.json", architectures=7),
    "an end of no token": settings_of("config.json", eos_token_id=[]),
    "an end of text": settings_of("config.json", eos_token_id="x"),
    "positions of -5": settings_of("config.json", max_position_embeddings=-5),
    "positions of text": settings_of("config.json", max_position_embeddings="long"),
    "a tokenizer that is no text": text_of("tokenizer.json", b"\xff\xfe\xff"),
    "deep settings": text_of("tokenizer_config.json", b"[" * 100_000),
    "deep settings of generation": text_of("generation_config.json", b'{"a":' * 100_000),
    "settings of 5000 digits": text_of("special_tokens_map.json", b'{"a": ' + b"9" * 5000 + b"}"),
    "pickled weights": pickled,
    "weights of another shape": lambda f: safetensors.torch.save_file(
        {"model.norm.weight": ones(7)}, f / WEIGHTS, metadata={"format": "pt"}
    ),
    "overlapping weights": text_of(WEIGHTS, FILES["overlapping tensors"]),
    "weights of a huge header": text_of(WEIGHTS, FILES["a header of an exabyte"]),
}
for _text, _data in BAD_JSON.items():
    CONFIGS[f"a configuration of {_text}"] = text_of("config.json", _data)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_poisoned_configuration_is_refused(
    tmp_path: Path, good: dict[str, Path], name: str
) -> None:
    refused(forged(good["dense"], tmp_path, CONFIGS[name]), slimfx.capture)


@pytest.mark.parametrize("kind", ["packed", "gptq", "slim"])
def test_a_checkpoint_that_asks_for_its_own_code_is_refused(
    tmp_path: Path, good: dict[str, Path], kind: str
) -> None:
    folder = forged(good[kind], tmp_path, coded(model_type="evil", trust_remote_code=True))
    refused(folder, import_checkpoint)

"""Hostile recipes, texts, masks, records, packed weights and packages.

Each is refused with an error of slimfx, in little time and memory, and nothing in it is run.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from models import captured, compressed
from slimfx.runtime import sidecar
from slimfx.runtime.manifest import Manifest, manifest_of
from slimfx.runtime.targets import aoti, pt2
from test_hostile_checkpoints import BAD_JSON, FILES, Payload
from test_hostile_pt2 import bomb, records_of, zipped
from trust import bounded, trying

import slimfx
from slimfx.data import documents
from slimfx.errors import SlimError
from slimfx.mask_file import mask_for, read_masks
from slimfx.methods.masks import NofM
from slimfx.recipe import Recipe

Ask = Callable[[Path], Any]


def refused(path: Path, data: bytes, ask: Ask) -> str:
    """The one error of slimfx with which a file is refused."""
    path.write_bytes(data)
    with trying("hostile files"):
        with bounded(), pytest.raises(SlimError) as caught:
            ask(path)
        assert len(str(caught.value)) < 10_000
        assert not (path.parent / "marker").exists()
    return str(caught.value)


# recipes


def laughs(depth: int) -> str:
    """Nine of nine of nine ... laughs."""
    lines = ["a0: &a0 [lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join([*lines, f"skip: *a{depth - 1}"])


RECIPES: dict[str, str] = {
    "an object": "!!python/object:slimfx.recipe.Recipe {}",
    "a call": "!!python/object/apply:os.system ['touch marker']",
    "a new object": "!!python/object/new:os.system ['touch marker']",
    "a name": "skip: !!python/name:os.system",
    "a module": "skip: !!python/module:os",
    "an object in a step": "prune: !!python/object:slimfx.steps.Prune {n: 2}",
    "a tuple": "skip: !!python/tuple [a]",
    "a tag of its own": "skip: !evil [a]",
    "a tag of an address": "skip: !<tag:evil.org,2002:x> [a]",
    "a billion laughs": laughs(10),
    "a billion laughs in an override": laughs(10).replace("skip:", "overrides:"),
    "a billion laughs in a number": laughs(10).replace("skip: ", "prune: {n: ") + "}",
    "a list within itself": "skip: &a [*a]",
    "a mapping within itself": "prune: &a {n: *a}",
    "a merged mapping": "a: &a {n: 2}\nprune: {<<: *a}",
    "deep lists": "skip: " + "[" * 20_000,
    "deep and closed lists": "skip: " + "[" * 5_000 + "]" * 5_000,
    "deep mappings": "{a: " * 5_000 + "1" + "}" * 5_000,
    "deep blocks": "".join(f"{' ' * i}a:\n" for i in range(1_200)),
    "two megabytes": "# " + "x" * (2 << 20),
    "two documents": "prune: {n: 2}\n---\nprune: {n: 1}",
    "a number of 5000 digits": "prune: {n: " + "9" * 5_000 + "}",
    "a hexadecimal of 5000 digits": "prune: {n: 0x" + "f" * 5_000 + "}",
    "a number to the base of sixty": "prune: {n: " + "1:" * 3_000 + "1}",
    "a day that never was": "prune: {path: 2001-99-99}",
    "bytes": "skip: [!!binary aGVsbG8=]",
    "bytes that are none": "skip: [!!binary '====!']",
    "a set": "skip: !!set {a, b}",
    "an ordered mapping": "prune: !!omap [n: 2]",
    "a key of a list": "? [a, b]\n: 1",
    "a key of a mapping": "? {a: b}\n: 1",
    "a key of a number": "7: 8",
    "a key of null": "~: 8",
    "a list": "[prune, quantize]",
    "a text": "prune",
    "a text of zero bytes": 'skip: ["\\0"]\nprune: "\\0"',
    "an integer that is none": "prune: {n: !!int x}",
    "a float that is none": "adapter: {rank: !!float x}",
    "not a number": "adapter: {rank: .nan}",
    "infinity": "adapter: {rank: .inf}",
    "minus infinity": "tune: {rate: -.inf}",
    "a rank of -1": "adapter: {rank: -1}",
    "a rank of a half more": "adapter: {rank: 1.5}",
    "bits of 2 ** 63": "quantize: {bits: 9223372036854775808}",
    "a group of 0": "quantize: {method: absmax, granularity: group, group: 0}",
    "negative bits": "quantize: {bits: -4}",
    "samples of -1": "calibration: {samples: -1}",
    "batches of 0": "calibration: {batch: 0}",
    "a preset of a list": "preset: [slim]",
    "a preset of a mapping": "preset: {a: b}",
    "a preset of a path": "preset: ../../etc/passwd",
    "an unknown preset": "preset: evil",
    "an override of nothing": "overrides: [null]",
    "an override of text": "overrides: [evil]",
    "an override without a pattern": "overrides: [{prune: {n: 1}}]",
    "a pattern of a number": "overrides: [{match: 7}]",
    "a pattern of a list": "overrides: [{match: [a]}]",
    "an unbalanced quote": 'skip: ["a]',
    "a tab": "prune:\n\tn: 2",
    "a bell": "prune: \a",
    "an unknown directive": "%EVIL 1.0\n---\nprune: {}\n...\n%YAML 9.9\n---\n",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(tmp_path / "recipe.yaml", RECIPES[name].encode(), Recipe.load)


@pytest.mark.parametrize("data", [b"\xff\xfe\xff", b"\x00\x00", pickle.dumps(1), b"PK\x03\x04\xff"])
def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path, data: bytes) -> None:
    refused(tmp_path / "recipe.yaml", data, Recipe.load)


HUGE: dict[str, str] = {
    "a rank of 2 ** 62": "adapter: {rank: 4611686018427387904}",
    "a rank of 300 digits": "adapter: {rank: " + "9" * 300 + "}",
    "a rank of 1e300": "adapter: {rank: 1.0e+300}",
    "an m of 2 ** 62": "prune: {n: 1, m: 4611686018427387904}",
    "a rank of an adapter in groups": "adapter: {rank: 1000000000, bits: 4}",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_recipe_of_huge_numbers_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    def ask(path: Path) -> Any:
        return slimfx.compress(captured("mlp"), str(path), [torch.ones(4, 16)])

    refused(tmp_path / "recipe.yaml", HUGE[name].encode(), ask)


# texts


def lines(*broken: str) -> bytes:
    """Good JSON lines, then a broken one."""
    return "\n".join(['{"text": "good"}'] * 3 + list(broken)).encode()


TEXTS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "half a line": ("a.jsonl", lambda: lines('{"text": "go')),
    "a line of nothing": ("a.jsonl", lambda: lines("{}")),
    "a line of a list": ("a.jsonl", lambda: lines("[]")),
    "a line of null": ("a.jsonl", lambda: lines("null")),
    "a line of a number": ("a.jsonl", lambda: lines("7")),
    "a text of a number": ("a.jsonl", lambda: lines('{"text": 7}')),
    "a text of null": ("a.jsonl", lambda: lines('{"text": null}')),
    "a text of a list": ("a.jsonl", lambda: lines('{"text": ["a"]}')),
    "a deep line": ("a.jsonl", lambda: lines("[" * 100_000)),
    "a deep object": ("a.jsonl", lambda: lines('{"text":' * 100_000)),
    "a line of 5000 digits": ("a.jsonl", lambda: lines('{"text": ' + "9" * 5_000 + "}")),
    "a line that is no UTF-8": ("a.jsonl", lambda: lines() + b'\n{"text": "\xff"}'),
    "two objects a line": ("a.jsonl", lambda: lines('{"text": "a"} {"text": "b"}')),
    "a pickle": ("a.jsonl", lambda: pickle.dumps({"text": "a"})),
    "text that is no UTF-8": ("a.txt", lambda: b"\xff\xfe\xff"),
    "gzip that is none": ("a.txt.gz", lambda: b"text"),
    "half a gzip": ("a.txt.gz", lambda: gzip.compress(bytes(range(128)) * 99)[:-20]),
    "gzip with another checksum": ("a.txt.gz", lambda: gzip.compress(b"text")[:-8] + bytes(8)),
    "bzip2 that is none": ("a.txt.bz2", lambda: b"BZh9text"),
    "half a bzip2": ("a.txt.bz2", lambda: bz2.compress(b"text" * 99)[:-9]),
    "xz that is none": ("a.jsonl.xz", lambda: b"\xfd7zXZ\x00evil"),
    "half an xz": ("a.txt.xz", lambda: lzma.compress(b"text" * 99)[:-9]),
    "a gzip of two gigabytes": ("a.txt.gz", lambda: gzip.compress(bytes(64 << 20)) * 32),
    "a gzip of one line": ("a.jsonl.gz", lambda: gzip.compress(bytes(64 << 20)) * 32),
    "a bzip2 of two gigabytes": ("a.txt.bz2", lambda: bz2.compress(bytes(45 << 20)) * 46),
    "an xz of two gigabytes": ("a.txt.xz", lambda: lzma.compress(bytes(64 << 20), preset=0) * 32),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_text_is_refused(tmp_path: Path, name: str) -> None:
    file, data = TEXTS[name]
    refused(tmp_path / file, data(), documents)


# masks


def saved(**arrays: Any) -> bytes:
    target = io.BytesIO()
    np.savez(target, **arrays)
    return target.getvalue()


def npy(shape: Any, dtype: Any = "|b1", data: bytes = b"", *, version: bytes = b"\1\0") -> bytes:
    """An array file of any header."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data


def member(data: bytes, name: str = "fc.npy", packed: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", packed) as archive:
        archive.writestr(name, data)
    return target.getvalue()


def nested() -> bytes:
    """A bomb of bombs."""
    inner = member(bytes(64 << 20), packed=zipfile.ZIP_DEFLATED)
    for _ in range(3):
        inner = member(inner * 10, packed=zipfile.ZIP_DEFLATED)
    return inner


def many() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i}.npy", b"")
    return target.getvalue()


MASK = np.ones((12, 16), bool)
OFF = np.tile(np.array([1, 1, 1, 0], bool), (12, 4))
MASKS: dict[str, Callable[[], bytes]] = {
    "objects": lambda: saved(fc=np.array([Payload(Path("marker"))], dtype=object)),
    "a pickle": lambda: pickle.dumps({"fc": MASK}),
    "a pickle in a member": lambda: member(pickle.dumps(Payload(Path("marker")))),
    "an object array by hand": lambda: member(
        npy((1,), "|O", pickle.dumps([Payload(Path("marker"))]))
    ),
    "a header that is code": lambda: member(
        b"\x93NUMPY\1\0" + struct.pack("<H", 30) + b"__import__('os').system('id')\n"
    ),
    "a deep header": lambda: member(b"\x93NUMPY\1\0" + struct.pack("<H", 60_000) + b"(" * 60_000),
    "a header of four gigabytes": lambda: member(b"\x93NUMPY\2\0\xff\xff\xff\xff"),
    "a header of another version": lambda: member(npy((12, 16), version=b"\x09\0")),
    "a petabyte": lambda: member(npy((1 << 50,))),
    "an exabyte in two sizes": lambda: member(npy((1 << 30, 1 << 30))),
    "sizes that overflow": lambda: member(npy((1 << 40, 1 << 40))),
    "two gigabytes that are not there": lambda: member(npy((1 << 31,))),
    "a negative size": lambda: member(npy((-1, 16))),
    "a shape of text": lambda: member(npy("12")),
    "a shape of fractions": lambda: member(npy((1.5, 2))),
    "more dimensions than any": lambda: member(npy((1,) * 99, data=b"\1")),
    "half an array": lambda: member(npy((12, 16), data=bytes(8))),
    "texts": lambda: saved(fc=np.array(["mask"])),
    "records": lambda: saved(fc=np.zeros(4, dtype=[("a", "i4"), ("b", "f8")])),
    "times": lambda: saved(fc=np.zeros((12, 16), "datetime64[s]")),
    "complex numbers": lambda: saved(fc=np.ones((12, 16), complex)),
    "numbers of another end": lambda: saved(fc=MASK.astype(">f8") * 2),
    "one array alone": lambda: npy((12, 16), data=bytes(192)),
    "a bomb": lambda: member(npy((2 << 30,), data=bytes(256 << 20)), packed=zipfile.ZIP_DEFLATED),
    "a bomb of bombs": nested,
    "twenty thousand members": many,
    "a packing that no one knows": lambda: member(npy((12, 16), data=bytes(192))).replace(
        b"\x14\x00\x00\x00\x00\x00", b"\x14\x00\x00\x00\x63\x00"
    ),
    "a name that climbs": lambda: member(npy((12, 16), data=bytes(192)), "../../fc.npy"),
    "a member that is no array": lambda: member(b"text", "fc.txt"),
    "another shape": lambda: saved(fc=MASK[:, :8]),
    "three dimensions": lambda: saved(fc=MASK[None]),
    "one mask too many": lambda: saved(fc=OFF, fd=OFF),
    "no mask": lambda: saved(),
    "too many that stay": lambda: saved(fc=OFF),
    "all that stay": lambda: saved(fc=MASK),
    "values of 2": lambda: saved(fc=MASK.astype(np.uint8) * 2),
    "values of NaN": lambda: saved(fc=np.full((12, 16), np.nan)),
    "an empty mask": lambda: saved(fc=MASK[:0]),
    "empty": lambda: b"",
    "half a zip": lambda: saved(fc=MASK)[:-30],
}


def ask_masks(path: Path) -> Any:
    return mask_for("fc", read_masks(path), (12, 16), NofM(2, 4))


@pytest.mark.parametrize("name", MASKS)
def test_a_hostile_mask_file_is_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path / "masks.npz", MASKS[name](), ask_masks)


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_safetensors_of_masks_is_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path / "masks.safetensors", FILES[name], ask_masks)


# records beside a file


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good record of an export."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "model.onnx").write_bytes(b"model")
    own = sidecar.Sidecar(
        "onnx",
        manifest_of(compressed("mlp", "slim")),
        {},
        {"x": torch.ones(2)},
        {"y": torch.ones(2)},
    )
    sidecar.write(folder / "model.onnx.slimfx", own, [folder / "model.onnx"])
    assert sidecar.read(folder / "model.onnx.slimfx", "onnx").manifest == own.manifest
    return (folder / "model.onnx.slimfx").read_bytes()


def with_metadata(data: bytes, **changes: Any) -> bytes:
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"] | changes
    kept = {key: value for key, value in metadata.items() if value is not None}
    return safetensors.torch.save(safetensors.torch.load(data), metadata=kept)


def manifest(**changes: Any) -> str:
    own = json.loads(Manifest().to_json())
    return json.dumps({**own, **changes})


LAYER = {
    **{"name": "a", "out_features": 1, "in_features": 1, "layout": "x", "rank": 0, "bytes": 1},
    **{"tokens": 1, "snr": 1.0, "snr_without_adapter": 1.0, "clipped": 0.0, "notes": []},
}
MANIFESTS: dict[str, str] = {
    **{text: data.decode("latin-1") for text, data in BAD_JSON.items()},
    "null": "null",
    "no format": json.dumps({"layers": []}),
    "a newer major format": manifest(format=[2, 0]),
    "an older major format": manifest(format=[0, 9]),
    "a format of text": manifest(format="1"),
    "a format of nothing": manifest(format=[]),
    "a format of null": manifest(format=None),
    "a format of 2 ** 70": manifest(format=[1 << 70, 0]),
    "a format of a mapping": manifest(format={"0": 1}),
    "layers of null": manifest(layers=None),
    "layers of text": manifest(layers="abc"),
    "layers of numbers": manifest(layers=[1, 2]),
    "a layer without a name": manifest(layers=[{k: v for k, v in LAYER.items() if k != "name"}]),
    "a layer of bytes of text": manifest(layers=[{**LAYER, "bytes": "1"}]),
    "a layer of a name of a list": manifest(layers=[{**LAYER, "name": ["a"]}]),
    "a layer of a rank of a half": manifest(layers=[{**LAYER, "rank": 0.5}]),
    "notes of numbers": manifest(layers=[{**LAYER, "notes": [1]}]),
    "notes of text": manifest(layers=[{**LAYER, "notes": "abc"}]),
    "skipped of a list": manifest(skipped=[1]),
    "calibration of text": manifest(calibration="x"),
    "versions of null": manifest(versions=None),
    "an end token of text": manifest(eos_token="x"),
    "a recipe of a list": manifest(recipe=[1]),
    "model files of a list": manifest(model_files=[1]),
    "a form of a number": manifest(form=7),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_record_whose_manifest_lies_is_refused(tmp_path: Path, beside: bytes, name: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"model")
    data = with_metadata(beside, manifest=MANIFESTS[name])
    refused(tmp_path / "model.onnx.slimfx", data, lambda p: sidecar.read(p, "onnx"))


SIDECARS: dict[str, dict[str, Any]] = {
    "no target": {"target": None},
    "another target": {"target": "pte"},
    "no manifest": {"manifest": None},
    "no files": {"files": None},
    "a file outside": {"files": json.dumps({"../model.onnx": "x"})},
    "a file of the system": {"files": json.dumps({"/etc/passwd": "x"})},
    "a file with a zero byte": {"files": json.dumps({"a\0b": "x"})},
    "a file with a long name": {"files": json.dumps({"x" * 100_000: "x"})},
    "a file that is not there": {"files": json.dumps({"none": "x"})},
    "a folder": {"files": json.dumps({".": "x"})},
    "another digest": {"files": json.dumps({"model.onnx": "x"})},
    "a digest of a number": {"files": json.dumps({"model.onnx": 7})},
    "files of a list": {"files": "[1, 2]"},
    "files of null": {"files": "null"},
    "a deep record": {"record": "[" * 100_000},
    "a record of a list": {"record": "[1]"},
    "a deep order": {"order": "[" * 100_000},
    "an order of three": {"order": "[[], [], []]"},
    "an order of null": {"order": "null"},
    "an order of numbers": {"order": "[[1], [2]]"},
    "an order of lists": {"order": '[[["x"]], [["y"]]]'},
    "an order of other names": {"order": '[["evil"], ["y"]]'},
}


@pytest.mark.parametrize("name", SIDECARS)
def test_a_record_that_lies_is_refused(tmp_path: Path, beside: bytes, name: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"model")
    data = with_metadata(beside, **SIDECARS[name])
    refused(tmp_path / "model.onnx.slimfx", data, lambda p: sidecar.read(p, "onnx"))


@pytest.mark.parametrize("name", FILES)
def test_a_record_that_is_no_safetensors_is_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path / "model.onnx.slimfx", FILES[name], lambda p: sidecar.read(p, "onnx"))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_program_whose_manifest_lies_is_refused(tmp_path: Path, name: str) -> None:
    data = zipped({**good(), "slimfx/manifest.json": MANIFESTS[name].encode("latin-1")})
    refused(tmp_path / "model.pt2", data, pt2.load)


# packed weights


def good() -> dict[str, bytes]:
    """The records of a program with 2:4 weights."""
    if not _GOOD:
        _GOOD.update(records_of("slim"))
    return dict(_GOOD)


_GOOD: dict[str, bytes] = {}


def place_of(suffix: str) -> str:
    """The record of the first tensor whose name ends so."""
    config = json.loads(good()["data/weights/model_weights_config.json"])["config"]
    names = [name for name in config if name.endswith(suffix)]
    return f"data/weights/{config[names[0]]['path_name']}"


@pytest.mark.parametrize("ask", [pt2.load, pt2.check], ids=["load", "check"])
@pytest.mark.parametrize(
    "byte", [0x00, 0x04, 0x1C, 0x23, 0x4F, 0x55, 0x5A, 0x6C, 0x79, 0xAE, 0xBB, 0xC0, 0xE1, 0xFF]
)
def test_indices_that_do_not_ascend_are_refused(tmp_path: Path, byte: int, ask: Ask) -> None:
    records, place = good(), place_of("indices")
    records[place] = records[place][:-1] + bytes([byte])
    assert "ascend" in refused(tmp_path / "model.pt2", zipped(records), ask)


# compiled packages


def package(records: dict[str, bytes] | None = None, **changes: Any) -> bytes:
    """An archive that says it was compiled by slimfx, with these records or keys of its own."""
    own = {"march": "x86-64-v3", "accuracy": "exact", "needs": [], "torch": torch.__version__}
    text = json.dumps({**own, "inputs": [], **changes}).encode()
    return zipped({"slimfx/aoti.json": text, **(records or {})})


PACKAGES: dict[str, Callable[[], bytes]] = {
    **{
        f"a record of {text}": lambda data=data: package({"slimfx/aoti.json": data})
        for text, data in BAD_JSON.items()
    },
    "a record of null": lambda: package({"slimfx/aoti.json": b"null"}),
    "a record of other keys": lambda: package(evil=1),
    "a record of no keys": lambda: package({"slimfx/aoti.json": b"{}"}),
    "a record of numbers": lambda: package(march=1, needs=3, torch=4, inputs=5),
    "needs of lists": lambda: package(needs=[[1]]),
    "another accuracy": lambda: package(accuracy="evil"),
    "an accuracy of a list": lambda: package(accuracy=["exact"]),
    "an older torch": lambda: package(torch="2.1.0"),
    "a torch of a number": lambda: package(torch=2),
    "another processor": lambda: package(needs=["sve"]),
    "a bomb as its record": lambda: bomb({}, "slimfx/aoti.json"),
    "a bomb as its manifest": lambda: bomb({"slimfx/aoti.json": b"{}"}, "slimfx/manifest.json"),
    "a bomb as its outputs": lambda: bomb({"slimfx/aoti.json": b"{}"}, "slimfx/golden.safetensors"),
    "half": lambda: package()[:-20],
    "no archive": lambda: b"\x7fELF" + bytes(64),
    "a pickle": lambda: pickle.dumps(1),
    "a program that is not compiled": lambda: zipped(good()),
    "another checksum": lambda: package().replace(b"x86-64-v3", b"x86-64-v4"),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_hostile_package_is_refused_before_its_code_is_loaded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor, "aoti_load_package", pytest.fail)
    refused(tmp_path / "model.pt2", PACKAGES[name](), aoti.load)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_package_whose_manifest_lies_is_refused(tmp_path: Path, name: str) -> None:
    data = package({"slimfx/manifest.json": MANIFESTS[name].encode("latin-1")})
    refused(tmp_path / "model.pt2", data, aoti.read_manifest)

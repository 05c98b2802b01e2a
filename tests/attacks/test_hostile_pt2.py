"""Hostile `.pt2` files: each is refused with an ArtifactError, and nothing in it ever runs.

Every file is a good one with something put in its place and all checksums right. A payload that is
run, at load or when the program is, leaves a marker.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import random
import struct
import sys
import tempfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import compressed, word_tokenizer
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.targets import pt2
from trust import trying

from slimfx.data import tokenizer_of
from slimfx.errors import ArtifactError, SlimError

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
MANIFEST = "slimfx/manifest.json"
GOLDEN = "slimfx/golden.safetensors"

Records = dict[str, bytes]
Forge = Callable[[Records], Any]


class Payload:
    """Unpickled, it makes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What only a payload makes; the test fails if it is there in the end."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "the file ran code"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch logs whole tracebacks of what it cannot read."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def records_of(recipe: str) -> Records:
    """The records of a compressed program, without the root folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "good.pt2"
        pt2.save(compressed("mlp", recipe), path)
        with zipfile.ZipFile(path) as archive:
            return {e.filename.partition("/")[2]: archive.read(e) for e in archive.infolist()}


@pytest.fixture(scope="module")
def good() -> Records:
    """A program with 2:4 weights."""
    return records_of("slim")


@pytest.fixture(scope="module")
def packed() -> Records:
    """A program in which a bitmask, 2:4 and dense codes all occur."""
    return records_of("50%")


def zipped(records: Records, *, root: str = "model/") -> bytes:
    """An archive of records, all checksums right."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for record, data in records.items():
            archive.writestr(f"{root}{record}", data)
    return target.getvalue()


def refused(tmp_path: Path, data: bytes, *, ask: Any = pt2.load) -> str:
    """The one line with which a file is refused."""
    (tmp_path / "hostile.pt2").write_bytes(data)
    with trying("hostile files"), pytest.raises(ArtifactError) as caught:
        ask(tmp_path / "hostile.pt2")
    return str(caught.value)


def editing(record: str, change: Callable[[Any], Any]) -> Forge:
    """Edit the JSON of one record in place, or put what the change returns there."""

    def forge(records: Records) -> None:
        data = json.loads(records[record])
        changed = change(data)
        records[record] = json.dumps(data if changed is None else changed).encode()

    return forge


def putting(record: str, data: bytes) -> Forge:
    return lambda records: records.update({record: data})


def first(config: dict[str, Any]) -> dict[str, Any]:
    """The first payload of a weight or constant table."""
    return next(iter(config["config"].values()))


def test_the_archive_that_is_forged_below_is_good(tmp_path: Path, good: Records) -> None:
    (tmp_path / "good.pt2").write_bytes(zipped(good))
    assert pt2.check(tmp_path / "good.pt2").identical


# pickles


def pickled(marker: Path) -> bytes:
    target = io.BytesIO()
    torch.save(({"x": Payload(marker)},), target)
    return target.getvalue()


def use_pickle(table: str, record: str, flag: Any) -> Callable[[Records, Path], None]:
    def forge(records: Records, marker: Path) -> None:
        editing(table, lambda config: first(config).update(use_pickle=flag))(records)
        records[record] = pickled(marker)

    return forge


def constant_named(name: str, data: Callable[[Path], bytes]) -> Callable[[Records, Path], None]:
    """A constant under a name that makes torch unpickle it."""

    def forge(records: Records, marker: Path) -> None:
        editing(CONSTANTS, lambda config: add_constant(config, name))(records)
        records[f"data/constants/{name}"] = data(marker)

    return forge


def add_constant(config: dict[str, Any], name: str) -> None:
    config["config"]["extra"] = {"path_name": name, "is_param": False, "use_pickle": False}
    config["config"]["extra"]["tensor_meta"] = None


def plain_pickle(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


def at(record: str, data: Callable[[Path], bytes]) -> Callable[[Records, Path], None]:
    return lambda records, marker: records.update({record: data(marker)})


def old_layout(records: Records, marker: Path) -> None:
    """The flat archive that torch 2.7 wrote."""
    records.clear()
    records["version"] = b"8.0"
    records["serialized_exported_program.json"] = b"{}"
    for name in ("state_dict", "constants", "example_inputs"):
        records[f"serialized_{name}.pt"] = pickled(marker)


PICKLES: dict[str, Callable[[Records, Path], None]] = {
    "a pickled weight": use_pickle(WEIGHTS, "data/weights/weight_0", True),
    "a pickled weight by number": use_pickle(WEIGHTS, "data/weights/weight_0", 1),
    "a pickled weight by text": use_pickle(WEIGHTS, "data/weights/weight_0", "no"),
    "a pickled weight by list": use_pickle(WEIGHTS, "data/weights/weight_0", [False]),
    "pickled sample inputs": at(SAMPLES, pickled),
    "sample inputs in the oldest format": at(SAMPLES, plain_pickle),
    "sample inputs of another model": at("data/sample_inputs/other.pt", pickled),
    "weights in the older format": at("data/weights/model.pt", pickled),
    "constants in the older format": at("data/constants/model.pt", pickled),
    "a script object": constant_named("custom_obj_0", pickled),
    "an opaque object": constant_named("opaque_obj_0", plain_pickle),
    "an opaque object that looks like JSON": constant_named("opaque_obj_0.json", plain_pickle),
    "the archive of torch 2.7": old_layout,
    "compiled code": at("data/aotinductor/model/model.so", plain_pickle),
    "compiled weights": at("data/aotinductor/model/weights_config.json", lambda marker: b"{}"),
    "an executorch program": at("executorch/model.pte", plain_pickle),
    "a module description": at("module_info.json", lambda marker: b"{}"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("attack", PICKLES)
def test_a_pickle_is_refused_and_not_run(
    tmp_path: Path, marker: Path, good: Records, attack: str
) -> None:
    records = dict(good)
    PICKLES[attack](records, marker)
    refused(tmp_path, zipped(records))


def test_a_pickled_constant_is_refused_and_not_run(
    tmp_path: Path, marker: Path, good: Records
) -> None:
    def add(config: dict[str, Any]) -> None:
        add_constant(config, "tensor_0")
        config["config"]["extra"]["use_pickle"] = True

    records = {**good, "data/constants/tensor_0": pickled(marker)}
    editing(CONSTANTS, add)(records)
    assert "pickle" in refused(tmp_path, zipped(records))


def test_the_payload_would_have_run(tmp_path: Path) -> None:
    pickle.loads(plain_pickle(tmp_path / "marker"))
    assert (tmp_path / "marker").exists()


# names


NAMES = [
    "../evil",
    "model/../../evil",
    "model/../model/models/other.json",
    "/etc/evil",
    "model//etc/evil",
    "model/data/weights/../../evil.json",
    "model/data/weights/..",
    "model/data/weights/weight_0/evil",
    "model/data/weights/weight_x",
    "model/data\\weights\\weight_0",
    "model/models/../evil.json",
    "model/models/evil.py",
    "model/slimfx/../evil",
    "model/slimfx/deeper/evil",
    "model/extra/../../evil",
    "model/unknown",
    "model/",
    "model",
    "evil.py",
    "model/data/weights/",
    "model/extra/",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_record_that_does_not_belong_is_refused(tmp_path: Path, good: Records, name: str) -> None:
    target = io.BytesIO(zipped(good))
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr(name, b"x")
    refused(tmp_path, target.getvalue())
    assert not (tmp_path / "evil").exists()


def twice(records: Records, name: str) -> bytes:
    target = io.BytesIO(zipped(records))
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr(name, b"{}")
    return target.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "name",
    [
        f"model/{WEIGHTS}",
        f"other/{WEIGHTS}",
        f"model/{MANIFEST}",
        "model/data/weights/MODEL_weights_config.json",
        "model/models/Model.json",
    ],
)
def test_two_records_of_one_name_are_refused(tmp_path: Path, good: Records, name: str) -> None:
    """torch finds records whatever their case."""
    refused(tmp_path, twice(good, name))


@pytest.mark.parametrize("missing", [MODEL, WEIGHTS, CONSTANTS, SAMPLES, "archive_version"])
def test_an_archive_that_lacks_a_record_is_refused(
    tmp_path: Path, good: Records, missing: str
) -> None:
    refused(tmp_path, zipped({name: data for name, data in good.items() if name != missing}))


@pytest.mark.parametrize("mark", ["archive_format", "archive_version"])
def test_a_mark_of_another_format_is_refused(tmp_path: Path, good: Records, mark: str) -> None:
    refused(tmp_path, zipped({**good, mark: b"\xff\xfe7"}))


# bombs


@cache
def gibibyte() -> tuple[bytes, int]:
    """A gibibyte of zeros, deflated, and its checksum."""
    block = bytes(1 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    crc = 0
    for _ in range(1024):
        crc = zlib.crc32(block, crc)
    return packed * 1024 + packer.flush(), crc


def bomb(records: Records, name: str, *, claimed: int | None = None) -> bytes:
    """An archive whose record `name` is a gibibyte of zeros, packed into `claimed` bytes."""
    packed, crc = gibibyte()
    data = bytearray(zipped({**records, name: packed}))
    sizes = struct.pack("<III", crc, claimed or len(packed), 1 << 30)
    for start, signature in ((14, b"PK\x03\x04"), (16, b"PK\x01\x02")):
        place = find_header(data, f"model/{name}".encode(), signature) + start
        data[place : place + 12] = sizes
        data[place - 6 : place - 4] = b"\x08\x00"
    return bytes(data)


def find_header(data: bytearray, name: bytes, signature: bytes) -> int:
    """Where the local header or the directory entry of a record starts."""
    length = 30 if signature == b"PK\x03\x04" else 46
    place = data.find(name)
    while bytes(data[place - length : place - length + 4]) != signature:
        place = data.find(name, place + 1)
    return place - length


BOMBS: dict[str, tuple[str, int | None]] = {
    "manifest": (MANIFEST, None),
    "golden outputs": (GOLDEN, None),
    "weight": ("data/weights/weight_0", None),
    "table": (WEIGHTS, None),
    "graph": (MODEL, None),
    "sample inputs": (SAMPLES, None),
    "manifest that claims more packed bytes than the file has": (MANIFEST, 6 << 20),
    "table that claims more packed bytes than the file has": (WEIGHTS, 6 << 20),
    "weight that claims to be its neighbours too": ("data/weights/weight_0", 6 << 20),
}


def test_the_bombs_are_what_they_say() -> None:
    packed, _ = gibibyte()
    share = zlib.decompressobj(-15).decompress(packed[: len(packed) // 64])
    assert len(share) == pytest.approx((1 << 30) / 64, rel=0.1)
    assert share == bytes(len(share))


@pytest.mark.parametrize("where", BOMBS)
def test_a_bomb_is_refused_at_once_and_in_little_memory(
    tmp_path: Path, good: Records, where: str
) -> None:
    data = bomb(good, BOMBS[where][0], claimed=BOMBS[where][1])
    tracemalloc.start()
    began = time.process_time()
    try:
        refused(tmp_path, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 3
    assert peak < 64 << 20


# tables of weights


JSON_SHAPES: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"7",
    "a string": b'"config"',
    "no table": b"{}",
    "a null table": b'{"config": null}',
    "a table of a list": b'{"config": [1]}',
    "a table of null": b'{"config": {"first.bias": null}}',
    "a table of a list each": b'{"config": {"first.bias": []}}',
    "an empty payload": b'{"config": {"first.bias": {}}}',
    "half": b'{"config": {"first.bi',
    "not UTF-8": b'{"config": "\xff\xfe\xfa"}',
    "UTF-16": '{"config": {}}'.encode("utf-16"),
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep inside": b'{"config": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    "a number of 5000 digits": b'{"config": ' + b"9" * 5000 + b"}",
    "infinity": b'{"config": 1e999}',
    "NaN": b'{"config": NaN}',
}


@pytest.mark.parametrize("shape", JSON_SHAPES)
@pytest.mark.parametrize("record", [WEIGHTS, CONSTANTS, MODEL, MANIFEST])
def test_json_of_another_shape_is_refused(
    tmp_path: Path, good: Records, record: str, shape: str
) -> None:
    refused(tmp_path, zipped({**good, record: JSON_SHAPES[shape]}))


def payload(**changes: Any) -> Forge:
    return editing(WEIGHTS, lambda config: first(config).update(changes))


def meta(**changes: Any) -> Forge:
    return editing(WEIGHTS, lambda config: first(config)["tensor_meta"].update(changes))


def ints(*values: int) -> list[dict[str, int]]:
    return [{"as_int": value} for value in values]


def without(key: str) -> Forge:
    return editing(WEIGHTS, lambda config: first(config).pop(key) and None)


TABLES: dict[str, Forge] = {
    "a missing record": payload(path_name="weight_99"),
    "a record outside": payload(path_name="../../../etc/passwd"),
    "a record of another folder": payload(path_name="../constants/model_constants_config.json"),
    "the table itself": payload(path_name="model_weights_config.json"),
    "a path that is no text": payload(path_name=3),
    "no path": without("path_name"),
    "no flag": without("use_pickle"),
    "no tensor": payload(tensor_meta=None),
    "a tensor of text": payload(tensor_meta="x"),
    "a tensor of nothing": payload(tensor_meta={}),
    "no sizes": meta(sizes=None),
    "sizes of text": meta(sizes="32"),
    "sizes of texts": meta(sizes=[{"as_int": "32"}]),
    "sizes of fractions": meta(sizes=[{"as_int": 3.5}]),
    "sizes of null": meta(sizes=[None]),
    "an unknown dtype": meta(dtype=99),
    "a negative dtype": meta(dtype=-1),
    "a dtype of text": meta(dtype="float"),
    "an unknown device": meta(device={"type": "toaster", "index": None}),
    "a device of text": meta(device="cpu"),
    "one element too many": meta(sizes=ints(33)),
    "many elements too many": meta(sizes=ints(1 << 20)),
    "more elements than memory": meta(sizes=ints(1 << 62)),
    "more elements than 64 bits": meta(sizes=ints(1 << 70)),
    "sizes whose product overflows": meta(sizes=ints(1 << 32, 1 << 32), strides=ints(1, 1)),
    "sizes whose product overflows to nothing": meta(
        sizes=ints(1 << 33, 1 << 33), strides=ints(0, 0)
    ),
    "a negative size": meta(sizes=ints(-1)),
    "a negative stride": meta(strides=ints(-1)),
    "a stride beyond the record": meta(strides=ints(2)),
    "a huge stride": meta(strides=ints(1 << 61)),
    "a stride of 63 bits": meta(strides=ints((1 << 63) - 1)),
    "a stride missing": meta(strides=[]),
    "a stride too many": meta(strides=ints(1, 1)),
    "an offset beyond the record": meta(storage_offset={"as_int": 1}),
    "a negative offset": meta(storage_offset={"as_int": -1}),
    "a huge offset": meta(storage_offset={"as_int": 1 << 61}),
    "an offset of 63 bits": meta(storage_offset={"as_int": (1 << 63) - 1}),
    "an offset of text": meta(storage_offset={"as_int": "0"}),
    "a wider dtype": meta(dtype=8),
    "a record cut in half": lambda records: records.update(
        {"data/weights/weight_0": records["data/weights/weight_0"][:64]}
    ),
    "a record of an odd length": lambda records: records.update(
        {"data/weights/weight_0": records["data/weights/weight_0"][:-1]}
    ),
    "an empty record": putting("data/weights/weight_0", b""),
}


def test_the_first_weight_is_the_bias_the_attacks_speak_of(good: Records) -> None:
    config = json.loads(good[WEIGHTS])
    assert next(iter(config["config"])) == "first.bias"
    assert first(config)["path_name"] == "weight_0"
    assert first(config)["tensor_meta"]["sizes"] == ints(32)
    assert len(good["data/weights/weight_0"]) == 4 * 32


@pytest.mark.parametrize("lie", TABLES)
def test_a_table_that_lies_of_its_weights_is_refused(
    tmp_path: Path, good: Records, lie: str
) -> None:
    records = dict(good)
    TABLES[lie](records)
    refused(tmp_path, zipped(records))


def test_an_empty_record_does_not_become_a_large_tensor(tmp_path: Path, good: Records) -> None:
    records = {**good, "data/weights/weight_0": b""}
    meta(sizes=ints(1 << 28), strides=ints(1))(records)
    refused(tmp_path, zipped(records))


MISFITS: dict[str, Forge] = {
    "a shorter tensor": meta(sizes=ints(16)),
    "another rank": meta(sizes=ints(2, 16), strides=ints(16, 1)),
    "another dtype": meta(dtype=4),
    "another weight's record": payload(path_name="weight_2"),
    "a weight that no one has": editing(
        WEIGHTS, lambda config: config["config"].update(extra=first(config))
    ),
    "a weight less": editing(WEIGHTS, lambda config: config["config"].pop("first.bias") and None),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_that_do_not_fit_the_graph_fail_at_the_latest_in_check(
    tmp_path: Path, good: Records, misfit: str
) -> None:
    records = dict(good)
    MISFITS[misfit](records)
    (tmp_path / "misfit.pt2").write_bytes(zipped(records))
    try:
        passed = pt2.check(tmp_path / "misfit.pt2").passed
    except ArtifactError:
        passed = False
    assert not passed


# code in the graph


def graph(change: Callable[[dict[str, Any]], Any]) -> Callable[[Records, Path], None]:
    """Edit the program's graph; MARKER in any text becomes the marker's path."""

    def forge(records: Records, marker: Path) -> None:
        editing(MODEL, change)(records)
        records[MODEL] = records[MODEL].replace(b"MARKER", str(marker).encode())

    return forge


CODE = "__import__('os').system('touch MARKER')"


def signature(model: dict[str, Any]) -> dict[str, Any]:
    return model["graph_module"]["module_call_graph"][0]["signature"]


def symbols(model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every symbolic size of a graph."""
    for tensor in model["graph_module"]["graph"]["tensor_values"].values():
        yield from (s["as_expr"] for s in [*tensor["sizes"], *tensor["strides"]] if "as_expr" in s)


def size_runs(model: dict[str, Any]) -> None:
    next(symbols(model))["expr_str"] = CODE


def every_size_runs(model: dict[str, Any]) -> None:
    for symbol in symbols(model):
        symbol["expr_str"] = f"({CODE}, {symbol['expr_str']})[1]"


def size_is_an_attribute(model: dict[str, Any]) -> None:
    for symbol in symbols(model):
        symbol["expr_str"] += f" + ().__class__.__base__.__subclasses__().index({CODE})"


def guard_runs(model: dict[str, Any]) -> None:
    model["guards_code"] = [f"{CODE} == 0"]


def argument_runs(model: dict[str, Any]) -> None:
    signature(model)["forward_arg_names"] = [f"x={CODE}"]


def edit_inputs(model: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> None:
    """Change the structure of the inputs, JSON within JSON."""
    version, spec = json.loads(signature(model)["in_spec"])
    change(spec["children_spec"][1])
    signature(model)["in_spec"] = json.dumps([version, spec])


def keyword_runs(model: dict[str, Any]) -> None:
    name = f"x': {CODE}, 'x"
    edit_inputs(model, lambda kwargs: kwargs.update(context=json.dumps([name])))


def inputs_import(model: dict[str, Any]) -> None:
    context = {"default_factory_module": "hostile", "default_factory_name": "x"}
    kind = {"type": "collections.defaultdict", "context": {**context, "dict_context": ["x"]}}
    edit_inputs(model, lambda kwargs: kwargs.update(kind))


def inputs_import_an_enum(model: dict[str, Any]) -> None:
    key = {"__enum__": True, "fqn": "hostile:E", "name": "A"}
    edit_inputs(model, lambda kwargs: kwargs.update(context=json.dumps([key])))


def outputs_import(model: dict[str, Any]) -> None:
    key = {"__enum__": True, "fqn": "hostile:E", "name": "A"}
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = {"type": "builtins.dict", "context": json.dumps([key]), "children_spec": [leaf]}
    signature(model)["out_spec"] = json.dumps([1, spec])


def first_node(model: dict[str, Any]) -> dict[str, Any]:
    return model["graph_module"]["graph"]["nodes"][0]


def target(name: str) -> Callable[[dict[str, Any]], None]:
    """The first node calls something else, with a command as its argument."""
    argument = {"name": "", "arg": {"as_string": "touch MARKER"}, "kind": 1}
    return lambda model: first_node(model).update(target=name, inputs=[argument])


def added(node: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A node before all others, whose output is a tensor like the first weight."""

    def change(model: dict[str, Any]) -> None:
        inner = model["graph_module"]["graph"]
        given = {"metadata": {}, "is_hop_single_tensor_return": None, "name": "added", **node}
        inner["nodes"].insert(0, given)
        like = next(iter(inner["tensor_values"].values()))
        inner["tensor_values"]["added"] = {**like, "sizes": ints(4), "requires_grad": False}

    return change


def named(name: str, kind: str, value: Any) -> dict[str, Any]:
    return {"name": name, "arg": {kind: value}, "kind": 1}


MAKES_A_FILE = {
    "target": "torch.ops.aten.from_file.default",
    "inputs": [
        named("filename", "as_string", "MARKER"),
        named("shared", "as_bool", True),
        named("size", "as_int", 4),
    ],
    "outputs": [{"as_tensor": {"name": "added"}}],
}
SAVES_A_FILE = {
    "target": "torch.ops.aten.save.default",
    "inputs": [named("item", "as_int", 1), named("filename", "as_string", "MARKER")],
    "outputs": [],
}
READS_A_FILE = {
    "target": "torch.ops.debugprims.load_tensor.default",
    "inputs": [
        named("name", "as_string", "MARKER"),
        named("size", "as_ints", [4]),
        named("stride", "as_ints", [1]),
        named("dtype", "as_scalar_type", 7),
        named("device", "as_device", {"type": "cpu", "index": None}),
    ],
    "outputs": [{"as_tensor": {"name": "added"}}],
}

GRAPHS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a size that is code": size_runs,
    "every size ends in code": every_size_runs,
    "a size that climbs to object": size_is_an_attribute,
    "a guard that is code": guard_runs,
    "an argument whose default is code": argument_runs,
    "a keyword that closes its quote": keyword_runs,
    "inputs that import a module": inputs_import,
    "inputs that import an enum": inputs_import_an_enum,
    "outputs that import an enum": outputs_import,
    "os.system": target("torch.os.system"),
    "torch.load": target("torch.load"),
    "torch.hub.load": target("torch.hub.load"),
    "torch.ops.load_library": target("torch.ops.load_library"),
    "eval": target("builtins.eval"),
    "a target that is code": target(CODE),
    "an op that makes a file": added(MAKES_A_FILE),
    "an op that saves a file": added(SAVES_A_FILE),
    "an op that reads a file": added(READS_A_FILE),
    "an unknown verifier": lambda model: model.update(verifiers=["NONE"]),
    "another major schema": lambda model: model.update(schema_version={"major": 9, "minor": 0}),
    "no schema": lambda model: model.pop("schema_version") and None,
}


@pytest.fixture
def importable(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module that makes the marker when it is imported."""
    folder = tmp_path / "importable"
    folder.mkdir()
    source = f"import enum\nopen({str(marker)!r}, 'w').close()\nx = dict\nE = enum.Enum('E', 'A')\n"
    (folder / "hostile.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("hostile", None)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("attack", GRAPHS)
def test_a_graph_that_would_do_more_than_compute_is_refused(
    tmp_path: Path, marker: Path, good: Records, attack: str
) -> None:
    records = dict(good)
    graph(GRAPHS[attack])(records, marker)
    assert records[MODEL] != good[MODEL]
    refused(tmp_path, zipped(records))


@pytest.mark.parametrize("attack", ["a guard that is code", "an op that makes a file"])
def test_checking_such_a_file_runs_nothing_either(
    tmp_path: Path, marker: Path, good: Records, attack: str
) -> None:
    records = dict(good)
    graph(GRAPHS[attack])(records, marker)
    refused(tmp_path, zipped(records), ask=pt2.check)


# packed weights that no slimfx wrote


def number(op: str, name: str, value: int) -> Callable[[dict[str, Any]], None]:
    """The first call of an op of ours gets another number."""

    def change(model: dict[str, Any]) -> None:
        nodes = model["graph_module"]["graph"]["nodes"]
        node = next(node for node in nodes if node["target"] == f"torch.ops.slimfx.{op}.default")
        given = next(given for given in node["inputs"] if given["name"] == name)
        given["arg"] = {"as_int": value}

    return change


NUMBERS = [
    *(("bits", value) for value in (0, -4, 1, 2, 5, 8, 16, 64, 1 << 40, (1 << 63) - 1)),
    *(("group", value) for value in (0, -1, -(1 << 62))),
]


def test_the_archive_with_every_layout_is_good(tmp_path: Path, packed: Records) -> None:
    (tmp_path / "good.pt2").write_bytes(zipped(packed))
    assert pt2.check(tmp_path / "good.pt2").identical
    for op in ("linear_int", "linear_24", "linear_bitmask"):
        assert f"slimfx.{op}.".encode() in packed[MODEL]


@pytest.mark.parametrize(("name", "value"), NUMBERS)
@pytest.mark.parametrize("op", ["linear_int", "linear_24", "linear_bitmask"])
def test_a_number_that_the_layout_does_not_have_fails_at_the_latest_in_check(
    tmp_path: Path, packed: Records, op: str, name: str, value: int
) -> None:
    records = dict(packed)
    editing(MODEL, number(op, name, value))(records)
    if op == "linear_bitmask" and value in (2, 8):  # how many values there are is not written
        (tmp_path / "hostile.pt2").write_bytes(zipped(records))
        assert not pt2.check(tmp_path / "hostile.pt2").passed
        return
    assert f"{op}: " in refused(tmp_path, zipped(records), ask=pt2.check)


@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x5A])
def test_any_bytes_of_packed_weights_are_some_weight_or_refused(
    tmp_path: Path, packed: Records, byte: int
) -> None:
    weights = [record for record in packed if record.startswith("data/weights/weight_")]
    assert len(weights) == 20
    for record in weights:
        records = {**packed, record: bytes([byte]) * len(packed[record])}
        (tmp_path / "hostile.pt2").write_bytes(zipped(records))
        try:
            assert not pt2.check(tmp_path / "hostile.pt2").identical, record
        except ArtifactError as error:
            assert "do not ascend" in str(error)


# what zipfile and torch read differently


def directory(data: bytes) -> tuple[int, int, int]:
    """Entries, size and place of an archive's directory."""
    count, size, place = struct.unpack_from("<HII", data, data.rindex(b"PK\x05\x06") + 10)
    return count, size, place


def moved(entries: bytes, distance: int) -> bytes:
    """A directory whose records lie so much further on."""
    data, place = bytearray(entries), 0
    while place < len(data):
        lengths = struct.unpack_from("<HHH", data, place + 28)
        (header,) = struct.unpack_from("<I", data, place + 42)
        struct.pack_into("<I", data, place + 42, header + distance)
        place += 46 + sum(lengths)
    return bytes(data)


def two_directories(shown: bytes, hidden: bytes) -> bytes:
    """zipfile takes the directory before the end record, torch the one at the given place."""
    _, size, place = directory(hidden)
    count, shown_size, shown_place = directory(shown)
    assert size == shown_size
    body = hidden[: place + size]
    entries = shown[shown_place : shown_place + size]
    start = len(body) + shown_place
    assert start >= place
    return b"".join(
        [
            body,
            shown[:shown_place],
            moved(entries, len(body) - (start - place)),
            struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, size, place, 0),
        ]
    )


def two_end_records(shown: bytes, hidden: bytes) -> bytes:
    """zipfile takes the 64-bit end record before its locator, torch the one it points to."""
    count, size, place = directory(shown)
    _, hidden_size, hidden_place = directory(hidden)
    body = hidden[: hidden_place + hidden_size]
    behind = len(body) + 56
    return b"".join(
        [
            body,
            end_record_64(count, hidden_size, hidden_place),
            shown[:place],
            moved(shown[place : place + size], behind),
            end_record_64(count, size, behind + place),
            struct.pack("<4sIQI", b"PK\x06\x07", 0, len(body), 1),
            struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 65535, 65535, 0xFFFFFFFF, 0xFFFFFFFF, 0),
        ]
    )


def end_record_64(count: int, size: int, place: int) -> bytes:
    return struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, place)


@pytest.mark.parametrize("trick", [two_directories, two_end_records])
def test_an_archive_that_shows_torch_another_content_is_refused(
    tmp_path: Path, marker: Path, good: Records, trick: Callable[[bytes, bytes], bytes]
) -> None:
    hidden = zipped({**good, SAMPLES: pickled(marker)})
    data = trick(zipped(good), hidden)
    refused(tmp_path, data)


@pytest.mark.parametrize("trick", [two_directories, two_end_records])
def test_two_equal_contents_are_not_guessed_between(
    tmp_path: Path, good: Records, trick: Callable[[bytes, bytes], bytes]
) -> None:
    other = {**good, "data/weights/weight_0": bytes(128)}
    refused(tmp_path, trick(zipped(good), zipped(other)))


def marked(data: bytes, record: str, place: int, value: bytes) -> bytes:
    """An archive with other bytes in a record's directory entry."""
    changed = bytearray(data)
    start = find_header(changed, f"model/{record}".encode(), b"PK\x01\x02") + place
    changed[start : start + len(value)] = value
    return bytes(changed)


ENTRIES = {
    "encrypted": (8, b"\x01\x00"),
    "packed by bzip2": (10, b"\x0c\x00"),
    "packed by lzma": (10, b"\x0e\x00"),
    "packed by what no one knows": (10, b"\x63\x00"),
    "a folder": (38, b"\x10\x00\x00\x00"),
    "empty, with the checksum of nothing": (16, bytes(8)),
    "four gigabytes": (24, b"\xff\xff\xff\xfe"),
    "four gigabytes, unpacked": (20, b"\xff\xff\xff\xfe\xff\xff\xff\xfe"),
}


@pytest.mark.parametrize("claim", ENTRIES)
@pytest.mark.parametrize("record", ["data/weights/weight_0", MODEL, GOLDEN])
def test_a_record_whose_entry_lies_is_refused(
    tmp_path: Path, good: Records, record: str, claim: str
) -> None:
    """A folder, or an empty entry, is memory that torch never writes to."""
    refused(tmp_path, marked(zipped(good), record, *ENTRIES[claim]))


# slimfx's own records


def golden_with(records: Records, change: Callable[[dict, dict], Any]) -> None:
    data = records[GOLDEN]
    length = int.from_bytes(data[:8], "little")
    tensors = safetensors.torch.load(data)
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    change(tensors, metadata)
    records[GOLDEN] = safetensors.torch.save(tensors, metadata=metadata)


GOLDENS: dict[str, Callable[[Records], Any]] = {
    "empty": putting(GOLDEN, b""),
    "text": putting(GOLDEN, b"golden"),
    "a header of 2 ** 64 - 1 bytes": putting(GOLDEN, b"\xff" * 16),
    "a header that is no JSON": putting(GOLDEN, struct.pack("<Q", 8) + b"{{{{{{{{"),
    "a deep header": putting(GOLDEN, struct.pack("<Q", 100_000) + b"[" * 100_000),
    "overlapping tensors": putting(
        GOLDEN,
        struct.pack("<Q", 120)
        + json.dumps(
            {name: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for name in ("a", "b")}
        )
        .encode()
        .ljust(120)
        + bytes(8),
    ),
    "half": lambda records: records.update({GOLDEN: records[GOLDEN][:100]}),
    "no inputs": lambda records: golden_with(records, lambda t, m: t.pop("input.0")),
    "too many inputs": lambda records: golden_with(
        records, lambda t, m: t.update({"input.1": torch.zeros(1)})
    ),
    "metadata that is no JSON": lambda records: golden_with(
        records, lambda t, m: m.update(dict.fromkeys(m, "{"))
    ),
    "no metadata": lambda records: golden_with(records, lambda t, m: m.clear()),
    "no outputs": lambda records: golden_with(records, lambda t, m: t.pop("output.0")),
    "inputs of another shape": lambda records: golden_with(
        records, lambda t, m: t.update({"input.0": torch.zeros(1, 2, 3)})
    ),
}


@pytest.mark.parametrize("damage", GOLDENS)
def test_damaged_golden_outputs_are_refused(tmp_path: Path, good: Records, damage: str) -> None:
    records = dict(good)
    GOLDENS[damage](records)
    refused(tmp_path, zipped(records), ask=pt2.check)


@pytest.mark.parametrize("ask", [pt2.load, pt2.read_manifest, pt2.check])
def test_a_manifest_of_a_newer_major_format_is_refused(
    tmp_path: Path, good: Records, ask: Any
) -> None:
    records = dict(good)
    editing(MANIFEST, lambda manifest: manifest.update(format=[2, 0]))(records)
    assert "format 2" in refused(tmp_path, zipped(records), ask=ask)


def test_a_manifest_of_a_newer_minor_format_is_accepted(tmp_path: Path, good: Records) -> None:
    records = dict(good)
    editing(MANIFEST, lambda manifest: manifest.update(format=[1, 7], kernel="x"))(records)
    (tmp_path / "newer.pt2").write_bytes(zipped(records))
    assert manifest_of(pt2.load(tmp_path / "newer.pt2")) == pt2.read_manifest(
        tmp_path / "newer.pt2"
    )
    assert pt2.check(tmp_path / "newer.pt2").identical


@pytest.mark.parametrize("record", [MANIFEST, "slimfx/tokenizer.json"])
@pytest.mark.parametrize("ask", [pt2.load, pt2.read_manifest])
def test_text_that_is_not_utf_8_is_refused(
    tmp_path: Path, good: Records, record: str, ask: Any
) -> None:
    text = good.get(record, word_tokenizer().encode())
    refused(tmp_path, zipped({**good, record: text.replace(b"a", b"\xff")}), ask=ask)


@pytest.mark.parametrize("text", [b"", b"{}", b"null", b"[" * 100_000, b'{"model": {"type": "X"}}'])
def test_a_tokenizer_that_is_none_is_an_error_of_slimfx(
    tmp_path: Path, good: Records, text: bytes
) -> None:
    (tmp_path / "model.pt2").write_bytes(zipped({**good, "slimfx/tokenizer.json": text}))
    with pytest.raises(SlimError):
        tokenizer_of(pt2.load(tmp_path / "model.pt2"))


# by chance


def mutated(value: Any, draw: Any) -> Any:
    """JSON with one value replaced, removed or renamed."""
    places = list(walk(value))
    place = draw.choice(places)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    action = draw.randrange(3)
    if action == 0:
        del holder[place[-1]]
    elif action == 1 and isinstance(holder, dict):
        holder[f"{place[-1]}_"] = holder.pop(place[-1])
    else:
        holder[place[-1]] = draw.choice(
            [None, True, 0, -1, 1 << 40, 1 << 63, "", "x", "cpu", [], {}, ints(-1), "weight_1"]
        )
    return value


def walk(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of everything in JSON, but for the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*place, key)
        if isinstance(inner, dict | list):
            yield from walk(inner, (*place, key))


@pytest.mark.parametrize("seed", range(100))
def test_random_damage_to_json_is_refused_or_leaves_a_program_of_its_size(
    tmp_path: Path, good: Records, seed: int
) -> None:
    draw = random.Random(seed)
    record = draw.choice([MODEL, MODEL, WEIGHTS, CONSTANTS, MANIFEST])
    changed = mutated(json.loads(good[record]), draw)
    (tmp_path / "damaged.pt2").write_bytes(zipped({**good, record: json.dumps(changed).encode()}))
    try:
        loaded = pt2.load(tmp_path / "damaged.pt2")
    except ArtifactError:
        return
    held = [*loaded.state_dict.values(), *loaded.constants.values()]
    assert sum(tensor.nbytes for tensor in held) <= sum(map(len, good.values()))


@pytest.mark.parametrize("record", [MODEL, WEIGHTS, MANIFEST])
def test_every_mutation_is_one(good: Records, record: str) -> None:
    before = json.loads(good[record])
    changed = [mutated(json.loads(good[record]), random.Random(seed)) for seed in range(30)]
    assert sum(after != before for after in changed) >= 25

"""Archives: damage of any kind is an ArtifactError, and a save is whole or has not happened."""

from __future__ import annotations

import io
import json
import os
import random
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bits, captured, compressed
from slimfx.runtime import archive
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.targets import pt2
from torch.export import ExportedProgram

from slimfx.errors import ArtifactError

CUTS = 40
FLIPS = 40


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A compressed two-layer program as slimfx writes it."""
    path = tmp_path_factory.mktemp("good") / "good.pt2"
    pt2.save(compressed("mlp", "slim"), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(artifact: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What loads from the file as it is."""
    found = outcome(tmp_path_factory.mktemp("whole") / "whole.pt2", artifact)
    assert found is not None
    return found


def content(program: ExportedProgram) -> dict[str, Any]:
    """Everything a loaded program is made of."""
    tensors = {**program.state_dict, **program.constants}
    args, kwargs = program.example_inputs
    return {
        "tensors": {name: bits(tensor) for name, tensor in sorted(tensors.items())},
        "nodes": [(n.op, n.name, str(n.target), str(n.args)) for n in program.graph.nodes],
        "inputs": [bits(value) for value in (*args, *kwargs.values())],
        "manifest": manifest_of(program),
        "ranges": str(program.range_constraints),
    }


def outcome(path: Path, data: bytes) -> dict[str, Any] | None:
    """What loads from such bytes; None for an ArtifactError, and no other error is let through."""
    path.write_bytes(data)
    try:
        return content(pt2.load(path))
    except ArtifactError:
        return None


def header_bytes(data: bytes) -> list[int]:
    """The places of a zip that no checksum covers: local headers, directory, end record."""
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        places = set(range(zipped.start_dir, len(data)))
        for entry in zipped.infolist():
            name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
            places |= set(range(entry.header_offset, entry.header_offset + 30 + name + extra))
    return sorted(places)


@pytest.mark.parametrize("cut", range(CUTS))
def test_a_truncated_file_is_refused(artifact: bytes, tmp_path: Path, cut: int) -> None:
    length = len(artifact) * cut // CUTS if cut < CUTS - 1 else len(artifact) - 1
    assert outcome(tmp_path / "cut.pt2", artifact[:length]) is None


@pytest.mark.parametrize("flip", range(FLIPS))
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(
    artifact: bytes, whole: dict[str, Any], tmp_path: Path, flip: int
) -> None:
    draw = random.Random(flip)
    data = bytearray(artifact)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    assert outcome(tmp_path / "flipped.pt2", bytes(data)) in (None, whole)


@pytest.mark.parametrize("flip", range(FLIPS))
def test_a_flipped_bit_in_a_zip_header_is_refused_or_changes_nothing(
    artifact: bytes, whole: dict[str, Any], tmp_path: Path, flip: int
) -> None:
    draw = random.Random(1000 + flip)
    data = bytearray(artifact)
    data[draw.choice(header_bytes(artifact))] ^= 1 << draw.randrange(8)
    assert outcome(tmp_path / "flipped.pt2", bytes(data)) in (None, whole)


FIELDS = {
    "encrypted": (8, b"\x01\x00"),
    "bzip2": (10, b"\x0c\x00"),
    "lzma": (10, b"\x0e\x00"),
    "an unknown method": (10, b"\x63\x00"),
    "a directory": (38, b"\x10\x00\x00\x00"),
    "longer than it is": (24, b"\xff\xff\x00\x00"),
    "shorter than it is": (24, b"\x01\x00\x00\x00"),
    "packed longer than it is": (20, b"\xff\xff\x0f\x00"),
    "packed into nothing": (16, b"\x00\x00\x00\x00\x00\x00\x00\x00"),
    "far outside the file": (42, b"\xff\xff\xff\x7f"),
    "another record": (42, b"\x00\x00\x00\x00"),
    "on another disk": (34, b"\x07\x00"),
    "of a later zip version": (6, b"\xff\x00"),
}
"""What a directory entry may claim of its record: the field's place, and its bytes."""


@pytest.mark.parametrize("record", ["data/weights/weight_2", "models/model.json"])
@pytest.mark.parametrize("claim", FIELDS)
def test_a_directory_entry_that_lies_is_refused_or_changes_nothing(
    artifact: bytes, whole: dict[str, Any], tmp_path: Path, claim: str, record: str
) -> None:
    place, value = FIELDS[claim]
    data = bytearray(artifact)
    start = directory_entry(artifact, f"{archive.ROOT}/{record}")
    data[start + place : start + place + len(value)] = value
    assert outcome(tmp_path / "lie.pt2", bytes(data)) in (None, whole)


def directory_entry(data: bytes, name: str) -> int:
    """Where the directory's entry of a record starts."""
    return data.rindex(name.encode()) - 46


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"PK\x05\x06" + bytes(18), b"not a zip at all" * 99, bytes(4096)]
)
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    assert outcome(tmp_path / "none.pt2", data) is None


def test_the_message_names_the_file_and_not_its_folder(artifact: bytes, tmp_path: Path) -> None:
    (tmp_path / "half.pt2").write_bytes(artifact[: len(artifact) // 2])
    with pytest.raises(ArtifactError, match=r"^half\.pt2: not a complete \.pt2 archive"):
        pt2.load(tmp_path / "half.pt2")


def test_inspect_returns_our_own_records_and_rewinds_the_file(artifact: bytes) -> None:
    file = io.BytesIO(artifact)
    own = archive.inspect(file, "good.pt2")
    assert set(own) == {"manifest.json", "golden.safetensors"}
    assert json.loads(own["manifest.json"])["form"] == "op"
    assert file.tell() == 0


def records(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        return {entry.filename.partition("/")[2]: zipped.read(entry) for entry in zipped.infolist()}


def rewritten(program: ExportedProgram, own: dict[str, bytes]) -> bytes:
    raw, target = io.BytesIO(), io.BytesIO()
    torch.export.save(program, raw)
    raw.seek(0)
    archive.rewrite(raw, target, own)
    return target.getvalue()


def test_a_rewritten_archive_has_no_times_no_traces_and_no_sample_inputs() -> None:
    program = captured("mlp")
    raw = io.BytesIO()
    torch.export.save(program, raw)
    with zipfile.ZipFile(raw) as zipped:
        before = {
            entry.filename.partition("/")[2]: zipped.read(entry) for entry in zipped.infolist()
        }
    assert len(before["data/sample_inputs/model.pt"]) > 0
    assert b"stack_trace" in before["models/model.json"]

    data = rewritten(program, {"note": b"x"})
    after = records(data)
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        entries = zipped.infolist()
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.filename.partition("/")[0] for entry in entries} == {archive.ROOT}
    assert after["data/sample_inputs/model.pt"] == b""
    assert b"stack_trace" not in after["models/model.json"]
    assert b"nn_module_stack" in after["models/model.json"]
    assert after["slimfx/note"] == b"x"
    assert set(before) - set(after) == {".data/serialization_id"}


def test_rewriting_twice_gives_the_same_bytes() -> None:
    program = captured("mlp")
    assert rewritten(program, {"note": b"x"}) == rewritten(program, {"note": b"x"})


def test_json_is_deflated_and_tensors_are_stored(artifact: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(artifact)) as zipped:
        for entry in zipped.infolist():
            packed = entry.compress_type == zipfile.ZIP_DEFLATED
            assert packed == entry.filename.endswith(".json"), entry.filename


def test_atomic_replaces_only_after_the_block(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with archive.atomic(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), ArtifactError("x")])
def test_atomic_leaves_nothing_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), archive.atomic(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664])
def test_atomic_keeps_the_mode_of_the_file_it_replaces(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    with archive.atomic(path) as temporary:
        temporary.write_bytes(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        with archive.atomic(tmp_path / "file") as temporary:
            temporary.write_bytes(b"new")
        assert os.umask(mask) == mask
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def folder_is_missing(tmp_path: Path) -> Path:
    return tmp_path / "missing" / "file.pt2"


def folder_is_a_file(tmp_path: Path) -> Path:
    (tmp_path / "plain").write_bytes(b"")
    return tmp_path / "plain" / "file.pt2"


def path_is_a_folder(tmp_path: Path) -> Path:
    (tmp_path / "folder.pt2").mkdir()
    return tmp_path / "folder.pt2"


def folder_takes_no_files(tmp_path: Path) -> Path:
    """Not even root makes a file in /proc."""
    return Path("/proc/file.pt2")


def name_is_too_long(tmp_path: Path) -> Path:
    return tmp_path / ("x" * 300 + ".pt2")


PLACES = [
    folder_is_missing,
    folder_is_a_file,
    path_is_a_folder,
    folder_takes_no_files,
    name_is_too_long,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_saving_where_no_file_can_be_is_one_clear_error(tmp_path: Path, place: Any) -> None:
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError) as caught:
        pt2.save(compressed("mlp", "slim"), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_longest_name_the_file_system_takes_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".pt2")
    pt2.save(compressed("mlp", "slim"), path)
    assert pt2.check(path).identical


INTERRUPTED = """
import hashlib, json, os, resource, signal, sys, threading
from pathlib import Path
import torch
import slimfx
from slimfx.errors import ArtifactError
from slimfx.recipe import Recipe
from slimfx.runtime import archive

torch.set_num_threads(1)
folder = Path(sys.argv[1])
path = folder / "model.pt2"

def program(seed):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)]
    model = torch.nn.Sequential(*layers)
    captured = slimfx.capture(model, (torch.randn(2, 64),))
    return slimfx.compress(captured, Recipe.preset("slim"), [torch.randn(32, 64)])

old, new = program(0), program(1)
slimfx.save(old, path)
before = path.read_bytes()
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def kind():
    if path.read_bytes() == before:
        return "old"
    loaded = slimfx.load(path).state_dict
    same = all(torch.equal(loaded[name], t) for name, t in new.state_dict.items())
    return "new" if same and loaded.keys() == new.state_dict.keys() else "mixture"

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Counting:
    def __init__(self, file, last):
        self.file, self.left = file, last
    def write(self, data):
        self.left -= 1
        if self.left == 0:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die()
        return self.file.write(data)
    def __getattr__(self, name):
        return getattr(self.file, name)

writes = []
rewrite = archive.rewrite
class Recording(Counting):
    def write(self, data):
        writes.append(len(data))
        return self.file.write(data)
archive.rewrite = lambda raw, file, *rest: rewrite(raw, Recording(file, 0), *rest)
size = slimfx.save(new, path)
path.write_bytes(before)
archive.rewrite = rewrite

def at_write(k):
    archive.rewrite = lambda raw, file, *rest: rewrite(raw, Counting(file, k), *rest)

def at_call(where, name, *, after):
    real = getattr(where, name)
    def hooked(*args, **kwargs):
        if not after:
            die()
        result = real(*args, **kwargs)
        die()
        return result
    setattr(where, name, hooked)

def at_time(seconds):
    threading.Timer(seconds, die).start()

def full(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

def attempt(prepare, *args, **kwargs):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "saved"
        try:
            prepare(*args, **kwargs)
            slimfx.save(new, path)
        except ArtifactError as error:
            said = f"ArtifactError: {error}"
        except BaseException as error:
            said = repr(error)
        os.write(write, said.encode()[:2000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    file = kind()
    left = sorted(p.name for p in folder.iterdir() if p != path)
    for name in left:
        (folder / name).unlink()
    loads = slimfx.check(path).identical
    path.write_bytes(before)
    signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"said": said, "signal": signalled, "file": file, "left": left, "loads": loads}

found = {}
for k in range(1, len(writes) + 1, max(1, len(writes) // 12)):
    found[f"write {k}"] = attempt(at_write, k)
for name in ("archive.rewrite", "os.fsync", "Path.chmod", "Path.replace"):
    owner = {"archive": archive, "os": os, "Path": Path}[name.split(".")[0]]
    for late in (False, True):
        found[f"{name} {late}"] = attempt(at_call, owner, name.split(".")[1], after=late)
for k in range(8):
    found[f"time {k}"] = attempt(at_time, 0.004 * 2**k)
for share in (0.0, 0.1, 0.3, 0.5, 0.8, 0.999):
    found[f"full {share}"] = attempt(full, int(size * share))
found["roomy"] = attempt(full, 1 << 30)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How saves over an older file end that are killed, or run out of space, at many moments."""
    folder = tmp_path_factory.mktemp("interrupted")
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_save_that_is_killed_at_any_write_leaves_the_old_file(
    interrupted: dict[str, dict[str, Any]],
) -> None:
    killed = {name: end for name, end in interrupted.items() if name.startswith("write ")}
    assert len(killed) >= 12
    signals = {end["signal"] for end in killed.values()}
    assert 9 in signals and signals <= {0, 9}  # a save may be done before its time is up
    files = {end["file"] for end in killed.values()}
    assert "old" in files and files <= {"old", "new"}  # never a mixture
    assert all(end["loads"] for end in killed.values())


def test_a_save_that_is_killed_between_its_steps_leaves_the_old_file_or_the_new_one(
    interrupted: dict[str, dict[str, Any]],
) -> None:
    steps = ("archive.rewrite", "os.fsync", "Path.chmod", "Path.replace")
    for step in steps:
        for late in (False, True):
            end = interrupted[f"{step} {late}"]
            assert end["signal"] == 9, step
            assert end["file"] == ("new" if (step, late) == ("Path.replace", True) else "old"), step
            assert end["loads"], step


def test_a_save_that_is_killed_at_any_time_leaves_the_old_file_or_the_new_one(
    interrupted: dict[str, dict[str, Any]],
) -> None:
    timed = [end for name, end in interrupted.items() if name.startswith("time ")]
    assert 9 in {end["signal"] for end in timed}
    for end in timed:
        assert end["file"] in ("old", "new") if end["signal"] else end["file"] == "new"
        assert end["loads"]


def test_a_full_disk_is_an_error_that_leaves_the_old_file_and_nothing_else(
    interrupted: dict[str, dict[str, Any]],
) -> None:
    full = {name: end for name, end in interrupted.items() if name.startswith("full ")}
    assert len(full) == 6
    for name, end in full.items():
        assert end["signal"] == 0, f"{name}: the process died"
        assert end["said"].startswith("ArtifactError: "), f"{name}: {end['said']}"
        assert "no space left; the older file is intact" in end["said"], name
        assert end["file"] == "old", name
        assert end["left"] == [], name
        assert end["loads"], name


def test_a_limit_above_the_size_does_not_disturb(
    interrupted: dict[str, dict[str, Any]],
) -> None:
    end = interrupted["roomy"]
    assert (end["said"], end["file"], end["left"]) == ("saved", "new", [])

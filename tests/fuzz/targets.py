"""What is fuzzed: bytes that one of slimfx's readers takes, or refuses with an error of slimfx."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from models import compressed
from slimfx.runtime import archive
from slimfx.runtime.manifest import Manifest, manifest_of
from slimfx.runtime.targets import pt2
from slimfx.runtime.untrusted import check_graph, parsed

from slimfx.errors import SlimError
from slimfx.recipe import PRESETS, Recipe

Target = Callable[[bytes], None]


def loader(data: bytes) -> None:
    """The look at a `.pt2` before torch reads it."""
    archive.inspect(io.BytesIO(data), "model.pt2")


def graph(data: bytes) -> None:
    """The look at a program's graph."""
    check_graph(parsed(data, "model"), "model")


def recipe(data: bytes) -> None:
    """A recipe's text."""
    Recipe.from_yaml(data.decode("utf-8", "replace"))


def manifest(data: bytes) -> None:
    """A manifest's text."""
    Manifest.from_json(data.decode("utf-8", "replace"), None)


TARGETS: dict[str, Target] = {
    "loader": loader,
    "graph": graph,
    "recipe": recipe,
    "manifest": manifest,
}


@cache
def seeds(name: str) -> tuple[bytes, ...]:
    """Good inputs of a target."""
    if name == "recipe":
        return tuple(each.to_yaml().encode() for each in PRESETS.values())
    if name == "manifest":
        return (manifest_of(compressed("mlp", "slim")).to_json().encode(),)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "good.pt2"
        pt2.save(compressed("mlp", "slim"), path, verify=False)
        if name == "loader":
            return (path.read_bytes(),)
        with zipfile.ZipFile(path) as held:
            model = json.loads(held.read("model/models/model.json"))
    return (json.dumps(model, separators=(",", ":")).encode(),)


def tried(name: str, data: bytes) -> bool:
    """Did a target take the data? Anything but an error of slimfx is let through."""
    try:
        TARGETS[name](data)
    except SlimError:
        return False
    return True

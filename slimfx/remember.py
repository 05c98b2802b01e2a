"""What was measured or searched once, in the user's cache folder, so that it is not done again.

The folder is $SLIMFX_CACHE, else slimfx in $XDG_CACHE_HOME or ~/.cache; it may be removed any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import slimfx
from slimfx import passes, runtime
from slimfx.errors import ArtifactError
from slimfx.runtime import archive


def folder() -> Path:
    """Where it is; nothing is made."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SLIMFX_CACHE") or Path(base) / "slimfx")


def recall(kind: str, key: Mapping[str, Any]) -> Any:
    """What `keep` was given for the same key by the same slimfx and torch, or None.

    A damaged file counts as none.
    """
    try:
        return json.loads(_path(kind, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def keep(kind: str, key: Mapping[str, Any], value: Any) -> None:
    """Write plain data, whose numbers come back to the bit; warn where nothing can be written."""
    path = _path(kind, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.atomic(path) as temporary:
            temporary.write_text(json.dumps(value), encoding="utf-8")
    except (OSError, ArtifactError) as error:
        warnings.warn(
            f"slimfx: not kept for the next time: {error}; set SLIMFX_CACHE", stacklevel=2
        )


def forget(kind: str, key: Mapping[str, Any]) -> None:
    """Remove what `keep` was given, if it is there."""
    with suppress(OSError):
        _path(kind, key).unlink()


def _path(kind: str, key: Mapping[str, Any]) -> Path:
    made = {**key, "slimfx": version("slimfx"), "torch": torch.__version__, "sources": _sources()}
    text = json.dumps(made, sort_keys=True)
    return folder() / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


@cache
def _sources() -> str:
    """SHA-256 of the Python and C++ that this is: a development version changes without a name."""
    sha = hashlib.sha256()
    roots = [*slimfx.__path__, *passes.__path__, *runtime.__path__]
    for path in sorted(file for root in roots for file in Path(root).rglob("*")):
        if path.suffix in (".py", ".h"):
            sha.update(path.read_bytes())
    return sha.hexdigest()

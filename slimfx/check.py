"""Any artifact of slimfx, asked again what it answered when it was written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from slimfx.errors import ArtifactError, SlimError
from slimfx.export import TARGETS
from slimfx.generate import generate
from slimfx.runtime.golden import CheckResult
from slimfx.runtime.targets import aoti, pt2
from slimfx.stepper import stepper

_PROMPT = "The"
_TOKENS = 32
_SECONDS = 5.0


@dataclass(frozen=True)
class Checked:
    """An artifact, and how it did."""

    target: str
    bytes: int
    """Of all its files."""
    needs: str
    """What runs it."""
    result: CheckResult
    tokens_per_second: float | None
    """Of a text that it continues greedily; None where it continues none."""


def check(path: str | Path, *, tolerance: float | None = None) -> CheckResult:
    """Run an artifact on its recorded inputs and compare with its recorded outputs.

    Args:
        tolerance: largest difference, relative to the largest output; by default the target's.

    Raises:
        ArtifactError: missing, damaged or unsafe, or it carries no recorded outputs.
        SlimError: a package that it needs is not installed.
    """
    run = TARGETS[target_of(path)].check
    return run(path) if tolerance is None else run(path, tolerance=tolerance)


def target_of(path: str | Path) -> str:
    """For which of `TARGETS` a file or folder was written, by its kind alone.

    Raises:
        ArtifactError: for none.
    """
    path = Path(path)
    if path.is_dir():
        return "hf"
    if path.suffix == ".pt2":
        return "aoti" if aoti.is_package(path) else "pt2"
    for name, target in TARGETS.items():
        if path.suffix == target.ending:
            return name
    endings = ", ".join(dict.fromkeys(t.ending for t in TARGETS.values() if t.ending))
    raise ArtifactError(f"{path}: its name ends in none of {endings}, and it is no folder")


def measure(path: str | Path) -> Checked:
    """`check`, and how fast the artifact continues a text.

    Raises:
        ArtifactError, SlimError: as `check`.
    """
    path, target = Path(path), target_of(path)
    result, needs = check(path), TARGETS[target].needs
    if target == "pt2" and pt2.read_manifest(path).form == "op":
        needs = "slimfx"
    return Checked(target, _bytes(path), needs, result, _speed(path))


def _bytes(path: Path) -> int:
    """With what lies beside a file: weights of its own, our record."""
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}*")
    own = (path.name, f"{path.name}.data", f"{path.name}.slimfx")
    return sum(f.stat().st_size for f in files if f.is_file() and (path.is_dir() or f.name in own))


def _speed(path: Path) -> float | None:
    """Tokens a second after the first, for some seconds at most."""
    try:
        pieces = generate(stepper(path), _PROMPT, tokens=_TOKENS)
    except SlimError:
        return None
    began = time.perf_counter()
    for _ in pieces:
        if time.perf_counter() - began > _SECONDS:
            break
    return pieces.took.figures()["decode_tokens_per_second"]

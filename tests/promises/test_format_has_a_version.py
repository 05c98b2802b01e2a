"""Promise 14: artifacts of every version of the format load, and a newer major one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from slimfx.runtime.manifest import FORMAT, Manifest
from slimfx.runtime.targets import pt2

import slimfx
from slimfx.errors import ArtifactError

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = [(1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("form", ["op", "aten"])
@pytest.mark.parametrize("version", VERSIONS)
def test_format_has_a_version(version: tuple[int, int], form: str) -> None:
    path = GOLDEN / f"format-{version[0]}.{version[1]}-{form}.pt2"
    manifest = pt2.read_manifest(path)
    assert [row.layout for row in manifest.layers] == ["2:4 int4", "2:4 int4"]
    assert slimfx.check(path).passed


def test_every_version_has_its_file() -> None:
    assert VERSIONS[-1] == FORMAT
    files = {f"format-{a}.{b}-{form}.pt2" for a, b in VERSIONS for form in ("op", "aten")}
    assert {path.name for path in GOLDEN.glob("*.pt2")} == files


def test_a_newer_major_version_is_refused() -> None:
    text = Manifest().to_json().replace(f'"format": [\n  {FORMAT[0]}', '"format": [\n  2')
    with pytest.raises(ArtifactError, match="the artifact has format 2, this slimfx reads 1"):
        Manifest.from_json(text, None)

"""A built wheel holds the library and nothing else: python tests/wheel.py WHEEL."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"slimfx": "", "passes": "slimfx/", "runtime": "slimfx/"}
ABOUT = {"METADATA", "RECORD", "WHEEL", "LICENSE", "entry_points.txt", "top_level.txt"}


def main() -> None:
    """Compare the wheel's names with the sources'."""
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        names = set(wheel.namelist())
    wanted = {"slimfx/py.typed", "slimfx/runtime/inductor/linear.h"}
    for folder, place in FOLDERS.items():
        sources = [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).glob("pages/*")]
        wanted |= {place + path.relative_to(ROOT).as_posix() for path in sources}
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == wanted, sorted((names - about) ^ wanted)
    assert {Path(name).name for name in about} == ABOUT, sorted(about)
    print(f"wheel holds {len(names)} files, all of them known")


if __name__ == "__main__":
    main()

"""The Python of the README runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_python_blocks_run_in_order(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 4
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    dense, small = map(float, lines[1].split())
    assert dense < small < 1.2 * dense  # 33.9 and 36.8 on the author's machine
    assert lines[2] == "True"
    assert "torch.Size([2, 16])" in lines[3:]
    assert (tmp_path / "small-native.pt2").exists()
    assert (tmp_path / "small.pt2").stat().st_size < 0.4 * 23_156_165  # the dense file

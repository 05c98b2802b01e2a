"""Promise 17: no socket is opened by import, capture, compress, save, load and check."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORK = """
import sys
def watch(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        print("SOCKET", event, arguments, flush=True)
        sys.exit(3)
sys.addaudithook(watch)
import slimfx, torch
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
program = slimfx.capture(model.eval(), (torch.randn(2, 16),))
small = slimfx.compress(program, "slim-q", [torch.randn(64, 16)])
slimfx.save(small, sys.argv[1])
slimfx.load(sys.argv[1])
print(slimfx.check(sys.argv[1]).identical)
"""


def test_offline_and_quiet(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORK, str(tmp_path / "a.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["True"], done.stdout + done.stderr[-2000:]


def test_the_hook_sees_a_socket(tmp_path: Path) -> None:
    text = WORK.replace(
        "import slimfx, torch", "import socket; socket.socket().connect(('127.0.0.1', 9))"
    )
    done = subprocess.run([sys.executable, "-c", text, "x"], capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout.startswith("SOCKET socket.connect")

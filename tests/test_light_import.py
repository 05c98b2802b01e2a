"""`import slimfx` is light, silent and offline."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, sys
events = []
sys.addaudithook(lambda event, _: events.append(event) if event.startswith("socket.") else None)
import slimfx
missing = [name for name in slimfx.__all__ if not hasattr(slimfx, name)]
print(json.dumps({"modules": sorted(sys.modules), "missing": missing, "events": events}))
"""


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """What a process that does nothing but import slimfx has seen."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "heavy",
    [
        *("transformers", "tokenizers", "datasets", "typer", "rich"),
        *("matplotlib", "pandas", "lm_eval", "onnx", "executorch"),
    ],
)
def test_importing_slimfx_does_not_import(fresh: dict[str, Any], heavy: str) -> None:
    assert "slimfx" in fresh["modules"]
    assert heavy not in fresh["modules"]


def test_importing_slimfx_imports_no_triton_of_its_own(fresh: dict[str, Any]) -> None:
    """torch.export imports it where it is installed."""
    ours = [name for name in fresh["modules"] if name.startswith("slimfx.runtime.kernels")]
    assert ours == []
    script = "import sys, torch.export, torch._dynamo; print('triton' in sys.modules)"
    torchs = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ("triton" in fresh["modules"]) <= (torchs.stdout.strip() == "True")


def test_importing_slimfx_opens_no_connection(fresh: dict[str, Any]) -> None:
    asked = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind"}
    assert asked & set(fresh["events"]) == set()


def test_every_public_name_is_there(fresh: dict[str, Any]) -> None:
    assert fresh["missing"] == []


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux alone")
def test_the_command_makes_no_tensor_before_it_asks_for_large_pages() -> None:
    script = (
        "import torch, slimfx.cli as cli; cli.prepare_allocator(); "
        "print(torch.empty(1 << 22).data_ptr() % 4096)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "0\n"  # else 64, behind what malloc notes of a piece

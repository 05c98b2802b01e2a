"""Promise 12: every op passes torch's own checks; each kernel's numbers are tested where it is."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
MODULES = ("cpu_ops", "gpu_ops", "ops", "straight_through")
"""That register ops."""


def test_kernel_is_reference() -> None:
    for name in MODULES:
        importlib.import_module(f"slimfx.runtime.{name}")
    found = {schema.name for schema in torch._C._jit_get_all_schemas()}
    ops = {name.removeprefix("slimfx::") for name in found if name.startswith("slimfx::")}
    texts = [path.read_text(encoding="utf-8") for path in (TESTS / "runtime").glob("test_*.py")]
    checked = "".join(text for text in texts if "opcheck(" in text)
    assert len(ops) > 5
    assert [name for name in sorted(ops) if name not in checked] == []

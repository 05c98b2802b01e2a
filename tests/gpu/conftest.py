"""The fixtures of tests/kernels: Triton's interpreter in a process of its own, and a GPU if any."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_KERNELS = Path(__file__).parents[1] / "kernels"
sys.path.append(str(_KERNELS))  # where the fixtures find what they import
_spec = importlib.util.spec_from_file_location("kernels_conftest", _KERNELS / "conftest.py")
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)

interpreter, run, own_triton_cache = _module.interpreter, _module.run, _module.own_triton_cache

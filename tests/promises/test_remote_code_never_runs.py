"""Promise 3: Python that lies beside a model's weights is never run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from models import DEMO

import slimfx
from slimfx.errors import SlimError


def test_remote_code_never_runs(tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(DEMO, folder)
    (folder / "modeling_poisoned.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "poisoned", "trust_remote_code": True}
    config["auto_map"] = {
        "AutoConfig": "modeling_poisoned.Config",
        "AutoModelForCausalLM": "modeling_poisoned.Model",
        "AutoModel": "modeling_poisoned.Model",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlimError):
        slimfx.capture(folder)
    assert not ran.exists()

"""Compress exported PyTorch programs to 2:4-sparse int4 weights plus low-rank adapters.

program = slimfx.capture("model-folder")
small = slimfx.compress(program, "slim")
slimfx.save(small, "model.pt2", form="aten")
"""

from slimfx.capture import capture
from slimfx.check import check
from slimfx.compress import compress
from slimfx.errors import SlimError
from slimfx.evaluate import evaluate
from slimfx.export import export
from slimfx.finetune import finetune
from slimfx.generate import generate
from slimfx.import_checkpoint import import_checkpoint
from slimfx.plan import plan
from slimfx.recipe import Recipe
from slimfx.report import report
from slimfx.runtime.targets.pt2 import load, save
from slimfx.training_text import Training

__all__ = [
    "Recipe",
    "SlimError",
    "Training",
    "capture",
    "check",
    "compress",
    "evaluate",
    "export",
    "finetune",
    "generate",
    "import_checkpoint",
    "load",
    "plan",
    "report",
    "save",
]

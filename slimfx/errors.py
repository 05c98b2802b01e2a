"""The errors slimfx raises: each names the layer, the value, the limit and the next step."""

import importlib
from types import ModuleType


class SlimError(Exception):
    """Base of every error slimfx raises on purpose; the command line prints it as one line."""


class CaptureError(SlimError):
    """The model could not be turned into an exported program."""


class RecipeError(SlimError):
    """The recipe holds an unknown key, a wrong type or an impossible combination."""


class PlanError(SlimError):
    """The recipe does not fit the program; every problem is listed with the line that solves it."""


class BudgetError(RecipeError):
    """A size or loss that cannot be reached, or a recipe that cannot be searched from."""


class CalibrationError(SlimError):
    """The calibration data is missing, too short, or makes activations that are not finite."""


class SolveError(SlimError):
    """A weight cannot be compressed: it is not finite, or the result would not be."""


class JournalError(SlimError):
    """The journal beside the output is of another job, in use, or damaged."""


class FinetuneError(SlimError):
    """The program cannot be trained on this text, or training came to nothing."""


class ArtifactError(SlimError):
    """A file is missing, damaged, unsafe or of another format version."""


_EXTRAS = {
    "transformers": "hf",
    "tokenizers": "hf",
    "datasets": "hf",
    "peft": "hf",
    "accelerate": "hf",
    "compressed_tensors": "hf",
    "lm_eval": "eval",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "executorch": "executorch",
    "torchao": "executorch",
    "triton": "triton",
    "matplotlib": "plots",
    "pandas": "notebook",
}


def need(module: str) -> ModuleType:
    """Import an optional dependency, or say which extra installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        extra = _EXTRAS[module.partition(".")[0]]
        raise SlimError(
            f"{module} is not installed; run: pip install 'slimfx[{extra}]'"
        ) from missing

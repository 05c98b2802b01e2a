"""From a model to an exported program with dynamic batch and sequence, or with a cache of fixed
batch and length.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from torch.export import Dim, ExportedProgram

from slimfx.cache import Decoder, check_decoder, check_model, decoder_inputs
from slimfx.errors import ArtifactError, CaptureError, need
from slimfx.experts import routed_experts
from slimfx.passes.base import with_state, written_buffers
from slimfx.passes.drop_unused import drop_unused
from slimfx.passes.split_experts import split_experts
from slimfx.runtime.manifest import Manifest, attach
from slimfx.runtime.unread import Place, left_unread, place_of, places, put, read

_LONGEST_BATCH = 1024
_LONGEST_CACHE = 8192
"""Tokens of a cache, all of which are held in memory, that are not asked for by name."""
_MODEL_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json"),
    "special_tokens_map.json",
)
_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def capture(
    model: nn.Module | str | Path,
    example_inputs: tuple | Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    max_length: int | None = None,
    dtype: str = "float32",
    kv_cache: bool = False,
    batch: int = 1,
    weights: bool | Literal["unread"] = True,
) -> ExportedProgram:
    """Export a model for compression; the model itself is left as it is.

    Args:
        model: a Hugging Face folder or hub name (needs slimfx[hf]), or any module.
        example_inputs: positional tensors or named ones. Hugging Face text models need none:
            a causal language model becomes input_ids -> logits, another one
            (input_ids, attention_mask) -> last hidden state.
        dynamic_shapes: as torch.export.export takes them. By default batch and sequence of text
            models, else the first dimension of every tensor (give examples of two rows or more).
        max_length: longest sequence of a text model; by default what its configuration says.
        dtype: floating-point type a folder is loaded in.
        kv_cache: a program (input_ids [batch, S], cache_position [S]) -> logits that remembers the
            keys and values of `max_length` tokens, for a causal language model.
        batch: rows of that program; without a cache any number goes.
        weights: False reads none of a folder, whose config.json is enough then; the program's
            tensors are on the meta device, which `plan` takes, however large the model is.
            "unread" leaves them in the folder's safetensors, if it has such, from which `compress`
            and `save` read what they need when they need it.

    Raises:
        CaptureError: no such folder, not a model, a tensor is missing, or torch.export cannot trace
            it.
    """
    manifest = Manifest()
    if dtype not in _DTYPES:
        raise CaptureError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    _check_cache(kv_cache, batch, given=example_inputs is not None or dynamic_shapes is not None)
    if weights is not True and (kv_cache or isinstance(model, nn.Module)):
        raise CaptureError(
            f"weights={weights!r} is for a folder or hub name without kv_cache, whose cache is "
            f"tried out"
        )
    missing: set[str] = set()
    source = model
    with nullcontext() if weights else torch.device("meta"):
        if not isinstance(model, nn.Module):
            manifest = _text_manifest(model)
            model, missing = _load(model, dtype, weights)
        program = _captured(model, example_inputs, dynamic_shapes, max_length, kv_cache, batch)
    lost = missing & {name.removeprefix("model.") for name in program.state_dict}
    if lost:
        raise CaptureError(f"{source}: its files hold no tensor {', '.join(sorted(lost))}")
    return attach(_left_unread(program) if weights == "unread" else program, manifest)


def _captured(
    model: nn.Module,
    example_inputs: tuple | Mapping[str, Any] | None,
    dynamic_shapes: Any,
    max_length: int | None,
    kv_cache: bool,
    batch: int,
) -> ExportedProgram:
    if kv_cache:
        return _decoder(model, max_length, batch)
    kwargs: dict[str, Any] = {}
    args: tuple = ()
    if example_inputs is None:
        kwargs, shapes = _text_inputs(model, max_length)
        dynamic_shapes = dynamic_shapes or shapes
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = tuple(example_inputs)
    traced = _FirstOutput(model) if hasattr(model, "main_input_name") else model
    with _tracing(model):
        if dynamic_shapes is None:
            dynamic_shapes = _first_dimension(traced, args, kwargs)
        program = torch.export.export(
            traced, args, kwargs=kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
    return split_experts(drop_unused(program))


def _check_cache(kv_cache: bool, batch: int, *, given: bool) -> None:
    """Refuse what does not go together, before any weight is read."""
    if kv_cache and given:
        raise CaptureError(
            "kv_cache makes a program of input_ids and cache_position; leave example_inputs and "
            "dynamic_shapes out"
        )
    if batch < 1 or (batch != 1 and not kv_cache):
        raise CaptureError(
            f"batch {batch}: a cache has one row or more, and without kv_cache the batch is free"
        )


def _decoder(model: nn.Module, max_length: int | None, batch: int) -> ExportedProgram:
    """The program of a causal model with its cache."""
    check_model(model)
    longest = _longest(model, max_length)
    if max_length is None and longest > _LONGEST_CACHE:
        raise CaptureError(
            f"{type(model).__name__} takes {longest} tokens and a cache holds all of them in "
            f"memory; give max_length, more than {_LONGEST_CACHE} only if you need it"
        )
    config: Any = model.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    inputs = decoder_inputs(vocabulary, min(16, longest), batch)
    sequence = Dim("sequence", min=1, max=longest)
    shapes = {"input_ids": {1: sequence}, "cache_position": {0: sequence}}
    with _tracing(model):
        decoder = Decoder(model, longest, batch).eval()
        check_decoder(decoder, vocabulary)
        program = torch.export.export(
            decoder, (), kwargs=inputs, dynamic_shapes=shapes, strict=False
        )
    return split_experts(drop_unused(program))


class _FirstOutput(nn.Module):
    """A Hugging Face model that answers with its first output alone, under the inputs' own names.

    A program whose outputs are ModelOutput objects could only be loaded where transformers is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        signature = inspect.signature(model.forward)
        fixed = {"use_cache": False} if "use_cache" in signature.parameters else {}

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            return model(*args, **kwargs, **fixed)[0]

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward


def _load(
    source: str | Path, dtype: str, weights: bool | Literal["unread"]
) -> tuple[nn.Module, set[str]]:
    """The folder's own class if it is a causal language model, else the bare model; and the names
    of its tensors that the files do not hold.
    """
    transformers = need("transformers")
    path = Path(source)
    looks_like_path = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if not path.is_dir() and (path.suffix or looks_like_path or path.exists()):
        kind = "not a folder" if path.exists() else "no such folder"
        raise CaptureError(f"{source}: {kind}; give a Hugging Face model folder with a config.json")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CaptureError(f"{source}: not a model, it has no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        names = {cls.__name__ for cls in [mapping.get(type(config), None)] if cls is not None}
        causal = bool(names & set(config.architectures or ()))
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        if not weights:
            return auto.from_config(config, dtype=_DTYPES[dtype]).eval(), set()
        state = _places(path, _DTYPES[dtype]) if weights == "unread" else None
        if state is not None:
            with torch.device("meta"):
                auto = type(auto.from_config(config))
        model, found = auto.from_pretrained(
            *(source if state is None else None,),
            config=config,
            dtype=_DTYPES[dtype],
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (
        *(OSError, ValueError, KeyError, AttributeError, RuntimeError),
        *(SafetensorError, ArtifactError),
    ) as error:
        raise CaptureError(f"{source}: not a model that transformers can load ({error})") from error
    for name, has, wants in found["mismatched_keys"]:
        held = (_places(path, _DTYPES[dtype]) or {}).get(name)
        place = None if held is None else place_of(held)
        raise CaptureError(
            f"{path if place is None else place.path}: {name} is {list(has)}, the model of "
            f"config.json has {list(wants)}; one of the two belongs to another model"
        )
    if state is not None and not _all_in_place(model, state, found["missing_keys"]):
        _LOG.warning("%s: its weights are made of others when read, so all are read now", source)
        return _load(source, dtype, weights=True)
    return model.eval(), set(found["missing_keys"])


def _places(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """For each tensor of a folder's safetensors one without values that knows where they are; None
    where there are no such files.

    transformers gives them their names in the model, and ties what is tied.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not single.is_file() and not index.is_file():
        return None
    files = [single]
    if not single.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({folder / name for name in shards.values()})
    found: dict[str, Place] = {}
    for file in files:
        found |= places(file)
    return {
        name: put(
            # memory that nobody touches takes none
            torch.empty(place.shape, dtype=dtype if place.dtype.is_floating_point else place.dtype),
            place,
        )
        for name, place in found.items()
    }


def _all_in_place(model: Any, files: Mapping[str, torch.Tensor], missing: set[str]) -> bool:
    """Did every tensor that was loaded stay what it is in a file, and did none depend on values?

    Two that are tied and both in the files stay two if they differ.
    """
    stored = {key.removeprefix(f"{model.base_model_prefix}.") for key in files}
    for pair in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if {name.removeprefix(f"{model.base_model_prefix}.") for name in pair} <= stored:
            return False
    state = model.state_dict(keep_vars=True)
    return all(place_of(tensor) for name, tensor in state.items() if name not in missing)


def _left_unread(program: ExportedProgram) -> ExportedProgram:
    """The same program with the tensors that are in files left there."""
    found = left_unread(program.state_dict)
    changes = {name: read(found[name]) for name in written_buffers(program) if name in found}
    return with_state(program, {**found, **changes})


def _text_manifest(source: str | Path) -> Manifest:
    """Tokenizer, end token and settings of a folder, where it has them."""
    path = Path(source)
    tokenizer = path / "tokenizer.json"
    files = {}
    for name in _MODEL_FILES:
        if not (path / name).is_file():
            continue
        try:
            files[name] = json.loads((path / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise CaptureError(f"{source}: {name} is no JSON ({error})") from error
        if not isinstance(files[name], dict):
            raise CaptureError(f"{source}: {name} is no JSON mapping")
    eos = files.get("config.json", {}).get("eos_token_id")
    return Manifest(
        tokenizer=tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else None,
        eos_token=eos[0] if isinstance(eos, list) else eos,
        model_files=files,
    )


def _text_inputs(model: nn.Module, max_length: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example token inputs and their dynamic dimensions."""
    if getattr(model, "main_input_name", None) != "input_ids":
        raise CaptureError(
            f"{type(model).__name__} does not take input_ids alone; give example_inputs, for "
            f"instance {{'pixel_values': torch.zeros(2, 3, 224, 224)}}"
        )
    longest = _longest(model, max_length)
    length = min(16, longest)
    config: Any = model.config
    ids = (torch.arange(2 * length) % config.vocab_size).reshape(2, length)
    inputs = {"input_ids": ids}
    generates: Any = getattr(model, "can_generate", None)
    if generates is None or not generates():  # an encoder
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][1, length // 2 :] = 0
    dims = {
        0: Dim("batch", min=1, max=_LONGEST_BATCH),
        1: Dim("sequence", min=1, max=longest),
    }
    return inputs, dict.fromkeys(inputs, dims)


def _longest(model: nn.Module, max_length: int | None) -> int:
    """How many tokens a program may take."""
    longest = max_length
    if longest is None:
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is None:
        raise CaptureError(
            f"{type(model).__name__} does not say how long its input may be; give max_length"
        )
    if longest < 2:
        raise CaptureError(f"max_length {longest} is below 2, the least that leaves it free")
    return longest


def _first_dimension(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return {
        name: torch.utils._pytree.tree_map(
            lambda value: (
                {0: Dim.AUTO} if isinstance(value, torch.Tensor) and value.dim() else None
            ),
            value,
        )
        for name, value in bound.arguments.items()
    }


@contextmanager
def _tracing(model: nn.Module):  # type: ignore[no-untyped-def]
    """Evaluation mode without gradients for the time of the block, what goes wrong in it named.

    Every submodule gets its own mode back.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), routed_experts(model):
            yield
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise CaptureError(f"torch.export cannot trace {type(model).__name__}: {error}") from error
    finally:
        for module, training in modes.items():
            module.training = training

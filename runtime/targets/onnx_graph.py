"""The ONNX graph of a lowered program, and how the file shows the program: its names and sizes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slimfx.runtime.nbits  # noqa: F401  lowered programs name its op
import torch
from slimfx.passes.base import changes_in_place
from slimfx.passes.grow_cache import grow_cache, has_cache
from slimfx.passes.inputs import tensor_inputs
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from slimfx.errors import ArtifactError, need

aten = torch.ops.aten
_DOMAIN = "com.microsoft"
_NUMBERS = ("K", "N", "bits", "block_size", "accuracy_level")
_VIEWS = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.to.dtype)


@dataclass(frozen=True)
class Face:
    """A program as the file shows it."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    grown: bool = False


def face_of(program: ExportedProgram) -> Face:
    """Names for inputs and outputs; a cache becomes some of both.

    Raises:
        ArtifactError: the program writes to buffers that are no cache, cannot let its cache grow,
            or computes in bfloat16.
    """
    _check_dtype(program)
    if has_cache(program):
        grown = grow_cache(program)
        return Face(grown.program, grown.inputs, grown.outputs, True)
    if program.graph_signature.buffers_to_mutate or any(map(_keeps, program.graph.nodes)):
        raise ArtifactError(
            "the program writes to its own buffers, which ONNX has no place for; export a model "
            "that takes and gives its state, or one captured with kv_cache=True"
        )
    return Face(program, tuple(tensor_inputs(program)), _output_names(program))


def _keeps(node: Node) -> bool:
    """Does a node write to an input of the graph, such as a buffer, or to a view of one?"""
    if not changes_in_place(node):
        return False
    target: Any = node.args[0]
    while target.op == "call_function" and (target.target.is_view or changes_in_place(target)):
        target = target.args[0]
    return target.op == "placeholder"


def _check_dtype(program: ExportedProgram) -> None:
    output: Any = program.graph.output_node()
    if any(v.meta["val"].dtype is torch.bfloat16 for v in output.all_input_nodes):
        raise ArtifactError(
            "the program computes in bfloat16, which ONNX Runtime does on no processor; capture "
            "the model with dtype='float32'"
        )


def _output_names(program: ExportedProgram) -> tuple[str, ...]:
    """logits or last_hidden_state for tokens, output for anything else, numbered if several."""
    output: Any = program.graph.output_node()
    values = pytree.tree_leaves(output.args)
    if len(values) > 1:
        return tuple(f"output_{i}" for i in range(len(values)))
    tables = [
        node.args[0].meta["val"].shape[0]
        for node in program.graph.nodes
        if node.target is aten.embedding.default and _source(node.args[1]).name == "input_ids"
    ]
    if not tables:
        return ("output",)
    return ("logits" if values[0].meta["val"].shape[-1] in tables else "last_hidden_state",)


def _source(node: Node) -> Node:
    """What a node is another view of."""
    while node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def converted(program: ExportedProgram, face: Face, path: Path) -> Any:
    """The program as torch's exporter writes it, without a word of this machine."""
    from torch.onnx.errors import OnnxExporterError

    try:
        with _quiet():
            converted: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=face.inputs,
                output_names=face.outputs,
                custom_translation_table={torch.ops.slimfx.matmul_nbits.default: _translation()},
            )
    except OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch's own message is a page on its exporter
            cause = cause.__cause__
        raise ArtifactError(f"{path}: the program has no ONNX form: {cause}") from error
    graph = converted.model.graph
    converted.rename_axes(_dimension_names(graph.inputs))
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        values += node.outputs
        node.metadata_props.clear()
        node.doc_string = None
    for value in [converted.model, graph, *values]:
        value.metadata_props.clear()
    return converted


def _translation() -> Callable[..., Any]:
    """The op of `runtime/nbits.py` as ONNX Runtime has it."""
    values, schemas = need("onnxscript").values, need("onnx").defs
    kinds = schemas.OpSchema
    schema = kinds(
        "MatMulNBits",
        _DOMAIN,
        1,
        inputs=[
            kinds.FormalParameter(name, kind) for name, kind in zip(("A", "B", "scales"), "TUT")
        ],
        outputs=[kinds.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], ""), ("U", ["tensor(uint8)"], "")],
        attributes=[kinds.Attribute(name, kinds.AttrType.INT, required=True) for name in _NUMBERS],
    )
    op = values.Op(values.Opset(_DOMAIN, 1), "MatMulNBits", schema)

    def matmul_nbits(  # type: ignore[no-untyped-def]
        x, B, scales, K: int, N: int, bits: int, block_size: int, accuracy_level: int
    ):
        numbers = (K, N, bits, block_size, accuracy_level)
        return op(x, B, scales, **dict(zip(_NUMBERS, numbers)))

    return matmul_nbits


def _dimension_names(inputs: Any) -> dict[str, str]:
    """Symbol -> name: batch comes first; of tokens the sequence second, of a cache the past third.

    The past of every layer is one length, which torch.export does not always see.
    """
    names: dict[str, str] = {}
    for value in inputs:
        for place, size in enumerate(value.shape):
            if isinstance(size, int) or not str(size.value).isidentifier():
                continue
            cached = value.name.startswith("past_key_values.")
            tokens = value.dtype.name == "INT64" and place == 1
            name = {0: "batch", 1: "sequence" * tokens, 2: "past" * cached}.get(place)
            if not name or (name in names.values() and not cached):
                name = f"{value.name}_{place}"
            names.setdefault(str(size.value), name)
    return names


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's words about packages it could also have used."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec", FutureWarning)
            yield
    finally:
        log.setLevel(level)

"""Turn a cache of fixed length inside a program into one that the caller hands in and gets back.

    logits = f(input_ids, cache_position), writing to buffers kv_cache.{i}.key / .value

becomes

    logits, present = f(input_ids, attention_mask, position_ids, past)    present = cat(past, new)

with batch, sequence and past length dynamic, as Optimum's decoders have it. attention_mask
[batch, past + sequence] is 0 where a row is padded; position_ids [batch, sequence] is there if the
model reads positions. A sequence goes through once more, for torch.export to learn the new shapes.
"""

from __future__ import annotations

import operator
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
from slimfx.passes.inputs import call_arguments, input_names
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from slimfx.errors import ArtifactError

aten = torch.ops.aten
_BUFFER = re.compile(r"kv_cache\.(\d+)\.(key|value)")
_WRITES = (aten.index_copy_.default, aten.index_copy.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_RANGES = (aten.arange.default, aten.arange.start)
_COMPARES = (
    *(aten.le.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.gt.Tensor),
    *(aten.eq.Tensor, aten.ne.Tensor),
)
_RESHAPES = (aten.unsqueeze.default, *_VIEWS, aten.expand.default, aten.to.dtype, aten.slice.Tensor)
_LONGEST_BATCH = 1024
_TOKENS = 8
"""Of the example, half of them in the past: torch.export wants sizes of two or more."""
_TOLERANCES = {torch.float32: 1e-3}
_COARSE = 5e-2
"""For types of 16 bits."""


@dataclass(frozen=True)
class Grown:
    """The program, and the names that its inputs and outputs have among decoders."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def has_cache(program: ExportedProgram) -> bool:
    """Was the program captured with a cache of keys and values?"""
    return any(_BUFFER.fullmatch(str(s.target)) for s in program.graph_signature.input_specs)


def grow_cache(program: ExportedProgram) -> Grown:
    """The same program with its cache as inputs and outputs; the given one is unchanged.

    Raises:
        ArtifactError: the cache is used in a way that does not show where its length enters, or
            the new program does not say what the old one says.
    """
    module, slots = _edited(program)
    length = _shape(slots[0].read)[2]
    if length < _TOKENS:
        raise ArtifactError(
            f"the cache has {length} slots, {_TOKENS} are needed to see which sizes follow it; "
            f"capture the model with max_length {_TOKENS} or more"
        )
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    inputs = _example(program, module, slots, names)
    batch, past = Dim("batch", min=1, max=_LONGEST_BATCH), Dim("past", min=1, max=length)
    sequence = Dim("sequence", min=1, max=length)
    shapes: dict[str, Any] = {
        "input_ids": {0: batch, 1: sequence},
        "attention_mask": {0: batch, 1: Dim.AUTO},
        "position_ids": {0: batch, 1: sequence},
    }
    shapes = {name: shapes.get(name, {0: batch, 2: past}) for name in inputs}
    try:
        with torch.no_grad():
            grown = torch.export.export(
                module, (), kwargs=inputs, dynamic_shapes=shapes, strict=False
            )
    except (RuntimeError, ValueError, TypeError) as error:
        raise ArtifactError(f"the cache of this program cannot grow: {error}") from error
    own = [name for name in inputs if name not in {slot.input for slot in slots}]
    parts = [f"{slot.layer}.{slot.part}" for slot in slots]
    return Grown(
        grown,
        (*own, *(f"past_key_values.{part}" for part in parts)),
        ("logits", *(f"present.{part}" for part in parts)),
    )


@dataclass(frozen=True)
class _Slot:
    """One buffer of the cache: where it is read, and what is written."""

    layer: int
    part: str
    read: Node
    write: Node

    @property
    def input(self) -> str:
        """Its placeholder."""
        return f"past_key_values_{self.layer}_{self.part}"


def _edited(program: ExportedProgram) -> tuple[GraphModule, list[_Slot]]:
    """The program's graph with the cache as inputs and outputs, its old shapes made relative."""
    unlifted: Any = program.module(check_guards=False)
    graph: Graph = unlifted.graph
    graph.set_codegen(CodeGen())
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    if set(inputs) != {"input_ids", "cache_position"}:
        raise ArtifactError(
            f"a program with a cache takes {', '.join(inputs)}, not input_ids and cache_position; "
            f"capture it with kv_cache=True"
        )
    slots = _slots(program, graph)
    depends = _relative(graph, inputs["input_ids"], slots)
    masks = _masks(graph, depends, _shape(slots[0].read)[2])
    if not masks:
        raise ArtifactError(
            "the program attends without a mask [1, 1, sequence, cache], so its cache cannot grow; "
            "capture the model with kv_cache=True"
        )
    presents = _grow(graph, inputs, slots, masks)
    logits, *_ = pytree.tree_leaves(graph.output_node().args)
    graph.output_node().args = ((logits, *presents),)
    graph.eliminate_dead_code()
    return GraphModule(unlifted, graph), slots


def _slots(program: ExportedProgram, graph: Graph) -> list[_Slot]:
    """Every buffer of the cache, in order of layers, key first."""
    found = []
    for read in graph.find_nodes(op="get_attr"):
        match = _BUFFER.fullmatch(read.target)
        if match is None:
            continue
        writes = [node for node in read.users if node.target in _WRITES]
        others = [n for n in read.users if n not in writes and n.target is not aten.copy_.default]
        if len(writes) != 1 or others or writes[0].args[:2] != (read, 2):
            raise ArtifactError(
                f"{read.target}: is not written once by index_copy along dimension 2, so it cannot "
                f"grow; capture the model with kv_cache=True"
            )
        found.append(_Slot(int(match[1]), match[2], read, writes[0]))
    return sorted(found, key=lambda slot: (slot.layer, slot.part))


def _relative(graph: Graph, input_ids: Node, slots: list[_Slot]) -> set[Node]:
    """Let sizes that were numbers follow the inputs: batch, and the length of the cache.

    Returns the nodes that depend on tokens or cache.
    """
    batch = _shape(input_ids)[0]
    length = _shape(slots[0].read)[2]
    depends = {input_ids, *(slot.read for slot in slots)}
    with graph.inserting_after(input_ids):
        rows = graph.call_function(aten.sym_size.int, (input_ids, 0))
    rows.meta["val"] = batch
    for node in list(graph.nodes):
        holds = isinstance(node.meta.get("val"), Tensor | list | tuple)
        if node.op == "call_function" and holds and depends & set(node.all_input_nodes):
            depends.add(node)
        if node.target in _VIEWS:
            _follow(node, rows if node in depends and isinstance(batch, int) else None)
        elif node.target is aten.expand.default:
            old = _shape(node.args[0])
            sizes = list(node.args[1])
            start = len(sizes) - len(old)
            for place, size in enumerate(old):
                if isinstance(size, int) and sizes[start + place] == size:
                    sizes[start + place] = -1
            if node in depends and sizes[0] == batch and isinstance(batch, int):
                sizes[0] = rows
            node.args = (node.args[0], sizes)
        elif node.target is aten.slice.Tensor and len(node.args) > 3:
            x, dim, start, end = node.args[:4]
            if isinstance(end, int) and end == _shape(x)[dim] == length:
                node.args = (x, dim, start, sys.maxsize, *node.args[4:])
    return depends


def _masks(graph: Graph, depends: set[Node], length: int) -> list[Node]:
    """Where what a token may see, found by comparing places, first has four dimensions."""
    compared: set[Node] = set()
    masks: list[Node] = []
    for node in graph.nodes:
        if node in depends or not isinstance(node.meta.get("val"), Tensor):
            continue
        before = set(node.all_input_nodes)
        if node.target in _COMPARES or before & compared:
            compared.add(node)
            shape = _shape(node)
            if len(shape) == 4 and shape[:2] == (1, 1) and shape[3] == length:
                masks += [] if before & set(masks) else [node]
    return masks


def _follow(view: Node, rows: Node | None) -> None:
    """Give each size of a view that is a number and also one of its input's as the input's.

    Two dimensions are the same if as many elements lie behind them; a first one of the size of the
    batch that is none of the input's comes from folding batch and sequence, and is the batch.
    """
    x: Any = view.args[0]
    old, new = _shape(x), _shape(view)
    sizes: list[Any] = list(view.args[1])  # type: ignore[arg-type]
    behind: dict[tuple[Any, Any], int] = {}
    for place in reversed(range(len(old))):
        if isinstance(old[place], int):
            behind[_product(old[place + 1 :]), old[place]] = place
    graph = view.graph
    for place, size in enumerate(sizes):
        if not isinstance(size, int) or size == -1:
            continue
        source = behind.pop((_product(new[place + 1 :]), size), None)
        with graph.inserting_before(view):
            if source is not None:
                sizes[place] = graph.call_function(aten.sym_size.int, (x, source))
                sizes[place].meta["val"] = size
            elif place == 0 and rows is not None and size == rows.meta["val"]:
                sizes[place] = rows
    view.args = (x, sizes)


def _product(sizes: Any) -> Any:
    """As an expression, which can be a key."""
    total: Any = 1
    for size in sizes:
        total = total * size
    return total if isinstance(total, int) else total.node.expr


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _grow(
    graph: Graph, inputs: dict[str, Node], slots: list[_Slot], masks: list[Node]
) -> list[Node]:
    """Cache buffers become inputs; returns what takes the place of their writes."""
    input_ids, old = inputs["input_ids"], inputs["cache_position"]
    length = _shape(slots[0].read)[2]
    with graph.inserting_before(old):
        mask = graph.placeholder("attention_mask")
        positions = graph.placeholder("position_ids")
        pasts = [graph.placeholder(slot.input) for slot in slots]
    with graph.inserting_after(old):
        head = graph.call_function(aten.sym_size.int, (input_ids, 1))
    with graph.inserting_before(head.next):
        past = graph.call_function(aten.sym_size.int, (pasts[0], 2))
        total = graph.call_function(operator.add, (past, head))
        places = graph.call_function(aten.arange.start, (past, total))
        allowed = _allowed(graph, mask, total, places)
    _replace_positions(graph, old, head, places, positions)
    for node in list(graph.nodes):
        if node.target in _RANGES and node.args in ((length,), (0, length)):
            node.args = (*node.args[:-1], total)
    for node in masks:
        _mask(graph, node, allowed)
    presents = []
    for slot, placeholder in zip(slots, pasts):
        with graph.inserting_before(slot.write):
            present = graph.call_function(aten.cat.default, ([placeholder, slot.write.args[3]], 2))
        slot.write.replace_all_uses_with(present)
        for user in list(slot.read.users):
            graph.erase_node(user)
        graph.erase_node(slot.read)
        presents.append(present)
    graph.erase_node(old)
    if not positions.users:
        graph.erase_node(positions)
    return presents


def _replace_positions(
    graph: Graph, old: Node, sequence: Node, places: Node, positions: Node
) -> None:
    """What counts slots follows the past; what the model reads as positions comes from outside."""
    for user in list(old.users):
        value = user.meta.get("val")
        row = isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == 1
        if user.target is aten.sym_size.int:
            user.replace_all_uses_with(sequence)
        elif row and not _compares(user):
            user.replace_all_uses_with(positions)
        else:
            user.replace_input_with(old, places)
            continue
        graph.erase_node(user)


def _compares(node: Node) -> bool:
    """Does a comparison read it, perhaps through a change of shape?"""
    return any(
        user.target in _COMPARES or (user.target in _RESHAPES and _compares(user))
        for user in node.users
    )


def _allowed(graph: Graph, mask: Node, total: Node, places: Node) -> Node:
    """Bool [batch, 1, sequence, past + sequence]: no padding, but each place sees itself, so that
    a padded one has no empty row.
    """
    columns = graph.call_function(aten.arange.default, (total,))
    row = graph.call_function(aten.unsqueeze.default, (places, 1))
    own = graph.call_function(aten.eq.Tensor, (columns, row))
    kept = graph.call_function(aten.ne.Scalar, (mask, 0))
    for place in (1, 1):
        kept = graph.call_function(aten.unsqueeze.default, (kept, place))
    return graph.call_function(aten.logical_or.default, (kept, own))


def _mask(graph: Graph, mask: Node, allowed: Node) -> None:
    """Keep every reader of a mask from padded places."""
    with graph.inserting_after(mask):
        if mask.meta["val"].dtype is torch.bool:
            both = graph.call_function(aten.logical_and.default, (mask, allowed))
        else:
            least = torch.finfo(mask.meta["val"].dtype).min
            both = graph.call_function(aten.where.ScalarOther, (allowed, mask, least))
    mask.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)


def _example(
    program: ExportedProgram, module: GraphModule, slots: list[_Slot], names: list[str]
) -> dict[str, Tensor]:
    """Two rows of the program's example, the second padded, half of them in the past.

    Raises:
        ArtifactError: the program has none, or answers otherwise than with its own cache.
    """
    if program.example_inputs is None:
        raise ArtifactError("the program has no example inputs; export it with some")
    given = dict(zip(input_names(program), pytree.tree_leaves(program.example_inputs)))
    row = given["input_ids"][0].repeat(_TOKENS)[:_TOKENS]
    tokens = torch.stack([row, row.flip(0)])
    mask = torch.ones_like(tokens)
    mask[1, 0] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    half = _TOKENS // 2

    def inputs(start: int, end: int, past: list[Tensor]) -> dict[str, Tensor]:
        found = {
            "input_ids": tokens[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
            **{slot.input: held for slot, held in zip(slots, past)},
        }
        return {name: found[name].clone() for name in names}

    nothing = []
    for slot in slots:
        _, heads, _, width = _shape(slot.read)
        nothing.append(torch.zeros(2, heads, 0, width, dtype=slot.read.meta["val"].dtype))
    with torch.no_grad():
        first, *past = module(**inputs(0, half, nothing))
        example = inputs(half, _TOKENS, past)
        second, *_ = module(**example)
    every = row.expand(len(given["input_ids"]), -1)
    _check_same(program, every, torch.cat([first[0], second[0]]))
    return example


def _check_same(program: ExportedProgram, ids: Tensor, found: Tensor) -> None:
    """Compare logits [sequence, vocabulary] with those of the program and its own cache."""
    module = program.module(check_guards=False)
    for part in module.modules():  # which the program writes to
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.clone()
    given = {"input_ids": ids, "cache_position": torch.arange(ids.shape[1])}
    args, kwargs = call_arguments(program, given)
    with torch.no_grad():
        answer = module(*args, **kwargs)
    expected = pytree.tree_leaves(answer)[0][0]
    worst = ((found - expected).abs().max() / expected.abs().max()).item()
    if not worst <= _TOLERANCES.get(expected.dtype, _COARSE):
        raise ArtifactError(
            f"with a cache that grows the logits differ by {worst:.1e} of the largest, so its "
            f"length enters where it is not seen; export the program captured without kv_cache"
        )

"""Find every linear layer of an exported program, whatever the model calls it.

    aten.linear(x, W, b)                         W [N, K]
    aten.addmm(b, x, W), aten.mm / matmul(x, W)  W [K, N], or t(W) with W [N, K]

where W is a two-dimensional parameter. A weight that several nodes multiply with is one site with
several uses.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from slimfx.passes.base import input_specs, lifted_tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

aten = torch.ops.aten
PREFIX = "slim_"
"""What the names of a compressed layer's own tensors begin with."""

_SCORES = (
    *(aten.to.dtype, aten.view.default, aten.reshape.default, aten.softmax.int),
    *(aten.sigmoid.default, aten.add.Tensor),
)
"""What scores may go through before the best are taken."""
_PRODUCTS = (aten.mm.default, aten.matmul.default)


@dataclass(frozen=True)
class Use:
    """One product with the weight: `node` = x @ W^T + bias."""

    node: Node
    x: Node
    bias: Node | None


@dataclass(frozen=True)
class Site:
    """A weight [N, K] that is used only (or not only) by linears."""

    name: str
    """The layer: its module path, or its parameter's name where a module holds several."""
    fqn: str
    """The parameter's name in the state dict."""
    out_features: int
    in_features: int
    dtype: torch.dtype
    transposed: bool
    """The parameter is stored as [K, N]."""
    uses: tuple[Use, ...]
    bias: str | None
    """The parameter that every use adds and nothing else reads, if there is one."""
    other_readers: tuple[str, ...]
    """Ops other than linears that read the same weight, such as aten.embedding."""
    routes: bool = False
    """Do its answers choose, by topk, what is computed next, as the router of experts does?"""


def find_linears(program: ExportedProgram) -> list[Site]:
    """Every linear weight in the order of first use."""
    weights = _weight_placeholders(program)
    uses: dict[str, list[tuple[Use, bool, Node]]] = defaultdict(list)
    for node in program.graph.nodes:
        match = _match(node, weights)
        if match is not None:
            use, stored_transposed, weight = match
            uses[weights[weight.name]].append((use, stored_transposed, weight))
    names = _names({fqn: [use for use, _, _ in found] for fqn, found in uses.items()})
    sites = []
    for fqn, found in uses.items():
        layouts = {stored_transposed for _, stored_transposed, _ in found}
        tensor = program.state_dict[fqn]
        transposed = layouts == {True}
        N, K = (tensor.shape[1], tensor.shape[0]) if transposed else tensor.shape
        readers = _other_readers(program, weights, fqn, {use.node for use, _, _ in found})
        if len(layouts) == 2:
            readers = (*readers, "a transposed linear")
        sites.append(
            Site(
                name=names[fqn],
                fqn=fqn,
                out_features=N,
                in_features=K,
                dtype=tensor.dtype,
                transposed=transposed,
                uses=tuple(use for use, _, _ in found),
                bias=_own_bias(program, [use for use, _, _ in found]),
                other_readers=readers,
                routes=any(_routes(use.node) for use, _, _ in found),
            )
        )
    return sites


def _weight_placeholders(program: ExportedProgram) -> dict[str, str]:
    """Placeholder name -> parameter name, aliases of one storage under their first name."""
    first: dict[tuple, str] = {}
    found = {}
    for name, spec in input_specs(program).items():
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            continue
        tensor = lifted_tensor(program, spec)
        if str(spec.target).rpartition(".")[2].startswith(PREFIX):
            continue  # an adapter of a layer that is already compressed
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.is_floating_point():
            found[name] = first.setdefault(storage_key(tensor, str(spec.target)), str(spec.target))
    return {name: fqn for name, fqn in found.items() if fqn in program.state_dict}


def storage_key(tensor: torch.Tensor, fqn: str) -> tuple:
    """Equal for two views of the same elements; a tensor without elements is known by its name."""
    storage = tensor.untyped_storage()
    pointer = storage._cdata if tensor.is_meta else storage.data_ptr()  # both say which memory
    return (pointer or fqn, tensor.storage_offset(), tensor.shape, tensor.stride())


def _match(node: Node, weights: dict[str, str]) -> tuple[Use, bool, Node] | None:
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
        if isinstance(weight, Node) and weight.name in weights:
            return Use(node, x, bias), False, weight  # type: ignore[arg-type]
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, operand = node.args
    elif node.target in _PRODUCTS:
        bias, (x, operand) = None, node.args
    else:
        return None
    weight, flipped = _through_transpose(operand)
    if weight is None or weight.name not in weights:
        return None
    return Use(node, x, bias), not flipped, weight  # type: ignore[arg-type]


def _through_transpose(node: object) -> tuple[Node | None, bool]:
    """The placeholder behind t / transpose / permute of a matrix, and whether there was one."""
    if not isinstance(node, Node):
        return None, False
    if node.op == "placeholder":
        return node, False
    flips = (
        node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default)
        or (node.target is aten.transpose.int and {d % 2 for d in node.args[1:]} == {0, 1})  # type: ignore[operator]
        or (node.target is aten.permute.default and list(node.args[1]) == [1, 0])  # type: ignore[arg-type]
    )
    source = node.args[0] if flips else None
    if isinstance(source, Node) and source.op == "placeholder":
        return source, True
    return None, False


def _other_readers(
    program: ExportedProgram, weights: dict[str, str], fqn: str, linears: set[Node]
) -> tuple[str, ...]:
    readers = []
    for node in program.graph.nodes:
        if node.op != "placeholder" or weights.get(node.name) != fqn:
            continue
        for user in node.users:
            through = set(user.users) if _through_transpose(user)[0] is node else {user}
            readers += [str(n.target) for n in through if n not in linears]
    return tuple(sorted(set(readers)))


def _own_bias(program: ExportedProgram, uses: list[Use]) -> str | None:
    biases = {use.bias for use in uses}
    node = biases.pop()
    if biases or not isinstance(node, Node) or set(node.users) != {use.node for use in uses}:
        return None
    spec = input_specs(program).get(node.name)
    target = None if spec is None else str(spec.target)
    return target if target in program.state_dict else None


def _routes(node: Node) -> bool:
    """Does topk choose among a linear's own answers, or what is made of each?"""
    seen, left = {node}, [node]
    while left:  # as deep as the model, along what it adds up
        for user in left.pop().users:
            if user.target is aten.topk.default:
                return True
            if user.target in _SCORES and user not in seen:
                seen.add(user)
                left.append(user)
    return False


def _names(uses: dict[str, list[Use]]) -> dict[str, str]:
    """Parameter -> layer name: the module path where it is the module's only linear weight."""
    paths = {fqn: module_path(found[0].node) for fqn, found in uses.items()}
    names = {}
    for fqn, path in paths.items():
        own = fqn == f"{path}.weight" or not fqn.startswith(path)
        alone = list(paths.values()).count(path) == 1
        names[fqn] = path if path and own and alone else fqn.removesuffix(".weight")
    taken = list(names.values())
    return {
        fqn: name if taken.count(name) == 1 else fqn.removesuffix(".weight")
        for fqn, name in names.items()
    }


def module_path(node: Node) -> str:
    """Dotted path of the innermost module a node belongs to, "" for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""

"""What the JSON of a `.pt2` may say before torch reads it.

torch evaluates shapes and guards as Python, imports the classes its tree specs name, resolves a
node's target by attribute, and lays tensors over memory as a table tells it. Each of these is held
to what torch.export writes.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

from slimfx.errors import ArtifactError

_NAMESPACES = {"aten", "higher_order", "prims", "slimfx", "transformers"}
_FILE_OPS = {"from_file", "save", "load", "set_"}
_TARGET = re.compile(
    r"torch\.ops\.(?P<space>\w+)\.(?P<op>\w+)(\.\w+)?"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_(float|int|ite|max|min|not|sum)"
)
_FUNCTIONS = set(
    re.findall(
        r"\w+",
        """Symbol Integer Float Rational Add Mul Pow Min Max Abs Mod PythonMod FloorDiv CleanDiv
        CeilDiv IntTrueDiv FloatTrueDiv ToFloat TruncToInt CeilToInt FloorToInt RoundToInt Identity
        Where ModularIndexing Eq Ne Lt Le Gt Ge Equality Unequality StrictLessThan LessThan
        GreaterThan StrictGreaterThan And Or Not Piecewise ExprCondPair""",
    )
)
_METHODS = {"size", "stride", "storage_offset", "dim"}
_SYNTAX = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Attribute),
    *(ast.Subscript, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.boolop, ast.operator),
    *(ast.unaryop, ast.cmpop),
)
_SYMBOL = re.compile(r"L|oo|int_oo|true|false|(s|u|zuf|zf)\d+")
_NAME = re.compile(r"[A-Za-z_][\w.]*|")
_TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


def parsed(data: bytes, record: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArtifactError: anything else.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{record} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{record} is not a JSON object")
    return found


def check_table(
    table: Mapping[str, Any], record: str, size_of: Callable[[str], int | None]
) -> None:
    """Every tensor of a weight or constant table lies inside its record, and none is a pickle.

    `size_of` gives a record's bytes by its name in the table, None where there is none.
    """
    entries = table.get("config")
    if not isinstance(entries, dict):
        raise ArtifactError(f"{record} holds no table of tensors")
    for fqn, entry in entries.items():
        try:
            if entry["use_pickle"] is not False:
                raise ArtifactError(
                    f"{record}: {fqn} is stored as a pickle, which can run code; export the model "
                    f"again from plain tensors"
                )
            held = size_of(entry["path_name"])
            needed = _extent(entry["tensor_meta"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{record}: the entry of {fqn} is damaged ({error!r})") from error
        if held is None or needed > held:
            raise ArtifactError(
                f"{record}: {fqn} needs {needed} bytes of {entry['path_name']}, which has {held}"
            )


def _extent(meta: Mapping[str, Any]) -> int:
    """Bytes from the start of the storage to the end of the last element."""
    sizes, strides = ([_count(s) for s in meta[key]] for key in ("sizes", "strides"))
    if len(sizes) != len(strides) or not isinstance(meta["requires_grad"], bool):
        raise TypeError("sizes, strides and requires_grad do not fit")
    if meta["device"]["type"] not in ("cpu", "cuda", "mps", "xpu") or meta["layout"] != 7:
        raise TypeError("unknown device, or a layout other than strided")
    width = _SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]].itemsize
    offset = _count(meta["storage_offset"])
    if math.prod(sizes) == 0:
        return offset * width
    return (offset + sum((n - 1) * step for n, step in zip(sizes, strides)) + 1) * width


def _count(value: Mapping[str, Any]) -> int:
    number = value["as_int"]
    if type(number) is not int or not 0 <= number < 1 << 62:
        raise TypeError(f"{number!r} is not a count")
    return number


def check_graph(model: Mapping[str, Any], record: str) -> None:
    """Targets, shapes, guards, tree specs and names are of the kinds torch.export writes.

    Raises:
        ArtifactError: something else, which torch would evaluate, import or resolve.
    """
    for key, value in _pairs(model):
        problem = _CHECKS.get(key, _fine)(value)
        if problem:
            raise ArtifactError(
                f"{record}: {key} {str(value)[:80]!r} {problem}; torch would act on it, so it is "
                f"refused"
            )


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON, without recursion."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _fine(value: Any) -> str:
    return ""


def _target(value: Any) -> str:
    match = _TARGET.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return "is no op"
    if match["space"] and (match["space"] not in _NAMESPACES or match["op"] in _FILE_OPS):
        return "is no op that only computes"
    return ""


def _expression(value: Any) -> str:
    """Empty if the text is arithmetic over symbols and sizes alone."""
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > 100_000:
        return "is no expression"
    try:
        tree = ast.parse(value, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "is no expression"
    return next((problem for problem in map(_syntax, ast.walk(tree)) if problem), "")


def _syntax(node: ast.AST) -> str:
    """Empty if one node of an expression is harmless."""
    if not isinstance(node, _SYNTAX):
        return f"holds a {type(node).__name__}"
    if isinstance(node, ast.Call):
        called = node.func
        plain = isinstance(called, ast.Name) and called.id in _FUNCTIONS
        method = isinstance(called, ast.Attribute) and called.attr in _METHODS
        return "" if plain or method else "calls what no shape needs"
    if isinstance(node, ast.Attribute):
        return "" if node.attr in _METHODS else f"reads the attribute {node.attr}"
    if isinstance(node, ast.Name):
        return "" if node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id) else f"names {node.id}"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return "" if node.value.isidentifier() else f"holds the text {node.value[:20]!r}"
    return ""


def _guards(value: Any) -> str:
    if not isinstance(value, list):
        return "is no list"
    return next((problem for problem in map(_expression, value) if problem), "")


def _tree(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        return "is no tree spec"
    try:
        spec = json.loads(value)
    except (ValueError, RecursionError):
        return "is no tree spec"
    for key, value in _pairs(spec):
        if key == "type" and (isinstance(value, list | dict) or value not in _TREES):
            return "names a class to import"
        if key == "context" and not _plain_context(value):
            return "holds more than names"
    return ""


def _plain_context(value: Any) -> bool:
    """Is a tree node's context nothing, or a list of names and numbers?"""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return False
    keys = found if isinstance(found, list) else [] if found is None else [found]
    return all(type(key) is int or (type(key) is str and not _plain_name(key)) for key in keys)


def _plain_name(value: Any) -> str:
    if value is None or (isinstance(value, str) and _NAME.fullmatch(value)):
        return ""
    return "is no name"


def _names(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, list):
        return "is no list of names"
    return next((problem for problem in map(_plain_name, value) if problem), "")


_CHECKS: dict[str, Callable[[Any], str]] = {
    "target": _target,
    "expr_str": _expression,
    "guards_code": _guards,
    "in_spec": _tree,
    "out_spec": _tree,
    "name": _plain_name,
    "forward_arg_names": _names,
    "treespec_namedtuple_fields": lambda value: "names a class to import" if value else "",
}

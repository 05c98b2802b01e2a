"""Golden outputs: the same program repeats them, another one does not, damage is named."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import safetensors.torch
import torch
from models import bits, captured, compressed, normal
from slimfx.runtime import golden
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from slimfx.errors import ArtifactError


class Each(nn.Module):
    """Calls a function; what it closes over is part of the program."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Scaled(nn.Module):
    """One weight, so that programs that differ a little are easily made."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def exported(module: nn.Module, *args: Any, **kwargs: Any) -> ExportedProgram:
    return torch.export.export(module, args, kwargs=kwargs, strict=False)


def recorded(program: ExportedProgram) -> bytes:
    return golden.record(program, program.example_inputs)


def edited(data: bytes, change: Any) -> bytes:
    """Golden outputs whose tensors and metadata went through `change`."""
    tensors = safetensors.torch.load(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    change(tensors, metadata)
    return safetensors.torch.save(tensors, metadata=metadata)


def programs() -> dict[str, ExportedProgram]:
    """Outputs and inputs of every kind."""
    x = normal(1, 3, 5)
    ints = torch.arange(6).reshape(2, 3)
    return {
        "one tensor": exported(Scaled(2.0), x),
        "several tensors": exported(Each(lambda x: (x + 1, [x * 2, {"a": x.sum()}])), x),
        "more than is kept": exported(Scaled(3.0), normal(2, 40, 50)),
        "half precision": exported(Scaled(3.0), normal(2, 7).bfloat16()),
        "integers": exported(Each(lambda x: x * 3), ints),
        "truth": exported(Each(lambda x: x > 2), ints),
        "a scalar": exported(Each(lambda x: x.sum()), x),
        "nothing in it": exported(Each(lambda x: x[:0] + 1), x),
        "not contiguous": exported(Each(lambda x: x.t() * 2), normal(3, 4, 6).t()),
        "infinite": exported(Each(lambda x: torch.where(x > 0, x, -math.inf)), x),
        "not a number": exported(Each(lambda x: x / 0 * 0), x),
        "keywords and numbers": exported(
            Each(lambda x, *, y, scale, flag: x * scale + y if flag else y),
            x,
            y=x + 1,
            scale=2.5,
            flag=True,
        ),
        "a tensor twice": exported(Each(lambda x, y: x + y), x, x),
        "parts of one tensor": exported(Each(lambda x, y: x + y), x[0], x[1]),
        "expanded": exported(Each(lambda x: x * 2), normal(4, 1, 5).expand(3, 5)),
        "a compressed one": compressed("mlp", "slim"),
        "an encoder": compressed("bert", "slim"),
    }


@pytest.fixture(scope="module")
def made() -> dict[str, ExportedProgram]:
    return programs()


KINDS = [
    "one tensor",
    "several tensors",
    "more than is kept",
    "half precision",
    "integers",
    "truth",
    "a scalar",
    "nothing in it",
    "not contiguous",
    "infinite",
    "not a number",
    "keywords and numbers",
    "a tensor twice",
    "parts of one tensor",
    "expanded",
    "a compressed one",
    "an encoder",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_repeats_its_own_outputs_to_the_bit(
    made: dict[str, ExportedProgram], kind: str
) -> None:
    result = golden.replay(made[kind], recorded(made[kind]), 0.0)
    assert result.identical
    assert result.passed
    assert result.max_difference == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_recorded_inputs_come_back(made: dict[str, ExportedProgram], kind: str) -> None:
    program = made[kind]
    before, spec = pytree.tree_flatten(program.example_inputs)
    after, spec_after = pytree.tree_flatten(golden.inputs_of(recorded(program), program))
    assert spec_after == spec
    for old, new in zip(before, after, strict=True):
        if isinstance(old, Tensor):
            assert bits(old) == bits(new)
        else:
            assert (type(old), old) == (type(new), new)


def test_recording_gives_the_same_bytes_every_time(made: dict[str, ExportedProgram]) -> None:
    program = made["several tensors"]
    assert len({recorded(program) for _ in range(16)}) == 1


def test_recording_does_not_write_to_the_inputs(made: dict[str, ExportedProgram]) -> None:
    program = made["one tensor"]
    before = bits(program.example_inputs[0][0])
    recorded(program)
    assert bits(program.example_inputs[0][0]) == before


def test_few_numbers_are_kept_of_a_large_output_the_ends_among_them(
    made: dict[str, ExportedProgram],
) -> None:
    program = made["more than is kept"]
    kept = safetensors.torch.load(recorded(program))["output.0"]
    whole = program.module()(*program.example_inputs[0]).detach().flatten()
    assert len(kept) == 256
    assert (kept[0], kept[-1]) == (whole[0], whole[-1])
    assert set(kept.tolist()) <= set(whole.tolist())


@pytest.mark.parametrize(
    ("factor", "passes"),
    [(2.0, True), (2.00001, True), (2.0003, False), (3.0, False), (-2.0, False)],
)
def test_another_program_passes_only_within_the_tolerance(factor: float, passes: bool) -> None:
    x = normal(1, 3, 5)
    data = recorded(exported(Scaled(2.0), x))
    result = golden.replay(exported(Scaled(factor), x), data, 1e-4)
    assert result.passed == passes
    assert result.identical == (factor == 2.0)
    assert result.max_difference == pytest.approx(abs(factor - 2.0) / 2, rel=0.02)
    assert result.tolerance == 1e-4


def test_the_difference_is_relative_to_the_largest_golden_value() -> None:
    x = torch.tensor([100.0, 1e-3])
    data = recorded(exported(Each(lambda x: x + 0.0), x))
    moved = exported(Each(lambda x: x + torch.tensor([0.0, 1e-3])), x)
    result = golden.replay(moved, data, 1e-4)
    assert result.max_difference == pytest.approx(1e-5, rel=0.01)
    assert result.passed and not result.identical


def test_a_difference_outside_the_kept_numbers_is_not_identical(
    made: dict[str, ExportedProgram],
) -> None:
    x = normal(2, 40, 50)
    data = recorded(exported(Each(lambda x: x + 0.0), x))
    bump = torch.zeros(40, 50)
    bump[0, 1] = 1.0
    result = golden.replay(exported(Each(lambda x: x + bump), x), data, 1e-4)
    assert not result.identical


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("share", ["all", "one"])
def test_an_output_that_is_no_longer_finite_fails(bad: float, share: str) -> None:
    x = normal(1, 3, 5)
    data = recorded(exported(Scaled(2.0), x))
    wrong = torch.zeros(3, 5)
    wrong[(0, 0) if share == "one" else ...] = bad
    result = golden.replay(exported(Each(lambda x: x * 2 + wrong), x), data, 1e-4)
    assert not result.identical
    assert not result.passed


def test_a_golden_infinity_that_turns_finite_fails() -> None:
    x = normal(1, 3, 5)
    data = recorded(exported(Each(lambda x: torch.where(x > 0, x, -math.inf)), x))
    assert not golden.replay(exported(Each(lambda x: x + 0.0), x), data, 1e-4).passed


def test_the_same_infinities_and_a_rounding_elsewhere_pass() -> None:
    x = normal(1, 3, 5)
    data = recorded(exported(Each(lambda x: torch.where(x > 0, x, -math.inf)), x))
    near = exported(Each(lambda x: torch.where(x > 0, x * 1.00001, -math.inf)), x)
    result = golden.replay(near, data, 1e-4)
    assert not result.identical
    assert result.passed


SHAPES: dict[str, Any] = {
    "the same": lambda x: x + 0.0,
    "two outputs": lambda x: (x + 0.0, x + 1),
    "a part": lambda x: x[:1] * 1,
    "twice as long": lambda x: x.repeat(2, 1),
    "nothing": lambda x: x[:0] + 1,
    "a scalar": lambda x: x.sum() * 0 + 1,
}


@pytest.mark.parametrize("now", SHAPES)
@pytest.mark.parametrize("golden_one", SHAPES)
def test_outputs_of_another_number_or_shape_are_no_pass(golden_one: str, now: str) -> None:
    x = torch.ones(3, 5)
    data = recorded(exported(Each(SHAPES[golden_one]), x))
    assert passes(exported(Each(SHAPES[now]), x), data) == (now == golden_one)


def passes(program: ExportedProgram, data: bytes) -> bool:
    """Refusing the comparison is not passing it."""
    try:
        return golden.replay(program, data, 1e-4).passed
    except ArtifactError:
        return False


def test_an_output_of_another_dtype_is_not_identical() -> None:
    x = torch.zeros(4)
    data = recorded(exported(Each(lambda x: x + 0.0), x))
    other = exported(Each(lambda x: (x + 0.0).view(torch.int32)), x)
    assert not golden.replay(other, data, 1e-4).identical


DAMAGED: dict[str, Any] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "a header of 2 ** 63 bytes": lambda data: b"\xff" * 7 + b"\x7f" + data[8:],
    "no metadata": lambda data: safetensors.torch.save(safetensors.torch.load(data)),
    "a key of the metadata gone": lambda data: edited(data, lambda t, m: m.pop(next(iter(m)))),
    "metadata not JSON": lambda data: edited(data, lambda t, m: m.update(dict.fromkeys(m, "{"))),
    "metadata null": lambda data: edited(data, lambda t, m: m.update(dict.fromkeys(m, "null"))),
    "metadata a list": lambda data: edited(data, lambda t, m: m.update(dict.fromkeys(m, "[1]"))),
    "metadata a number": lambda data: edited(data, lambda t, m: m.update(dict.fromkeys(m, "1"))),
    "metadata deep": lambda data: edited(
        data, lambda t, m: m.update(dict.fromkeys(m, "[" * 100_000))
    ),
    "no inputs": lambda data: edited(data, lambda t, m: t.pop("input.0")),
    "an input too many": lambda data: edited(
        data, lambda t, m: t.update({"input.1": t["input.0"] + 1})
    ),
    "an input under another name": lambda data: edited(
        data, lambda t, m: t.update({"input.9": t.pop("input.0")})
    ),
    "an input of another rank": lambda data: edited(
        data, lambda t, m: t.update({"input.0": torch.zeros(2, 2, 2)})
    ),
    "an input of another width": lambda data: edited(
        data, lambda t, m: t.update({"input.0": torch.zeros(5, 3)})
    ),
    "an input of another dtype": lambda data: edited(
        data, lambda t, m: t.update({"input.0": torch.zeros(5, 16, dtype=torch.int64)})
    ),
    "no outputs": lambda data: edited(data, lambda t, m: t.pop("output.0")),
    "an output of another length": lambda data: edited(
        data, lambda t, m: t.update({"output.0": torch.zeros(3)})
    ),
    "an empty output": lambda data: edited(
        data, lambda t, m: t.update({"output.0": torch.zeros(0)})
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_golden_outputs_are_refused(kind: str) -> None:
    program = captured("mlp")
    data = DAMAGED[kind](recorded(program))
    try:
        passed = golden.replay(program, data, 1e-4).passed
    except ArtifactError:
        passed = False
    assert not passed

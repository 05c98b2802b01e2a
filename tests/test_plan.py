"""plan: every linear, its bytes to the byte, and every problem at once with the way out."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from models import (
    KINDS,
    RECIPES,
    SOLVED,
    Chain,
    answer,
    bits,
    captured,
    case,
    compressed,
    compressed_demo_lm,
    demo_lm,
    ids,
    normal,
    tiny_llama,
)
from slimfx.runtime.manifest import manifest_of
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx
from slimfx.errors import PlanError, SlimError
from slimfx.plan import Plan, PlanRow, adapter_layout, layout_of, scale_count
from slimfx.recipe import Calibration, Recipe
from slimfx.steps import Adapter, Inputs, LayerRecipe, Override, Prune, Quantize, Solve, Transform

README = Path(__file__).parents[1] / "README.md"


class Wide(nn.Module):
    """Layers of three shapes; the inputs are multiples of 128, the usual group."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(128, 384)
        self.down = nn.Linear(384, 128, bias=False)
        self.narrow = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.down(torch.relu(self.up(x))))


@pytest.fixture(scope="module")
def wide() -> ExportedProgram:
    return slimfx.capture(Wide(), (normal(1, 4, 128),))


MORE = {
    "channels": Recipe(prune=Prune(n=1, m=4), quantize=Quantize("absmax", granularity="channel")),
    "dense": Recipe(prune=None, quantize=Quantize("absmax", granularity="group", group=100)),
    "3:4": Recipe(prune=Prune(n=3, m=4), adapter=Adapter(bits=32, rank=2)),
    "ragged adapter": Recipe(adapter=Adapter(bits=4, rank=5, group=48)),
    "1:2": Recipe(prune=Prune("magnitude", n=1, m=2), adapter=None),
    "ragged groups": Recipe(
        quantize=Quantize("absmax", bits=3, granularity="group", group=100), adapter=None
    ),
    "half of each row": Recipe(prune=Prune(sparsity=0.5), adapter=Adapter(sparse=True)),
    "a third of the layer": Recipe(
        prune=Prune(sparsity=1 / 3, scope="layer"),
        quantize=None,
        transform=Transform("smoothquant"),
    ),
    "floats": Recipe(quantize=None, adapter=Adapter(bits=4, sparse=True, group=48)),
    "overrides": Recipe(
        skip=("narrow",),
        overrides=(Override("down", prune=None, adapter=None), Override("up", adapter={"rank": 7})),
    ),
}


def held(program: ExportedProgram) -> int:
    """Bytes of all tensors that a program's placeholders stand for, each storage once."""
    tensors = {}
    for spec in program.graph_signature.input_specs:
        for group in (program.state_dict, program.constants):
            if spec.target in group:
                tensor = group[spec.target]
                key = (tensor.untyped_storage().data_ptr(), tensor.shape, tensor.stride())
                tensors[key] = tensor.numel() * tensor.element_size()
    return sum(tensors.values())


def stored(program: ExportedProgram, name: str) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for key, tensor in program.state_dict.items()
        if key.startswith(f"{name}.slim_")
    )


def check_bytes(program: ExportedProgram, small: ExportedProgram, planned: Plan) -> None:
    rows = [row for row in planned.rows if not row.skipped]
    assert rows
    for row, layer in zip(rows, manifest_of(small).layers, strict=True):
        assert row.bytes_after == stored(small, row.name) == layer.bytes, row.name
        assert (row.name, row.layout, row.rank) == (layer.name, layer.layout, layer.rank)
    assert planned.bytes_before == held(program)
    assert planned.bytes_after == held(small)
    weights = sum(row.out_features * row.in_features for row in rows)
    assert planned.bits_per_weight == 8 * sum(row.bytes_after for row in rows) / weights
    assert planned.file_bytes > planned.bytes_after


@pytest.mark.parametrize("name", [*SOLVED, *MORE])
def test_bytes_are_those_of_the_compressed_program_for_every_recipe(
    name: str, wide: ExportedProgram
) -> None:
    recipe = MORE[name] if name in MORE else Recipe.preset(name)
    small = slimfx.compress(wide, recipe, [normal(2, 150, 128)])
    check_bytes(wide, small, slimfx.plan(wide, recipe))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_compressed_program_for_every_model(kind: str, recipe: str) -> None:
    planned = slimfx.plan(captured(kind), RECIPES[recipe])
    check_bytes(captured(kind), compressed(kind, recipe), planned)


def test_each_linear_has_a_row_with_its_figures(wide: ExportedProgram) -> None:
    recipe = dataclasses.replace(Recipe.preset("slim-q"), skip=("narrow",))
    up, down, narrow = slimfx.plan(wide, recipe).rows
    method = "slim-quant 4 bit + wanda 2:4 + slim-lora 4 bit"
    codes = 384 * 128 // 4 + 384 * 128 // 8 + 2
    adapter = 12 * 128 // 2 + 2 * 12 + 384 * 12 // 2 + 2 * 384
    assert up == PlanRow(
        "up", 384, 128, method, "2:4 int4", 12, 4, 4 * 384 * 128, codes + adapter, ""
    )
    assert (down.name, down.out_features, down.in_features) == ("down", 128, 384)
    assert (narrow.layout, narrow.bytes_after) == ("dense", 4 * 5 * 128)
    assert narrow.bytes_before == narrow.bytes_after and narrow.rank == 0
    assert narrow.skipped == "skipped by the recipe"


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_in_the_order_of_use_and_name_each_weight_once(kind: str) -> None:
    planned = slimfx.plan(captured(kind), RECIPES["slim"])
    names = [row.name for row in planned.rows]
    assert len(set(names)) == len(names)
    done = [layer.name for layer in manifest_of(compressed(kind, "slim")).layers]
    assert [row.name for row in planned.rows if not row.skipped] == done


def test_the_method_says_what_each_step_is(wide: ExportedProgram) -> None:
    expected = {
        "magnitude": "absmax 4 bit + magnitude 2:4",
        "wanda": "absmax 4 bit + wanda 2:4",
        "sparsegpt": "second-order: absmax 4 bit + sparsegpt 2:4",
        "naive-lora": "slim-quant 4 bit + wanda 2:4 + naive 16 bit",
        "slim": "slim-quant 4 bit + wanda 2:4 + slim-lora 16 bit",
        "slim-q": "slim-quant 4 bit + wanda 2:4 + slim-lora 4 bit",
        "slim-o": "slim-quant-o + slim-quant 4 bit + wanda 2:4 + slim-lora 16 bit",
        "smoothquant": "smoothquant + absmax 4 bit + fp8 inputs",
        "oats": "alternate: wanda 50% + qera 16 bit",
        "joint": "joint: slim-quant 4 bit + sparsegpt 2:4 + full 16 bit",
    }
    assert {name: slimfx.plan(wide, name).rows[0].method for name in expected} == expected


INT4, INT2 = Quantize(), Quantize(bits=2)


@pytest.mark.parametrize(
    ("prune", "quantize", "name"),
    [
        (None, INT4, "int4"),
        (None, Quantize(bits=3), "int3"),
        (Prune(), INT2, "2:4 int2"),
        (Prune(n=1, m=3), INT4, "2:4 int4"),
        (Prune(n=2, m=8), None, "2:4 bf16"),
        (Prune(n=4, m=8), INT4, "bitmask int4"),
        (Prune(n=3, m=4), INT4, "int4"),  # 1 + 3 bits a weight are no less than 4
        (Prune(n=3, m=4), Quantize(bits=8), "bitmask int8"),
        (Prune(n=3, m=4), None, "bitmask bf16"),
        (Prune(sparsity=0.5), INT4, "bitmask int4"),
        (Prune(sparsity=0.5), INT2, "int2"),
        (Prune(sparsity=0.6), INT2, "bitmask int2"),
        (Prune(sparsity=0.25), INT4, "int4"),
        (Prune(sparsity=0.01, scope="layer"), None, "bitmask bf16"),
    ],
)
def test_the_layout_is_the_one_that_the_pattern_allows_and_that_is_smaller(
    prune: Prune | None, quantize: Quantize | None, name: str
) -> None:
    assert layout_of(LayerRecipe(prune, quantize, None)).name == name


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (Adapter(sparse=True), "2:4 bf16"),
        (Adapter(sparse=True, bits=4), "2:4 int4"),
        (Adapter(bits=4), "int4"),
        (Adapter(), "bf16"),
    ],
)
def test_only_a_sparse_adapter_is_stored_as_24(adapter: Adapter, name: str) -> None:
    assert adapter_layout(adapter).name == name


def test_the_scales_of_a_layer_are_counted_with_a_ragged_last_group() -> None:
    def count(granularity: str, group: int) -> int:
        return scale_count(6, 130, Quantize("absmax", granularity=granularity, group=group))

    assert [count("tensor", 7), count("channel", 7)] == [1, 6]
    assert [count("group", group) for group in (1, 65, 128, 130, 999)] == [780, 12, 12, 6, 6]


def test_what_costs_nothing_in_the_layer_changes_no_byte(wide: ExportedProgram) -> None:
    plain = slimfx.plan(wide, Recipe())
    for change in ({"inputs": Inputs()}, {"solve": Solve(correct_bias=True)}):
        assert slimfx.plan(wide, Recipe(**change)).bytes_after == plain.bytes_after
    scaled = slimfx.plan(wide, Recipe(transform=Transform("smoothquant")))
    assert scaled.bytes_after - plain.bytes_after == 2 * (128 + 384 + 128)


def test_memory_holds_at_least_the_program_before_and_after(wide: ExportedProgram) -> None:
    planned = slimfx.plan(wide)
    assert planned.peak_memory >= planned.bytes_before + planned.bytes_after + 4 * 384 * 128


def test_memory_of_a_folder_is_that_of_its_largest_block(tmp_path: Path) -> None:
    def peak(layers: int, samples: int = 8, batch: int = 8) -> int:
        tiny_llama(num_hidden_layers=layers).config.save_pretrained(tmp_path)
        how = Recipe(calibration=Calibration(samples=samples, batch=batch))
        return slimfx.plan(slimfx.capture(tmp_path, weights=False), how).peak_memory

    assert peak(6) == peak(2) == peak(2, samples=800)
    assert peak(2, batch=32) - peak(2, batch=16) > 1.9 * (peak(2, batch=16) - peak(2))


def test_a_plan_looks_at_no_weight_and_no_data() -> None:
    model = Wide()
    before = slimfx.plan(slimfx.capture(model, (normal(1, 4, 128),)))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    assert slimfx.plan(slimfx.capture(model, (normal(1, 4, 128),))) == before
    with torch.device("meta"):
        empty = torch.export.export(
            Wide(), (torch.zeros(4, 128),), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}}
        )
    assert [row.bytes_after for row in slimfx.plan(empty).rows] == [
        row.bytes_after for row in before.rows
    ]


def test_problems_come_before_the_calibration_data_is_touched(wide: ExportedProgram) -> None:
    touched = []

    def data() -> object:
        touched.append(True)
        yield normal(1, 4, 128)

    recipe = Recipe(adapter=Adapter(rank=6))
    with pytest.raises(PlanError, match="rank 6"):
        slimfx.compress(wide, recipe, data())
    assert not touched


def test_the_plan_leaves_the_program_as_it_was(wide: ExportedProgram) -> None:
    before = (str(wide.graph), {k: bits(t) for k, t in wide.state_dict.items()})
    slimfx.plan(wide, "slim-q")
    assert (str(wide.graph), {k: bits(t) for k, t in wide.state_dict.items()}) == before


class Awkward(nn.Module):
    """Widths that fit no group, a narrow layer, and a table that is also a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 48)
        self.fine = nn.Linear(48, 30)
        self.odd = nn.Linear(30, 40)
        self.ragged = nn.Linear(40, 48)
        self.narrow = nn.Linear(48, 8)

    def forward(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(index)
        y = self.ragged(self.odd(self.fine(x)))
        return self.narrow(y), nn.functional.linear(y, self.table.weight)


@pytest.fixture(scope="module")
def awkward() -> ExportedProgram:
    return slimfx.capture(Awkward(), (torch.arange(6),))


BAD = Recipe(prune=Prune(n=2, m=4), adapter=Adapter(rank=12, sparse=True), skip=(), overrides=())
SPARSE = Override("ragged", prune={"sparsity": 0.9999}, adapter={"rank": 0.1})


@pytest.fixture(scope="module")
def complaint(awkward: ExportedProgram) -> str:
    with pytest.raises(PlanError) as caught:
        slimfx.plan(awkward, dataclasses.replace(BAD, overrides=(SPARSE,)))
    return str(caught.value)


def test_every_problem_is_listed_at_once_with_its_layer_and_numbers(complaint: str) -> None:
    lines = complaint.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [
        "odd",
        "odd",
        "ragged",
        "narrow",
        "table",
    ]
    for line, parts in zip(
        lines,
        [
            ("in_features 30", "multiple of 4", "prune: null", "skip"),
            ("in_features 30", "multiple of 4", "sparse adapter", "adapter: {sparse: false}"),
            ("sparsity 0.9999", "none of its 48 x 40 weights", "prune: null", "skip"),
            ("rank 12", "[8, 48]", "(8)", "adapter: {rank: 0.1}"),
            ("table.weight", "aten.embedding.default", "tied", "skip", "untie"),
        ],
    ):
        for part in parts:
            assert part in line
    assert "fine" not in complaint


def test_the_skip_line_of_the_complaint_solves_it(awkward: ExportedProgram, complaint: str) -> None:
    line = complaint.splitlines()[-1]
    skip = yaml.safe_load(line[line.index("skip:") :])
    assert skip == {"skip": ["odd", "ragged", "narrow", "table"]}
    recipe = Recipe.from_dict({**BAD.to_dict(), **skip})
    rows = slimfx.plan(awkward, recipe).rows
    assert [row.name for row in rows if not row.skipped] == ["fine"]


def test_the_overrides_of_the_complaint_solve_it(awkward: ExportedProgram, complaint: str) -> None:
    overrides = [dataclasses.asdict(SPARSE)]
    found = re.findall(r"^(\w+): .*override it with (\w+: (?:null|\{.*?\}))", complaint, re.M)
    overrides += [{"match": name, **yaml.safe_load(advice)} for name, advice in found]
    assert len(overrides) == 5
    recipe = Recipe.from_dict({**BAD.to_dict(), "skip": ["table"], "overrides": overrides})
    rows = slimfx.plan(awkward, recipe).rows
    assert [row.name for row in rows if not row.skipped] == ["fine", "odd", "ragged", "narrow"]
    small = slimfx.compress(awkward, recipe, [torch.arange(16)])
    check_bytes(awkward, small, slimfx.plan(awkward, recipe))


def test_groups_need_not_divide_the_inputs(awkward: ExportedProgram) -> None:
    for width in (2, 3, 4, 8):
        quantize = Quantize("absmax", bits=width, granularity="group", group=16)
        recipe = Recipe(None, quantize, adapter=None, skip=("table",))
        small = slimfx.compress(awkward, recipe, [torch.arange(16)])
        check_bytes(awkward, small, slimfx.plan(awkward, recipe))


def test_skip_patterns_that_were_there_stay_in_the_advice(awkward: ExportedProgram) -> None:
    with pytest.raises(PlanError, match=r"skip: \[lm_head, odd, table\]"):
        slimfx.plan(awkward, "slim")


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen2"])
def test_a_tied_head_is_refused_unless_it_is_skipped(kind: str) -> None:
    recipe = dataclasses.replace(Recipe.preset("slim"), skip=())
    with pytest.raises(PlanError) as caught:
        slimfx.plan(captured(kind), recipe)
    text = str(caught.value)
    assert text.startswith("model.lm_head: its weight ")
    assert "aten.embedding.default" in text and "add it to skip" in text
    assert "skip: [model.lm_head]" in text
    with pytest.raises(PlanError):
        slimfx.compress(captured(kind), recipe, case(kind).batches)


@pytest.mark.parametrize(
    ("model", "skip", "reason"),
    [
        (Wide(), ("*",), r"\(up, down, narrow\)"),
        (Chain(nn.Tanh()), (), "the program has no linear layer"),
    ],
)
def test_nothing_to_compress_is_an_error(
    model: nn.Module, skip: tuple[str, ...], reason: str
) -> None:
    program = slimfx.capture(model, (normal(1, 4, 128),))
    with pytest.raises(PlanError, match=f"nothing to compress.*{reason}"):
        slimfx.plan(program, Recipe(skip=skip))


def test_a_share_of_the_rank_never_exceeds_a_layer(wide: ExportedProgram) -> None:
    for share in (0.01, 0.5, 0.999):
        for row in slimfx.plan(wide, Recipe(adapter=Adapter(rank=share))).rows:
            assert row.rank == max(1, int(share * min(row.out_features, row.in_features)))


def test_a_plan_of_a_compressed_program_finds_only_what_is_left(wide: ExportedProgram) -> None:
    recipe = dataclasses.replace(Recipe.preset("slim"), skip=("narrow",))
    small = slimfx.compress(wide, recipe, [normal(2, 150, 128)])
    assert [row.name for row in slimfx.plan(small, "slim").rows] == ["narrow"]


def test_adapters_that_a_bfloat16_program_multiplies_with_are_no_layers() -> None:
    program = slimfx.capture(Wide().bfloat16(), (normal(1, 4, 128).bfloat16(),))
    recipe = dataclasses.replace(Recipe.preset("slim"), skip=("narrow",))
    small = slimfx.compress(program, recipe, [normal(2, 150, 128).bfloat16()])
    assert [row.name for row in slimfx.plan(small, "slim").rows] == ["narrow"]


@pytest.mark.parametrize("preset", ["slim", "slim-q", "absmax"])
def test_the_predicted_file_is_within_two_percent(preset: str, tmp_path: Path) -> None:
    small = compressed_demo_lm(preset)
    size = slimfx.save(small, tmp_path / "demo.pt2", verify=False)
    assert size == (tmp_path / "demo.pt2").stat().st_size
    planned = slimfx.plan(demo_lm(), preset)
    assert math.isclose(planned.file_bytes, size, rel_tol=0.02)
    check_bytes(demo_lm(), small, planned)


FOLDERS = ("llama", "gpt2", "opt", "bert", "qwen2", "albert")


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_configuration_is_planned_as_its_model_is(kind: str, tmp_path: Path) -> None:
    model = case(kind).model
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "config").mkdir()
    name = "config.json"
    (tmp_path / "config" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    small = slimfx.plan(slimfx.capture(tmp_path / "config", weights=False), RECIPES["slim-q"])
    whole = slimfx.plan(slimfx.capture(tmp_path / "whole"), RECIPES["slim-q"])
    assert small.rows == whole.rows
    assert small.other_bytes == whole.other_bytes
    assert small.file_bytes == pytest.approx(whole.file_bytes, rel=0.02)


def test_a_program_without_weights_is_for_plan_alone(tmp_path: Path) -> None:
    case("llama").model.config.save_pretrained(tmp_path)
    program = slimfx.capture(tmp_path, weights=False)
    with pytest.raises(PlanError, match="has no weights: capture it with weights=True"):
        slimfx.compress(program, RECIPES["slim"], case("llama").batches)
    with pytest.raises(SlimError, match="weights=False is for a folder"):
        slimfx.capture(Wide(), (normal(1, 4, 128),), weights=False)
    with pytest.raises(SlimError, match="weights=False is for a folder"):
        slimfx.capture(tmp_path, kv_cache=True, weights=False)


def test_a_model_larger_than_any_memory_is_planned(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        **{"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 2},
        **{"num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256},
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    planned = slimfx.plan(slimfx.capture(tmp_path, weights=False), "slim-q")
    block = 2 * 16384 * (16384 + 1024) + 3 * 16384 * 53248
    assert planned.bytes_before == 4 * (2 * (block + 2 * 16384) + 2 * 128256 * 16384 + 16384) + 512
    assert 3.5 < planned.bits_per_weight < 3.8


def apart(a: Tensor, b: Tensor) -> float:
    """The difference, as a share of b."""
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_in_fewer_bits_to_the_byte(bits: int, tied: bool) -> None:
    if tied and bits == 16:
        return  # the next test
    torch.manual_seed(0)
    program = slimfx.capture(tiny_llama(tie_word_embeddings=tied).eval())
    recipe = dataclasses.replace(RECIPES["slim-q"], embeddings=bits)
    table = program.state_dict["model.model.embed_tokens.weight"]
    before, after = slimfx.plan(program, RECIPES["slim-q"]), slimfx.plan(program, recipe)
    stored = len(table) * (2 * table.shape[1] if bits == 16 else table.shape[1] + 2)
    assert before.bytes_after - after.bytes_after == table.nbytes - stored
    small = slimfx.compress(program, recipe, ids(1, 4, 16))
    plain = slimfx.compress(program, RECIPES["slim-q"], ids(1, 4, 16))
    held = [sum(t.nbytes for t in each.state_dict.values()) for each in (plain, small)]
    assert held[0] - held[1] == table.nbytes * (1 + tied) - stored  # a tied table has two names
    x = {"input_ids": ids(2, 2, 9)}
    assert apart(answer(small.module(), x), answer(plain.module(), x)) < 0.02


def test_a_table_that_is_tied_to_the_head_is_not_rounded() -> None:
    program = slimfx.capture(tiny_llama(tie_word_embeddings=True).eval())
    said = r"embed_tokens.weight: embeddings: 16 .* linear_14 reads, too; set embeddings: 8"
    with pytest.raises(PlanError, match=said):
        slimfx.plan(program, Recipe(embeddings=16))


EVERYTHING = """
preset: slim-q
embeddings: 8
skip: []
overrides:
- {match: lm_head, prune: null, adapter: null,
   quantize: {method: absmax, bits: 8, granularity: channel}}
"""
"""Of the README: the head and the table in eight bits."""


def test_a_model_compressed_to_its_ends_answers_nearly_as_with_a_float_head() -> None:
    assert EVERYTHING.strip().replace("\n", "\n    ") in README.read_text(encoding="utf-8")
    recipe, program = Recipe.from_yaml(EVERYTHING), captured("llama")
    small = slimfx.compress(program, recipe, ids(1, 4, 16))
    head = next(row for row in manifest_of(small).layers if row.name == "model.lm_head")
    assert (head.layout, head.rank) == ("int8", 0)
    x = {"input_ids": ids(2, 2, 9)}
    plain = slimfx.compress(program, RECIPES["slim-q"], ids(1, 4, 16))
    assert apart(answer(small.module(), x), answer(plain.module(), x)) < 0.02

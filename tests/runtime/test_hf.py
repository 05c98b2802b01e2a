"""A Hugging Face folder is the program: transformers and peft answer as it does."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch
from slimfx.passes.decompose import decompose
from slimfx.passes.find_linears import find_linears
from slimfx.passes.replace_linears import packed_linear, replace_linears
from slimfx.runtime import sidecar
from slimfx.runtime.manifest import attach, manifest_of
from slimfx.runtime.pack import PackedDense, PackedLinear, pack_codes
from slimfx.runtime.targets import hf, hf_card
from slimfx.runtime.targets.hf_layers import Layer, read_layers
from torch import Tensor
from torch.export import ExportedProgram

import slimfx
from slimfx.errors import ArtifactError, SlimError
from slimfx.recipe import Recipe
from slimfx.steps import Adapter, Inputs, Override, Prune, Quantize, Transform

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: models.tiny_llama(**WIDE),
    "qwen2": models.tiny_qwen2,
    "gpt2": models.tiny_gpt2,
    "bert": models.tiny_bert,
}
PLAIN = Recipe.preset("slim")
FIRST = dataclasses.replace(PLAIN, skip=("lm_head", "*layers.[1-5].*"))
"""One block of the demo model is enough where only the form matters."""


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ExportedProgram]:
    """Programs captured from folders, each once."""
    found: dict[str, ExportedProgram] = {"demo": models.demo_lm()}

    def get(kind: str) -> ExportedProgram:
        if kind not in found:
            folder = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            MODELS[kind]().save_pretrained(folder)
            (folder / "tokenizer.json").write_text(models.word_tokenizer(), encoding="utf-8")
            found[kind] = slimfx.capture(folder)
        return found[kind]

    return get


Compressed = Callable[..., ExportedProgram]


@pytest.fixture(scope="session")
def compressed(captured: Callable[[str], ExportedProgram]) -> Compressed:
    """Programs under recipes, each once."""
    found: dict[tuple[str, str], ExportedProgram] = {}

    def get(kind: str, recipe: Recipe = PLAIN) -> ExportedProgram:
        key = (kind, recipe.digest())
        if key not in found:
            batches = {
                "demo": None,
                "bert": [models.padded(1, 4, 24, keep=17)],
            }.get(kind, [{"input_ids": models.ids(1, 4, 24)}])
            asked = dataclasses.replace(recipe, calibration=models.QUICK)
            found[key] = slimfx.compress(captured(kind), asked, batches)
        return found[key]

    return get


FRESH = """
import json, sys
import safetensors.torch, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

for folder in sys.argv[1:]:
    ids = torch.tensor(json.load(open(folder + ".ids")))
    dense = CompressedTensorsConfig(dequantize=True)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=dense)
    found = {"base": base(ids).logits}
    model = PeftModel.from_pretrained(base, folder + "/adapter")
    found["adapted"] = model(ids).logits
    found["merged"] = model.merge_and_unload()(ids).logits
    safetensors.torch.save_file({k: v.detach() for k, v in found.items()}, folder + ".logits")
assert "slimfx" not in sys.modules
"""


def gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_a_fresh_process_without_slimfx_answers_like_the_program(
    compressed: Compressed, tmp_path: Path
) -> None:
    """llama: groups of 128; qwen2: rows, biases, tied embeddings; demo: trained, tied."""
    programs = {kind: compressed(kind) for kind in ("llama", "qwen2")}
    programs["demo"] = compressed("demo", FIRST)
    ids = models.ids(3, 3, 10)
    for kind, program in programs.items():
        hf.save(program, tmp_path / kind)
        (tmp_path / f"{kind}.ids").write_text(json.dumps(ids.tolist()))
    folders = [str(tmp_path / kind) for kind in programs]
    subprocess.run([sys.executable, "-c", FRESH, *folders], check=True, capture_output=True)
    for kind, program in programs.items():
        expected = program.module()(input_ids=ids)
        found = safetensors.torch.load_file(tmp_path / f"{kind}.logits")
        assert gap(found["adapted"], expected) < 1e-4
        assert gap(found["merged"], expected) < 1e-4
        assert gap(found["base"], expected) > 1e-2, "the adapter counts for something"


LAYOUTS = {
    "2:4 int4, int4 adapters": Recipe.preset("slim-q"),
    "2:4 int4 in groups": Recipe(quantize=Quantize("absmax", granularity="group", group=128)),
    "1:4 int4 a row": Recipe(
        prune=Prune("magnitude", n=1, m=4), quantize=Quantize("absmax", granularity="channel")
    ),
    "int2 in groups that do not divide": Recipe(
        prune=None, quantize=Quantize("absmax", bits=2, granularity="group", group=48)
    ),
    "bitmask int3, sparse adapters": Recipe(
        prune=Prune("wanda", sparsity=0.5),
        quantize=Quantize("absmax", bits=3, granularity="group", group=32),
        adapter=Adapter(sparse=True),
    ),
    "bitmask bf16": Recipe(prune=Prune("wanda", sparsity=0.5), quantize=None, adapter=None),
    "2:4 bf16": Recipe(quantize=None),
    "int8": Recipe(prune=None, quantize=Quantize("absmax", bits=8, granularity="tensor")),
    "int8 and int4": Recipe(
        quantize=Quantize("absmax", granularity="tensor"),
        overrides=(Override("*down_proj", quantize={"bits": 8}),),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_as_it_is(layout: str, compressed: Compressed, tmp_path: Path) -> None:
    hf.save(compressed("llama", LAYOUTS[layout]), tmp_path / "out")
    assert hf.check(tmp_path / "out").passed


def test_an_encoder_loads_with_its_mask(compressed: Compressed, tmp_path: Path) -> None:
    hf.save(compressed("bert"), tmp_path / "out")
    assert hf.check(tmp_path / "out").passed
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION"


def test_a_program_of_16_bits_and_one_that_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(tmp_path / "dense")
    program = slimfx.capture(tmp_path / "dense", dtype="bfloat16")
    batches = [{"input_ids": models.ids(1, 4, 24)}]
    slimfx.save(slimfx.compress(program, PLAIN, batches), tmp_path / "model.pt2")
    hf.save(slimfx.load(tmp_path / "model.pt2"), tmp_path / "out")
    assert hf.check(tmp_path / "out").passed
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    floats = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    assert floats == {torch.bfloat16}


def test_a_dtype_rounds_parameters_and_adapters(compressed: Compressed, tmp_path: Path) -> None:
    whole, _ = hf.save(compressed("qwen2"), tmp_path / "whole")
    half, _ = hf.save(compressed("qwen2"), tmp_path / "half", dtype="bfloat16")
    assert half < whole
    assert hf.check(tmp_path / "half").passed
    weights = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].dtype is torch.bfloat16
    assert "lm_head.weight" not in weights, "tied weights are stored once"
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ArtifactError, match=r"dtype 'int8' is not one of float32, bfloat16"):
        hf.save(compressed("qwen2"), tmp_path / "no", dtype="int8")


def test_tensors_are_what_compressed_tensors_writes(compressed: Compressed, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    program = compressed("llama")
    hf.save(program, tmp_path / "out")
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert config["ignore"] == ["lm_head"]
    name = "model.layers.0.mlp.down_proj"
    part = {key: weights[f"{name}.{key}"] for key in ("weight_packed", "weight_scale")}
    part["weight_shape"] = weights[f"{name}.weight_shape"]
    assert part["weight_packed"].shape == (128, 256 // 8)
    assert part["weight_scale"].shape == (128, 256 // 128)
    codec = BaseCompressor.get_value_from_registry("pack-quantized")
    dense = codec.decompress(part, scheme)["weight"]
    eye = torch.eye(256)
    start = f"model.{name}.slim_"
    stored = (program.state_dict[f"{start}{key}"] for key in ("values", "indices", "scale"))
    assert torch.equal(dense.T, torch.ops.slimfx.linear_24(eye, *stored, 4, 128))
    again = codec.compress({**part, "weight": dense}, scheme)
    assert torch.equal(again["weight_packed"], part["weight_packed"])


def test_adapters_have_one_rank_and_need_no_patterns(
    compressed: Compressed, tmp_path: Path
) -> None:
    """vLLM scales by alpha / r of the whole folder and does not read rank_pattern."""
    _, said = hf.save(compressed("llama"), tmp_path / "out")
    folder = tmp_path / "out" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    ranks = {t.shape[0] for name, t in tensors.items() if "lora_A" in name}
    assert ranks == {config["r"]} == {config["lora_alpha"]}
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    layers = read_layers(compressed("llama"))
    assert len({layer.rank for layer in layers}) > 1
    assert any("padded with zeros" in sentence for sentence in said)
    assert set(config["target_modules"]) == {layer.name for layer in layers}


def test_adapters_of_codes_are_stored_as_floats_that_hold_them(
    compressed: Compressed, tmp_path: Path
) -> None:
    program = compressed("llama", LAYOUTS["2:4 int4, int4 adapters"])
    _, said = hf.save(program, tmp_path / "out", dtype="bfloat16")
    assert "int4 adapters are stored as float16 (7 layers)" in said
    held = safetensors.torch.load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    packed = packed_linear(program, f"model.{name}.weight")
    A = held[f"base_model.model.{name}.lora_A.weight"]
    assert A.dtype is torch.float16
    stored = torch.ops.slimfx.linear_int(
        *(torch.eye(256), packed.L.codes, packed.L.scale, packed.L.bits, packed.L.group)
    )
    assert torch.equal(A[: stored.shape[1]].float(), stored.T)


def test_ranks_that_vllm_does_not_serve_are_said() -> None:
    matrix = torch.zeros(513, 600)
    layer = Layer("a", (600, 600), "int4", None, {}, matrix, matrix.T, False, ())
    (sentence,) = hf_card.sentences((layer,))
    assert sentence.startswith("adapters of rank 513 exceed vLLM's largest max_lora_rank (512;")
    card = hf_card.card((layer,), manifest_of(models.demo_lm()), tensor_bytes=0, causal=True)
    assert "it can serve the base alone" in card


def test_the_same_bytes_twice(compressed: Compressed, tmp_path: Path) -> None:
    for name in ("a", "b"):
        hf.save(compressed("llama"), tmp_path / name)
    files = [sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("a", "b")]
    assert [p.relative_to(tmp_path / "a") for p in files[0]] == [
        p.relative_to(tmp_path / "b") for p in files[1]
    ]
    assert len(files[0]) >= 8
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "adapter/adapter_model.safetensors"],
)
def test_a_flipped_byte_is_refused(name: str, compressed: Compressed, tmp_path: Path) -> None:
    hf.save(compressed("llama"), tmp_path / "out")
    file = tmp_path / "out" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for read in (hf.load, hf.check):
        with pytest.raises(ArtifactError, match=f"{name}: damaged"):
            read(tmp_path / "out")
    file.unlink()
    with pytest.raises(ArtifactError, match=f"{name}: missing"):
        hf.load(tmp_path / "out")


@pytest.mark.parametrize("package", ["transformers", "peft", "compressed_tensors"])
def test_a_missing_runtime_is_named(
    package: str, compressed: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf.save(compressed("llama"), tmp_path / "out")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SlimError, match=rf"{package} is not installed.*'slimfx\[hf\]'"):
        hf.check(tmp_path / "out")


def test_another_answer_does_not_pass(compressed: Compressed, tmp_path: Path) -> None:
    hf.save(compressed("llama"), tmp_path / "out")
    place = tmp_path / "out" / hf.SIDECAR
    held = sidecar.read(place, "hf")
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file() and file != place]
    other = {"output": held.outputs["output"] * 1.01}
    sidecar.write(place, dataclasses.replace(held, outputs=other), files)
    result = hf.check(tmp_path / "out")
    assert not result.passed
    assert 0.005 < result.max_difference < 0.02
    assert hf.check(tmp_path / "out", tolerance=0.1).passed


def test_large_models_are_split(
    compressed: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "_SHARD", 60_000)
    hf.save(compressed("llama"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert hf.check(tmp_path / "out").passed


def test_the_card_tells_how_it_was_made(compressed: Compressed, tmp_path: Path) -> None:
    program = compressed("demo", FIRST)
    hf.save(program, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    manifest = manifest_of(program)
    assert manifest.calibration["sha256"] in card
    assert json.dumps(manifest.recipe, indent=1, sort_keys=True) in card
    assert (
        "| model.layers.0.self_attn.q_proj | 256 x 256 | 2:4 int4 | int4, groups of 128 |" in card
    )
    assert "vllm serve FOLDER --enable-lora --max-lora-rank 32" in card
    assert "--tensor-parallel-size" in card


def test_only_its_own_folder_is_replaced(compressed: Compressed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    hf.save(compressed("llama"), out)
    hf.save(compressed("qwen2"), out)
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds notes.txt, which slimfx did not write"):
        hf.save(compressed("llama"), out)
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2"
    with pytest.raises(ArtifactError, match="is a file"):
        hf.save(compressed("llama"), out / "notes.txt")
    with pytest.raises(ArtifactError, match="no such folder"):
        hf.save(compressed("llama"), tmp_path / "no" / "out")


def test_a_failure_leaves_the_older_folder(
    compressed: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf.save(compressed("llama"), tmp_path / "out")
    before = (tmp_path / "out" / hf.SIDECAR).read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.sidecar, "write", full)
    with pytest.raises(ArtifactError, match="not written, No space left"):
        hf.save(compressed("qwen2"), tmp_path / "out")
    assert (tmp_path / "out" / hf.SIDECAR).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def with_input_scales(program: ExportedProgram, scale: Callable[[int], Tensor]) -> ExportedProgram:
    """The first linear as int4 codes with an input scale."""
    site = find_linears(program)[0]
    codes = torch.randint(-7, 8, (site.out_features, site.in_features)).to(torch.int8)
    weight = PackedDense(pack_codes(codes, 4), torch.full((1, 1), 0.01).bfloat16(), 4, 128)
    L, R = torch.randn(4, site.in_features), torch.randn(site.out_features, 4)
    packed = PackedLinear(weight, L, R, input_scale=scale(site.in_features))
    return attach(replace_linears(program, [site], {site.name: packed}), manifest_of(program))


def test_input_scales_are_folded_where_that_is_exact(
    captured: Callable[[str], ExportedProgram], tmp_path: Path
) -> None:
    same = with_input_scales(captured("llama"), lambda K: torch.full((K,), 0.5).bfloat16())
    hf.save(same, tmp_path / "out")
    assert hf.check(tmp_path / "out").passed
    differ = with_input_scales(captured("llama"), lambda K: (1 + torch.arange(K) / K).bfloat16())
    with pytest.raises(ArtifactError, match=r"q_proj: its inputs are scaled channel by channel"):
        hf.save(differ, tmp_path / "no")
    rounds = with_input_scales(captured("llama"), lambda K: torch.full((K,), 1.3).bfloat16())
    with pytest.raises(ArtifactError, match=r"q_proj: its weight times its input scale is not"):
        hf.save(rounds, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_expressed_is_refused_by_name(
    compressed: Compressed, tmp_path: Path
) -> None:
    awq = Recipe(quantize=Quantize("absmax", granularity="channel"), transform=Transform("awq"))
    with pytest.raises(ArtifactError, match=r"layers.0.self_attn.q_proj: its inputs are scaled"):
        hf.save(compressed("llama", awq), tmp_path / "out")
    fp8 = Recipe(inputs=Inputs())
    with pytest.raises(ArtifactError, match=r"layers.0.self_attn.q_proj: its inputs are rounded"):
        hf.save(compressed("llama", fp8), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"h.0.attn.c_attn: is a .*Conv1D; compressed-tensors"):
        hf.save(compressed("gpt2"), tmp_path / "out")


def test_programs_of_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"knows no config.json; capture it from a Hugging"):
        hf.save(models.capture_rows(models.Rows(), 5, 16), tmp_path / "out")
    folder = tmp_path / "dense"
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(folder)
    program = slimfx.capture(folder, kv_cache=True, max_length=16)
    with pytest.raises(ArtifactError, match=r"writes to kv_cache.0.key.*without kv_cache"):
        hf.save(program, tmp_path / "out")


def test_files_of_the_manifest_stay_in_the_folder(compressed: Compressed, tmp_path: Path) -> None:
    """A .pt2 of someone else may name them."""
    program = compressed("llama")
    manifest = manifest_of(program)
    try:
        for name, content in (("../evil.json", {}), ("run.py", {}), ("a.json", [])):
            files = {**manifest.model_files, name: content}
            attach(program, dataclasses.replace(manifest, model_files=files))
            with pytest.raises(ArtifactError, match="is no JSON file of a model folder"):
                hf.save(program, tmp_path / "out")
    finally:
        attach(program, manifest)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_overflows_is_refused(
    captured: Callable[[str], ExportedProgram], tmp_path: Path
) -> None:
    program = with_input_scales(captured("llama"), lambda K: torch.ones(K).bfloat16())
    program.state_dict["model.model.norm.weight"] = torch.nn.Parameter(torch.full((128,), 1e6))
    with pytest.raises(ArtifactError, match=r"norm.weight: its largest value, 1e\+06, is beyond"):
        hf.save(program, tmp_path / "out", dtype="float16")


def test_a_program_written_out_in_aten_is_refused(compressed: Compressed, tmp_path: Path) -> None:
    program = compressed("llama")
    aten = attach(decompose(program), manifest_of(program))
    with pytest.raises(ArtifactError, match=r"q_proj.slim_values: no linear of the program reads"):
        hf.save(aten, tmp_path / "out")


def test_a_folder_of_something_else_is_refused(compressed: Compressed, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not slimfx's record of a hf export"):
        hf.load(models.DEMO)
    hf.save(compressed("llama"), tmp_path / "out")
    shutil.move(tmp_path / "out" / "adapter", tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=r"adapter/adapter_config.json: missing"):
        hf.load(tmp_path / "out")

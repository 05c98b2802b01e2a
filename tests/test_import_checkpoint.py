"""Checkpoints of other libraries, written by hand from known codes, become what they mean."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch
import transformers
from slimfx.runtime.checkpoints.checkpoint import read_checkpoint
from slimfx.runtime.int_weights import from_words, stored_codes, to_words
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.pack import Packed24, PackedDense, pack_codes, unpack_24, unpack_codes
from slimfx.runtime.targets import hf
from torch import Tensor
from torch.export import ExportedProgram

import slimfx
from slimfx.errors import ArtifactError
from slimfx.import_checkpoint import import_checkpoint
from slimfx.recipe import Recipe

Tensors = dict[str, Tensor]
NAME = "model.layers.0.mlp.down_proj"
GROUP = 16


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a Llama of one layer, with a head of its own and not compressed."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    models.tiny_llama(num_hidden_layers=1, tie_word_embeddings=False).save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Weight:
    """What a linear of a hand-written checkpoint is made of."""

    codes: Tensor
    scale: Tensor
    """[N, K / GROUP]."""

    def floats(self) -> Tensor:
        """The weight it stands for."""
        return self.codes.float() * self.scale.float().repeat_interleave(GROUP, 1)


def known(weight: Tensor, *, sparse: bool, dtype: torch.dtype) -> Weight:
    """Random codes from -8 to 7 in the shape of a weight; at most two of four if sparse."""
    N, K = weight.shape
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    if sparse:
        codes = (codes.unflatten(1, (-1, 4)) * torch.tensor([1, 0, 0, 1])).flatten(1).to(torch.int8)
    scale = (torch.rand(N, K // GROUP) * 0.02 + 0.01).to(dtype)
    return Weight(codes, scale)


def weights_of(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Weight], Tensors]:
    """Every linear of the folder but its head, down_proj 2:4-sparse; and all other tensors."""
    torch.manual_seed(1)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    names = [key.removesuffix(".weight") for key in tensors if "proj" in key]
    made = {
        name: known(tensors.pop(f"{name}.weight"), sparse=name == NAME, dtype=dtype)
        for name in names
    }
    return made, tensors


def words(codes: Tensor) -> Tensor:
    """4-bit codes [N, K] -> int32 [N, K / 8], the first in the lowest bits."""
    raw = (codes.to(torch.int64) + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    joined = raw.sum(-1)
    return torch.where(joined >= 2**31, joined - 2**32, joined).to(torch.int32)


def write(folder: Path, dense: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A model folder with these tensors and the dense one's configuration, changed."""
    folder.mkdir(exist_ok=True)
    own = json.loads((dense / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**own, **config}))
    held = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def pack_quantized(made: Mapping[str, Weight]) -> Tensors:
    """As compressed-tensors stores them."""
    parts = {}
    for name, weight in made.items():
        parts[f"{name}.weight_packed"] = words(weight.codes)
        parts[f"{name}.weight_scale"] = weight.scale
        parts[f"{name}.weight_shape"] = torch.tensor(weight.codes.shape)
    return parts


def settings(**weights: Any) -> dict[str, Any]:
    """A quantization_config of 4-bit groups, changed."""
    own = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    own |= {"group_size": GROUP, "dynamic": False, **weights}
    scheme = {"targets": ["Linear"], "weights": own, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


def gptq(made: Mapping[str, Weight], zero: int) -> Tensors:
    """As GPTQ stores them, `zero` being what it writes for the zero point."""
    parts = {}
    for name, weight in made.items():
        N, K = weight.codes.shape
        parts[f"{name}.qweight"] = words(weight.codes).T
        parts[f"{name}.qzeros"] = words(torch.full((K // GROUP, N), zero - 8))
        parts[f"{name}.scales"] = weight.scale.T
        parts[f"{name}.g_idx"] = (torch.arange(K) // GROUP).to(torch.int32)
    return parts


def held_codes(program: ExportedProgram, name: str, K: int) -> tuple[str, Tensor]:
    """How a layer of the program is stored, and its codes."""
    start = f"model.{name}.slim_"
    part = {k[len(start) :]: t for k, t in program.state_dict.items() if k.startswith(start)}
    if "codes" in part:
        return "dense", unpack_codes(part["codes"], 4, K)
    return "2:4", unpack_24(part["values"], part["indices"], 4, K)


def check_program(program: ExportedProgram, dense: Path, made: Mapping[str, Weight]) -> None:
    """Codes are those that were written, and the logits those of the dense model of them."""
    for name, weight in made.items():
        where, codes = held_codes(program, name, weight.codes.shape[1])
        assert where == ("2:4" if name == NAME else "dense")
        assert torch.equal(codes, weight.codes)
    assert gap(program, eager(dense, {n: weight.floats() for n, weight in made.items()})) < 1e-5


def eager(dense: Path, weights: Mapping[str, Tensor]) -> Tensor:
    """Logits of the dense model with other weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight
    return models.answer(model, {"input_ids": models.ids(3, 3, 10)})


def gap(program: ExportedProgram, expected: Tensor) -> float:
    """Largest difference of the program's logits, relative to the largest."""
    with torch.no_grad():
        found = program.module()(input_ids=models.ids(3, 3, 10))
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_the_bytes_of_pack(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (3, 21)).to(torch.int8)
    codes[1] = -top - 1
    stored = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(stored, bits, 21), codes)
    assert torch.equal(from_words(to_words(stored), bits, 21), stored)


def test_scales_that_are_equal_are_stored_once() -> None:
    codes = pack_codes(torch.randint(1, 8, (6, 32)).to(torch.int8), 4)
    rows = (torch.arange(6) + 1.0).bfloat16()[:, None]
    for scale, shape in (
        (torch.full((6, 4), 0.5).bfloat16(), (1, 1)),
        (rows.expand(6, 4), (6, 1)),
        (torch.rand(6, 4).bfloat16(), (6, 4)),
    ):
        matrix = stored_codes(codes, scale, bits=4, group=8, K=32)
        assert isinstance(matrix, PackedDense)
        assert matrix.scale.shape == shape
        assert matrix.scale.is_contiguous()
    sparse = pack_codes((torch.tensor([[0, -8, 0, 7]]).to(torch.int8)).repeat(6, 8), 4)
    matrix = stored_codes(sparse, scale, bits=4, group=8, K=32)
    assert isinstance(matrix, Packed24)
    assert unpack_24(matrix.values, matrix.indices, 4, 32)[0, :4].tolist() == [0, -8, 0, 7]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_exported_folder_comes_back_as_it_was(kind: str, dense: Path, tmp_path: Path) -> None:
    """qwen2: tied embeddings and biases."""
    if kind == "qwen2":
        dense = tmp_path / "dense"
        models.tiny_qwen2().save_pretrained(dense)
    recipe = dataclasses.replace(Recipe.preset("slim"), calibration=models.QUICK)
    batches = [{"input_ids": models.ids(1, 4, 24)}]
    program = slimfx.compress(slimfx.capture(dense), recipe, batches)
    hf.save(program, tmp_path / "out")
    again = import_checkpoint(tmp_path / "out")
    assert models.same_tensors(program.state_dict, again.state_dict)
    assert gap(again, program.module()(input_ids=models.ids(3, 3, 10))) == 0
    assert manifest_of(again) == manifest_of(program)
    file = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="damaged"):
        import_checkpoint(tmp_path / "out")


def test_compressed_tensors_keep_their_codes(dense: Path, tmp_path: Path) -> None:
    made, rest = weights_of(dense, torch.bfloat16)
    folder = write(
        *(tmp_path / "ct", dense, {**rest, **pack_quantized(made)}),
        quantization_config=settings(),
    )
    program = import_checkpoint(folder)
    check_program(program, dense, made)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    answer = models.answer(model, {"input_ids": models.ids(3, 3, 10)})
    assert gap(program, answer) < 1e-2, "they multiply codes and scales in bfloat16"
    manifest = manifest_of(program)
    assert manifest.skipped == {"model.lm_head": "not compressed in the checkpoint"}
    assert manifest.calibration == {"imported": "compressed-tensors"}
    hf.save(program, tmp_path / "again")
    assert hf.check(tmp_path / "again").passed
    written = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    for name, weight in made.items():
        assert torch.equal(written[f"{name}.weight_packed"], words(weight.codes))


@pytest.mark.parametrize(
    ("zero", "config"),
    [
        (7, {"sym": True, "desc_act": False}),
        (8, {"sym": True, "desc_act": False}),
        (7, {"checkpoint_format": "gptq"}),
        (8, {"checkpoint_format": "gptq_v2"}),
    ],
    ids=["v1", "v1 without the one", "v1 by its zeros", "v2"],
)
def test_gptq_keeps_its_codes(
    zero: int, config: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    made, rest = weights_of(dense, torch.bfloat16)
    asked = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, **config}
    tensors = {**rest, **gptq(made, zero)}
    folder = write(tmp_path / "gptq", dense, tensors, quantization_config=asked)
    if zero == 7 and "sym" in config:
        check_program(import_checkpoint(folder), dense, made)
    found = read_checkpoint(folder).linears[NAME].packed.weight
    assert isinstance(found, Packed24)
    codes = unpack_24(found.values, found.indices, 4, made[NAME].codes.shape[1])
    assert torch.equal(codes, made[NAME].codes)


def test_scales_that_bfloat16_does_not_hold_are_rounded_aloud(dense: Path, tmp_path: Path) -> None:
    made, rest = weights_of(dense, torch.float16)
    folder = write(tmp_path / "gptq", dense, {**rest, **gptq(made, 7)})
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "sym": True}))
    checkpoint = read_checkpoint(folder)
    (note,) = checkpoint.notes
    assert note.startswith("scales of 7 layers are rounded to bfloat16")
    for name, weight in made.items():
        stored = checkpoint.linears[name]
        assert torch.equal(stored.packed.weight.scale, weight.scale.bfloat16())
        assert 0 < stored.change <= 2**-8
    with pytest.warns(UserWarning, match="scales of 7 layers are rounded to bfloat16"):
        import_checkpoint(folder)


def slim(made: Mapping[str, Weight], factor: Callable[[Weight], Tensor]) -> tuple[Tensors, Tensors]:
    """As the paper's code stores them, with adapters; and the weights that they mean."""
    parts, means = {}, {}
    for name, weight in made.items():
        N, K = weight.codes.shape
        left, right = torch.randn(K, 6) / K, torch.randn(6, N)
        parts[f"{name}.weight"] = weight.floats().bfloat16()
        parts[f"{name}.quantization_scaling_factor"] = factor(weight)
        parts[f"{name}.lora_left"] = left.bfloat16()
        parts[f"{name}.lora_right"] = right.bfloat16()
        product = left.bfloat16().float() @ right.bfloat16().float() / 6
        means[name] = weight.floats() + product.T
    return parts, means


ARGS = {"bitwidth": 4, "quantize_weight": True, "lora_rank": 0.1}


def test_the_papers_checkpoint_of_groups(dense: Path, tmp_path: Path) -> None:
    made, rest = weights_of(dense, torch.bfloat16)
    exact = {  # scales whose product with 7, the largest code, bfloat16 holds
        name: dataclasses.replace(weight, scale=2.0 ** weight.scale.float().log2().round())
        for name, weight in made.items()
    }
    parts, means = slim(exact, lambda weight: (weight.scale * 7).bfloat16())
    folder = write(tmp_path / "slim", dense, {**rest, **parts})
    (folder / "args.json").write_text(json.dumps(ARGS))
    program = import_checkpoint(folder)
    for name, weight in exact.items():
        where, codes = held_codes(program, name, weight.codes.shape[1])
        assert where == ("2:4" if name == NAME else "dense")
        assert torch.equal(codes, weight.codes)
    assert gap(program, eager(dense, means)) < 1e-5


def test_the_papers_checkpoint_of_one_scale(dense: Path, tmp_path: Path) -> None:
    made, rest = weights_of(dense, torch.bfloat16)
    one = {
        name: dataclasses.replace(weight, scale=torch.full(weight.scale.shape, 0.0123))
        for name, weight in made.items()
    }
    parts, _ = slim(one, lambda weight: (1 / weight.scale[:1, :1]).float())
    folder = write(tmp_path / "slim", dense, {**rest, **parts})
    (folder / "args.json").write_text(json.dumps({**ARGS, "quantize_input": True}))
    checkpoint = read_checkpoint(folder)
    for name, weight in one.items():
        packed = checkpoint.linears[name].packed
        assert packed.weight.scale.shape == (1, 1)
        codes = (
            unpack_24(packed.weight.values, packed.weight.indices, 4, weight.codes.shape[1])
            if isinstance(packed.weight, Packed24)
            else unpack_codes(packed.weight.codes, 4, weight.codes.shape[1])
        )
        assert torch.equal(codes, weight.codes)
        assert torch.equal(packed.L, parts[f"{name}.lora_left"].T)
    change = abs(torch.tensor(0.0123).bfloat16().item() / 0.0123 - 1)
    scales, inputs = checkpoint.notes
    assert f"rounded to bfloat16, which changes them by {change:.2g} of themselves" in scales
    assert inputs.startswith("args.json asks for rounded inputs")


def test_the_papers_checkpoint_without_codes(dense: Path, tmp_path: Path) -> None:
    made, rest = weights_of(dense, torch.bfloat16)
    parts = {f"{name}.weight": weight.floats().bfloat16() for name, weight in made.items()}
    folder = write(tmp_path / "slim", dense, {**rest, **parts})
    (folder / "args.json").write_text("{}")
    linears = read_checkpoint(folder).linears
    assert list(linears) == [NAME], "the only one that is 2:4-sparse"
    packed = linears[NAME].packed.weight
    assert isinstance(packed, Packed24)
    assert packed.scale is None
    K = parts[f"{NAME}.weight"].shape[1]
    assert torch.equal(unpack_24(packed.values, packed.indices, 16, K), parts[f"{NAME}.weight"])


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_another_scaling(rslora: bool, dense: Path, tmp_path: Path) -> None:
    made, rest = weights_of(dense, torch.bfloat16)
    tensors = {**rest, **pack_quantized(made)}
    folder = write(tmp_path / "ct", dense, tensors, quantization_config=settings())
    N, K = made[NAME].codes.shape
    A, B = torch.randn(4, K), torch.randn(N, 4)
    A[3], B[:, 3] = 0, 0  # padding
    adapter = tmp_path / "lora"
    adapter.mkdir()
    start = f"base_model.model.{NAME}.lora_"
    held = {f"{start}A.weight": A, f"{start}B.weight": B}
    safetensors.torch.save_file(held, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 3, "bias": "none"}
    config |= {"rank_pattern": {"down_proj": 4}, "use_rslora": rslora}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    packed = read_checkpoint(folder, adapter).linears[NAME].packed
    assert torch.equal(packed.L, A[:3])
    assert torch.equal(packed.R, B[:, :3] * (3 / (2 if rslora else 4)))
    halves = {key: tensor.half() for key, tensor in held.items()}
    safetensors.torch.save_file(halves, adapter / "adapter_model.safetensors")
    packed = read_checkpoint(folder, adapter).linears[NAME].packed
    assert torch.equal(packed.L, A[:3].half().float()), "kernels read no float16 adapters"
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {".*": 2}}))
    with pytest.raises(ArtifactError, match=r"rank_pattern: '\.\*' is a regular expression"):
        read_checkpoint(folder, adapter)
    for key, value in (("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"])):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ArtifactError, match=f"{key} is"):
            read_checkpoint(folder, adapter)


def test_a_dense_folder_with_an_adapter(dense: Path, tmp_path: Path) -> None:
    """What `hf.save` makes of layouts of bfloat16."""
    recipe = Recipe(quantize=None, calibration=models.QUICK)
    program = slimfx.compress(slimfx.capture(dense), recipe, [{"input_ids": models.ids(1, 4, 24)}])
    hf.save(program, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    again = import_checkpoint(tmp_path / "out")
    assert models.same_tensors(program.state_dict, again.state_dict)


Change = Callable[[Tensors, dict[str, Any]], None]


def without(key: str) -> Change:
    """A checkpoint that lacks a tensor."""
    return lambda tensors, config: tensors.pop(key)  # type: ignore[return-value]


def changed(key: str, make: Callable[[Tensor], Tensor]) -> Change:
    """A checkpoint with another tensor."""
    return lambda tensors, config: tensors.update({key: make(tensors[key])})


def extra(key: str) -> Change:
    """A checkpoint with one more tensor."""
    return lambda tensors, config: tensors.update({key: torch.zeros(2, dtype=torch.int32)})


def asking(**weights: Any) -> Change:
    """A checkpoint whose settings are others."""
    return lambda tensors, config: config.update(settings(**weights))


REFUSED_PACKED: dict[str, tuple[Change, str]] = {
    "no scale": (without(f"{NAME}.weight_scale"), "down_proj.weight_scale: missing"),
    "no shape": (without(f"{NAME}.weight_shape"), "down_proj.weight_shape: missing"),
    "a norm is missing": (without("model.norm.weight"), "files hold no tensor model.norm.weight"),
    "other words": (
        changed(f"{NAME}.weight_packed", lambda t: t[:, 1:]),
        "7 words a row are not those of 64 codes of 4 bits",
    ),
    "floats for words": (
        changed(f"{NAME}.weight_packed", lambda t: t.float()),
        r"weight_packed: is torch.float32 \[32, 8\], not torch.int32 \[32, -1\]",
    ),
    "scales do not divide": (
        changed(f"{NAME}.weight_scale", lambda t: t[:, :3]),
        "3 scales a row do not divide its 64 inputs",
    ),
    "scales are not finite": (
        changed(f"{NAME}.weight_scale", lambda t: t * torch.inf),
        "weight_scale: holds values that are not finite",
    ),
    "zero points": (extra(f"{NAME}.weight_zero_point"), "down_proj: has weight_zero_point"),
    "reordered": (extra(f"{NAME}.weight_g_idx"), r"has weight_g_idx, inputs in another order"),
    "asymmetric": (asking(symmetric=False), "config group group_0: asymmetric codes"),
    "three bits": (asking(num_bits=3), "int codes of 3 bits, not int of 4 or 8"),
    "fp8": (asking(type="float", num_bits=8), "float codes of 8 bits"),
    "another format": (
        lambda tensors, config: config.update(format="float-quantized"),
        "format 'float-quantized', not 'pack-quantized'",
    ),
    "activations": (
        lambda tensors, config: config["config_groups"]["group_0"].update(
            input_activations={"num_bits": 8}
        ),
        "config group group_0: rounds activations",
    ),
    "another method": (
        lambda tensors, config: config.update(quant_method="awq"),
        "quant_method 'awq' is not one that slimfx reads",
    ),
}


@pytest.mark.parametrize("name", REFUSED_PACKED)
def test_pack_quantized_that_cannot_be_read(name: str, dense: Path, tmp_path: Path) -> None:
    change, message = REFUSED_PACKED[name]
    made, rest = weights_of(dense, torch.bfloat16)
    tensors, config = {**rest, **pack_quantized(made)}, settings()
    change(tensors, config)
    folder = write(tmp_path / "ct", dense, tensors, quantization_config=config)
    read = import_checkpoint if "norm" in name else read_checkpoint
    with pytest.raises(ArtifactError, match=message):
        read(folder)


def with_settings(**config: Any) -> Change:
    """A checkpoint whose settings, of one level, are others."""
    return lambda tensors, own: own.update(config)


REFUSED_GPTQ: dict[str, tuple[Change, str]] = {
    "act-order": (
        changed(f"{NAME}.g_idx", lambda t: t.flip(0)),
        "down_proj: its g_idx puts inputs in another order",
    ),
    "asymmetric": (
        changed(f"{NAME}.qzeros", lambda t: t + 1),
        r"down_proj: its zero points are stored as \[7, 8\], not all as 7: an asymmetric weight",
    ),
    "v1 that means nine": (
        changed(f"{NAME}.qzeros", lambda t: torch.full_like(t, -2004318072)),
        r"down_proj: its zero points are stored as \[8\], not all as 7",
    ),
    "no zeros": (without(f"{NAME}.qzeros"), "down_proj.qzeros: missing"),
    "three bits": (with_settings(bits=3), "GPTQ: bits is 3, not 4 or 8"),
    "marlin": (with_settings(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not one"),
}


@pytest.mark.parametrize("name", REFUSED_GPTQ)
def test_gptq_that_cannot_be_expressed(name: str, dense: Path, tmp_path: Path) -> None:
    change, message = REFUSED_GPTQ[name]
    made, rest = weights_of(dense, torch.bfloat16)
    tensors = {**rest, **gptq(made, 7)}
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
    change(tensors, config)
    with pytest.raises(ArtifactError, match=message):
        read_checkpoint(write(tmp_path / "gptq", dense, tensors, quantization_config=config))


REFUSED_SLIM: dict[str, tuple[Change, str]] = {
    "changed after": (
        changed(f"{NAME}.weight", lambda t: t * 1.07),
        "down_proj: its weight is not 4-bit codes times its scaling factor",
    ),
    "groups of outputs": (
        changed(f"{NAME}.quantization_scaling_factor", lambda t: t[:2]),
        r"down_proj: scaling factors \[2, 4\] for 32 outputs: groups of outputs",
    ),
    "half an adapter": (without(f"{NAME}.lora_right"), "down_proj.lora_right: missing"),
    "no weight": (without(f"{NAME}.weight"), "down_proj.weight: missing"),
    "scaled columns": (with_settings(scale_important_weights=True), "scale_important_weights"),
    "three bits": (with_settings(bitwidth=3), "args.json says codes of 3 bits, not 4"),
}


@pytest.mark.parametrize("name", REFUSED_SLIM)
def test_the_papers_checkpoint_that_cannot_be_read(name: str, dense: Path, tmp_path: Path) -> None:
    change, message = REFUSED_SLIM[name]
    made, rest = weights_of(dense, torch.bfloat16)
    parts, _ = slim(made, lambda weight: (weight.scale * 7).bfloat16())
    tensors, config = {**rest, **parts}, dict(ARGS)
    change(tensors, config)
    folder = write(tmp_path / "slim", dense, tensors)
    (folder / "args.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        read_checkpoint(folder)


def test_folders_that_are_no_checkpoint(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"config.json: No such file"):
        read_checkpoint(tmp_path)
    with pytest.raises(
        ArtifactError, match=r"not a compressed checkpoint. Read it with slimfx.cap"
    ):
        read_checkpoint(dense)
    folder = write(tmp_path / "ct", dense, {"a": torch.zeros(1)}, quantization_config=settings())
    with pytest.raises(ArtifactError, match=r"no tensor of the checkpoint ends in .weight_packed"):
        read_checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ArtifactError, match="no safetensors file"):
        read_checkpoint(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"it has pytorch_model.bin, a pickle"):
        read_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}')
    with pytest.raises(ArtifactError, match=r"names ../a, which is outside"):
        read_checkpoint(folder)


def test_a_checkpoint_with_a_cache(dense: Path, tmp_path: Path) -> None:
    made, rest = weights_of(dense, torch.bfloat16)
    tensors = {**rest, **pack_quantized(made)}
    folder = write(tmp_path / "ct", dense, tensors, quantization_config=settings())
    program = import_checkpoint(folder, kv_cache=True, max_length=16)
    ids = models.ids(3, 1, 10)
    with torch.no_grad():
        found = program.module()(input_ids=ids, cache_position=torch.arange(10))
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for name, weight in made.items():
        model.get_submodule(name).weight.data = weight.floats()
    expected = models.answer(model, {"input_ids": ids})
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_a_weight_for_no_linear_is_refused(dense: Path, tmp_path: Path) -> None:
    made, rest = weights_of(dense, torch.bfloat16)
    made["model.layers.0.mlp.other"] = made[NAME]
    tensors = {**rest, **pack_quantized(made)}
    folder = write(tmp_path / "ct", dense, tensors, quantization_config=settings())
    with pytest.raises(ArtifactError, match=r"mlp.other is not a torch.nn.Linear of the model"):
        import_checkpoint(folder)

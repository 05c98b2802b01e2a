"""Tiny models of every kind, captured once, and the eager model a compressed program stands for."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from slimfx.runtime.pack import FLOAT_BITS, unpack_24, unpack_bitmask, unpack_codes
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.functional import relu
from transformers.pytorch_utils import Conv1D

import slimfx
from slimfx.recipe import PRESETS, Calibration, Recipe
from slimfx.steps import Adapter, Prune, Quantize, Transform

aten = torch.ops.aten
VOCABULARY = 96
LONGEST = 64
DEMO = Path(__file__).parent.parent / "examples" / "demo_lm"

RECIPES = {
    "slim": Recipe.preset("slim"),
    "slim-q": Recipe.preset("slim-q"),
    "wanda": dataclasses.replace(
        Recipe.preset("wanda"), quantize=Quantize("absmax", granularity="group", group=8)
    ),
    "int4": Recipe(
        prune=None,
        quantize=Quantize("absmax", granularity="group", group=8),
        adapter=Adapter(rank=0.2, bits=4, group=4),
    ),
    "1:4": Recipe(
        prune=Prune("magnitude", n=1, m=4),
        quantize=Quantize("absmax", granularity="channel"),
        adapter=Adapter("naive", bits=32),
    ),
    "50%": Recipe(
        prune=Prune("wanda", sparsity=0.5),
        quantize=Quantize("absmax", bits=3, granularity="group", group=12),
        adapter=Adapter(rank=0.2, bits=4, group=5, sparse=True),
        transform=Transform("smoothquant"),
    ),
}
"""Together every kind of layout, granularity and adapter, at groups that tiny layers allow."""


SOLVED = [name for name, recipe in PRESETS.items() if recipe.tune is None]
"""The presets that need no gradient descent."""


@dataclass(frozen=True)
class Case:
    """A model, what it is captured with, and what it is calibrated with."""

    model: nn.Module
    batches: list[dict[str, Tensor]]
    inputs: dict[str, Tensor]
    """Other inputs than the calibration's, to compare answers on."""
    text: bool = False
    """A Hugging Face text model, which needs no example inputs."""
    root: str = ""
    """What capture puts before the names of the model's own parameters."""


class Chain(nn.Module):
    """Modules one after the other, in a numbered container."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Rows(nn.Module):
    """Two linears with nothing between them, the second one the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Mlp(Rows):
    """The same with a ReLU between."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(relu(self.first(x)))


class Tied(nn.Module):
    """One weight in two linears with a bias each; a third linear stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.c = nn.Linear(16, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(relu(self.b(relu(self.a(x)))))


class TransposedStorage(nn.Module):
    """Two weights over the same memory, one read across the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 24)
        self.b = nn.Linear(24, 16)
        self.b.weight = nn.Parameter(self.a.weight.data.t())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(relu(self.a(x)))


class InOut(nn.Module):
    """Weights stored as [in, out]: x @ w and torch.addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(16, 32) / 4)
        self.w2 = nn.Parameter(torch.randn(32, 8) / 5)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, relu(x @ self.w1), self.w2)


class OutIn(nn.Module):
    """Weights stored as [out, in]: torch.mm and torch.addmm with a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(32, 16) / 4)
        self.w2 = nn.Parameter(torch.randn(8, 32) / 5)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, relu(torch.mm(x, self.w1.t())), self.w2.T)


def ids(seed: int, *shape: int) -> Tensor:
    """Random tokens of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, shape, generator=generator)


def normal(seed: int, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.2,
}


def tiny_llama(**changes: Any) -> nn.Module:
    """Llama with grouped heads."""
    config = transformers.LlamaConfig(**{**_SIZES, "num_key_value_heads": 2, **changes})
    return transformers.LlamaForCausalLM(config)


def tiny_gpt2() -> nn.Module:
    """GPT-2, whose Conv1D stores [in, out] and becomes aten.addmm."""
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=LONGEST,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    return transformers.GPT2LMHeadModel(config)


def tiny_opt() -> nn.Module:
    """OPT, with a bias everywhere and a tied head."""
    config = transformers.OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=LONGEST,
        word_embed_proj_dim=32,
        init_std=0.2,
    )
    return transformers.OPTForCausalLM(config)


def tiny_bert() -> nn.Module:
    """BERT, an encoder with an attention mask and a pooler."""
    return transformers.BertModel(transformers.BertConfig(**_SIZES))


def tiny_qwen2() -> nn.Module:
    """Qwen2, with tied embeddings."""
    config = transformers.Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **_SIZES)
    return transformers.Qwen2ForCausalLM(config)


def tiny_albert() -> nn.Module:
    """ALBERT, whose two layers are one."""
    return transformers.AlbertModel(transformers.AlbertConfig(embedding_size=16, **_SIZES))


def tiny_vit() -> nn.Module:
    """ViT on 32 x 32 pixels."""
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        initializer_range=0.2,
    )
    return transformers.ViTForImageClassification(config)


def _decoder(model: nn.Module) -> Case:
    calibration = [{"input_ids": ids(1, 4, 24)}, {"input_ids": ids(2, 4, 24)}]
    return Case(model, calibration, {"input_ids": ids(3, 3, 10)}, text=True, root="model.")


def _encoder(model: nn.Module) -> Case:
    return Case(
        model,
        [padded(1, 4, 24, keep=17), padded(2, 4, 24, keep=9)],
        padded(3, 3, 10, keep=6),
        text=True,
        root="model.",
    )


def padded(seed: int, rows: int, length: int, *, keep: int) -> dict[str, Tensor]:
    """Tokens of which every row but the first one counts `keep`, with their mask."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[1:, keep:] = 0
    return {"input_ids": ids(seed, rows, length), "attention_mask": mask}


def _matrix(model: nn.Module, name: str = "x", *between: int) -> Case:
    batches = [{name: normal(seed, 20, *between, 16)} for seed in (1, 2)]
    return Case(model, batches, {name: normal(3, 5, *between, 16)})


def _vit(model: nn.Module) -> Case:
    batches = [{"pixel_values": normal(seed, 4, 3, 32, 32)} for seed in (1, 2)]
    return Case(model, batches, {"pixel_values": normal(3, 3, 3, 32, 32)}, root="model.")


KINDS: dict[str, Callable[[], Case]] = {
    "llama": lambda: _decoder(tiny_llama()),
    "gpt2": lambda: _decoder(tiny_gpt2()),
    "opt": lambda: _decoder(tiny_opt()),
    "bert": lambda: _encoder(tiny_bert()),
    "qwen2": lambda: _decoder(tiny_qwen2()),
    "albert": lambda: _encoder(tiny_albert()),
    "vit": lambda: _vit(tiny_vit()),
    "mlp": lambda: _matrix(Mlp()),
    "rows": lambda: _matrix(Rows()),
    "tied": lambda: _matrix(Tied()),
    "transposed storage": lambda: _matrix(TransposedStorage()),
    "encoder layer": lambda: _matrix(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), "src", 5
    ),
    "in out": lambda: _matrix(InOut()),
    "out in": lambda: _matrix(OutIn()),
}


@cache
def case(kind: str) -> Case:
    """The one model of a kind; nothing may write to it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = KINDS[kind]()
    made.model.eval()
    return made


@cache
def captured(kind: str) -> ExportedProgram:
    """The program of a kind; nothing may write to it."""
    made = case(kind)
    return slimfx.capture(made.model, None if made.text else made.inputs)


@cache
def compressed(kind: str, recipe: str) -> ExportedProgram:
    """The program of a kind under one of `RECIPES`."""
    return slimfx.compress(captured(kind), RECIPES[recipe], case(kind).batches)


@cache
def demo_lm() -> ExportedProgram:
    """The small trained language model of examples/, with its tokenizer."""
    return slimfx.capture(DEMO)


QUICK = Calibration(samples=2, length=64)
"""Enough for the demo model where only its form matters."""


@cache
def compressed_demo_lm(preset: str) -> ExportedProgram:
    """The demo model under a preset."""
    return slimfx.compress(demo_lm(), dataclasses.replace(Recipe.preset(preset), calibration=QUICK))


def word_tokenizer() -> str:
    """A tokenizer of the tiny vocabulary: word w7 is token 7."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer.to_str()


def capture_rows(model: nn.Module, *shape: int) -> ExportedProgram:
    """Capture a module that takes one tensor of such a shape."""
    return slimfx.capture(model, (normal(5, *shape),))


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What a model says eagerly; the first output of a Hugging Face model."""
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, Tensor) else found[0]


def emulate(each: Case, program: ExportedProgram, recipe: Recipe) -> tuple[nn.Module, list[str]]:
    """A copy of the model with the weights that the program stores, and their parameters.

    Biases are those of the program, too: a recipe may shift them.
    """
    model = copy.deepcopy(each.model)
    replaced = []
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        turned = isinstance(owner, Conv1D | InOut)
        shape = parameter.shape[::-1] if turned else parameter.shape
        W = stored_weight(program, each.root + name.removesuffix(".weight"), shape, recipe)
        if W is not None:
            parameter.data = W.T.contiguous() if turned else W
            replaced.append(name)
        if name.endswith("bias") and each.root + name in program.state_dict:
            parameter.data = program.state_dict[each.root + name].detach()
    return model, replaced


def stored_weight(
    program: ExportedProgram, prefix: str, shape: Any, recipe: Recipe
) -> Tensor | None:
    """(unpack * scale + R @ L) * input_scale of one layer, from the program's own tensors.

    None if the program stores none for it.
    """
    start = f"{prefix}.slim_"
    part = {k[len(start) :]: t for k, t in program.state_dict.items() if k.startswith(start)}
    if not part:
        return None
    W = _unpacked(part, "", shape[1], recipe.quantize)
    if recipe.adapter is not None:
        L = _unpacked(part, "L", shape[1], recipe.adapter)
        W = W + _unpacked(part, "R", len(L), recipe.adapter) @ L
    return W * part.get("input_scale", torch.ones(1)).float()


def _unpacked(
    part: dict[str, Tensor], name: str, width: int, how: Quantize | Adapter | None
) -> Tensor:
    """A stored matrix as float32, in whatever layout its tensors are."""
    if name in part:
        return part[name].float()
    prefix = f"{name}_" if name else ""
    bits, group = (how.bits, how.group) if how else (FLOAT_BITS, width)
    if f"{prefix}codes" in part:
        values = unpack_codes(part[f"{prefix}codes"], bits, width)
    elif f"{prefix}mask" in part:
        values = unpack_bitmask(part[f"{prefix}values"], part[f"{prefix}mask"], bits, width)
    else:
        values = unpack_24(part[f"{prefix}values"], part[f"{prefix}indices"], bits, width)
    scale = part.get(f"{prefix}scale")
    return values.float() if scale is None else values.float() * _wide(scale, group, width)


def _wide(scale: Tensor, group: int, width: int) -> Tensor:
    if scale.shape[1] == 1:
        return scale.float()
    return scale.float().repeat_interleave(group, dim=1)[:, :width]


def count(program: ExportedProgram, *ops: Any) -> int:
    """How many nodes call one of the ops."""
    return sum(node.target in ops for node in program.graph.nodes)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names with the same bytes."""
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def bits(tensor: Tensor) -> bytes:
    """A tensor's dtype, shape and bytes."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data

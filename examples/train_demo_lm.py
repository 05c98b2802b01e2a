"""Train the small language model of the examples on any text.

python examples/train_demo_lm.py docs/train.jsonl.xz --valid docs/valid.jsonl.xz -o demo_lm

Tokens, tokenizer, checkpoints and the loss curve are kept in OUTPUT.work. A run that was stopped
goes on when started again. The rate is constant and falls to zero over the last quarter, so a run
may also be lengthened, or shortened to end now: the steps done before its fall stay as they are.
"""

import json
import math
import time
from pathlib import Path
from typing import Annotated

import numpy
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimfx.data import documents

VOCABULARY, LENGTH, END = 4096, 512, "<|endoftext|>"
FALL = 0.25
"""The share of the steps over which the rate falls to zero."""
WARM_UP = 100


def build(hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama of which every dimension of a linear is a multiple of 128."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def tokenizer_for(text: Path, work: Path) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding, trained on the text once."""
    path = work / "tokenizer.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet
        )
        tokenizer.train_from_iterator(documents(text), trainer)
        tokenizer.save(str(path))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token=END, eos_token=END, model_max_length=LENGTH
    )


def tokens(text: Path, tokenizer: PreTrainedTokenizerFast, kept: Path) -> Tensor:
    """The text in one row of tokens, an end token after each document; made once."""
    if not kept.exists():
        parts = tokenizer(documents(text), verbose=False)["input_ids"]
        flat = [token for part in parts for token in (*part, tokenizer.eos_token_id)]
        numpy.save(kept, numpy.array(flat, dtype=numpy.uint16))
    return torch.from_numpy(numpy.load(kept).astype(numpy.int64))


def batch(stream: Tensor, step: int, size: int) -> Tensor:
    """The windows of a step, [size, 512]: every one once in each pass, the cuts moved between."""
    windows = len(stream) // LENGTH - 1
    steps = windows // size
    draw = torch.Generator().manual_seed(step // steps)
    start = int(torch.randint(LENGTH, (), generator=draw))
    order = torch.randperm(windows, generator=draw)
    chosen = order[step % steps * size :][:size]
    return stream[start:][: windows * LENGTH].view(windows, LENGTH)[chosen]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def validation(model: nn.Module, stream: Tensor) -> float:
    """Nats a token over 128 windows spread over the text."""
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    chosen = windows[:: max(1, len(windows) // 128)][:128]
    losses = [loss_of(model, part).item() * len(part) for part in chosen.split(16)]
    return sum(losses) / len(chosen)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, Adam for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() == 1 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.004, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.004, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def factor(step: int, steps: int) -> float:
    """The rate of a step as a share of the highest."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (FALL * steps))


def save(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def main(
    text: Path,
    valid: Annotated[Path, typer.Option(help="Held-out text.")],
    output: Annotated[Path, typer.Option("--output", "-o")],
    million: Annotated[float, typer.Option(help="Tokens to train on, in millions.")] = 100,
    hidden: int = 256,
    layers: int = 6,
    size: Annotated[int, typer.Option(help="Windows of 512 tokens a step.")] = 32,
    device: str = "cpu",
) -> None:
    """Train, or go on, and write the model in bfloat16 with its loss curve."""
    work = output.with_name(f"{output.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_for(text, work)
    stream = tokens(text, tokenizer, work / "train.npy").to(device)
    held_out = tokens(valid, tokenizer, work / "valid.npy").to(device)
    torch.manual_seed(0)
    model = build(hidden, layers).to(device)
    steps = math.ceil(million * 1e6 / (size * LENGTH))
    own = optimizers(model)
    rates = [group["lr"] for each in own for group in each.param_groups]
    first, curve = resume(work, model, own, steps)
    compiled = torch.compile(model)
    began = time.perf_counter()
    for step in range(first, steps):
        for each, rate in zip(own, rates, strict=True):
            each.param_groups[0]["lr"] = rate * factor(step, steps)
        loss = loss_of(compiled, batch(stream, step, size))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in own:
            each.step()
            each.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            held = validation(compiled, held_out)
            curve.append({"step": step + 1, "train": loss.item(), "valid": held})
            left = (time.perf_counter() - began) / (step + 1 - first) * (steps - step - 1)
            print(
                f"{step + 1}/{steps} {loss.item():.3f} {held:.3f} {left / 60:.0f} min", flush=True
            )
            state = {"model": model.state_dict(), "own": [each.state_dict() for each in own]}
            falls = factor(step, steps) < 1.0 and step >= WARM_UP
            name = "falling.pt" if falls else "constant.pt"
            save({**state, "step": step + 1, "steps": steps, "curve": curve}, work / name)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    told = {"tokens": steps * size * LENGTH, "windows a step": size, "curve": curve}
    (output / "loss.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def resume(
    work: Path, model: nn.Module, own: list[torch.optim.Optimizer], steps: int
) -> tuple[int, list[dict]]:
    """Load the last checkpoint that a run of so many steps passes through; where it goes on."""
    for path in (work / "falling.pt", work / "constant.pt"):
        if not path.exists():
            continue
        state = torch.load(path, weights_only=True)
        same_run = state["steps"] == steps
        before_fall = path.stem == "constant" and state["step"] <= steps * (1 - FALL)
        if same_run or before_fall:
            model.load_state_dict(state["model"])
            for each, kept in zip(own, state["own"], strict=True):
                each.load_state_dict(kept)
            return state["step"], state["curve"]
    return 0, []


if __name__ == "__main__":
    typer.run(main)

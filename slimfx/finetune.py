"""Train the adapters of a compressed program, and nothing else of it.

    loss = next-token cross-entropy of the program's own logits [+ KL(teacher || program)]

Adapters of int4 or bfloat16 are rounded in every step as they will be stored, and gradients pass
the rounding (straight through); Hugging Face's `Trainer` runs Adafactor over them, the rate falling
linearly to zero. The result is an artifact of the same form. Started by torchrun, processes share
the windows of each step.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.functional import cross_entropy, kl_div

from slimfx.capture import capture
from slimfx.errors import FinetuneError, need
from slimfx.journal import digest
from slimfx.passes.inputs import call_arguments, module_of, tensor_inputs
from slimfx.passes.train_adapters import Trained, put_back, train_adapters
from slimfx.runtime.manifest import attach, manifest_of
from slimfx.runtime.targets import pt2
from slimfx.training_text import IGNORED, Batch, Training, training_batches, vocabulary

Progress = Callable[[float, str], None]
_JOB = "job.json"


def finetune(
    program: ExportedProgram,
    source: Any = None,
    *,
    how: Training | None = None,
    teacher: ExportedProgram | str | Path | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> ExportedProgram:
    """A copy of a compressed program with its adapters trained on a text; every other tensor is the
    same, and so is global random state.

    Processes that torchrun started share each step's windows, and all return the same program;
    those without GPUs speak by gloo. Windows are rounded up to a multiple of their number.

    Args:
        program: as `compress` returns it or `load` reads it (form op), answering with logits.
        source: text or tokens as in `slimfx.data`; None takes the English that comes with Python.
        teacher: the dense program, its file or its Hugging Face folder; adds its divergence.
        checkpoints: a folder for them; none are written without one.
        resume: go on from the last checkpoint of the same job, from the start if there is none.
        progress: told how far the work is.

    Raises:
        FinetuneError: no text for one window, tokens the program does not know, another job's
            checkpoints, or a loss that is not finite (the last checkpoint stays).
        SlimError: no adapters, or transformers or accelerate is missing.
    """
    how = how or Training()
    processes = _processes(how)
    transformers, _ = need("transformers"), need("accelerate")
    trainable, trained = train_adapters(program)
    batches = training_batches(program, source, how, processes)
    taught = None if teacher is None else _teacher(program, teacher)
    trainee = _Trainee(trainable, trained, taught)
    named = {**program.state_dict, **{str(i): b["labels"] for i, b in enumerate(batches)}}
    known = None if taught is None else digest(taught.state_dict)
    job = {**asdict(how), "teacher": known, "sha256": digest(named), "processes": processes}
    del job["save_every"]  # which changes nothing of the result
    with tempfile.TemporaryDirectory() as scratch, _random_state():
        folder = _folder(checkpoints, job, resume)
        where = folder or Path(scratch)
        runs = _Run(transformers, trainee, how, where, folder is not None, processes)
        losses = runs.train(batches, _last_checkpoint(folder), progress)
    values = {each.parameter: trainable.state_dict[each.parameter].detach() for each in trained}
    result = put_back(program, trained, values)
    own = manifest_of(program)
    record = {**job, "steps": len(losses), "loss_first": losses[0], "loss_last": losses[-1]}
    return attach(result, replace(own, calibration={**own.calibration, "finetune": record}))


def _teacher(program: ExportedProgram, teacher: ExportedProgram | str | Path) -> ExportedProgram:
    if not isinstance(teacher, ExportedProgram):
        teacher = pt2.load(teacher) if str(teacher).endswith(".pt2") else capture(teacher)
    own, other = manifest_of(program).tokenizer, manifest_of(teacher).tokenizer
    if vocabulary(teacher) != vocabulary(program) or (own and other and own != other):
        raise FinetuneError(
            f"the teacher tells {vocabulary(teacher)} tokens apart and the program "
            f"{vocabulary(program)}, or their tokenizers differ; give the model the program was "
            f"compressed from"
        )
    if tensor_inputs(teacher).keys() != tensor_inputs(program).keys():
        raise FinetuneError(
            f"the teacher takes {', '.join(tensor_inputs(teacher))} and the program "
            f"{', '.join(tensor_inputs(program))}; capture both alike"
        )
    return teacher


def _processes(how: Training) -> int:
    """How many processes train together, as torchrun says it."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if how.accumulate % processes:
        raise FinetuneError(
            f"{processes} processes share {how.accumulate} windows a step, which they do not "
            f"divide; set accumulate to a multiple of {processes}"
        )
    if processes == 1 and torch.cuda.device_count() > 1:
        raise FinetuneError(
            f"{torch.cuda.device_count()} GPUs and one process, which trains on one: start "
            f"torchrun with a process for each, or set CUDA_VISIBLE_DEVICES"
        )
    return processes


def is_first() -> bool:
    """Is this the process that writes, of those that torchrun started?"""
    return os.environ.get("RANK", "0") == "0"


class _NotFinite(ArithmeticError):
    """What stops training, named by its value."""


class _Trainee(nn.Module):
    """The adapters as the only parameters of a module that answers with its loss.

    The program's own module is kept out of torch's sight: it cannot be set to training mode, and
    its frozen tensors belong in no checkpoint.
    """

    def __init__(
        self,
        trainable: ExportedProgram,
        trained: tuple[Trained, ...],
        teacher: ExportedProgram | None,
    ) -> None:
        super().__init__()
        names = [each.parameter for each in trained]
        self.adapters = nn.ParameterDict(
            {name.replace(".", "/"): trainable.state_dict[name] for name in names}
        )
        self._programs = [(p, module_of(p)) for p in (trainable, teacher) if p is not None]

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss of one batch.

        Raises:
            _NotFinite: it is NaN or infinite.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch = {name: value for name, value in given.items() if value is not None}
        counted = labels[:, 1:] != IGNORED
        logits = self._logits(0, batch)[counted]
        loss = cross_entropy(logits, labels[:, 1:][counted])
        if len(self._programs) > 1:
            with torch.no_grad():
                wanted = self._logits(1, batch)[counted].log_softmax(-1)
            loss = loss + kl_div(
                logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True
            )
        if not loss.isfinite():
            raise _NotFinite(f"the loss is {loss.item()}")
        return {"loss": loss}

    def _logits(self, which: int, batch: Batch) -> Tensor:
        program, module = self._programs[which]
        args, kwargs = call_arguments(program, batch)
        found = module(*args, **kwargs)
        return (found if isinstance(found, Tensor) else found[0])[:, :-1].float()


@dataclass(frozen=True)
class _Run:
    """One run of Hugging Face's Trainer."""

    transformers: Any
    trainee: _Trainee
    how: Training
    folder: Path
    saves: bool
    processes: int

    def train(
        self, batches: list[Batch], start: Path | None, progress: Progress | None
    ) -> list[float]:
        """Train in place, and return the loss of each step."""
        hf, parameters = self.transformers, list(self.trainee.parameters())
        count = len(batches) // self.processes
        trainer = hf.Trainer(
            model=self.trainee,
            args=self._arguments(parameters[0].device),
            train_dataset=batches,
            data_collator=lambda items: items[0],
            optimizers=(
                hf.Adafactor(
                    *(parameters, self.how.rate),
                    scale_parameter=True,
                    relative_step=False,
                    warmup_init=False,
                ),
                None,
            ),
            callbacks=[_watch(hf.TrainerCallback, parameters, count, progress)],
        )
        trainer.remove_callback(hf.PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
        except _NotFinite as error:
            last = _last_checkpoint(self.folder) if self.saves else None
            raise FinetuneError(
                f"step {trainer.state.global_step + 1}: {error}; lower the rate ({self.how.rate}). "
                f"The last good checkpoint: {last or 'none'}"
            ) from error
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def _arguments(self, device: torch.device) -> Any:
        on_cuda = device.type == "cuda"
        return self.transformers.TrainingArguments(
            output_dir=str(self.folder),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=self.how.accumulate // self.processes,
            num_train_epochs=1,
            learning_rate=self.how.rate,
            lr_scheduler_type="linear",
            train_sampling_strategy="sequential",
            seed=self.how.seed,
            use_cpu=not on_cuda,
            ddp_backend=None if self.processes == 1 else "nccl" if on_cuda else "gloo",
            bf16=on_cuda and torch.cuda.is_bf16_supported(),
            save_strategy="steps" if self.saves else "no",
            save_steps=self.how.save_every,
            save_total_limit=2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )


def _watch(base: type, parameters: list[nn.Parameter], count: int, tell: Progress | None) -> Any:
    """A callback, of the class transformers asks for, that reports progress and refuses to save
    what is not finite.
    """

    class Watch(base):  # type: ignore[misc]
        done = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.done = state.global_step * args.gradient_accumulation_steps

        def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.done += 1
            if tell is not None:
                tell(self.done / count, f"step {state.global_step + 1} of {state.max_steps}")

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if not all(value.isfinite().all() for value in parameters):
                state.global_step -= 1  # this one does not count: it has no good weights
                raise _NotFinite("an adapter is not finite")
            self.done = state.global_step * args.gradient_accumulation_steps
            if tell is not None:
                tell(min(self.done / count, 1.0), f"step {state.global_step} of {state.max_steps}")

    return Watch()


def _folder(given: str | Path | None, job: Mapping[str, Any], resume: bool) -> Path | None:
    """The folder for checkpoints, its job written into it or found to be this one."""
    if given is None:
        if resume:
            raise FinetuneError("resume needs the folder of the checkpoints")
        return None
    folder = Path(given)
    if not is_first():
        return folder
    found = folder / _JOB
    if found.exists():
        if not resume:
            raise FinetuneError(
                f"{folder}: holds the checkpoints of an earlier run; resume it, or remove them"
            )
        other = json.loads(found.read_text(encoding="utf-8"))
        changed = sorted(key for key in {*job, *other} if job.get(key) != other.get(key))
        if changed:
            raise FinetuneError(
                f"{folder}: holds the checkpoints of a run with another {', '.join(changed)}; give "
                f"the same settings, program and text, or another folder"
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    found.write_text(json.dumps(job, sort_keys=True), encoding="utf-8")
    return folder


def _last_checkpoint(folder: Path | None) -> Path | None:
    """The latest one that was written to its end: the state of the trainer comes last."""
    if folder is None:
        return None
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """Leave the random state of torch, numpy and Python as it was: the trainer seeds all three."""
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    numpy.random.set_state(numbers)

"""The HF Trainer with a row for every optimizer step.

Only public methods and callbacks of Trainer are overridden. If a release of transformers no longer
calls one of them, the run stops with an error instead of training without rows.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_harness.data.examples import IGNORE
from qlora_harness.errors import HarnessError, TrainingError
from qlora_harness.record import LOGS_FILE, write_json
from qlora_harness.schema.training_records import StepRow, TrainingLog
from qlora_harness.train.checkpoints import cannot_be_loaded
from qlora_harness.train.held_out import HeldOut
from qlora_harness.train.measured_step import Clock, MeasuredStep
from qlora_harness.train.memory_meter import MemoryMeter
from qlora_harness.train.order import StepBatches

_WRITE_EVERY_SECONDS = 10.0
# In float16 a step whose gradients overflow is skipped, and the scale of the loss halved. It begins
# at 2^16, so gradients that overflow after this many are infinite without a scale, too.
_MOST_SKIPPED = 17


class CountingTrainer(Trainer):
    """Trainer that counts the tokens, the loss and the gradient norm of each step.

    The counts stay on the device, so that nothing waits for it; `StepLog` turns them into rows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses: list[float] = []
        self._begun: Clock | None = None
        self._counts: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None
        self._norm: torch.Tensor | float | None = None
        self._operations: float | None = None
        self._checkpoint: str | None = None  # while it is being loaded
        self._clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self._clip_gradients
        if self.accelerator.ddp_handler is not None:
            # Without a copy of the gradients beside the buckets that are reduced.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        # Every process has loaded the same base. DDP would send it again, and buffers in each step.
        model: Any = self.model
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        buffers = [name for name, _ in model.named_buffers()]
        model._ddp_params_and_buffers_to_ignore = frozen + buffers  # noqa: SLF001  # DDP's name

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; a checkpoint that torch can't load raises RunError."""
        self._checkpoint = resume_from_checkpoint
        try:
            with listed_modules(self.model):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        except (HarnessError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self._checkpoint is None:
                raise
            raise cannot_be_loaded(self._checkpoint, error) from None

    def get_train_dataloader(self) -> Any:
        """Deals the examples of each step to the processes, see `StepBatches`.

        Trainer's own order by length would change where a run resumes in a later epoch.
        """
        data: Any = self.train_dataset
        batches = StepBatches(
            data.lengths,
            batch_size=self.args.train_batch_size,
            passes=self.args.gradient_accumulation_steps,
            processes=self.accelerator.num_processes,
            by_length=self.args.train_sampling_strategy == "group_by_length",
            seed=self.args.seed,
            epoch=lambda: math.floor((self.state.epoch or 0.0) + 1e-6),
        )
        loader = DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetches the micro-batches of one optimizer step and counts their tokens."""
        if self._begun is None:
            self._begun = Clock(self.args.device)
        samples, items = super().get_batch_samples(*args, **kwargs)
        counts = torch.zeros(2, dtype=torch.int64, device=self.args.device)
        for batch in samples:
            mask = batch.get("attention_mask")
            counts[0] += batch["input_ids"].numel() if mask is None else mask.sum()
            counts[1] += (batch["labels"][:, 1:] != IGNORE).sum()
        self._counts, self._loss, self._norm = counts, None, None
        return samples, items

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Computes one micro-batch and adds up the loss of its optimizer step."""
        self._checkpoint = None  # it has been loaded by now
        wrapped: Any = self.model_wrapped
        if wrapped is not self.model:
            wrapped.parameters = cast(Any, self.model).parameters  # see `listed_modules`
        loss = super().training_step(*args, **kwargs)
        if self._loss is None:
            self._loss = torch.zeros((), device=self.args.device)
        self._loss += loss
        return loss

    def _clip_gradients(self, *args: Any, **kwargs: Any) -> Any:
        self._norm = self._clip(*args, **kwargs)
        return self._norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> Any:
        """Returns Trainer's estimate for a batch; counts the model's parameters only once."""
        if self._operations is None:
            one = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
            self._operations = float(super().floating_point_ops(one))
        return self._operations * float(inputs["input_ids"].numel())

    def measured_step(self, learning_rate: float | None) -> MeasuredStep:
        """Returns the step just launched, whose numbers are on their way; raises TrainingError."""
        device, step = self.args.device, self.state.global_step
        begun, counts, loss, grad_norm = self._begun, self._counts, self._loss, self._norm
        if begun is None or counts is None or loss is None:
            raise _unsupported_release(f"no tokens or loss for step {step}")
        if grad_norm is None or learning_rate is None:
            raise _unsupported_release(f"no gradient norm or learning rate for step {step}")
        norm = torch.as_tensor(grad_norm, device=device)
        processes = self.accelerator.num_processes
        means = torch.stack([loss.detach().double(), norm.detach().double()]) / processes
        values = torch.cat([means, counts.double()])
        if processes > 1:
            torch.distributed.all_reduce(values)
        numbers = torch.empty(4, dtype=torch.float64, pin_memory=device.type == "cuda")
        numbers.copy_(values, non_blocking=True)
        self._begun = ended = Clock(device)
        return MeasuredStep(step, self.state.epoch, learning_rate, begun, ended, numbers)

    def pause(self) -> None:
        """Excludes the time until the next batch from the next step."""
        self._begun = None

    def log_step(self, step: MeasuredStep, loss: float, grad_norm: float | None) -> None:
        """Logs a step under its own number and epoch, even if a later one has been launched."""
        self._losses.append(loss)
        state = self.state
        now = state.global_step, state.epoch
        state.global_step, state.epoch = step.step, step.epoch or 0.0
        try:
            norm = {} if grad_norm is None else {"grad_norm": grad_norm}
            self.log({"loss": loss, "learning_rate": step.learning_rate} | norm)
        finally:
            state.global_step, state.epoch = now

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, with the mean loss over all processes in place of Trainer's own."""
        if "train_loss" in logs:
            logs["train_loss"] = sum(self._losses) / max(len(self._losses), 1)
        super().log(logs, *args, **kwargs)


def _unsupported_release(problem: str) -> TrainingError:
    return TrainingError(
        f"transformers {transformers.__version__} is not supported: {problem}",
        "Install one of the releases that pyproject.toml names",
    )


@contextlib.contextmanager
def listed_modules(model: Any) -> Iterator[None]:
    """Makes `model.parameters()` and `model.train()` cheap inside the `with` block.

    Walking the 2,665 modules of a 7B model with PEFT takes over 10 ms a step.
    """
    parameters, train = list(model.parameters()), model.train
    current: bool | None = None  # unknown: modules may be in different modes

    def train_if_not_yet(mode: bool = True) -> Any:
        nonlocal current
        if mode is not current:
            train(mode)
            current = mode
        return model

    def listed(recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        return iter(parameters) if recurse else type(model).parameters(model, recurse=False)

    model.train, model.parameters = train_if_not_yet, listed
    try:
        yield
    finally:
        del model.train, model.parameters


class StepLog(TrainerCallback):
    """Logs a row per optimizer step, and stops a run whose loss is not finite.

    On a GPU the row of a step is made after the next one is launched, so that the device never
    idles. All rows are complete before anything is saved, and at the end. It must come after every
    callback that requests a checkpoint.
    """

    trainer: CountingTrainer

    def __init__(
        self,
        run_dir: Path,
        memory: MemoryMeter,
        rows: list[dict[str, Any]],
        on_row: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.rows = rows
        self._on_row = on_row
        self.held_out: HeldOut | None = None
        self._path = run_dir / LOGS_FILE
        self._memory = memory
        self._written = time.monotonic()
        self._learning_rate: float | None = None
        self._pending: deque[MeasuredStep] = deque()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Evaluates after the checkpoint's step if a signal stopped the run before that."""
        if held_out := self._due(state):
            held_out.during(state.global_step)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Reads the learning rate before the scheduler changes it."""
        self._learning_rate = float(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Queues the step, makes the rows that are due, evaluates, and prepares a checkpoint."""
        self._pending.append(self.trainer.measured_step(self._learning_rate))
        self._learning_rate = None
        # After a signal nothing may delay the checkpoint.
        held_out = None if control.should_training_stop else self._due(state)
        pauses = control.should_save or control.should_training_stop or held_out is not None
        self.log_pending(leave=1 if _runs_ahead(args.device) and not pauses else 0)
        if pauses:
            self.trainer.pause()
        if held_out is not None:
            held_out.during(state.global_step)
            self.write()
        if control.should_save:
            self.write()  # so that a checkpoint is never ahead of the log
            if args.should_save:
                # After a kill, files of two checkpoints in one folder would look intact.
                shutil.rmtree(_checkpoint_folder(args, state), ignore_errors=True)
            self.trainer.accelerator.wait_for_everyone()

    def _due(self, state: TrainerState) -> HeldOut | None:
        """The held-out conversations, if they must be evaluated now."""
        held_out = self.held_out
        if held_out is None or not held_out.is_due(state.global_step, state.max_steps):
            return None
        return held_out

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Removes unused files that name the host or the user's folders."""
        if state.is_world_process_zero:
            for name in ("training_args.bin", "README.md"):
                (_checkpoint_folder(args, state) / name).unlink(missing_ok=True)

    def log_pending(self, *, leave: int = 0) -> None:
        """Makes the rows of all pending steps but the newest `leave`."""
        while len(self._pending) > leave:
            self.add_row(self._pending.popleft())

    def add_row(self, step: MeasuredStep) -> None:
        """Waits for a step and logs it; raises TrainingError if its numbers are not finite."""
        step.ended.wait()
        loss, norm, tokens, supervised_tokens = step.numbers.tolist()
        skipped = self._is_skipped(loss, norm)
        self.trainer.log_step(step, loss, None if skipped else norm)
        if not skipped and not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step.step}: loss {loss}, gradient norm {norm}; the run was stopped, and "
                f"{self._path.name} has the earlier steps",
                "Lower --learning-rate, or look at the data of this step"
                + ", or use --compute-dtype float32"
                * (self.trainer.accelerator.scaler is not None),
            )
        seconds = step.ended.seconds_since(step.begun)
        self.rows.append(
            {
                "step": step.step,
                "epoch": step.epoch,
                "loss": loss,
                "learning_rate": step.learning_rate,
                "grad_norm": None if skipped else norm,
                "tokens": int(tokens),
                "supervised_tokens": int(supervised_tokens),
                "seconds": seconds,
                "tokens_per_second": int(tokens) / seconds,
                **self._memory.sample(),
            }
        )
        if self._on_row is not None:
            self._on_row(self.rows[-1])
        if time.monotonic() - self._written > _WRITE_EVERY_SECONDS:
            self.write()

    def _is_skipped(self, loss: float, norm: float) -> bool:
        """Whether the scaler of float16 skipped a step, and a smaller scale may help."""
        if self.trainer.accelerator.scaler is None or math.isfinite(norm):
            return False
        before = [row["grad_norm"] for row in self.rows[-_MOST_SKIPPED:]]
        return math.isfinite(loss) and before != [None] * _MOST_SKIPPED

    def write(self) -> None:
        """Writes training_logs.json (main process only)."""
        self._written = time.monotonic()
        if self.trainer.is_world_process_zero():
            log = TrainingLog(steps=[StepRow(**row) for row in self.rows])
            if self.held_out is not None and self.held_out.losses.tokens:
                log.evaluation = self.held_out.losses
            write_json(self._path, log.content(), rows_at=2)  # a step a line

    def check_complete(self, first: int, last: int) -> None:
        """Raises TrainingError if a step from `first` to `last` has no row."""
        missing = set(range(first, last + 1)) - {row["step"] for row in self.rows}
        if missing:
            raise _unsupported_release(f"{self._path.name} lacks step {min(missing)} of {last}")


def _runs_ahead(device: torch.device) -> bool:
    """Whether the device computes asynchronously."""
    return device.type == "cuda"


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")

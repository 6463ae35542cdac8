"""The HF Trainer with a full record of every step."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from qlora_harness.data.chat import IGNORE
from qlora_harness.errors import HarnessError, RunError, TrainingError
from qlora_harness.record import LOGS_FILE, write_json
from qlora_harness.schema.training import EvaluationLosses, StepRow, TrainingLog
from qlora_harness.train.measured_step import Clock, MeasuredStep, to_host
from qlora_harness.train.memory import MemoryMeter
from qlora_harness.train.process import launcher_has_ended

_WRITE_EVERY_SECONDS = 10.0


class CountingTrainer(Trainer):  # type: ignore[misc]  # Trainer is untyped to mypy
    """Trainer that measures each optimizer step, and logs it without making the device wait.

    The row of a step is logged when the next one has been launched, or before anything is saved or
    evaluated and at the end.

    Attributes:
        measured: The step that is being logged.
        step_log: Written before each checkpoint, so that a resumed run has the rows of all steps.
    """

    measured: MeasuredStep | None = None
    step_log: StepLog | None = None
    _step_tokens: torch.Tensor
    _begun: Clock | None = None
    _operations: float | None = None
    _globalstep_last_logged: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: deque[MeasuredStep] = deque()

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Like lengths together, in an order that depends on seed and epoch alone.

        transformers' own sampler draws from the global random numbers, which a run that is resumed
        after its first epoch does not have back in time: it would go on with other examples.
        """
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(*args, **kwargs)
        return _ByLength(
            [len(self.train_dataset[i]["input_ids"]) for i in range(len(self.train_dataset))],
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            self.args.seed,
            lambda: math.floor((self.state.epoch or 0.0) + 1e-6),
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetches the micro-batches of one optimizer step, and counts their tokens on the way."""
        if self._begun is None:
            self._begun = Clock(self.args.device)
        samples, items = super().get_batch_samples(*args, **kwargs)
        counts = torch.zeros(2, dtype=torch.int64, device=self.args.device)
        for batch in samples:
            mask = batch.get("attention_mask")
            counts[0] += batch["input_ids"].numel() if mask is None else mask.sum()
            counts[1] += (batch["labels"][:, 1:] != IGNORE).sum()
        self._step_tokens = counts
        return samples, items

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Trainer's estimate, counting the model's parameters once and not at every pass.

        Args:
            inputs: A batch.
        """
        if self._operations is None:
            one = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
            self._operations = float(super().floating_point_ops(one))
        return self._operations * float(inputs["input_ids"].numel())

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        replaced = self.is_fsdp_enabled or self.is_deepspeed_enabled  # parameters, by shards
        with contextlib.nullcontext() if replaced else _listed(self.model):
            return super()._inner_training_loop(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # PEFT would replace bfloat16 adapters by new parameters in float32, of which neither the
        # fused layers nor the settings know.
        chosen = self.model if model is None else model
        chosen.load_adapter = partial(chosen.load_adapter, autocast_adapter_dtype=False)
        try:
            with _loading(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        finally:
            del chosen.load_adapter

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _loading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _prepare_checkpoint(self) -> None:
        """Writes the step log, and removes an older checkpoint of this step.

        Files of both would make one that looks whole if this run were killed while it saves.
        """
        if self.step_log is not None:
            self.step_log.write()
        if self.args.should_save:
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        *args: Any,
        learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        control = self.control
        if control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._hold(tr_loss, grad_norm, learning_rate)
        stops = control.should_save or control.should_evaluate or control.should_training_stop
        self.log_held(leave=0 if stops or not self._runs_ahead else 1)
        if stops:
            self._begun = None
        if control.should_save:
            self._prepare_checkpoint()
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs
        )

    @property
    def _runs_ahead(self) -> bool:
        """Whether the device computes while the host goes on."""
        return bool(self.args.device.type == "cuda")

    def _hold(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        learning_rate: float | None,
    ) -> None:
        """Sends the numbers of the step that was just launched to the host."""
        device = self.args.device
        norm = torch.as_tensor(math.nan if grad_norm is None else grad_norm, device=device)
        means = torch.stack([tr_loss.detach().double(), norm.detach().double()])
        counts = self._step_tokens.double()
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, reduction="mean")
            counts = self.accelerator.reduce(counts, reduction="sum")
        numbers = to_host(torch.cat([means, counts]))
        ended = Clock(device)
        assert self._begun is not None
        self._held.append(
            MeasuredStep(
                self.state.global_step,
                self.state.epoch,
                self._get_learning_rate() if learning_rate is None else learning_rate,
                self._begun,
                ended,
                numbers,
                grad_norm is not None,
            )
        )
        self._begun = ended
        tr_loss.zero_()
        self._globalstep_last_logged = self.state.global_step

    def log_held(self, *, leave: int = 0) -> None:
        """Logs steps whose numbers are on their way, oldest first.

        Args:
            leave: How many of the newest to leave.
        """
        while len(self._held) > leave:
            self._log_step(self._held.popleft())

    def _log_step(self, measured: MeasuredStep) -> None:
        measured.ended.wait()
        logs = {"loss": measured.loss, "learning_rate": measured.learning_rate}
        if measured.grad_norm is not None:
            logs["grad_norm"] = measured.grad_norm
        self._total_loss_scalar += measured.loss
        self.store_flos()
        self.measured = measured
        now = self.state.global_step, self.state.epoch
        self.state.global_step, self.state.epoch = measured.step, measured.epoch
        try:
            self.log(logs)
        finally:
            self.state.global_step, self.state.epoch = now
            self.measured = None


@contextlib.contextmanager
def _loading(checkpoint: str | None) -> Iterator[None]:
    """Inside the `with` block, what torch can't load is one line."""
    try:
        yield
    except (HarnessError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch and PEFT raise many kinds
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        raise RunError(
            f"{checkpoint} can't be loaded ({type(error).__name__}: {reason})",
            "Remove it, so that an older one is taken, or use another --output-dir",
        ) from None


@contextlib.contextmanager
def _listed(model: Any) -> Iterator[None]:
    """Inside the `with` block, what Trainer asks of all modules at each pass comes from a list.

    A model of 32 layers with PEFT's modules around each projection has 2,665 modules. To go
    through them for `train()`, clipping and `zero_grad()` takes 10 ms and more a step, for which
    a GPU waits unless it is behind. (Around a model for several processes, only `train()` is
    shorter.)
    """
    parameters, train = list(model.parameters()), model.train
    current: bool | None = None  # only what was set here is known of all modules

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


class _ByLength(Sampler[int]):
    """Examples of like length side by side, in a new order each epoch."""

    def __init__(
        self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self._lengths, self._batch_size = lengths, batch_size
        self._seed, self._epoch = seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self._seed + 1_000_003 * self._epoch())
        return iter(
            get_length_grouped_indices(self._lengths, self._batch_size, generator=generator)
        )


class StepLog(TrainerCallback):  # type: ignore[misc]  # Trainer is untyped to mypy
    """Keeps one row per optimizer step and stops a run whose loss is not finite.

    Args:
        run_dir: Where training_logs.json is written (by the main process).
        memory: Measures the training phase.
        rows: Rows of the steps before, when a run goes on from a checkpoint.

    Attributes:
        evaluation: Losses of the evaluation conversations, once known.
    """

    def __init__(self, run_dir: Path, memory: MemoryMeter, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.evaluation: EvaluationLosses | None = None
        self.trainer: CountingTrainer | None = None
        self._path = run_dir / LOGS_FILE
        self._memory = memory
        self._written = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the row of a step (Trainer logs its end-of-run summary through here, too)."""
        measured = self.trainer.measured if self.trainer is not None else None
        if logs is None or measured is None:
            return
        loss, norm = measured.loss, measured.grad_norm or 0.0
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"step {state.global_step}: loss {loss}, gradient norm {norm}; the run was stopped "
                f"and {self._path.name} keeps the steps before",
                "Lower --learning-rate, or look at the data of this step",
            )
        self.rows.append(
            {
                "step": state.global_step,
                "epoch": measured.epoch,
                "loss": loss,
                "learning_rate": measured.learning_rate,
                "grad_norm": norm,
                "tokens": measured.tokens,
                "supervised_tokens": measured.supervised_tokens,
                "seconds": measured.seconds,
                "tokens_per_second": measured.tokens / measured.seconds,
                **self._memory.sample(),
            }
        )
        if time.monotonic() - self._written > _WRITE_EVERY_SECONDS:
            self.write()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes what nobody reads and names the host, the user's folders or both."""
        if state.is_world_process_zero:
            for name in ("training_args.bin", "README.md"):
                Path(args.output_dir, f"checkpoint-{state.global_step}", name).unlink(
                    missing_ok=True
                )

    def write(self) -> None:
        """Writes training_logs.json (main process only)."""
        self._written = time.monotonic()
        if self.trainer is None or self.trainer.is_world_process_zero():
            log = TrainingLog(steps=[StepRow(**row) for row in self.rows])
            if self.evaluation is not None:
                log.evaluation = self.evaluation
            write_json(self._path, log.content(), rows_at=2)  # a step a line


class StopOnSignal(TrainerCallback):  # type: ignore[misc]  # Trainer is untyped to mypy
    """Ends a run at the next step border, with a checkpoint, on SIGTERM or Ctrl-C.

    So does the end of the launcher: `accelerate launch` does not pass on its SIGTERM.

    Attributes:
        received: Name of the signal, or what else stops the run; None until then.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Catches the signals inside the `with` block; a second one acts as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = (signal.SIGTERM, signal.SIGINT)
        previous = {name: signal.getsignal(name) for name in names}

        def handle(number: int, frame: FrameType | None) -> None:
            self.received = signal.Signals(number).name
            for name in names:
                signal.signal(name, previous[name])

        for name in names:
            signal.signal(name, handle)
        try:
            yield
        finally:
            for name in names:
                signal.signal(name, previous[name])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks Trainer to save and stop, on all processes at the same step."""
        if not self.received and launcher_has_ended():
            self.received = "the end of the launcher"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor([float(self.received is not None)], device=args.device)
            torch.distributed.all_reduce(flag)
            if flag.item() and not self.received:
                self.received = "a signal to another process"
        if self.received:
            control.should_save = True
            control.should_training_stop = True

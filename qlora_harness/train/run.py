"""One training run, from settings to adapter and record."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from accelerate import PartialState
from filelock import FileLock
from transformers import TrainerState
from transformers.utils import logging as transformers_logging

from qlora_harness.data.corpus import TrainingData, load_training_data
from qlora_harness.data.examples import Example, show
from qlora_harness.data.templates import chat_template
from qlora_harness.errors import AdapterError, RunError, TrainingError
from qlora_harness.fused import fp8
from qlora_harness.model.adapter_starts import START_FILE, save_pissa_start
from qlora_harness.model.facts import base_of, is_out_of_memory
from qlora_harness.model.lora import save_adapter
from qlora_harness.model.rope import why_by_length
from qlora_harness.model.source import BaseSource, find_base, load_tokenizer
from qlora_harness.record import ADAPTER_DIR, CHECKPOINT_DIR, TRAINER_STATE_FILE
from qlora_harness.schema.training_records import EvaluationLosses
from qlora_harness.settings import Quant, Settings
from qlora_harness.settings_checks import check_can_run, check_can_shard
from qlora_harness.train.adapter import adapter_record, pissa_start
from qlora_harness.train.arguments import planned_steps, training_arguments
from qlora_harness.train.batches import ExampleSet, pack_batch, pad_batch, padding_id
from qlora_harness.train.checkpoints import cannot_be_loaded, check_fits, checkpoint_step
from qlora_harness.train.compute_dtype import with_compute_dtype
from qlora_harness.train.evaluation import evaluate_loss
from qlora_harness.train.held_out import HeldOut, check_held_out
from qlora_harness.train.loading import RunModel, load_model, plan_memory, refuse_fp8
from qlora_harness.train.memory_meter import MemoryMeter
from qlora_harness.train.model_card import refresh_card
from qlora_harness.train.ranks import (
    device_of,
    for_all,
    lost_process,
    on_main,
    say,
    shards_base,
    start_processes,
    watched,
)
from qlora_harness.train.run_folder import (
    StartingPoint,
    clear_run_folder,
    earlier_steps,
    find_start,
    lock_run_folder,
    remove_temporary_files,
)
from qlora_harness.train.run_record import RunRecord
from qlora_harness.train.signals import StopOnSignal, sigterm_as_ctrl_c, sigterm_ignored
from qlora_harness.train.trainer import CountingTrainer, StepLog
from qlora_harness.train.window import check_window


def run_training(
    settings: Settings,
    *,
    resume_given: bool = False,
    on_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Trains one arm, writes its run folder and returns the summary; `on_row` gets each step's row.

    Raises HarnessError; the folder then says "failed", or is untouched if training had not begun.
    """
    try:
        return _run_training(settings, resume_given, on_row)
    except RuntimeError as error:
        raise lost_process(error) or error from None


def _run_training(
    settings: Settings, resume_given: bool, on_row: Callable[[Mapping[str, Any]], None] | None
) -> dict[str, Any]:
    with sigterm_as_ctrl_c():
        state = start_processes()
        check_can_run(settings)
        if shards_base(state):
            check_can_shard(settings)
        find = partial(
            find_start,
            *(settings.run_dir, settings, state.num_processes),
            resume_given=resume_given,
        )
        start = on_main(state, find)
        for note in start.notes:
            say(state, f"{settings.run_dir}: skipped {note}")
        if start.nothing_to_do and start.previous is not None:
            say(state, f"{settings.run_dir} holds this run, completed; nothing is left to do")
            return start.previous
        if settings.model.compute == "fp8":
            refuse_fp8(fp8.why_unavailable(device_of(state)))
        recorded = start.recorded("quantization", "compute_dtype")
        settings = with_compute_dtype(settings, state, recorded)
        run = _Run(settings, state, start, find, on_row)
        with watched(state, run.record.fail):
            return run.execute()


class _Run:
    """The state of one run; `execute` is its only entry."""

    loaded: RunModel
    trainer: CountingTrainer
    log: StepLog
    held_out: HeldOut | None = None  # None if no conversation is held out
    lock: FileLock | None = None

    def __init__(
        self,
        settings: Settings,
        state: PartialState,
        start: StartingPoint,
        find: Callable[..., StartingPoint],
        on_row: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        self.settings = settings
        self.chosen = settings  # with the choices of --memory applied
        self.state = state
        self.start = start
        self.find_start = find
        self.on_row = on_row
        self.run_dir = settings.run_dir
        self.trains_residual = settings.lora.init_lora_weights == "pissa"
        self.pissa_start = self.run_dir / CHECKPOINT_DIR / START_FILE
        self.device = device_of(state)
        self.memory = MemoryMeter(self.device, state.process_index)
        self.stop = StopOnSignal()
        self.earlier_rows: list[dict[str, Any]] = []
        self.losses = EvaluationLosses()
        resumed = None if start.checkpoint is None else start.previous or {}
        self.record = RunRecord(settings, state, self.device, self.memory, resumed)

    def execute(self) -> dict[str, Any]:
        """Runs every phase and returns the summary."""
        if self.trains_residual and self.start.checkpoint is not None:
            pissa_start(self.start.checkpoint)
        source = find_base(self.settings.model.model, self.settings.model.revision)
        if self.start.checkpoint is None:  # earlier versions let runs exceed it
            check_window(self.settings, source)
        tokenizer = load_tokenizer(source)
        # The main process goes first: it fills the cache that the others read.
        with self.record.timed("data"), self.state.main_process_first():
            data = load_training_data(tokenizer, self.settings.data)
        fingerprint = data.report["train"]["fingerprint"]
        self.start.check_same(self.run_dir, fingerprint, "data", "train", "fingerprint")
        check_held_out(self.settings, data)
        say(self.state, _description(self.settings, source, data, self.device))
        self.chosen, plan = plan_memory(self.settings, self.state, source, data.train.lengths)
        with self.record.timed("load"), self.memory.phase("load"):
            self.loaded = load_model(self.chosen, self.state, source, data, self.start.checkpoint)
        self._check_same_computation()
        try:
            self._begin(source, data, plan)
            try:
                self._prepare_trainer(tokenizer, data)
                if self.held_out is not None and self.start.checkpoint is None:
                    self.held_out.before()
                self._train()
                self._save_adapter(source, tokenizer, data)
                if self.held_out is not None:
                    self.held_out.after()
                    self.log.write()
                self.record.finish("completed", self.log.rows, self.earlier_rows)
            except BaseException as error:
                with sigterm_ignored():
                    self._fail(lost_process(error) or error)
                if is_out_of_memory(error):
                    raise self._memory_advice() from error
                raise
        finally:
            if self.lock is not None:
                self.lock.release()
            if self.loaded.fused is not None:
                self.loaded.fused.detach()  # the weights may be those of later runs, too
        if self.state.is_main_process:
            refresh_card(self.run_dir)
        return self.record.content

    def _check_same_computation(self) -> None:
        """Refuses to resume on other weights or with another computation."""
        computation = self.loaded.computation(self.chosen)
        if self.start.recorded("environment", "world_size") not in (None, self.state.num_processes):
            # Other processes share the examples of a step differently; `find_start` has checked it.
            del computation["batch_size"], computation["grad_accum"]
        for name, value in computation.items():
            self.start.check_same(self.run_dir, value, "computation", name)
        fingerprint = self.loaded.base_fingerprint
        self.start.check_same(self.run_dir, fingerprint, "model", "weights_fingerprint")
        if self.start.checkpoint is not None:
            check_fits(self.start.checkpoint, self.loaded.model)

    def _begin(self, source: BaseSource, data: TrainingData, plan: dict[str, Any] | None) -> None:
        """Takes the run folder and writes the first record."""
        if self.start.checkpoint is not None:
            self.earlier_rows, self.losses = earlier_steps(self.start.checkpoint)
        on_main(self.state, self._take_folder)
        if self.trains_residual and self.state.is_main_process:
            save_pissa_start(self.loaded.model, self.pissa_start)
        self.record.begin(
            *(source, self.loaded.model, data),
            fingerprint=self.loaded.base_fingerprint,
            computation=self.loaded.computation(self.chosen),
            plan=plan,
        )

    def _take_folder(self) -> None:
        self.lock = lock_run_folder(self.run_dir)
        if self.find_start(has_lock=True) != self.start:
            raise RunError(
                f"another run changed {self.run_dir} while this one loaded its model",
                "Run the command again, or use another --output-dir",
            )
        remove_temporary_files(self.run_dir)
        if self.start.replace:
            clear_run_folder(self.run_dir)

    def _prepare_trainer(self, tokenizer: Any, data: TrainingData) -> None:
        settings, fused = self.settings, self.loaded.fused is not None
        self.pad_id = padding_id(tokenizer)
        self.steps = planned_steps(settings.optimization, len(data.train), self.state.num_processes)
        arguments = training_arguments(
            self.chosen.optimization,
            checkpoint_dir=self.run_dir / CHECKPOINT_DIR,
            steps=self.steps,
            save_steps=settings.run.save_steps,
            report_to=settings.run.report_to,
            compute_dtype=settings.model.compute_dtype,
            use_cpu=self.device.type == "cpu",
            fused=fused,
        )
        example = show(data.train[0], tokenizer)
        say(self.state, f"first example, learned parts in ⟦ ⟧:\n{example}\n")
        transformers_logging.set_verbosity_error()  # else Trainer prints every row
        log = StepLog(self.run_dir, self.memory, list(self.earlier_rows), self.on_row)
        self.trainer = log.trainer = CountingTrainer(
            model=self.loaded.model,
            args=arguments,
            train_dataset=ExampleSet(data.train),
            data_collator=pack_batch if fused else partial(pad_batch, pad_id=self.pad_id),
            callbacks=[self.stop, log],
        )
        self.log = log
        if data.evaluation:
            self.held_out = log.held_out = self._hold_out(data.evaluation)
        self.memory.optimizer = lambda: self.trainer.optimizer

    def _hold_out(self, examples: Sequence[Example]) -> HeldOut:
        settings = self.settings
        dtype = getattr(torch, settings.model.compute_dtype)
        evaluate = partial(
            evaluate_loss,
            cast(torch.nn.Module, self.trainer.model),
            examples,
            batch_size=1 if self._mixes_texts() else settings.optimization.eval_batch_size,
            pad_id=self.pad_id,
            accelerator=self.trainer.accelerator,
            autocast_dtype=None if dtype == torch.float32 else dtype,
            fused=self.loaded.fused is not None,
        )
        every = self.settings.run.eval_steps
        return HeldOut(evaluate, every, self.losses, self.record, self.memory)

    def _mixes_texts(self) -> bool:
        """Whether the loss of a conversation depends on the others of its batch."""
        by_length = why_by_length(base_of(self.trainer.model).config)
        return self.settings.quant is Quant.INT8 or by_length is not None

    def _train(self) -> None:
        """Trains to the last step; raises TrainingError if a signal stops the run first."""
        checkpoint, trainer, log = self.start.checkpoint, self.trainer, self.log
        done = 0 if checkpoint is None else checkpoint_step(checkpoint)
        if checkpoint is not None and done >= self.steps:
            # Stopped after its last step: Trainer would take one more.
            try:
                trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_FILE))
                cast(Any, trainer.model).load_adapter(str(checkpoint), "default", is_trainable=True)
            except Exception as error:  # noqa: BLE001  # PEFT and safetensors raise many kinds
                raise cannot_be_loaded(checkpoint, error) from None
        else:
            resume_from = None if checkpoint is None else str(checkpoint)
            with self.record.timed("train"), self.memory.phase("train"), self.stop.installed():
                trainer.train(resume_from_checkpoint=resume_from)
        if self.loaded.fused is not None:
            self.record.graph_passes = self.loaded.fused.graphs.passes
        last = trainer.state.global_step
        log.check_complete(done + 1, last)
        log.write()
        if self.state.is_main_process:
            temporary = self.run_dir / f".{TRAINER_STATE_FILE}.tmp"
            trainer.state.save_to_json(str(temporary))
            temporary.replace(self.run_dir / TRAINER_STATE_FILE)
        self.record.trained(
            log.rows, last, self.losses.loss_before if self.losses.nll_before else None
        )
        if self.stop.received and last < self.steps:
            self.record.finish("interrupted", log.rows, self.earlier_rows)
            stopped = TrainingError(
                f"{self.stop.received} stopped the run at step {last} of {self.steps}; a "
                "checkpoint was saved",
                "Run the same command again to resume",
            )
            raise for_all(self.state, stopped)

    def _save_adapter(self, source: BaseSource, tokenizer: Any, data: TrainingData) -> None:
        if not self.state.is_main_process:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        # The adapter has learned this template, not the base's own.
        tokenizer.chat_template = chat_template(
            self.settings.data.template,
            leading_bos=bool(data.report["leading_bos"]),
            own=tokenizer.chat_template,
        )
        record = adapter_record(source, self.loaded.base_fingerprint, self.settings, data)
        try:
            save_adapter(
                *(model, tokenizer, self.run_dir / ADAPTER_DIR, record),
                pissa_start=self.pissa_start if self.trains_residual else None,
            )
        except AdapterError as error:
            raise TrainingError(error.problem, error.remedy) from None

    def _fail(self, error: BaseException) -> None:
        print(file=sys.stderr, flush=True)  # ends the line of the progress bar
        if hasattr(self, "log"):
            with contextlib.suppress(Exception):
                self.log.log_pending()  # the previous step may be complete but not logged
            self.log.write()
        self.record.fail(error)

    def _memory_advice(self) -> TrainingError:
        optimization = self.chosen.optimization
        return TrainingError(
            f"{self.device} ran out of memory with --batch-size {optimization.batch_size} and "
            f"--max-length {self.settings.data.max_length}",
            "Use --memory balanced or lean, halve --batch-size and double --grad-accum, lower "
            "--max-length, or use --quant nf4",
        )


def _description(
    settings: Settings, source: BaseSource, data: TrainingData, device: torch.device
) -> str:
    report = data.report
    train, held_out = report["train"], report["eval"]
    dropped = ", ".join(f"{n} {reason}" for reason, n in report["dropped"].items()) or "none"
    rows = (
        f"{report['trees']} trees, {report['messages']} messages"
        if "messages" in report
        else f"{report['rows']} rows in the form {report['form']}"
    )
    note = " (random weights)" if source.random_weights else ""
    return (
        f"{source.name}{note}, {settings.quant.value}, into {settings.run_dir}, on {device}\n"
        f"data: {report['source']}: {rows}; dropped: {dropped}\n"
        f"train: {train['conversations']} conversations, {train['tokens']:,} tokens, "
        f"{train['supervised_tokens']:,} learned; {train['truncated']} truncated to "
        f"{settings.data.max_length}, {train['without_supervised_token']} left out\n"
        f"evaluation ({report['evaluation_source']}): {held_out['conversations']} "
        f"conversations, {held_out['supervised_tokens']:,} learned tokens"
    )

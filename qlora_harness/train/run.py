"""One training run from settings to adapter and record."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from filelock import FileLock
from transformers import TrainerState
from transformers.utils import logging as transformers_logging

from qlora_harness.data.chat import chat_template, show
from qlora_harness.data.corpus import TrainingData, load_chosen_data
from qlora_harness.errors import (
    AdapterError,
    HarnessError,
    RunError,
    SettingsError,
    TrainingError,
    printable,
)
from qlora_harness.fused.host_memory import memory_of_a_process
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.base import (
    BaseSource,
    find_base,
    is_out_of_memory,
    load_base,
    load_tokenizer,
    weights_fingerprint,
)
from qlora_harness.model.lora import public_name, save_adapter
from qlora_harness.record import (
    ADAPTER_DIR,
    CHECKPOINT_DIR,
    SCHEMA_VERSION,
    TRAINER_STATE_FILE,
    nested,
    scrub_all,
)
from qlora_harness.schema.training import EvaluationLosses
from qlora_harness.settings import Settings
from qlora_harness.train.adapter import attach_adapter
from qlora_harness.train.arguments import planned_steps, training_arguments
from qlora_harness.train.batches import ExampleSet, pack_batch, pad_batch, padding_id
from qlora_harness.train.checkpoints import check_fits, checkpoint_step
from qlora_harness.train.cpu import bfloat16_slowdown, use_all_cores
from qlora_harness.train.evaluation import EvaluationLoss, evaluate_loss
from qlora_harness.train.memory import MemoryMeter
from qlora_harness.train.memory_choice import choose
from qlora_harness.train.model_shape import measure_shape
from qlora_harness.train.plan_text import describe, host_shortage, one_pass
from qlora_harness.train.run_folder import (
    StartingPoint,
    clear,
    inspect,
    lock,
    read_log,
    read_steps,
    remove_temporary_files,
    run_of,
)
from qlora_harness.train.run_record import RunRecord
from qlora_harness.train.trainer import CountingTrainer, StepLog, StopOnSignal

_Result = TypeVar("_Result")


def run_training(settings: Settings, *, resume_given: bool = False) -> dict[str, Any]:
    """Trains one arm and writes its run folder.

    Args:
        settings: What to do.
        resume_given: Whether the user asked to resume.

    Returns:
        The training summary, as stored.

    Raises:
        HarnessError: Anything the user can mend; the folder then says "failed", or is untouched if
            training had not begun.
    """
    with _interruptible():
        return _run_training(settings, resume_given)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Inside the `with` block SIGTERM ends a run as Ctrl-C does: its record says so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run_training(settings: Settings, resume_given: bool) -> dict[str, Any]:
    state = _process_state()
    if not state.is_main_process:
        logging.getLogger("qlora_harness").setLevel(logging.ERROR)  # a warning is said once
    _check_launch(state)
    _check_report_to(settings.run.report_to)
    run_dir = settings.run_dir

    def find_start(has_lock: bool) -> StartingPoint:
        return inspect(run_dir, settings, resume_given=resume_given, has_lock=has_lock)

    start = _on_main(state, lambda: find_start(False))
    for note in start.notes:
        _say(state, f"{run_dir}: passed over {note}")
    if start.nothing_to_do and start.previous is not None:
        _say(state, f"{run_dir} holds this run already, completed; nothing is left to do")
        return start.previous
    settings = _with_compute_dtype(settings, state, start)
    return _Run(settings, state, start, find_start).execute()


def _on_main(state: PartialState, work: Callable[[], _Result]) -> _Result:
    """The result of the main process for all; what it refuses, all refuse."""
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome[0] = work()
        except HarnessError as error:
            outcome[0] = error
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(outcome)
    if isinstance(outcome[0], HarnessError):
        raise outcome[0]
    result: _Result = outcome[0]
    return result


def _with_compute_dtype(settings: Settings, state: PartialState, start: StartingPoint) -> Settings:
    """Puts a dtype in place of "auto", and says how the CPU computes."""
    on_cpu = state.device.type == "cpu"
    notes = []
    if on_cpu and use_all_cores():
        notes.append(
            f"{torch.get_num_threads()} threads (accelerate launch "
            "--num_cpu_threads_per_process N sets another number)"
        )
    dtype = settings.model.compute_dtype
    if dtype == "auto":
        recorded = nested(start.previous or {}, "quantization", "compute_dtype")
        if start.checkpoint is not None and recorded in ("bfloat16", "float32"):
            dtype = recorded
        elif not on_cpu:
            dtype = "bfloat16"
        else:
            slowdown = _on_main(state, bfloat16_slowdown)
            # Clearly faster: a choice at the edge could give the arms of a comparison two dtypes.
            dtype = "bfloat16" if slowdown < 2 / 3 else "float32"
            notes.insert(0, f"{dtype} (bfloat16 takes {slowdown:.1f} times as long as float32)")
    if notes:
        _say(state, f"on the CPU: {', '.join(notes)}")
    model = dataclasses.replace(settings.model, compute_dtype=dtype)
    return dataclasses.replace(settings, model=model)


def _process_state() -> PartialState:
    """This process among the others; `accelerate launch --cpu`, and no GPU, mean the CPU."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return PartialState(cpu=asked or not torch.cuda.is_available())


def _check_report_to(name: str) -> None:
    if name != "none" and find_spec(name) is None:
        raise SettingsError(
            f"--report-to {name} needs a package that is not installed", f"pip install {name}"
        )


def _check_launch(state: PartialState) -> None:
    on_gpu = state.device.type == "cuda"
    if on_gpu and state.num_processes == 1 and torch.cuda.device_count() > 1:
        raise SettingsError(
            f"{torch.cuda.device_count()} GPUs are visible to one process",
            "Use `accelerate launch --multi_gpu launch/train.py …`, or set CUDA_VISIBLE_DEVICES=0",
        )


def _say(state: PartialState, text: str) -> None:
    if state.is_main_process:
        print(printable(text, keep="\n"), flush=True)


class _Run:
    """The state of one run; `execute` is its only entry."""

    def __init__(
        self,
        settings: Settings,
        state: PartialState,
        start: StartingPoint,
        find_start: Callable[[bool], StartingPoint],
    ) -> None:
        self.settings = settings
        # The same with what --memory chose in place of its own.
        self.chosen = settings
        self.plan: dict[str, Any] | None = None
        self.state = state
        self.start = start
        self.find_start = find_start
        self.lock: FileLock | None = None
        self.run_dir = settings.run_dir
        # LOCAL rank: the global one would name a GPU that a second machine does not have.
        cuda = state.device.type == "cuda"
        self.device = torch.device("cuda", state.local_process_index) if cuda else state.device
        self.memory = MemoryMeter(self.device, state.process_index)
        self.stop = StopOnSignal()
        self.log: StepLog | None = None
        self.earlier_rows: list[dict[str, Any]] = []
        resumed = None if start.checkpoint is None else start.previous or {}
        self.record = RunRecord(settings, state, self.device, self.memory, resumed)

    def execute(self) -> dict[str, Any]:
        settings = self.settings
        source = find_base(settings.model.model, settings.model.revision)
        tokenizer = load_tokenizer(source)
        # The main process goes first: it fills the cache that the others read.
        with self.record.timed("data"), self.state.main_process_first():
            data = load_chosen_data(tokenizer, settings.data)
        self._check_same_data(data)
        self._describe(source, data)
        self._plan_memory(source, data)
        with self.record.timed("load"), self.memory.phase("load"):
            model = self._load_model(source)
        try:
            self._begin(source, data, model)
            try:
                return self._train_and_evaluate(model, tokenizer, data, source)
            except BaseException as error:
                self._fail(error)
                if is_out_of_memory(error):
                    raise self._memory_advice() from error
                raise
        finally:
            if self.lock is not None:
                self.lock.release()

    def _check_same_data(self, data: TrainingData) -> None:
        """A resumed run must go on with the tokens that it began with."""
        before = nested(self.start.previous or {}, "data", "train", "fingerprint")
        now_found = data.report["train"]["fingerprint"]
        if self.start.checkpoint is not None and before not in (None, now_found):
            raise RunError(
                f"{self.run_dir} holds a run on other data (fingerprint {before}, now {now_found})",
                "Restore the data, use --overwrite to start again, or another --output-dir",
            )

    def _describe(self, source: BaseSource, data: TrainingData) -> None:
        report, settings = data.report, self.settings
        train, held_out = report["train"], report["eval"]
        dropped = ", ".join(f"{n} {reason}" for reason, n in report["dropped"].items()) or "none"
        note = " (random weights)" if source.random_weights else ""
        lines = [
            f"{source.name}{note}, {settings.quant.value}, into {self.run_dir}, on {self.device}",
            f"data: {report['source']}: {report['trees']} trees, {report['messages']} messages; "
            f"dropped: {dropped}",
            f"train: {train['conversations']} conversations, {train['tokens']:,} tokens, "
            f"{train['supervised_tokens']:,} learned; {train['truncated']} truncated to "
            f"{settings.data.max_length}, {train['without_supervised_token']} left out",
            f"evaluation ({report['evaluation_source']}): {held_out['conversations']} "
            f"conversations, {held_out['supervised_tokens']:,} learned tokens",
        ]
        _say(self.state, "\n".join(lines))

    def _plan_memory(self, source: BaseSource, data: TrainingData) -> None:
        """Applies --memory, and says what the peak on a GPU will be."""
        asked = self.settings.optimization.memory
        if self.device.type != "cuda" and asked is None:
            return
        shape = measure_shape(source.path, source.revision, self.settings.lora.lora_targets)
        lengths = [len(e.input_ids) for e in data.train]
        self.chosen, plan, tokens = choose(shape, self.settings, lengths)
        self.plan = plan.record() | {"tokens_per_pass": tokens}
        _say(self.state, describe(plan, tokens))
        shortage = host_shortage(plan, memory_of_a_process())
        if shortage is not None:
            _say(self.state, shortage)
        if self.device.type == "cuda" and self.start.checkpoint is None:
            free, _ = torch.cuda.mem_get_info(self.device)
            faster = one_pass(shape, self.settings, lengths, free)
            if faster is not None:
                _say(self.state, faster)

    def _load_model(self, source: BaseSource) -> Any:
        settings = self.chosen
        model = load_base(
            source,
            quant=settings.quant,
            double_quant=settings.model.double_quant,
            compute_dtype=settings.model.compute_dtype,
            device=self.device,
        )
        self.base_fingerprint = weights_fingerprint(model)
        model = attach_adapter(model, settings)
        # PEFT writes this into every adapter folder, which people upload: no path of this machine.
        model.peft_config["default"].base_model_name_or_path = public_name(source.name)
        model.config._name_or_path = public_name(source.name)
        # The vocabulary never grows; "auto" asks the Hub about that name at every checkpoint.
        model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
        self.fused = self._fuse(model)
        return model

    def _fuse(self, model: Any) -> bool:
        """Gives the model fused layers where it can have them."""
        optimization = self.chosen.optimization
        auto = optimization.kernels == "auto"
        reason = FusedDecoder.reason_against(model) if auto else "--kernels none"
        if reason is None:
            FusedDecoder.attach(model, optimization.checkpointing)
            return True
        if optimization.checkpointing in ("selective", "offload"):
            raise SettingsError(
                f"--checkpointing {optimization.checkpointing} needs fused layers, and "
                f"{self.settings.model.model} has none: {reason}",
                "Use --checkpointing full or none",
            )
        if auto:
            _say(self.state, f"PEFT's own modules and padded batches: {reason}")
        return False

    def _begin(self, source: BaseSource, data: TrainingData, model: Any) -> None:
        """From here on the run folder is ours."""
        computation = self._computation()
        before = nested(self.start.previous or {}, "computation")
        changed = [name for name in computation if before and before.get(name) != computation[name]]
        if self.start.checkpoint is not None and changed:
            raise RunError(
                f"{self.run_dir} was begun in another way: {changed[0]} was "
                f"{before.get(changed[0])}, and is now {computation[changed[0]]}",
                "Go on with the version of qlora-harness that began it, use --overwrite, or "
                "another --output-dir",
            )
        fingerprint = nested(self.start.previous or {}, "model", "weights_fingerprint")
        if self.start.checkpoint is not None:
            if fingerprint not in (None, self.base_fingerprint):
                raise RunError(
                    f"{self.run_dir}: the weights of {source.name} are others than those that the "
                    f"run began with (weights_fingerprint {fingerprint}, now "
                    f"{self.base_fingerprint})",
                    "Restore the base, or use another --output-dir",
                )
            check_fits(self.start.checkpoint, model)
        self.earlier_rows = self._earlier_rows()
        _on_main(self.state, self._take_folder)
        self.record.begin(
            source,
            model,
            data,
            fingerprint=self.base_fingerprint,
            computation=computation,
            plan=self.plan,
        )

    def _take_folder(self) -> None:
        """Locks the run folder and removes what is replaced."""
        self.lock = lock(self.run_dir)
        if self.find_start(True) != self.start:  # changed while the model was loaded
            raise RunError(
                f"{self.run_dir} was changed by another run in the meantime",
                "Give the command again, or use another --output-dir",
            )
        remove_temporary_files(self.run_dir)
        if self.start.replace:
            clear(self.run_dir)

    def _computation(self) -> dict[str, Any]:
        """How the steps are computed: what --memory and the model's kind decide."""
        return {
            "fused_layers": self.fused,
            "padding": "none" if self.fused else "right",
            "checkpointing": self.chosen.optimization.checkpointing,
            "optimizer": self.chosen.optimization.optimizer,
            "adapter_dtype": self.chosen.lora.adapter_dtype,
            "batch_size": self.chosen.optimization.batch_size,
            "grad_accum": self.chosen.optimization.grad_accum,
        }

    def _train_and_evaluate(
        self, model: Any, tokenizer: Any, data: TrainingData, source: BaseSource
    ) -> dict[str, Any]:
        settings = self.settings
        pad = padding_id(tokenizer)
        steps = planned_steps(settings.optimization, len(data.train), self.state.num_processes)
        arguments = training_arguments(
            self.chosen.optimization,
            checkpoint_dir=self.run_dir / CHECKPOINT_DIR,
            steps=steps,
            save_steps=settings.run.save_steps,
            report_to=settings.run.report_to,
            compute_dtype=settings.model.compute_dtype,
            use_cpu=self.device.type == "cpu",
            fused=self.fused,
        )
        log = self.log = StepLog(self.run_dir, self.memory, list(self.earlier_rows))
        if self.state.is_main_process:
            example = printable(show(data.train[0], tokenizer), keep="\n")
            print(f"first example, learned parts in ⟦ ⟧:\n{example}\n", flush=True)
        # Trainer resets the log level to "warning", which repeats every step's row on the screen.
        transformers_logging.set_verbosity_error()
        trainer = CountingTrainer(
            model=model,
            args=arguments,
            train_dataset=ExampleSet(data.train),
            data_collator=pack_batch if self.fused else partial(pad_batch, pad_id=pad),
            callbacks=[log, self.stop],
        )
        log.trainer = trainer
        trainer.step_log = log
        self.memory.optimizer = lambda: trainer.optimizer
        checkpoint = self.start.checkpoint

        def evaluate() -> EvaluationLoss:
            return evaluate_loss(
                trainer.model,
                data.evaluation,
                batch_size=settings.optimization.eval_batch_size,
                pad_id=pad,
                accelerator=trainer.accelerator,
                autocast_dtype=torch.bfloat16 if arguments.bf16 else None,
                fused=self.fused,
            )

        losses = self._losses_before(checkpoint)
        if data.evaluation and checkpoint is None:
            with self.memory.phase("evaluate_before"):
                untrained = evaluate()
            if math.isfinite(untrained.loss):
                losses.nll_before = [nll for nll, _ in untrained.conversations]
                losses.tokens = [tokens for _, tokens in untrained.conversations]
        if losses.nll_before:
            log.evaluation = losses
            self.record.evaluated_before(losses.loss_before)
        if checkpoint is not None and checkpoint_step(checkpoint) >= steps:
            # It was stopped after its last step: Trainer would take one more.
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            trainer._load_from_checkpoint(str(checkpoint))
        else:
            resume_from = str(checkpoint) if checkpoint else None
            with self.record.timed("train"), self.memory.phase("train"), self.stop.installed():
                trainer.train(resume_from_checkpoint=resume_from)
        log.write()
        if self.state.is_main_process:
            _save_state(trainer.state, self.run_dir / TRAINER_STATE_FILE)
        self.record.trained(log.rows, trainer.state.global_step)
        if self.stop.received and trainer.state.global_step < steps:
            self.record.finish("interrupted", log.rows, self.earlier_rows)
            raise TrainingError(
                f"{self.stop.received} stopped the run at step {trainer.state.global_step} of "
                f"{steps}; a checkpoint was saved",
                "Give the same command again to go on",
            )
        if self.state.is_main_process:
            adapter_record = {
                "schema_version": SCHEMA_VERSION,
                "kind": "adapter",
                "base": source.record() | {"weights_fingerprint": self.base_fingerprint},
                "quant": settings.quant.value,
                "double_quant": settings.model.double_quant,
                "compute_dtype": settings.model.compute_dtype,
                "data_fingerprint": data.report["train"]["fingerprint"],
                "template": settings.data.template,
                "run": self.run_dir.name,
            }
            adapter_record = scrub_all(adapter_record)
            # The base's own would not be what this adapter has learned.
            tokenizer.chat_template = chat_template(settings.data.template, tokenizer)
            unwrapped = trainer.accelerator.unwrap_model(trainer.model)
            try:
                save_adapter(unwrapped, tokenizer, self.run_dir / ADAPTER_DIR, adapter_record)
            except AdapterError as error:  # here it is the run that failed
                raise TrainingError(error.problem, error.remedy) from None
        if data.evaluation:
            with self.record.timed("eval"), self.memory.phase("evaluate"):
                evaluation = evaluate()
            if not math.isfinite(evaluation.perplexity):
                raise TrainingError(
                    f"the evaluation loss is {evaluation.loss:g}, of which no perplexity follows",
                    "Lower --learning-rate or look at the step log",
                )
            self.record.evaluated(evaluation)
            losses.nll = [nll for nll, _ in evaluation.conversations]
            losses.tokens = [tokens for _, tokens in evaluation.conversations]
            log.evaluation = losses
            log.write()
        self.record.finish("completed", log.rows, self.earlier_rows)
        return self.record.content

    def _losses_before(self, checkpoint: Path | None) -> EvaluationLosses:
        """The evaluation before the first step of the run that this one goes on from."""
        earlier = None if checkpoint is None else read_log(run_of(checkpoint))
        if earlier is None or not earlier.evaluation.nll_before:
            return EvaluationLosses()
        evaluation = earlier.evaluation
        return EvaluationLosses(nll_before=evaluation.nll_before, tokens=evaluation.tokens)

    def _earlier_rows(self) -> list[dict[str, Any]]:
        """The step rows before the checkpoint that this run goes on from."""
        checkpoint = self.start.checkpoint
        if checkpoint is None:
            return []
        return read_steps(run_of(checkpoint), checkpoint_step(checkpoint))

    def _fail(self, error: BaseException) -> None:
        print(file=sys.stderr, flush=True)  # ends the line of the progress bar
        if self.log is not None:
            if self.log.trainer is not None:
                # The step before may be done, and not logged yet.
                with contextlib.suppress(Exception):
                    self.log.trainer.log_held()
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


def _save_state(state: TrainerState, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    state.save_to_json(str(temporary))
    os.replace(temporary, path)

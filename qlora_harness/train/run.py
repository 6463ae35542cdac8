"""One training run from settings to adapter and record."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerState
from transformers.utils import logging as transformers_logging

from qlora_harness.data.chat import ChatEncoder, show
from qlora_harness.data.corpus import TrainingData, load_training_data
from qlora_harness.errors import (
    AdapterError,
    HarnessError,
    RunError,
    SettingsError,
    TrainingError,
)
from qlora_harness.fused.model import install, why_not_fused
from qlora_harness.model.base import (
    BaseSource,
    find_base,
    is_out_of_memory,
    load_base,
    load_tokenizer,
    parameter_dtypes,
    weights_fingerprint,
)
from qlora_harness.model.kernels import has_liger
from qlora_harness.model.lora import save_adapter
from qlora_harness.record import (
    ADAPTER_DIR,
    CHECKPOINT_DIR,
    LOGS_FILE,
    SCHEMA_VERSION,
    SUMMARY_FILE,
    TRAINER_STATE_FILE,
    environment,
    nested,
    now,
    read_json,
    scrub_all,
    write_json,
)
from qlora_harness.settings import Settings
from qlora_harness.train.adapter import attach_adapter
from qlora_harness.train.arguments import planned_steps, training_arguments
from qlora_harness.train.batches import ExampleSet, pack_batch, pad_batch, padding_id
from qlora_harness.train.evaluation import EvaluationLoss, evaluate_loss
from qlora_harness.train.memory import MemoryMeter, summarise
from qlora_harness.train.plan import choose, describe, measure_shape
from qlora_harness.train.run_folder import StartingPoint, checkpoint_step, clear, inspect
from qlora_harness.train.trainer import CountingTrainer, StepLog, StopOnSignal

# Steps left out of the steady throughput: kernels are chosen and memory is mapped in them.
WARM_UP_STEPS = 3


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
    state = _process_state()
    _check_launch(state)
    _check_report_to(settings.run.report_to)
    run_dir = settings.run_dir
    start = inspect(
        run_dir,
        experiment=settings.experiment(),
        resume=settings.run.resume,
        resume_given=resume_given,
        overwrite=settings.run.overwrite,
    )
    if start.nothing_to_do and start.previous is not None:
        _say(state, f"{run_dir} holds this run already, completed; nothing is left to do")
        return start.previous
    return _Run(settings, state, start).execute()


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
        print(text, flush=True)


class _Run:
    """The state of one run; `execute` is its only entry."""

    def __init__(self, settings: Settings, state: PartialState, start: StartingPoint) -> None:
        self.settings = settings
        # The same with what --memory chose in place of its own.
        self.chosen = settings
        self.plan: dict[str, Any] | None = None
        self.state = state
        self.start = start
        self.run_dir = settings.run_dir
        # LOCAL rank: the global one would name a GPU that a second machine does not have.
        cuda = state.device.type == "cuda"
        self.device = torch.device("cuda", state.local_process_index) if cuda else state.device
        self.memory = MemoryMeter(self.device, state.process_index)
        self.seconds: dict[str, float] = {}
        self.stop = StopOnSignal()
        self.log: StepLog | None = None
        self.earlier_rows: list[dict[str, Any]] = []
        self.began = time.perf_counter()
        self.summary: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": "training_summary",
            "status": "running",
            "arm": settings.quant.arm,
            "quant": settings.quant.value,
            "started": now(),
            "finished": None,
        }

    def execute(self) -> dict[str, Any]:
        settings = self.settings
        source = find_base(settings.model.model, settings.model.revision)
        tokenizer = load_tokenizer(source)
        with self._timed("data"):
            data = self._load_data(tokenizer)
        self._check_same_data(data)
        self._describe(source, data)
        self._plan_memory(source, data)
        with self._timed("load"), self.memory.phase("load"):
            model = self._load_model(source)
        self._begin(source, data, model)
        try:
            outcome = self._train_and_evaluate(model, tokenizer, data, source)
        except BaseException as error:
            self._fail(error)
            if is_out_of_memory(error):
                raise self._memory_advice() from error
            raise
        return outcome

    def _load_data(self, tokenizer: Any) -> TrainingData:
        chosen = self.settings.data
        encoder = ChatEncoder(tokenizer, chosen.template, chosen.max_length, chosen.mask)
        # The main process goes first: it fills the cache that the others read.
        with self.state.main_process_first():
            return load_training_data(
                encoder,
                chosen.dataset,
                revision=chosen.dataset_revision,
                languages=chosen.languages,
                paths=chosen.conversations,
                eval_fraction=chosen.eval_fraction,
            )

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
        self.fused = self._fuse(model)
        return model

    def _fuse(self, model: Any) -> bool:
        """Gives the model fused layers where it can have them."""
        optimization = self.chosen.optimization
        reason = why_not_fused(model) if optimization.kernels == "auto" else "--kernels none"
        if reason is None:
            install(model, optimization.checkpointing)
            return True
        if optimization.checkpointing in ("selective", "offload"):
            raise SettingsError(
                f"--checkpointing {optimization.checkpointing} needs fused layers, and "
                f"{self.settings.model.model} has none: {reason}",
                "Use --checkpointing full or none",
            )
        if optimization.kernels == "auto":
            _say(self.state, f"PEFT's own modules and padded batches: {reason}")
        return False

    def _begin(self, source: BaseSource, data: TrainingData, model: Any) -> None:
        """From here on the run folder is ours."""
        settings, main = self.settings, self.state.is_main_process
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        computation = self._computation()
        before = nested(self.start.previous or {}, "computation")
        if self.start.checkpoint is not None and before not in (None, computation):
            changed = [name for name in computation if before.get(name) != computation[name]]
            raise RunError(
                f"{self.run_dir} was begun in another way: {changed[0]} was "
                f"{before.get(changed[0])}, and is now {computation[changed[0]]}",
                "Give the flags that lead to the same, use --overwrite, or another --output-dir",
            )
        if self.start.replace and main:
            clear(self.run_dir)
        self.state.wait_for_everyone()
        quant = settings.quant
        self.summary |= {
            "model": source.record() | {"trainable_parameters": trainable},
            "quantization": {
                "quant": quant.value,
                "double_quant": settings.model.double_quant if quant.is_4bit else None,
                "compute_dtype": settings.model.compute_dtype,
                "parameter_dtypes": parameter_dtypes(model),
            },
            "computation": computation,
            "plan": self.plan,
            "settings": settings.flat() | {"output_dir": str(self.run_dir)},
            "data": data.report,
            "process": {"id": os.getpid(), "host": socket.gethostname()},
            "environment": environment()
            | {"device": _device(self.device), "world_size": self.state.num_processes},
            "failure": None,
        }
        self._write_summary()

    def _computation(self) -> dict[str, Any]:
        """How the steps are computed: what --memory and the model's kind decide."""
        return {
            "fused_layers": self.fused,
            "padding": "none" if self.fused else "right",
            "liger_kernels": self.fused and self.device.type == "cuda" and has_liger(),
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
        self.earlier_rows = self._earlier_rows()
        log = self.log = StepLog(self.run_dir, self.memory, list(self.earlier_rows))
        if self.state.is_main_process:
            shown = show(data.train[0], tokenizer)
            print(f"first example, learned parts in ⟦ ⟧:\n{shown}\n", flush=True)
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
        checkpoint = self.start.checkpoint
        if checkpoint is not None and checkpoint_step(checkpoint) >= steps:
            # It was stopped after its last step: Trainer would take one more.
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            trainer._load_from_checkpoint(str(checkpoint))
        else:
            resume_from = str(checkpoint) if checkpoint else None
            with self._timed("train"), self.memory.phase("train"), self.stop.installed():
                trainer.train(resume_from_checkpoint=resume_from)
        log.write()
        if self.state.is_main_process:
            _save_state(trainer.state, self.run_dir / TRAINER_STATE_FILE)
        self.summary["results"] = _results(log.rows, trainer.state.global_step)
        if self.stop.received and trainer.state.global_step < steps:
            self._finish("interrupted", log.rows)
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
                "run": self.run_dir.name,
            }
            adapter_record = scrub_all(adapter_record)
            unwrapped = trainer.accelerator.unwrap_model(trainer.model)
            try:
                save_adapter(unwrapped, tokenizer, self.run_dir / ADAPTER_DIR, adapter_record)
            except AdapterError as error:  # here it is the run that failed
                raise TrainingError(error.problem, error.remedy) from None
        if data.evaluation:
            with self._timed("eval"), self.memory.phase("evaluate"):
                evaluation = evaluate_loss(
                    trainer.model,
                    data.evaluation,
                    batch_size=settings.optimization.eval_batch_size,
                    pad_id=pad,
                    accelerator=trainer.accelerator,
                    autocast_dtype=torch.bfloat16 if arguments.bf16 else None,
                    fused=self.fused,
                )
            if not math.isfinite(evaluation.perplexity):
                raise TrainingError(
                    f"the evaluation loss is {evaluation.loss:g}, of which no perplexity follows",
                    "Lower --learning-rate or look at the step log",
                )
            self.summary["results"] |= _evaluation_results(evaluation)
            log.evaluation = {
                "nll": [nll for nll, _ in evaluation.conversations],
                "tokens": [tokens for _, tokens in evaluation.conversations],
            }
            log.write()
        self._finish("completed", log.rows)
        return self.summary

    def _earlier_rows(self) -> list[dict[str, Any]]:
        """The step rows before the checkpoint that this run goes on from."""
        if self.start.checkpoint is None or not (self.run_dir / LOGS_FILE).is_file():
            return []
        last = checkpoint_step(self.start.checkpoint)
        rows = read_json(self.run_dir / LOGS_FILE).get("steps", [])
        return [row for row in rows if row["step"] <= last]

    def _finish(self, status: str, rows: list[dict[str, Any]]) -> None:
        phases = [vars(p) for p in self.memory.phases]
        if self.state.num_processes > 1:
            from accelerate.utils import gather_object

            phases = gather_object(phases)
        previous = self.start.previous or {}
        # A killed run has no runtime, but its step log has the seconds of each step.
        recorded = nested(previous, "runtime", "train_seconds") or 0.0
        before = max(recorded, sum(row["seconds"] for row in self.earlier_rows))
        self.summary["status"] = status
        self.summary["finished"] = now()
        self.summary["memory"] = summarise(phases, self.device.type)
        self.summary["runtime"] = {
            "train_seconds": self.seconds.get("train", 0.0) + before,
            "load_seconds": self.seconds.get("load"),
            "data_seconds": self.seconds.get("data"),
            "eval_seconds": self.seconds.get("eval"),
            "total_seconds": time.perf_counter() - self.began,
            "resumed": self.start.checkpoint is not None,
        }
        self.summary["throughput"] = _throughput(rows)
        self._write_summary()

    def _fail(self, error: BaseException) -> None:
        """Notes the failure; an interruption has been noted already."""
        print(file=sys.stderr, flush=True)  # ends the line of the progress bar
        if self.log is not None:
            self.log.write()
        if self.summary["status"] != "running":
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        self.summary["status"] = "interrupted" if interrupted else "failed"
        self.summary["finished"] = now()
        self.summary["memory"] = summarise([vars(p) for p in self.memory.phases], self.device.type)
        text = str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
        self.summary["failure"] = {"problem": text.splitlines()[0] if text else "stopped"}
        self._write_summary()

    def _memory_advice(self) -> TrainingError:
        optimization = self.chosen.optimization
        return TrainingError(
            f"{self.device} ran out of memory with --batch-size {optimization.batch_size} and "
            f"--max-length {self.settings.data.max_length}",
            "Use --memory balanced or lean, halve --batch-size and double --grad-accum, lower "
            "--max-length, or use --quant nf4",
        )

    def _write_summary(self) -> None:
        if self.state.is_main_process:
            write_json(self.run_dir / SUMMARY_FILE, scrub_all(self.summary))

    def _timed(self, name: str) -> _Timer:
        return _Timer(self.seconds, name, self.device)


class _Timer:
    """Measures the seconds of a `with` block, device work included."""

    def __init__(self, seconds: dict[str, float], name: str, device: torch.device) -> None:
        self._seconds, self._name, self._device = seconds, name, device

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda" and error[0] is None:
            torch.cuda.synchronize(self._device)
        self._seconds[self._name] = time.perf_counter() - self._start


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": device.type, "type": device.type, "total_memory_bytes": None, "count": 0}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "type": "cuda",
        "total_memory_bytes": properties.total_memory,
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def _results(rows: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The loss of the last step and means; Trainer's own mean covers this segment only."""
    losses = [row["loss"] for row in rows]
    last = losses[-10:]
    return {
        "steps": steps,
        "final_train_loss": losses[-1] if losses else None,
        "last_10_steps_train_loss": sum(last) / len(last) if last else None,
        "mean_train_loss": sum(losses) / len(losses) if losses else None,
        "eval_loss": None,
        "perplexity": None,
        "eval_tokens": None,
    }


def _evaluation_results(evaluation: EvaluationLoss) -> dict[str, Any]:
    return {
        "eval_loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "eval_tokens": evaluation.tokens,
    }


def _throughput(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens a second over the steps, with the first ones left out where there are enough."""
    steady = rows[WARM_UP_STEPS:] if len(rows) > 2 * WARM_UP_STEPS else rows
    seconds = sum(row["seconds"] for row in steady)
    if not seconds:
        return {"tokens_per_second": None, "supervised_tokens_per_second": None}
    return {
        "tokens_per_second": sum(row["tokens"] for row in steady) / seconds,
        "supervised_tokens_per_second": sum(row["supervised_tokens"] for row in steady) / seconds,
        "steps_per_second": len(steady) / seconds,
        "steps_measured": len(steady),
    }


def _save_state(state: TrainerState, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    state.save_to_json(str(temporary))
    os.replace(temporary, path)

"""Settings as arguments of transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.settings import OptimizationSettings

if TYPE_CHECKING:
    from transformers import TrainingArguments

OPTIMIZERS = {
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adamw_8bit": "adamw_bnb_8bit",
    "adamw_torch": "adamw_torch_fused",
}


def planned_steps(optimization: OptimizationSettings, examples: int, processes: int) -> int:
    """Returns the optimizer steps of a run over a number of examples."""
    if optimization.max_steps is not None:
        return optimization.max_steps
    assert optimization.epochs is not None
    per_step = optimization.batch_size * optimization.grad_accum * processes
    return max(1, math.ceil(optimization.epochs * examples / per_step))


def training_arguments(
    optimization: OptimizationSettings,
    *,
    checkpoint_dir: Path,
    steps: int,
    save_steps: int,
    report_to: str,
    compute_dtype: str,
    use_cpu: bool,
    fused: bool,
    kind: type[TrainingArguments] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> TrainingArguments:
    """Builds the TrainingArguments of a run, or a subclass `kind`; states every value that matters.

    `steps` are those of the whole run; `changes` are arguments to add or replace.
    """
    from transformers import TrainingArguments

    schedule = optimization.lr_schedule
    if schedule == "constant" and optimization.warmup_ratio > 0:
        schedule = "constant_with_warmup"  # Trainer's "constant" ignores the warm-up
    values: dict[str, Any] = {
        "output_dir": str(checkpoint_dir),
        "max_steps": steps,
        "per_device_train_batch_size": optimization.batch_size,
        "per_device_eval_batch_size": optimization.eval_batch_size,
        "gradient_accumulation_steps": optimization.grad_accum,
        "learning_rate": optimization.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": math.ceil(optimization.warmup_ratio * steps),
        "optim": OPTIMIZERS[optimization.optimizer],
        "adam_beta1": 0.9,
        "adam_beta2": optimization.adam_beta2,
        "adam_epsilon": 1e-8,
        "weight_decay": optimization.weight_decay,
        "max_grad_norm": optimization.max_grad_norm,
        "bf16": compute_dtype == "bfloat16",
        "fp16": compute_dtype == "float16",
        "seed": optimization.seed,
        "data_seed": optimization.seed,
        # StepLog logs every step; Trainer would wait for the device at each one.
        "logging_strategy": "no",
        "logging_steps": 1,
        # A NaN loss must be seen, not replaced by the mean of its neighbours.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "report_to": [] if report_to == "none" else [report_to],
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": not use_cpu,
        # `StepBatches` has as many batches for every process.
        "accelerator_config": {"non_blocking": not use_cpu, "even_batches": False},
        "use_cpu": use_cpu,
        # Trainer's tracker would reset our peak counters.
        "skip_memory_metrics": True,
        "disable_tqdm": False,
        "train_sampling_strategy": "group_by_length" if optimization.group_by_length else "random",
    }
    kind = TrainingArguments if kind is None else kind
    names = {f.name for f in dataclasses.fields(kind)}
    # transformers 5.2x renames gradient_checkpointing to activation_checkpointing.
    name = "activation" if "activation_checkpointing" in names else "gradient"
    values[f"{name}_checkpointing"] = optimization.checkpointing == "full" and not fused
    values[f"{name}_checkpointing_kwargs"] = {"use_reentrant": False}
    return kind(**values | dict(changes or {}))

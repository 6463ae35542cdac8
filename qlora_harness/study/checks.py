"""Checks a study before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from qlora_harness.data.corpus import TrainingData, load_training_data
from qlora_harness.errors import RunError, SettingsError
from qlora_harness.model.compute_dtype import check_training_dtype
from qlora_harness.model.source import find_base, load_tokenizer
from qlora_harness.settings import DataSettings, Settings
from qlora_harness.settings_checks import check_can_run, with_dtype
from qlora_harness.study.definition import Cell, Study
from qlora_harness.study.devices import Device
from qlora_harness.study.folder import StudyFolder
from qlora_harness.study.progress import summary_of
from qlora_harness.train.arguments import planned_steps
from qlora_harness.train.cpu import faster_dtype
from qlora_harness.train.held_out import check_held_out
from qlora_harness.train.memory_plan import CONTEXT, GIB, choose_memory_plan, measure_shape
from qlora_harness.train.window import check_window


@dataclass(frozen=True)
class ArmPlan:
    """The memory and steps of an arm, from its settings and data."""

    peak: int  # predicted bytes on a GPU, without the CUDA context
    steps: int  # optimizer steps
    tokens: float  # of all steps, on average
    evaluations: int  # of the held-out conversations, including those before and after training


def with_one_dtype(study: Study, devices: Sequence[Device]) -> Study:
    """Replaces the compute dtype "auto", once for all cells and all later commands.

    Unlike GPUs, or noise on a CPU, could otherwise give two arms two dtypes.
    """
    if devices[0].gpu is not None and all(device.has_bfloat16 for device in devices):
        return study
    recorded = StudyFolder(study).read()
    before = {} if recorded is None else recorded.arms
    measured = cache(lambda: faster_dtype()[0] if devices[0].gpu is None else "float16")

    def resolved(cell: Cell) -> Cell:
        if cell.settings.model.compute_dtype != "auto":
            return cell
        recorded = before.get(cell.arm, {}).get("compute_dtype")
        dtype = measured() if recorded in (None, "auto") else recorded
        return dataclasses.replace(cell, settings=with_dtype(cell.settings, dtype))

    return dataclasses.replace(study, cells=tuple(map(resolved, study.cells)))


def check_study_runs(study: Study, devices: Sequence[Device]) -> dict[str, ArmPlan]:
    """Returns each arm's plan; raises HarnessError if something is missing or an arm can't run."""
    for settings in study.arms().values():
        check_can_run(settings)
        if settings.model.compute == "fp8" and devices[0].gpu is None:
            raise SettingsError("--compute fp8: there is no CUDA device", "Use --compute bf16")
        if devices[0].gpu is None:
            check_training_dtype(settings.model.compute_dtype, torch.device("cpu"))
    if study.tasks:
        from qlora_harness.lm_eval_compat.in_process import load_tasks

        load_tasks(study.tasks, study.data_dir)
    data: dict[DataSettings, TrainingData] = {}
    plans = {}
    for arm, settings in study.arms().items():
        source = find_base(settings.model.model, settings.model.revision)
        # Earlier versions let runs exceed the window, and those can go on.
        if not any(summary_of(cell) for cell in study.cells if cell.arm == arm):
            check_window(settings, source)
        tokenizer = load_tokenizer(source)
        if settings.data not in data:
            data[settings.data] = load_training_data(tokenizer, settings.data)
        check_held_out(settings, data[settings.data])
        _check_same_data(study, arm, data[settings.data])
        lengths = data[settings.data].train.lengths
        shape = measure_shape(source.path, source.revision, settings.lora.lora_targets)
        chosen, plan, _ = choose_memory_plan(shape, settings, lengths)
        plans[arm] = _plan(chosen, plan.peak, lengths)
        _check_memory(arm, plan.peak, devices)
    return plans


def _check_same_data(study: Study, arm: str, data: TrainingData) -> None:
    """Raises RunError if cells of an arm were trained on other conversations than today's."""
    for cell in study.cells:
        summary = summary_of(cell) if cell.arm == arm else None
        before = None if summary is None else summary.data.train.fingerprint
        if before not in (None, data.report["train"]["fingerprint"]):
            raise RunError(
                f"{cell.folder}: the data set {cell.settings.data.dataset} or its tokens have "
                f"changed since {cell.name} was trained",
                "Restore the data, or give the study another name",
            )


def _plan(settings: Settings, peak: int, lengths: Sequence[int]) -> ArmPlan:
    optimization = settings.optimization
    steps = planned_steps(optimization, len(lengths), 1)
    examples = optimization.batch_size * optimization.grad_accum
    tokens = steps * examples * sum(lengths) / len(lengths)
    every = settings.run.eval_steps
    between = 0 if every is None else (steps - 1) // every
    return ArmPlan(peak, steps, tokens, evaluations=2 + between)


def _check_memory(arm: str, peak: int, devices: Sequence[Device]) -> None:
    known = [device.free for device in devices if device.free is not None]
    if known and peak + CONTEXT > min(known):
        raise SettingsError(
            f"arm {arm!r} needs {(peak + CONTEXT) / GIB:.1f} GiB by prediction, and a GPU has only "
            f"{min(known) / GIB:.1f} GiB free",
            "Use memory: lean, a smaller batch_size or max_length, or leave the arm out",
        )

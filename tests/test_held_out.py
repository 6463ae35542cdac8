"""--eval-steps: the evaluations during training, which change nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from training_runs import Train, evaluations, losses, read, summary

from qlora_harness.schema.training_records import EvaluationLosses, EvaluationPoint, TrainingLog
from qlora_harness.settings_checks import build_settings
from qlora_harness.train import run, run_record, trainer
from qlora_harness.train.evaluation import evaluate_loss
from qlora_harness.train.memory_meter import MemoryMeter
from qlora_harness.train.run_record import RunRecord

TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def assert_equal(one: Any, other: Any) -> None:
    """Asserts that two nested values of tensors, arrays and numbers are equal to the last bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif hasattr(one, "tobytes"):
        assert one.tobytes() == other.tobytes()
    else:
        assert one == other


@pytest.mark.parametrize(
    ("quant", "kernels", "checkpointing", "group_by_length"),
    [("nf4", "auto", "none", True), ("bf16", "none", "full", False)],
)
def test_training_is_the_same_with_and_without_evaluations(
    train: Train, quant: str, kernels: str, checkpointing: str, group_by_length: bool
) -> None:
    options: dict[str, Any] = {
        "quant": quant, "kernels": kernels, "checkpointing": checkpointing,
        "group_by_length": group_by_length, "batch_size": 2, "grad_accum": 2, "max_steps": 5,
        "save_steps": 3, "lora_dropout": 0.3,
    }  # fmt: skip
    assert train(output_dir="without", **options) == 0
    assert train(output_dir="with", eval_steps=1, **options) == 0
    assert losses("with") == losses("without")
    for checkpoint in ("checkpoint-3", "checkpoint-5"):
        folders = [Path(name, "checkpoints", checkpoint) for name in ("with", "without")]
        assert_equal(*[load_file(folder / "adapter_model.safetensors") for folder in folders])
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            # Made by this test, and the random states are pickled.
            assert_equal(*[torch.load(folder / name, weights_only=False) for folder in folders])
        states = [read(folder / "trainer_state.json") for folder in folders]
        assert states[0] == states[1]
    assert_equal(
        *[load_file(f"{name}/adapter/adapter_model.safetensors") for name in ("with", "without")]
    )
    assert summary("with")["results"] == summary("without")["results"]
    with_curve, without = evaluations("with"), evaluations("without")
    assert [point["step"] for point in with_curve.pop("during")] == [1, 2, 3, 4]
    assert with_curve == without
    phases = [phase["phase"] for phase in summary("with")["memory"]["phases"]]
    assert phases == ["load", "evaluate_before", "train", "evaluate_during", "evaluate"]


def test_points_are_the_evaluations_of_shorter_runs(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step has only one evaluation, that after training."""
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return evaluate_loss(*args, **options)

    monkeypatch.setattr(run, "evaluate_loss", counted)
    assert train(quant="nf4", output_dir="long", max_steps=4, eval_steps=2) == 0
    assert len(calls) == 3  # before, after step 2, after training
    assert train(quant="nf4", output_dir="short", max_steps=2) == 0
    (point,) = evaluations("long")["during"]
    assert point == {"step": 2, "nll": evaluations("short")["nll"]}
    log = TrainingLog.model_validate(read("long/training_logs.json"))
    assert [point.step for point in log.curve] == [0, 2, 4]
    assert [log.evaluation.mean(point.nll) for point in log.curve] == [
        summary("long")["results"]["eval_loss_before"],
        summary("short")["results"]["eval_loss"],
        summary("long")["results"]["eval_loss"],
    ]


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_do_not_include_the_time_of_evaluations(
    train: Train, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    evaluations: list[tuple[float, float]] = []
    measured: list[tuple[float, float]] = []
    add_row = trainer.StepLog.add_row

    def timed(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = evaluate_loss(*args, **options)
        evaluations.append((began, time.perf_counter()))
        return result

    def noted(self: Any, step: Any) -> None:
        measured.append((step.begun._now, step.ended._now))
        add_row(self, step)

    monkeypatch.setattr(run, "evaluate_loss", timed)
    monkeypatch.setattr(trainer.StepLog, "add_row", noted)
    monkeypatch.setattr(trainer, "_runs_ahead", lambda device: ahead)
    assert train(quant="bf16", output_dir="run", max_steps=5, eval_steps=2) == 0
    assert (len(evaluations), len(measured)) == (4, 5)
    for began, ended in evaluations:
        assert all(end <= began or ended <= begin for begin, end in measured)


def test_time_of_an_inner_block_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(run_record.time, "perf_counter", lambda: clock.now)
    device = torch.device("cpu")
    record = RunRecord(build_settings({}), PartialState(), device, MemoryMeter(device, 0), None)
    monkeypatch.setattr(record, "write", lambda: None)
    clock.now = 10.0
    with record.timed("train"):
        clock.now += 1.0
        for seconds in (20.0, 300.0):
            with record.timed("eval"):
                clock.now += seconds
            clock.now += 4000.0
    with record.timed("eval"):
        clock.now += 50_000.0
    record.finish("interrupted", [], [])
    runtime = record.content["runtime"]
    assert (runtime["train_seconds"], runtime["eval_seconds"]) == (8001.0, 50_320.0)
    assert runtime["total_seconds"] == 10.0 + 8001.0 + 50_320.0


def test_evaluations_without_held_out_conversations_are_refused(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(quant="bf16", output_dir="run", eval_fraction=0, eval_steps=2) == 2
    assert "--eval-steps 2" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("run/training_summary.json").exists()


@pytest.mark.parametrize(
    "during",
    [
        [EvaluationPoint(step=1, nll=[1.0])],
        [EvaluationPoint(step=step, nll=[1.0, 2.0]) for step in (2, 1)],
        [EvaluationPoint(step=step, nll=[1.0, 2.0]) for step in (2, 2)],
    ],
)
def test_points_that_do_not_belong_together_are_refused(during: list[EvaluationPoint]) -> None:
    with pytest.raises(ValueError, match="step"):
        EvaluationLosses(tokens=[3, 4], during=during)


def test_log_of_an_earlier_version_has_a_curve_of_two_points() -> None:
    evaluation = {"nll": [2.0, 4.0], "tokens": [1, 3], "nll_before": [4.0, 8.0]}
    steps = [{"step": 7, "loss": 1.0}]
    log = TrainingLog.model_validate({"steps": steps, "evaluation": evaluation})
    assert [(p.step, log.evaluation.mean(p.nll)) for p in log.curve] == [(0, 3.0), (7, 1.5)]

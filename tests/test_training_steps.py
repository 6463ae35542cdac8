"""Training steps: exact losses, rows read one step later, learning rate, arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from training_runs import Train, base, data_of, loss_of, losses, read, steps

from qlora_harness.settings import OptimizationSettings, setting_fields
from qlora_harness.train import trainer
from qlora_harness.train.arguments import OPTIMIZERS, planned_steps, training_arguments


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_first_loss_is_that_of_the_base_model(
    train: Train, tiny_llama: Path, rows: Path, quant: str
) -> None:
    """A new adapter is zero, so the first loss follows without it."""
    assert train(quant=quant, output_dir="run", batch_size=6, grad_accum=2, max_steps=1) == 0
    expected = loss_of(base(tiny_llama, quant), data_of(tiny_llama, rows).train)
    assert losses("run")[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_accumulation_and_checkpointing_change_no_number(train: Train, quant: str) -> None:
    ways = [(4, 1, "none"), (1, 4, "none"), (2, 2, "none"), (4, 1, "full")]
    runs = []
    for number, (batch_size, grad_accum, checkpointing) in enumerate(ways):
        batches = {"batch_size": batch_size, "grad_accum": grad_accum, "group_by_length": False}
        way = {"checkpointing": checkpointing, **batches}
        assert train(quant=quant, output_dir=f"run{number}", **way) == 0
        runs.append(losses(f"run{number}"))
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], abs=1e-5)


def test_losses_depend_on_the_seed_alone(train: Train) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(quant="bf16", output_dir=folder, seed=seed, lora_dropout=0.3) == 0
    assert losses("a") == losses("b")
    assert losses("a") != losses("c")


def test_steps_read_one_step_later_leave_the_same_records(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step's numbers are read after the next one is launched."""
    run = {"quant": "bf16", "max_steps": 5, "save_steps": 2, "grad_accum": 2, "batch_size": 2}
    assert train(output_dir="at_once", **run) == 0
    rows: list[tuple[int, int]] = []  # a step, and the newest one launched by then
    add_row = trainer.StepLog.add_row

    def noted(self: Any, step: Any) -> None:
        rows.append((step.step, self.trainer.state.global_step))
        add_row(self, step)

    monkeypatch.setattr(trainer.StepLog, "add_row", noted)
    monkeypatch.setattr(trainer, "_runs_ahead", lambda device: True)
    assert train(output_dir="later", **run) == 0
    # Steps 1 and 3 wait for the next; 2, 4 and 5 are saved or the last, so that all is read.
    assert rows == [(1, 2), (2, 2), (3, 4), (4, 4), (5, 5)]
    timed = {"seconds", "tokens_per_second", "cpu_peak_rss_bytes"}
    logs = [
        [{k: v for k, v in row.items() if k not in timed} for row in steps(folder)]
        for folder in ("at_once", "later")
    ]
    assert logs[0] == logs[1]
    states = [read(f"{folder}/trainer_state.json") for folder in ("at_once", "later")]
    for state in states:
        history = state["log_history"]
        assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 5]
        mean = sum(row["loss"] for row in history[:5]) / 5
        assert history[-1]["train_loss"] == pytest.approx(mean, abs=1e-12)
        for name in ("train_runtime", "train_samples_per_second", "train_steps_per_second"):
            del history[-1][name]
    assert states[0]["log_history"] == states[1]["log_history"]
    assert states[0]["total_flos"] == states[1]["total_flos"] > 0


@pytest.mark.parametrize(
    "name",
    ["get_batch_samples", "training_step", "clip_grad_norm_", "on_optimizer_step", "on_step_end"],
)
def test_release_that_no_longer_calls_a_method_fails_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Otherwise a run would complete without step rows."""
    if name == "clip_grad_norm_":
        monkeypatch.setattr(
            trainer.CountingTrainer, "_clip_gradients", lambda self, *args: self._clip(*args)
        )
    else:
        owner = trainer.StepLog if name.startswith("on_") else trainer.CountingTrainer
        monkeypatch.delattr(owner, name)
    assert train(quant="bf16", output_dir="run", max_steps=2) == 3
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"transformers {transformers.__version__} " in line
    missing = "training_logs.json lacks step 1 of 2" if name == "on_step_end" else "for step 1"
    assert missing in line
    assert read("run/training_summary.json")["status"] == "failed"


def test_listed_modules_behave_as_before() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.5))
    model[1].eval()  # as in a base model inside a new adapter
    parameters = list(model.parameters())
    with trainer.listed_modules(model):
        for mode in (True, True, False, True):
            assert model.train(mode) is model
            assert model[1].training is mode
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert list(model.parameters(recurse=False)) == []
        parameters[0].grad = torch.ones(3, 2)
        model.zero_grad()
        assert parameters[0].grad is None
    assert not {"train", "parameters"} & set(vars(model))


@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_dropout_acts_and_checkpointing_is_on_in_training(
    train: Train, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[int] = []
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: calls.append(1) or own(mlp, x))  # type: ignore[func-returns-value]
    shared = {"quant": "bf16", "kernels": kernels, "eval_fraction": 0, "checkpointing": "full"}
    shared |= {"batch_size": 2, "grad_accum": 2, "max_steps": 3}
    assert train(output_dir="plain", **shared) == 0
    # Two layers, and each once more in the backward pass.
    assert len(calls) == (2 * 2 * 2 * 3 if kernels == "none" else 0)
    assert train(output_dir="dropped", lora_dropout=0.5, **shared) == 0
    plain, dropped = losses("plain"), losses("dropped")
    assert dropped[0] == plain[0]  # B is zero
    assert all(a != b for a, b in zip(dropped[1:], plain[1:], strict=True))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.0, 0.005, 0.01, 0.005]),
        ("constant", [0.0, 0.005, 0.01, 0.01]),  # Trainer's own "constant" has no warm-up
    ],
)
def test_learning_rate_with_warm_up(train: Train, schedule: str, rates: list[float]) -> None:
    assert train(quant="bf16", output_dir="run", lr_schedule=schedule, warmup_ratio=0.5) == 0
    assert [row["learning_rate"] for row in steps("run")] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("optimization", "examples", "processes", "expected"),
    [
        (OptimizationSettings(max_steps=7), 100, 1, 7),
        (OptimizationSettings(epochs=1, batch_size=4, grad_accum=4), 100, 1, 7),
        (OptimizationSettings(epochs=1, batch_size=4, grad_accum=4), 100, 2, 4),
        (OptimizationSettings(epochs=0.5, batch_size=1, grad_accum=1), 100, 1, 50),
        (OptimizationSettings(epochs=0.001, batch_size=16), 10, 1, 1),
    ],
)
def test_planned_steps(
    optimization: OptimizationSettings, examples: int, processes: int, expected: int
) -> None:
    assert planned_steps(optimization, examples, processes) == expected


def test_arguments_of_the_published_recipe(tmp_path: Path) -> None:
    arguments = training_arguments(
        OptimizationSettings(max_steps=1875), checkpoint_dir=tmp_path, steps=1875, save_steps=250,
        report_to="none", compute_dtype="bfloat16", use_cpu=True, fused=False,
    )  # fmt: skip
    stated = {
        "max_steps": 1875, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16,
        "learning_rate": 2e-4, "lr_scheduler_type": "constant", "optim": "paged_adamw_32bit",
        "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.0, "max_grad_norm": 0.3,
        "bf16": True, "fp16": False, "seed": 0, "logging_nan_inf_filter": False, "report_to": [],
    }  # fmt: skip
    values = {name: getattr(arguments, name) for name in stated}
    assert {n: getattr(v, "value", v) for n, v in values.items()} == stated


def test_installed_transformers_knows_every_optimizer() -> None:
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) == set(setting_fields()["optimizer"][1].metadata["choices"])
    assert set(OPTIMIZERS.values()) <= {name.value for name in OptimizerNames}

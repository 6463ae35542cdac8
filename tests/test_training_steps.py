"""Training steps: exact losses, rows read one step later, the learning rate, the arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import Train, base, data_of, loss_of, losses, read, steps

from qlora_harness.settings import OptimizationSettings
from qlora_harness.train import trainer
from qlora_harness.train.arguments import OPTIMIZERS, planned_steps, training_arguments

# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_first_loss_is_that_of_the_base_model(
    train: Train, tiny_llama: Path, rows: Path, quant: str
) -> None:
    """The fresh adapter is zero, so the first step's loss can be worked out without it."""
    assert train(quant=quant, output_dir="run", batch_size=6, grad_accum=2, max_steps=1) == 0
    expected = loss_of(base(tiny_llama, quant), data_of(tiny_llama, rows).train)
    assert losses("run")[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_accumulation_equals_one_large_batch(train: Train, quant: str) -> None:
    found = {}
    for batch_size, grad_accum in ((4, 1), (1, 4), (2, 2)):
        folder = f"run-{batch_size}"
        assert (
            train(
                quant=quant,
                output_dir=folder,
                batch_size=batch_size,
                grad_accum=grad_accum,
                group_by_length=False,
            )
            == 0
        )
        found[batch_size] = losses(folder)
    assert found[1] == pytest.approx(found[4], abs=1e-5)
    assert found[2] == pytest.approx(found[4], abs=1e-5)


def test_checkpointing_changes_memory_not_numbers(train: Train) -> None:
    assert train(quant="nf4", output_dir="with", checkpointing="full") == 0
    assert train(quant="nf4", output_dir="without", checkpointing="none") == 0
    assert losses("with") == pytest.approx(losses("without"), abs=1e-5)


def test_same_seed_same_losses_other_seed_others(train: Train) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(quant="bf16", output_dir=folder, seed=seed, lora_dropout=0.3) == 0
    assert losses("a") == losses("b")
    assert losses("a") != losses("c")


def test_steps_read_one_step_later_leave_the_same_records(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step's numbers are read when the next one is under way."""
    run = {"quant": "bf16", "max_steps": 5, "save_steps": 2, "grad_accum": 2, "batch_size": 2}
    assert train(output_dir="at_once", **run) == 0
    log, logged = trainer.StepLog.on_log, []

    def on_log(
        self: Any, args: Any, state: Any, control: Any, logs: Any = None, **more: Any
    ) -> None:
        if logs and "loss" in logs:
            logged.append((state.global_step, self.trainer.state.global_step))
            assert len(self.trainer._held) <= 1
        log(self, args, state, control, logs, **more)

    held: list[int] = []
    hold = trainer.CountingTrainer._hold

    def counted(self: Any, *args: Any) -> None:
        hold(self, *args)
        held.append(len(self._held))

    monkeypatch.setattr(trainer.StepLog, "on_log", on_log)
    monkeypatch.setattr(trainer.CountingTrainer, "_hold", counted)
    monkeypatch.setattr(trainer.CountingTrainer, "_runs_ahead", True)
    assert train(output_dir="later", **run) == 0
    # Steps 1 and 3 wait for the next; 2, 4 and 5 are saved or the last, so that all is read.
    assert held == [1, 2, 1, 2, 1]
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5]
    timed = {"seconds", "tokens_per_second", "cpu_peak_rss_bytes"}
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in steps(folder)]
        for folder in ("at_once", "later")
    ]
    assert rows[0] == rows[1]
    states = [read(f"{folder}/trainer_state.json") for folder in ("at_once", "later")]
    for state in states:
        history = state["log_history"]
        assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 5]
        for name in ("train_runtime", "train_samples_per_second", "train_steps_per_second"):
            del history[-1][name]
    assert states[0]["log_history"] == states[1]["log_history"]
    assert states[0]["total_flos"] == states[1]["total_flos"] > 0


def test_listed_modules_answer_as_before() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.5))
    model[1].eval()  # as a base model is when an adapter has been put around it
    wanted = list(model.parameters())
    with trainer._listed(model):
        assert model.train() is model and model[1].training
        assert model.train() is model
        assert model.eval() is model and not model[1].training
        assert model.train() is model and model[1].training
        assert [a is b for a, b in zip(model.parameters(), wanted, strict=True)] == [True] * 2
        assert list(model.parameters(recurse=False)) == []
        wanted[0].grad = torch.ones(3, 2)
        model.zero_grad()
        assert wanted[0].grad is None
    assert "train" not in vars(model) and "parameters" not in vars(model)


@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_dropout_acts_and_checkpointing_is_on_in_training(
    train: Train, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[int] = []
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: (calls.append(1), own(mlp, x))[1])
    shared = {"quant": "bf16", "kernels": kernels, "eval_fraction": 0, "checkpointing": "full"}
    shared |= {"batch_size": 2, "grad_accum": 2, "max_steps": 3}
    assert train(output_dir="plain", **shared) == 0
    # Two layers, and each once more in the backward pass.
    assert len(calls) == (2 * 2 * 2 * 3 if kernels == "none" else 0)
    assert train(output_dir="dropped", lora_dropout=0.5, **shared) == 0
    plain, dropped = losses("plain"), losses("dropped")
    assert dropped[0] == plain[0]  # B is zero
    assert all(a != b for a, b in zip(dropped[1:], plain[1:], strict=True))


# --- the learning rate and the arguments ----------------------------------------------------------


def test_linear_schedule_with_warm_up(train: Train) -> None:
    assert train(quant="bf16", output_dir="run", lr_schedule="linear", warmup_ratio=0.5) == 0
    rates = [row["learning_rate"] for row in steps("run")]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])


def test_warm_up_of_a_constant_rate_is_not_silently_left_out(train: Train) -> None:
    status = train(quant="bf16", output_dir="run", lr_schedule="constant", warmup_ratio=0.5)
    if status == 0:
        rates = [row["learning_rate"] for row in steps("run")]
        assert rates == pytest.approx([0.0, 0.005, 0.01, 0.01])
    else:
        assert status == 2  # refusing the combination is right, too


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
        OptimizationSettings(max_steps=1875),
        checkpoint_dir=tmp_path,
        steps=1875,
        save_steps=250,
        report_to="none",
        compute_dtype="bfloat16",
        use_cpu=True,
        fused=False,
    )
    stated = {
        "max_steps": 1875,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "optim": "paged_adamw_32bit",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": 0.3,
        "bf16": True,
        "fp16": False,
        "seed": 0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
    }
    found = {name: getattr(arguments, name) for name in stated}
    assert {n: getattr(v, "value", v) for n, v in found.items()} == stated


def test_every_optimizer_is_one_of_the_installed_transformers() -> None:
    from transformers.training_args import OptimizerNames

    from qlora_harness.settings import setting_fields

    assert set(OPTIMIZERS) == set(setting_fields()["optimizer"][1].metadata["choices"])
    assert set(OPTIMIZERS.values()) <= {name.value for name in OptimizerNames}

"""Runs that fail, and bad input, which is refused in one line before anything is touched."""

from __future__ import annotations

import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import Train, everything_in, steps, summary

from qlora_harness.train import trainer

# --- runs that fail -------------------------------------------------------------------------------


def test_non_finite_loss_stops_the_run(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(quant="bf16", output_dir="run", learning_rate=1e30) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("qlora-harness: error: step 2: loss nan, gradient norm nan; ")
    assert [row["step"] for row in steps("run")] == [1]
    assert math.isfinite(steps("run")[0]["loss"])
    record = summary("run")
    assert record["status"] == "failed"
    assert record["finished"] is not None
    assert record["failure"]["problem"].startswith("step 2: loss nan")
    assert record["memory"]["cpu_peak_rss_bytes"] > 0
    assert not Path("run/adapter").exists()
    assert train(quant="bf16", output_dir="run") == 0  # the same folder is started again
    assert summary("run")["status"] == "completed"


@pytest.mark.parametrize("learning_rate", [1e30, 1e39])
def test_last_step_that_ruins_the_adapter_fails_the_run(
    train: Train, capsys: pytest.CaptureFixture[str], learning_rate: float
) -> None:
    """The loss of the only step is fine; then the evaluation or the adapter is not finite."""
    assert train(quant="bf16", output_dir="run", learning_rate=learning_rate, max_steps=1) == 3
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("qlora-harness: error: ")
    assert summary("run")["status"] == "failed"


def test_infinite_perplexity_fails_the_run(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(loss) overflows above 709 nats."""
    from qlora_harness.train import run
    from qlora_harness.train.evaluation import ConversationLosses

    monkeypatch.setattr(run, "evaluate_loss", lambda *_, **__: ConversationLosses([4000.0], [5]))
    assert train(quant="bf16", output_dir="run", max_steps=1) == 3
    assert summary("run")["status"] == "failed"


def test_unexpected_error_is_recorded_and_raised(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(trainer.StepLog, "add_row", broken)
    with pytest.raises(ZeroDivisionError):
        train(quant="bf16", output_dir="run")
    assert summary("run")["status"] == "failed"
    assert summary("run")["failure"] == {"problem": "ZeroDivisionError: boom"}


def test_completed_step_is_logged_when_the_next_one_fails(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the row of a step waits for the next one."""
    train_step = trainer.CountingTrainer.training_step

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return train_step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.CountingTrainer, "training_step", full)
    monkeypatch.setattr(trainer, "_runs_ahead", lambda device: True)
    assert train(quant="bf16", output_dir="run", save_steps=100) == 3
    assert [row["step"] for row in steps("run")] == [1, 2]


def test_out_of_memory_gives_advice(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer.StepLog, "add_row", full)
    assert train(quant="bf16", output_dir="run") == 3
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cpu ran out of memory with --batch-size 4 and --max-length 96. " in line
    for flag in ("--memory", "--grad-accum", "--quant nf4"):
        assert flag in line
    assert summary("run")["status"] == "failed"


# --- bad input ------------------------------------------------------------------------------------

# Flags, and how the message begins.
BAD_INPUT: dict[str, tuple[dict[str, str], str]] = {
    "missing model": ({"model": "{folder}/nope"}, "--model: {folder}/nope does not exist"),
    "model without weights": ({"model": "{folder}/model"}, "--model: '{folder}/model' can't be "),
    "broken JSON": ({"dataset": "{folder}/half.jsonl"}, "{folder}/half.jsonl, line 33: not valid "),
    "nothing left": (
        {"languages": "de"},
        "--dataset {rows}: no conversation is left to train on (of 32 rows; dropped: 32 langu",
    ),
    "layers": ({"lora_targets": "typo"}, "--lora-targets: the model has no layers named typo"),
    "checkpoint": ({"resume": "{folder}/nope"}, "--resume: {folder}/nope has no step in its name"),
    "output folder is a file": ({"output_dir": "{rows}"}, "--output-dir {rows}: "),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_touches_nothing(
    train: Train, tiny_llama: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    case: str,
) -> None:  # fmt: skip
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "half.jsonl").write_text(rows.read_text() + '{"text": ')
    before = everything_in(tmp_path)
    flags, expected = BAD_INPUT[case]
    capfd.readouterr()
    given = {name: text.format(folder=tmp_path, rows=rows) for name, text in flags.items()}
    assert train(quant="nf4", **given) == 2
    err = capfd.readouterr().err
    _, message = err.split("qlora-harness: error: ")  # once
    assert message.startswith(expected.format(folder=tmp_path, rows=rows))
    assert message.count("\n") == 1
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_logging_package_is_one_line(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if find_spec(name) or (name == "tensorboard" and find_spec("tensorboardX")):
        pytest.skip(f"{name} is installed")
    assert train(quant="bf16", report_to=name) == 2
    assert f"pip install {name}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_completed_run_survives_a_later_mistake(train: Train) -> None:
    assert train(quant="bf16", output_dir="run") == 0
    before = everything_in(Path("run"))
    assert train(quant="bf16", output_dir="run", overwrite=True, languages="de") == 2
    assert everything_in(Path("run")) == before

"""Interrupted and killed runs resume; completed ones are left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_rows
from safetensors.torch import load_file, save_file
from training_runs import (
    Train,
    as_if_killed,
    change_summary,
    evaluations,
    everything_in,
    losses,
    read,
    steps,
    summary,
)

from qlora_harness.schema.training_records import read_summary
from qlora_harness.train import run_folder, trainer

PT = {"format": "pt"}


@pytest.fixture
def signal_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Sends this process a signal when the row of a step is logged, once."""

    def install(step: int, number: signal.Signals) -> None:
        add_row = trainer.StepLog.add_row
        sent: list[int] = []

        def add_row_and_send(self: Any, measured: Any) -> None:
            add_row(self, measured)
            if measured.step == step and not sent:
                sent.append(step)
                os.kill(os.getpid(), number)

        monkeypatch.setattr(trainer.StepLog, "add_row", add_row_and_send)

    return install


@pytest.mark.parametrize(("quant", "number"), [("nf4", signal.SIGTERM), ("bf16", signal.SIGINT)])
def test_signal_ends_the_run_with_a_checkpoint_and_the_same_command_resumes(
    train: Train, signal_after: Callable[[int, signal.Signals], None],
    capsys: pytest.CaptureFixture[str], quant: str, number: signal.Signals,
) -> None:  # fmt: skip
    assert train(quant=quant, output_dir="whole", lora_dropout=0.1) == 0
    handlers = [signal.getsignal(item) for item in (signal.SIGTERM, signal.SIGINT)]

    signal_after(2, number)
    capsys.readouterr()
    assert train(quant=quant, output_dir="cut", lora_dropout=0.1) != 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    stopped = summary("cut")
    done = stopped["results"]["steps"]
    assert done in (2, 3)  # the step that was running is finished
    assert f"error: {number.name} stopped the run at step {done} of 4; " in last
    assert stopped["status"] == "interrupted"
    assert losses("cut") == losses("whole")[:done]
    assert not Path("cut/adapter").exists()
    assert [signal.getsignal(item) for item in (signal.SIGTERM, signal.SIGINT)] == handlers

    assert train(quant=quant, output_dir="cut", lora_dropout=0.1) == 0
    finished, whole = summary("cut"), summary("whole")
    assert losses("cut") == losses("whole")
    assert finished["status"] == "completed"
    assert finished["results"] == whole["results"]
    assert finished["runtime"]["resumed"] is True
    assert finished["runtime"]["train_seconds"] > stopped["runtime"]["train_seconds"]
    resumed = load_file("cut/adapter/adapter_model.safetensors")
    straight = load_file("whole/adapter/adapter_model.safetensors")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize("killed", ["in the middle", "while evaluating", "while saving"])
def test_killed_run_repeats_the_steps_after_its_checkpoint(
    train: Train, capsys: pytest.CaptureFixture[str], killed: str
) -> None:
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    whole, results = losses("run"), summary("run")["results"]
    as_if_killed("run", *[4] * (killed == "in the middle"))
    if killed == "while saving":
        path = Path("run/checkpoints/checkpoint-4/optimizer.pt")
        path.write_bytes(path.read_bytes()[:-100])
    capsys.readouterr()
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    skipped = "run: skipped checkpoint-4: optimizer.pt " in capsys.readouterr().out
    assert skipped is (killed == "while saving")
    assert losses("run") == whole
    assert summary("run")["results"] == results


def test_resumed_run_has_the_evaluations_of_an_uninterrupted_one(train: Train) -> None:
    """Those up to its checkpoint from the step log; the later ones are made once more."""
    options = {"quant": "bf16", "eval_steps": 1, "save_steps": 2}
    assert train(output_dir="run", **options) == 0
    whole = evaluations("run")
    assert [point["step"] for point in whole["during"]] == [1, 2, 3]
    as_if_killed("run", 4)
    assert train(output_dir="run", **options) == 0
    assert evaluations("run") == whole


def test_evaluation_that_a_signal_prevented_is_made_when_the_run_resumes(
    train: Train, signal_after: Callable[[int, signal.Signals], None]
) -> None:
    options = {"quant": "nf4", "eval_steps": 2, "max_steps": 5, "lora_dropout": 0.1}
    assert train(output_dir="whole", **options) == 0
    assert [point["step"] for point in evaluations("whole")["during"]] == [2, 4]
    signal_after(1, signal.SIGTERM)  # heeded after step 2
    assert train(output_dir="cut", **options) != 0
    assert summary("cut")["results"]["steps"] == 2
    assert "during" not in evaluations("cut")
    assert train(output_dir="cut", **options) == 0
    assert evaluations("cut") == evaluations("whole")
    assert losses("cut") == losses("whole")


def test_run_of_an_earlier_version_resumes_with_evaluations(train: Train) -> None:
    """Its settings lack the later ones, which had their defaults then."""
    later = {
        "eval_seed": 0, "use_rslora": False, "use_dora": False, "init_lora_weights": "default",
    }  # fmt: skip
    assert train(quant="nf4", output_dir="run", save_steps=2) == 0
    whole = losses("run")
    as_if_killed("run", 4)
    record = summary("run")
    for name in ("eval_steps", *later):
        del record["settings"][name]
    Path("run/training_summary.json").write_text(json.dumps(record))
    earlier = read_summary(Path("run"))
    assert earlier is not None
    assert {name: earlier.settings[name] for name in later} == later
    assert train(quant="nf4", output_dir="run", save_steps=2, eval_steps=1) == 0
    assert losses("run") == whole
    assert [point["step"] for point in evaluations("run")["during"]] == [2, 3]


def test_time_and_steps_before_a_kill_are_counted(train: Train) -> None:
    """Even if the step log was cut: rows are lost, not the number of steps."""
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    as_if_killed("run", 4)
    log = read("run/training_logs.json")
    rows = [log["steps"][0] | {"seconds": 100.0}]
    Path("run/training_logs.json").write_text(json.dumps(log | {"steps": rows}))
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    assert [row["step"] for row in steps("run")] == [1, 3, 4]
    assert summary("run")["results"]["steps"] == 4
    assert summary("run")["runtime"]["train_seconds"] > 100


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_checkpoint_that_torch_cannot_load_is_one_line(
    train: Train, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Its checksums are right, so only loading it shows the problem."""
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    as_if_killed("run", 4)
    torch.save(Path("a pickled object"), f"run/checkpoints/checkpoint-2/{name}")
    assert train(quant="bf16", output_dir="run", save_steps=2) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint-2 can't be loaded (UnpicklingError: " in line


def test_resume_from_a_checkpoint_of_another_run(train: Train) -> None:
    assert train(quant="bf16", output_dir="whole", save_steps=2) == 0
    checkpoint = Path("whole/checkpoints/checkpoint-2")
    before = everything_in(Path("whole"))
    assert train(quant="bf16", output_dir="new", resume=checkpoint) == 0
    assert losses("new") == losses("whole")  # with the rows before the checkpoint
    assert summary("new")["results"] == summary("whole")["results"]
    assert everything_in(Path("whole")) == before


def refused(
    train: Train, capsys: pytest.CaptureFixture[str], run_dir: str = "run", **flags: Any
) -> str:
    """Returns the error of a run that is refused and touches nothing."""
    before = everything_in(Path(run_dir))
    capsys.readouterr()
    assert train(quant="bf16", output_dir=run_dir, **flags) == 2
    err = capsys.readouterr().err.splitlines()
    assert len([line for line in err if line.startswith("qlora-harness: error: ")]) == 1
    assert everything_in(Path(run_dir)) == before
    assert len(err[-1]) <= 500
    return err[-1]


def test_resume_of_what_has_changed_is_refused(
    train: Train, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags, and what agrees by its flags: rank, computation, weights and data."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    rows = tiny_rows(tmp_path / "mine.jsonl")
    flags: dict[str, Any] = {"model": model, "dataset": rows, "save_steps": 2, "memory": "fast"}
    flags |= {"optimizer": None, "checkpointing": None}  # chosen by --memory
    assert train(quant="bf16", output_dir="run", **flags) == 0
    as_if_killed("run", 4)
    assert "--lora-r 4, not 2" in refused(train, capsys, **flags, lora_r=2)

    record = summary("run")
    settings, computation = record["settings"], record["computation"]
    change_summary(Path("run"), settings=settings | {"lora_r": 2})
    assert "does not fit this model" in refused(train, capsys, **flags, lora_r=2)
    other = computation | {"optimizer": "paged_adamw_32bit"}  # as another version may choose
    change_summary(Path("run"), settings=settings, computation=other)
    line = refused(train, capsys, **flags)
    assert "computation.optimizer was paged_adamw_32bit and is now adamw_torch" in line
    change_summary(Path("run"), computation=computation)

    weights = load_file(model / "model.safetensors")
    changed = weights["model.norm.weight"] + 1
    save_file(weights | {"model.norm.weight": changed}, model / "model.safetensors", PT)
    assert "weights_fingerprint" in refused(train, capsys, **flags)
    rows.write_text(rows.read_text().replace("It is", "That is"))
    assert "data.train.fingerprint" in refused(train, capsys, **flags)


def test_folder_taken_by_another_process_during_loading_is_refused(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def description(*args: Any) -> str:
        held.append(run_folder.lock_run_folder(Path("run")))
        return ""

    monkeypatch.setattr("qlora_harness.train.run._description", description)
    assert train(quant="bf16", output_dir="run") == 2
    assert "still training" in capsys.readouterr().err
    assert not Path("run/training_summary.json").exists()


@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_resumed_bfloat16_adapter_stays_bfloat16_and_learns(train: Train, kernels: str) -> None:
    """PEFT would replace its parameters by float32 ones on loading."""
    options = {"adapter_dtype": "bfloat16", "kernels": kernels, "save_steps": 2}
    assert train(quant="nf4", output_dir="whole", **options) == 0
    shutil.copytree("whole", "resumed")
    as_if_killed("resumed", 4)
    assert train(quant="nf4", output_dir="resumed", **options) == 0
    assert losses("resumed") == losses("whole")
    whole, resumed = (
        load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("whole", "resumed")
    )
    assert {str(tensor.dtype) for tensor in resumed.values()} == {"torch.bfloat16"}
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert all(row["grad_norm"] > 0 for row in steps("resumed"))


def test_resuming_in_a_later_epoch_continues_with_the_same_examples(train: Train) -> None:
    options = {"quant": "bf16", "max_steps": 10, "batch_size": 2, "save_steps": 8}
    assert train(output_dir="run", group_by_length=True, **options) == 0
    rows = steps("run")
    assert rows[7]["epoch"] > 1.0
    as_if_killed("run", 10)
    assert train(output_dir="run", group_by_length=True, **options) == 0
    for one, other in zip(rows, steps("run"), strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_completed_run_is_never_replaced_without_overwrite(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(quant="bf16", output_dir="run") == 0
    before = everything_in(Path("run"))
    assert "--overwrite" in refused(train, capsys)
    assert train(quant="bf16", output_dir="run", resume="auto") == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert everything_in(Path("run")) == before
    Path("run/evaluation_results.json").write_text("{}")
    assert train(quant="bf16", output_dir="run", overwrite=True, max_steps=1) == 0
    assert len(losses("run")) == 1
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["checkpoint-1"]
    assert not Path("run/evaluation_results.json").exists()

"""Training runs of a tiny model on the CPU, through the command's own main function.

Real NF4 and real bf16 bases, in float32 arithmetic so that losses can be compared to 1e-5. What
needs processes of its own (the launcher, kill -9, two ranks) is in test_launcher.py.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_rows
from safetensors.torch import load_file, save_file

from qlora_harness.data.chat import ChatEncoder, Example
from qlora_harness.data.corpus import TrainingData, load_training_data
from qlora_harness.model.base import find_base, load_base, load_tokenizer
from qlora_harness.model.lora import load_adapter, read_adapter_record
from qlora_harness.settings import OptimizationSettings, Quant
from qlora_harness.train import trainer
from qlora_harness.train.arguments import OPTIMIZERS, planned_steps, training_arguments
from qlora_harness.train.command import main
from qlora_harness.train.evaluation import evaluate_loss

Train = Callable[..., int]


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Results go below the working folder unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def train(tiny_llama: Path, rows: Path) -> Train:
    """Runs the training command on the tiny model; keywords are flags and win over these."""

    def run(**flags: Any) -> int:
        chosen = {
            "model": tiny_llama,
            "dataset": rows,
            "compute_dtype": "float32",
            "max_steps": 4,
            "batch_size": 4,
            "grad_accum": 1,
            "optimizer": "adamw_torch",
            "checkpointing": "none",
            "max_length": 96,
            "lora_dropout": 0,
            "lora_r": 4,
            "eval_fraction": 0.25,
            "learning_rate": 0.01,
        } | flags
        words = []
        for name, value in chosen.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                words.append(f"--{flag}={value}")
        return main(words)

    return run


def read(path: str | Path) -> dict[str, Any]:
    text = Path(path).read_text(encoding="utf-8")
    value: dict[str, Any] = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    return value


def summary(run_dir: str | Path) -> dict[str, Any]:
    return read(Path(run_dir) / "training_summary.json")


def steps(run_dir: str | Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read(Path(run_dir) / "training_logs.json")["steps"]
    return found


def losses(run_dir: str | Path) -> list[float]:
    assert [row["step"] for row in steps(run_dir)] == list(range(1, len(steps(run_dir)) + 1))
    return [row["loss"] for row in steps(run_dir)]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def data_of(model: Path, rows: Path) -> TrainingData:
    encoder = ChatEncoder(load_tokenizer(find_base(str(model))), "guanaco", 96, "prompt")
    return load_training_data(
        encoder,
        str(rows),
        revision=None,
        languages="en",
        paths="best-path",
        eval_fraction=0.25,
    )


def base(model: Path, quant: str) -> Any:
    return load_base(
        find_base(str(model)),
        quant=Quant(quant),
        double_quant=True,
        compute_dtype="float32",
        device=torch.device("cpu"),
    )


def loss_of(model: Any, examples: list[Example]) -> float:
    return evaluate_loss(
        model,
        examples,
        batch_size=3,
        pad_id=0,
        accelerator=Accelerator(cpu=True),
        autocast_dtype=None,
    ).loss


# --- one run of each arm --------------------------------------------------------------------------

SUMMARY_KEYS = {
    "computation", "plan",
    "schema_version", "kind", "status", "arm", "quant", "started", "finished", "model", "process",
    "quantization", "settings", "data", "environment", "failure", "results", "memory", "runtime",
    "throughput",
}  # fmt: skip
STEP_KEYS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens",
    "seconds", "tokens_per_second", "cpu_peak_rss_bytes",
}  # fmt: skip
PEAK_KEYS = {
    "peak_allocated_bytes", "peak_reserved_bytes", "peak_device_used_bytes", "cpu_peak_rss_bytes"
}  # fmt: skip


@pytest.mark.parametrize(("quant", "folder"), [("nf4", "results/4bit"), ("bf16", "results/16bit")])
def test_run_and_all_it_leaves(
    train: Train,
    tiny_llama: Path,
    rows: Path,
    capsys: pytest.CaptureFixture[str],
    quant: str,
    folder: str,
) -> None:
    assert train(quant=quant) == 0
    out = capsys.readouterr().out
    run_dir = Path(folder)
    assert {path.name for path in run_dir.iterdir()} == {
        "adapter",
        "checkpoints",
        "trainer_state.json",
        "training_logs.json",
        "training_summary.json",
    }
    data = data_of(tiny_llama, rows)
    record = summary(run_dir)
    is_4bit = quant == "nf4"

    assert set(record) == SUMMARY_KEYS
    assert (record["schema_version"], record["kind"]) == (1, "training_summary")
    assert (record["status"], record["failure"]) == ("completed", None)
    assert (record["arm"], record["quant"]) == (run_dir.name, quant)
    assert record["started"] <= record["finished"]
    assert record["model"] == {
        "name": str(tiny_llama),
        "revision": None,
        "commit": None,
        "random_weights": True,
        "trainable_parameters": 8192,
    }
    linear, other, adapter = 73728, 46144, 8192
    assert record["quantization"] == {
        "quant": quant,
        "double_quant": True if is_4bit else None,
        "compute_dtype": "float32",
        "parameter_dtypes": (
            {"float32": other + adapter, "uint8": linear // 2}
            if is_4bit
            else {"float32": other + adapter + linear}
        ),
    }
    assert record["settings"]["learning_rate"] == 0.01
    assert record["settings"]["output_dir"] == folder
    assert record["data"] == data.report
    assert record["environment"]["device"]["type"] == "cpu"
    assert record["environment"]["world_size"] == 1
    assert {"versions", "git", "platform", "command"} <= set(record["environment"])

    # 4 steps of 4 examples, all counted by hand from the 12 examples that are learned.
    rows_logged = steps(run_dir)
    assert [row["step"] for row in rows_logged] == [1, 2, 3, 4]
    assert all(set(row) == STEP_KEYS for row in rows_logged)
    assert sum(row["tokens"] for row in rows_logged[:3]) == data.report["train"]["tokens"]
    learned = data.report["train"]["supervised_tokens"]
    assert sum(row["supervised_tokens"] for row in rows_logged[:3]) == learned
    assert all(row["learning_rate"] == 0.01 and row["grad_norm"] > 0 for row in rows_logged)
    for row in rows_logged:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])

    results = record["results"]
    assert results == {
        "steps": 4,
        "final_train_loss": rows_logged[-1]["loss"],
        "last_10_steps_train_loss": pytest.approx(sum(losses(run_dir)) / 4),
        "mean_train_loss": pytest.approx(sum(losses(run_dir)) / 4),
        "eval_loss": results["eval_loss"],
        "perplexity": pytest.approx(math.exp(results["eval_loss"])),
        "eval_tokens": data.report["eval"]["supervised_tokens"],
    }
    assert losses(run_dir)[-1] < losses(run_dir)[0]

    memory = record["memory"]
    assert set(memory) == {"device_type", "phases"} | PEAK_KEYS
    assert memory["device_type"] == "cpu"
    assert [(p["phase"], p["rank"]) for p in memory["phases"]] == [
        ("load", 0),
        ("train", 0),
        ("evaluate", 0),
    ]
    assert memory["cpu_peak_rss_bytes"] == memory["phases"][1]["cpu_peak_rss_bytes"] > 0
    assert memory["peak_allocated_bytes"] is memory["peak_reserved_bytes"] is None

    runtime = record["runtime"]
    assert set(runtime) == {
        "train_seconds", "load_seconds", "data_seconds", "eval_seconds", "total_seconds", "resumed"
    }  # fmt: skip
    assert runtime["resumed"] is False
    parts = ("train_seconds", "load_seconds", "data_seconds", "eval_seconds")
    assert all(0 < runtime[name] < runtime["total_seconds"] for name in parts)
    assert sum(row["seconds"] for row in rows_logged) < runtime["train_seconds"]
    seconds = sum(row["seconds"] for row in rows_logged)
    assert record["throughput"] == {
        "tokens_per_second": pytest.approx(sum(r["tokens"] for r in rows_logged) / seconds),
        "supervised_tokens_per_second": pytest.approx(
            sum(r["supervised_tokens"] for r in rows_logged) / seconds
        ),
        "steps_per_second": pytest.approx(4 / seconds),
        "steps_measured": 4,
    }

    state = read(run_dir / "trainer_state.json")
    assert (state["global_step"], state["max_steps"]) == (4, 4)
    assert [row["loss"] for row in state["log_history"] if "loss" in row] == losses(run_dir)

    # What a newcomer sees: where from, how much of it, and the first example with its masked part.
    assert f"data: {rows}: 16 trees, 32 messages; dropped: none" in out
    assert "(random weights)" in out
    assert "<s> ### Human: What is 1 plus 1?### Assistant:⟦It is 2. ok</s>⟧" in out


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_adapter_of_a_run_is_trained_and_scores_as_the_record_says(
    train: Train, tiny_llama: Path, rows: Path, quant: str
) -> None:
    assert train(quant=quant, output_dir="run") == 0
    weights = load_file("run/adapter/adapter_model.safetensors")
    lora_b = [value for name, value in weights.items() if "lora_B" in name]
    assert len(lora_b) == 14
    assert all(value.any() for value in lora_b)
    # The whole folder is a fraction of the 240 KB that the tiny base has.
    size = sum(path.stat().st_size for path in Path("run/adapter").iterdir())
    assert size < 60_000 < (tiny_llama / "model.safetensors").stat().st_size

    model = load_adapter(base(tiny_llama, quant), Path("run/adapter"))
    data = data_of(tiny_llama, rows)
    assert loss_of(model, data.evaluation) == pytest.approx(
        summary("run")["results"]["eval_loss"], abs=1e-5
    )
    record = read_adapter_record(Path("run/adapter"))
    assert record is not None
    fingerprint = record["base"].pop("weights_fingerprint")
    assert fingerprint.startswith("sha256:")
    assert record == {
        "schema_version": 1,
        "kind": "adapter",
        "base": {
            "name": str(tiny_llama),
            "revision": None,
            "commit": None,
            "random_weights": True,
        },
        "quant": quant,
        "double_quant": True,
        "compute_dtype": "float32",
        "data_fingerprint": data.report["train"]["fingerprint"],
        "run": "run",
    }


def test_both_arms_learn_the_same_tokens_in_the_same_order(train: Train) -> None:
    assert train(quant="nf4") == train(quant="bf16") == 0
    nf4, bf16 = summary("results/4bit"), summary("results/16bit")
    assert nf4["data"] == bf16["data"]
    differing = {n for n in nf4["settings"] if nf4["settings"][n] != bf16["settings"][n]}
    assert differing == {"quant", "output_dir"}
    for first, second in zip(steps("results/4bit"), steps("results/16bit"), strict=True):
        assert first["tokens"] == second["tokens"]
        assert first["loss"] == pytest.approx(second["loss"], rel=0.02)
        assert first["loss"] != second["loss"]


# --- losses -----------------------------------------------------------------------------------


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
    model.eval()
    wanted = list(model.parameters())
    with trainer._listed(model):
        assert model.train() is model and model[1].training
        assert model.train() is model
        assert model.eval() is model and not model[1].training
        assert [a is b for a, b in zip(model.parameters(), wanted, strict=True)] == [True] * 2
        assert list(model.parameters(recurse=False)) == []
        wanted[0].grad = torch.ones(3, 2)
        model.zero_grad()
        assert wanted[0].grad is None
    assert "train" not in vars(model) and "parameters" not in vars(model)


def test_published_optimizer_and_dtype_run_on_the_cpu(train: Train) -> None:
    assert (
        train(
            quant="nf4",
            output_dir="run",
            compute_dtype="bfloat16",
            optimizer="paged_adamw_32bit",
            checkpointing="full",
            max_steps=2,
        )
        == 0
    )
    assert summary("run")["quantization"]["parameter_dtypes"] == {
        "bfloat16": 46144,
        "float32": 8192,
        "uint8": 36864,
    }


def test_fp4_arm(train: Train) -> None:
    assert train(quant="fp4", max_steps=1) == 0
    assert summary("results/4bit_fp4")["quantization"]["quant"] == "fp4"


def test_epochs(train: Train) -> None:
    assert train(quant="bf16", output_dir="run", max_steps=None, epochs=1.5) == 0
    # 1.5 x 12 examples in batches of 4: 4.5, so 5 steps.
    assert len(losses("run")) == 5


def test_without_evaluation(train: Train) -> None:
    assert train(quant="bf16", output_dir="run", eval_fraction=0) == 0
    results = summary("run")["results"]
    assert results["eval_loss"] is results["perplexity"] is results["eval_tokens"] is None
    assert summary("run")["data"]["train"]["conversations"] == 16


# --- the learning rate ----------------------------------------------------------------------------


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


# --- interrupted and resumed ----------------------------------------------------------------------


@pytest.fixture
def signal_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Sends this process a signal when the row of a step is logged, once."""

    def install(step: int, number: signal.Signals) -> None:
        log, sent = trainer.StepLog.on_log, []

        def on_log(
            self: Any, args: Any, state: Any, control: Any, logs: Any = None, **more: Any
        ) -> None:
            log(self, args, state, control, logs, **more)
            if logs and "loss" in logs and state.global_step == step and not sent:
                sent.append(step)
                os.kill(os.getpid(), number)

        monkeypatch.setattr(trainer.StepLog, "on_log", on_log)

    return install


@pytest.mark.parametrize(("quant", "number"), [("nf4", signal.SIGTERM), ("bf16", signal.SIGINT)])
def test_signal_ends_the_run_with_a_checkpoint_and_the_same_command_goes_on(
    train: Train,
    signal_after: Callable[[int, signal.Signals], None],
    capsys: pytest.CaptureFixture[str],
    quant: str,
    number: signal.Signals,
) -> None:
    assert train(quant=quant, output_dir="whole", lora_dropout=0.1) == 0
    handlers = [signal.getsignal(item) for item in (signal.SIGTERM, signal.SIGINT)]

    signal_after(2, number)
    capsys.readouterr()
    assert train(quant=quant, output_dir="cut", lora_dropout=0.1) != 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    stopped = summary("cut")
    done = stopped["results"]["steps"]
    assert done in (2, 3)  # the step that was running is finished
    assert last == (
        f"qlora-harness: error: {number.name} stopped the run at step {done} of 4; a checkpoint "
        "was saved. Give the same command again to go on."
    )
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


def as_if_killed(run_dir: str) -> None:
    """Makes a completed run look as kill -9 leaves it: a summary from the start, no adapter."""
    record = summary(run_dir)
    for name in ("results", "memory", "runtime", "throughput"):
        del record[name]
    record |= {"status": "running", "finished": None}
    Path(run_dir, "training_summary.json").write_text(json.dumps(record))
    shutil.rmtree(Path(run_dir, "adapter"))


def test_run_killed_in_the_middle_repeats_the_steps_after_its_checkpoint(train: Train) -> None:
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    whole = losses("run")
    as_if_killed("run")
    shutil.rmtree("run/checkpoints/checkpoint-4")
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    assert losses("run") == whole
    assert summary("run")["results"]["steps"] == 4


def test_run_killed_while_evaluating_does_not_train_further(train: Train) -> None:
    assert train(quant="bf16", output_dir="run") == 0
    whole, results = losses("run"), summary("run")["results"]
    as_if_killed("run")
    assert train(quant="bf16", output_dir="run") == 0
    assert losses("run") == whole
    assert summary("run")["results"] == results


def test_training_time_before_a_kill_is_counted(train: Train) -> None:
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    as_if_killed("run")
    shutil.rmtree("run/checkpoints/checkpoint-4")
    log = read("run/training_logs.json")
    for row in log["steps"]:
        row["seconds"] = 100.0
    Path("run/training_logs.json").write_text(json.dumps(log))
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    # Two steps of 100 seconds and two new ones.
    assert summary("run")["runtime"]["train_seconds"] > 200


def test_steps_are_counted_even_if_the_log_is_behind_the_checkpoint(train: Train) -> None:
    """A kill between the checkpoint and the step log loses rows, not the count of steps."""
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    as_if_killed("run")
    shutil.rmtree("run/checkpoints/checkpoint-4")
    log = read("run/training_logs.json")
    Path("run/training_logs.json").write_text(json.dumps(log | {"steps": log["steps"][:1]}))
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    assert [row["step"] for row in steps("run")][-2:] == [3, 4]
    assert summary("run")["results"]["steps"] == 4


def test_half_written_checkpoint_is_passed_over(train: Train) -> None:
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    whole = losses("run")
    as_if_killed("run")
    Path("run/checkpoints/checkpoint-4/trainer_state.json").unlink()
    assert train(quant="bf16", output_dir="run", save_steps=2) == 0
    assert losses("run") == whole


@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_resumed_adapter_in_bfloat16_stays_so_and_learns_on(train: Train, kernels: str) -> None:
    """PEFT's own loading would replace its parameters by others in float32."""
    from safetensors.torch import load_file

    options = {"adapter_dtype": "bfloat16", "kernels": kernels, "save_steps": 2}
    assert train(quant="nf4", output_dir="whole", **options) == 0
    shutil.copytree("whole", "resumed")
    as_if_killed("resumed")
    shutil.rmtree("resumed/checkpoints/checkpoint-4")
    assert train(quant="nf4", output_dir="resumed", **options) == 0
    assert losses("resumed") == losses("whole")
    adapters = [
        load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("whole", "resumed")
    ]
    assert {str(tensor.dtype) for tensor in adapters[1].values()} == {"torch.bfloat16"}
    for name, tensor in adapters[0].items():
        assert torch.equal(adapters[1][name], tensor), name
    assert all(row["grad_norm"] > 0 for row in steps("resumed"))


def test_resume_of_changed_data_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings are the same, the rows of the file are not: the losses would be of both."""
    rows = tiny_rows(tmp_path / "mine.jsonl")
    assert train(quant="bf16", output_dir="run", save_steps=2, dataset=rows) == 0
    as_if_killed("run")
    shutil.rmtree("run/checkpoints/checkpoint-4")
    rows.write_text(rows.read_text().replace("It is", "That is"))
    assert train(quant="bf16", output_dir="run", save_steps=2, dataset=rows) == 2
    assert "fingerprint" in capsys.readouterr().err


def test_completed_run_is_left_alone_unless_told(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(quant="bf16", output_dir="run") == 0
    before = everything_in(Path("run"))
    assert train(quant="bf16", output_dir="run") == 2
    assert everything_in(Path("run")) == before
    capsys.readouterr()
    assert train(quant="bf16", output_dir="run", resume="auto") == 0
    assert "completed; nothing is left to do" in capsys.readouterr().out
    assert everything_in(Path("run")) == before
    Path("run/evaluation_results.json").write_text("{}")
    assert train(quant="bf16", output_dir="run", overwrite=True, max_steps=1) == 0
    assert len(losses("run")) == 1
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["checkpoint-1"]
    assert not Path("run/evaluation_results.json").exists()


# --- runs that fail -------------------------------------------------------------------------------


def test_non_finite_loss_stops_the_run(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(quant="bf16", output_dir="run", learning_rate=1e30) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("qlora-harness: error: step 2: loss nan, gradient norm nan; ")
    record = summary("run")
    assert record["status"] == "failed"
    assert record["finished"] is not None
    assert record["failure"]["problem"].startswith("step 2: loss nan")
    assert record["memory"]["cpu_peak_rss_bytes"] > 0
    assert not Path("run/adapter").exists()


def test_failed_run_keeps_the_steps_before_as_its_message_says(train: Train) -> None:
    assert train(quant="bf16", output_dir="run", learning_rate=1e30) == 3
    assert [row["step"] for row in steps("run")] == [1]
    assert all(math.isfinite(row["loss"]) for row in steps("run"))


def test_poisoned_base_weight_stops_the_run_at_once(
    train: Train, tiny_llama: Path, tmp_path: Path
) -> None:
    poisoned = Path(shutil.copytree(tiny_llama, tmp_path / "poisoned"))
    weights = load_file(poisoned / "model.safetensors")
    weights["lm_head.weight"][5, 5] = float("nan")
    save_file(weights, poisoned / "model.safetensors", {"format": "pt"})
    assert train(quant="nf4", output_dir="run", model=poisoned) == 3
    assert summary("run")["failure"]["problem"].startswith("step 1: loss nan")


@pytest.mark.parametrize("learning_rate", [1e30, 1e39])
def test_last_step_that_ruins_the_adapter_fails_the_run(
    train: Train, capsys: pytest.CaptureFixture[str], learning_rate: float
) -> None:
    """The only step's own loss is fine. After it the evaluation, or the adapter, is not finite."""
    assert train(quant="bf16", output_dir="run", learning_rate=learning_rate, max_steps=1) == 3
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("qlora-harness: error: ")
    assert summary("run")["status"] == "failed"


def test_evaluation_loss_without_a_finite_perplexity_is_no_crash(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exp(loss) leaves the range of a float above 709 nats."""
    from qlora_harness.train import run
    from qlora_harness.train.evaluation import EvaluationLoss

    monkeypatch.setattr(run, "evaluate_loss", lambda *_, **__: EvaluationLoss(800.0, 5))
    assert train(quant="bf16", output_dir="run", max_steps=1) in (0, 3)
    assert summary("run")["status"] in ("completed", "failed")


def test_failed_run_is_started_again(train: Train) -> None:
    assert train(quant="bf16", output_dir="run", learning_rate=1e30) == 3
    assert train(quant="bf16", output_dir="run") == 0
    assert summary("run")["status"] == "completed"


def test_unexpected_error_is_noted_and_raised(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(trainer.StepLog, "on_log", broken)
    with pytest.raises(ZeroDivisionError):
        train(quant="bf16", output_dir="run")
    record = summary("run")
    assert (record["status"], record["failure"]) == (
        "failed",
        {"problem": "ZeroDivisionError: boom"},
    )


def test_step_that_is_done_is_logged_when_the_next_one_fails(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the row of a step waits for the next one."""
    train_step = trainer.CountingTrainer.training_step

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return train_step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.CountingTrainer, "training_step", full)
    monkeypatch.setattr(trainer.CountingTrainer, "_runs_ahead", True)
    assert train(quant="bf16", output_dir="run", save_steps=100) == 3
    assert [row["step"] for row in steps("run")] == [1, 2]


def test_out_of_memory_gives_advice(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer.StepLog, "on_log", full)
    assert train(quant="bf16", output_dir="run") == 3
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "qlora-harness: error: cpu ran out of memory with --batch-size 4 and --max-length 96. "
        "Use --memory balanced or lean, halve --batch-size and double --grad-accum, lower "
        "--max-length, or use --quant nf4."
    )
    assert summary("run")["status"] == "failed"


# --- bad input ------------------------------------------------------------------------------------


def _model_without_weights(folder: Path, tiny_llama: Path) -> Path:
    shutil.copytree(tiny_llama, folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    return folder / "model"


def _rows_with(folder: Path, rows: Path, line: str) -> Path:
    path = folder / "broken.jsonl"
    path.write_text(rows.read_text() + line + "\n")
    return path


BAD_INPUT: dict[str, tuple[Callable[[Path, Path, Path], dict[str, Any]], str]] = {
    "missing model": (
        lambda folder, model, rows: {"model": folder / "nope"},
        "--model: {folder}/nope does not exist. ",
    ),
    "model on an unreachable hub": (
        lambda folder, model, rows: {"model": "meta-llama/Llama-2-7b-hf"},
        "--model: 'meta-llama/Llama-2-7b-hf' ",
    ),
    "model without weights": (
        lambda folder, model, rows: {"model": _model_without_weights(folder, model)},
        "--model: '{folder}/model' can't be loaded (",
    ),
    "missing data": (
        lambda folder, model, rows: {"dataset": folder / "nope.jsonl"},
        "--dataset: {folder}/nope.jsonl does not exist. ",
    ),
    "broken JSON": (
        lambda folder, model, rows: {"dataset": _rows_with(folder, rows, '{"text": ')},
        "{folder}/broken.jsonl, line 33: not valid JSON (",
    ),
    "missing fields": (
        lambda folder, model, rows: {"dataset": _rows_with(folder, rows, '{"text": "a"}')},
        "{folder}/broken.jsonl, line 33: field 'message_id' is missing. ",
    ),
    "nothing left": (
        lambda folder, model, rows: {"languages": "de"},
        "--dataset {rows}: no conversation is left to train on (of 32 messages; "
        "dropped: 32 language; ",
    ),
    "too short": (
        lambda folder, model, rows: {"max_length": 8},
        "--dataset {rows}: no conversation is left to train on ",
    ),
    "template": (
        lambda folder, model, rows: {"template": "chatml"},
        "--template chatml needs the token '<|im_start|>'",
    ),
    "layers": (
        lambda folder, model, rows: {"lora_targets": "typo"},
        "--lora-targets: the model has no layers named typo. ",
    ),
    "seed": (lambda folder, model, rows: {"seed": 2**33}, "--seed: 8589934592 "),
    "checkpoint": (
        lambda folder, model, rows: {"resume": folder / "nope"},
        "--resume: {folder}/nope is no whole checkpoint (missing: ",
    ),
    "output folder is a file": (lambda folder, model, rows: {"output_dir": rows}, "{rows}"),
    "output folder below a file": (
        lambda folder, model, rows: {"output_dir": rows / "run"},
        "{rows}",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_touches_nothing(
    train: Train,
    tiny_llama: Path,
    rows: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    case: str,
) -> None:
    make, expected = BAD_INPUT[case]
    flags = make(tmp_path, tiny_llama, rows)
    before = everything_in(tmp_path)
    capfd.readouterr()
    assert train(quant="nf4", **flags) == 2
    err = capfd.readouterr().err
    told = [line for line in err.splitlines() if "qlora-harness: error: " in line]
    assert len(told) == 1
    assert err.endswith(f"{told[0]}\n")
    message = told[0].split("qlora-harness: error: ")[1]
    assert expected.format(folder=tmp_path, rows=rows) in message
    assert "Traceback" not in err
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


def test_resumed_in_a_later_epoch_goes_on_with_the_same_examples(train: Train) -> None:
    options = {"quant": "bf16", "max_steps": 10, "batch_size": 2, "save_steps": 8}
    assert train(output_dir="whole", group_by_length=True, **options) == 0
    rows = steps("whole")
    assert rows[7]["epoch"] > 1.0
    shutil.copytree("whole", "resumed")
    for path in Path("resumed/checkpoints").glob("checkpoint-10"):
        shutil.rmtree(path)
    record = read("resumed/training_summary.json")
    record["status"] = "interrupted"
    Path("resumed/training_summary.json").write_text(json.dumps(record))
    assert train(output_dir="resumed", group_by_length=True, **options) == 0
    for one, other in zip(rows, steps("resumed"), strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)

"""Helpers for training runs of a tiny model on the CPU.

The fixture `train` in conftest.py runs the command's own main function: real NF4 and real bf16
bases, in float32 arithmetic so that losses can be compared to 1e-5. What needs processes of its own
(the launcher, kill -9, two ranks) is in test_launcher.py.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qlora_harness.data.corpus import TrainingData, load_training_data
from qlora_harness.data.examples import Example
from qlora_harness.model.base import load_base
from qlora_harness.model.source import find_base, load_tokenizer
from qlora_harness.settings import DataSettings, Quant
from qlora_harness.train.evaluation import evaluate_loss

Train = Callable[..., int]


def read(path: str | Path) -> dict[str, Any]:
    text = Path(path).read_text(encoding="utf-8")
    value: dict[str, Any] = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    return value


def summary(run_dir: str | Path) -> dict[str, Any]:
    return read(Path(run_dir) / "training_summary.json")


def evaluations(run_dir: str) -> dict[str, Any]:
    evaluation: dict[str, Any] = read(f"{run_dir}/training_logs.json")["evaluation"]
    return evaluation


def steps(run_dir: str | Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read(Path(run_dir) / "training_logs.json")["steps"]
    return rows


def losses(run_dir: str | Path) -> list[float]:
    assert [row["step"] for row in steps(run_dir)] == list(range(1, len(steps(run_dir)) + 1))
    return [row["loss"] for row in steps(run_dir)]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def data_of(model: Path, rows: Path) -> TrainingData:
    settings = DataSettings(dataset=str(rows), max_length=96, eval_fraction=0.25)
    return load_training_data(load_tokenizer(find_base(str(model))), settings)


def base(model: Path, quant: str = "bf16") -> Any:
    """A base in float32 arithmetic on the CPU."""
    return load_base(
        find_base(str(model)), quant=Quant(quant), double_quant=True, compute_dtype="float32",
        device=torch.device("cpu"),
    )  # fmt: skip


def loss_of(model: Any, examples: Sequence[Example]) -> float:
    return evaluate_loss(
        model, examples, batch_size=3, pad_id=0, accelerator=Accelerator(cpu=True),
        autocast_dtype=None,
    ).loss  # fmt: skip


def as_if_killed(run_dir: str | Path, *lost: int) -> None:
    """Makes a completed run look as if killed; removes the checkpoints of the `lost` steps."""
    record = summary(run_dir)
    for name in ("results", "memory", "runtime", "throughput"):
        del record[name]
    record |= {"status": "running", "finished": None}
    Path(run_dir, "training_summary.json").write_text(json.dumps(record))
    shutil.rmtree(Path(run_dir, "adapter"))
    for step in lost:
        shutil.rmtree(Path(run_dir, "checkpoints", f"checkpoint-{step}"))


# Run folders made by hand.

CHECKPOINT_FILES = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "trainer_state.json",
)  # fmt: skip


def write_summary(run_dir: Path, status: str, settings: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "schema_version": 1,
        "kind": "training_summary",
        "status": status,
        "settings": json.loads(json.dumps(settings)),
    }
    if status == "completed":
        record |= {
            "data": {"train": {"fingerprint": "sha256:0"}, "dataset": "oasst1"},
            "results": {"final_train_loss": 1.0},
            "runtime": {"train_seconds": 1.0},
            "throughput": {"tokens_per_second": 1.0},
        }
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "training_summary.json").write_text(json.dumps(record))
    return record


def change_summary(run_dir: Path, **keys: Any) -> None:
    path = run_dir / "training_summary.json"
    path.write_text(json.dumps(read(path) | keys))


def write_checkpoint(run_dir: Path, step: int, without: str = "") -> Path:
    folder = run_dir / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"lora_A.weight": torch.ones(2, 3)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 2, "peft_type": "LORA"}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.arange(50)}, folder / name)
    state: dict[str, Any] = {
        "epoch": 1.0, "global_step": step, "max_steps": 8, "num_train_epochs": 1,
    }  # fmt: skip
    state |= {"total_flos": 0.0, "log_history": [{"loss": 1.0}], "stateful_callbacks": {}}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if without:
        (folder / without).unlink()
    return folder


# Runs in several processes.


def on_ranks(
    ranks: int, flags: Mapping[str, Any], folder: Path, *, fault: str = "", restarts: int = 0,
    fsdp: bool = False,
) -> None:  # fmt: skip
    """Runs the training command in processes joined by gloo, as torchrun does.

    What each prints goes to `folder`/rank0.txt and so on, errors to errors0.txt. A `fault`, "kill",
    "stop" or "out of memory", befalls the last one in its fifth step.
    """
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag}={value}")
    launch(ranks, _rank, words, folder, fault, fsdp, restarts=restarts)


def launch(ranks: int, function: Callable[..., Any], *args: Any, restarts: int = 0) -> None:
    """Calls a function in processes joined by gloo.

    The server from which they are forked imports everything once.
    """
    multiprocessing.set_forkserver_preload(
        ["qlora_harness.train.run", "qlora_harness.train.command"]
    )
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, max_restarts=restarts,
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1",
        start_method="forkserver",
    )  # fmt: skip
    elastic_launch(config, function)(*args)


def _rank(words: list[str], folder: Path, fault: str, fsdp: bool) -> None:
    from qlora_harness.train import heartbeat
    from qlora_harness.train.command import main
    from qlora_harness.train.trainer import CountingTrainer

    if fault == "stop":
        heartbeat._EVERY = 0.2  # seconds
    rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
    os.environ["ACCELERATE_USE_FSDP"] = str(fsdp).lower()
    os.chdir(folder)
    step = CountingTrainer.training_step

    def faulty(self: CountingTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 4:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "stop":  # until later, as the launcher waits 30 s before it kills
                subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
                return step(self, *args, **options)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args, **options)

    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if fault and first and int(rank) == int(ranks) - 1:
        CountingTrainer.training_step = faulty  # type: ignore[method-assign]
    with contextlib.ExitStack() as outputs:
        for name, redirect in (
            ("rank", contextlib.redirect_stdout), ("errors", contextlib.redirect_stderr),
        ):  # fmt: skip
            file = outputs.enter_context(open(f"{name}{rank}.txt", "a"))
            outputs.enter_context(redirect(file))
        status = main(words)
    if status:
        sys.exit(status)

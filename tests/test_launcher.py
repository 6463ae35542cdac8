"""Training as users start it: through the launcher, and killed.

Each run is a subprocess that imports torch anew (about 6 seconds), so there are few of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, tiny_rows
from training_runs import losses, summary

ACCELERATE = Path(sys.executable).parent / "accelerate"
ONE_PROCESS = [
    "--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no",
]  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A working folder with `launch/train.py` and an empty results/."""
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    return tmp_path


@pytest.fixture
def flags(tiny_llama: Path, tmp_path: Path) -> list[str]:
    rows = tiny_rows(tmp_path / "rows.jsonl")
    # fmt: off
    return [
        "--model", str(tiny_llama), "--dataset", str(rows), "--compute-dtype", "float32",
        "--optimizer", "adamw_torch", "--max-length", "96", "--lora-r", "4", "--lora-dropout", "0",
        "--eval-fraction", "0.25", "--learning-rate", "0.01", "--no-group-by-length",
    ]
    # fmt: on


def start(folder: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"} | more
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=folder, env=environment, **pipes)


def run(folder: Path, *words: str, **more: str) -> tuple[int, str, str]:
    process = start(folder, *words, **more)
    out, err = process.communicate(timeout=150)
    return process.returncode, out, err


def test_accelerate_launch_trains(checkout: Path, flags: list[str]) -> None:
    status, out, err = run(
        checkout, str(ACCELERATE), "launch", *ONE_PROCESS, "launch/train.py", "--quant", "nf4",
        *flags, "--max-steps", "2",
    )  # fmt: skip
    assert (status, "Traceback" in err) == (0, False), err
    record = summary(checkout / "results" / "4bit")
    assert (record["status"], record["quant"]) == ("completed", "nf4")
    assert record["environment"]["command"].startswith("train.py --quant nf4 --model ")
    assert len(losses(checkout / "results" / "4bit")) == 2
    # The numbers that a user looks for are the last lines.
    last = out.strip().splitlines()[-2:]
    assert last[0].startswith("nf4: 2 steps in ")
    assert f"evaluation loss {record['results']['eval_loss']:.3f}, perplexity " in last[0]
    assert last[1] == "adapter: results/4bit/adapter   record: results/4bit"


def test_mistake_through_the_launcher_is_one_line(checkout: Path) -> None:
    status, out, err = run(
        checkout, str(ACCELERATE), "launch", *ONE_PROCESS, "launch/train.py", "--quant", "int4"
    )
    assert status != 0
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(
        "qlora-harness: error: --quant: 'int4' is not one of nf4, fp4, int8, hqq, bf16. "
    )
    assert not (checkout / "results").exists()


@pytest.mark.parametrize(
    ("words", "status"), [(["--quant", "int4"], 2), (["--recipe", "nope"], 2), (["--help"], 0)]
)
@pytest.mark.parametrize("program", [["launch/train.py"], ["-m", "qlora_harness.train"]])
def test_launcher_runs_without_accelerate_too(
    checkout: Path, program: list[str], words: list[str], status: int
) -> None:
    ended, out, err = run(checkout, sys.executable, *program, *words)
    assert ended == status
    assert (err.count("\n"), bool(out)) == ((0, True) if status == 0 else (1, False))


def test_sigterm_to_accelerate_launch_ends_the_run_with_a_checkpoint(
    checkout: Path, flags: list[str]
) -> None:
    """Schedulers signal that process, which dies without forwarding the signal."""
    run_dir = checkout / "run"
    process = start(
        checkout, str(ACCELERATE), "launch", *ONE_PROCESS, "launch/train.py", "--quant", "bf16",
        *flags, "--max-steps", "100000", "--grad-accum", "1", "--save-steps", "20",
        "--output-dir", "run",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("checkpoints/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trains = psutil.Process(summary(run_dir)["process"]["id"])
    assert trains.parent() == psutil.Process(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    psutil.wait_procs([trains], timeout=60)
    assert not trains.is_running()
    process.communicate()
    record = summary(run_dir)
    assert record["status"] == "interrupted"
    assert (run_dir / "checkpoints" / f"checkpoint-{record['results']['steps']}").is_dir()

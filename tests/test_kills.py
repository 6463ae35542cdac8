"""Training and scoring killed at random points: nothing is lost, no number changes.

Each try is a process forked from this one, which has imported everything already. Other tests
start threads, with which a fork may hang, so these run by themselves:
`pytest -m slow tests/test_kills.py`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from scoring_runs import evaluate
from training_runs import Train, losses, read, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
KILLS = 50


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> None:
    if {item.path for item in request.session.items} != {request.path}:
        pytest.skip("run this file by itself: pytest -m slow tests/test_kills.py")


def forked(work: Callable[[], object], seconds: float | None = None) -> bool:
    """Runs `work` in a forked process, killed after `seconds`; returns whether it ended first."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is None or time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def seconds_of(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    forked(work)
    return time.monotonic() - begun


def is_completed(folder: str) -> bool:
    path = Path(folder, "training_summary.json")
    return path.is_file() and bool(read(path)["status"] == "completed")


def test_killed_training_resumes_to_the_same_numbers(train: Train) -> None:
    import qlora_harness.train.run  # noqa: F401

    numbers = random.Random(1)
    options = {"quant": "bf16", "lora_dropout": 0.1, "max_steps": 12, "save_steps": 1}

    def run(folder: str) -> Callable[[], None]:
        def work() -> None:
            assert train(output_dir=folder, **options) == 0

        return work

    duration = seconds_of(run("whole"))
    whole = load_file("whole/adapter/adapter_model.safetensors")
    done = resumed = tries = 0
    while done < KILLS:
        folder = f"run{tries}"
        tries += 1
        while not forked(run(folder), numbers.uniform(0, duration) if done < KILLS else None):
            done += 1
            if is_completed(folder):  # killed after its last file
                break
        resumed += summary(folder)["runtime"]["resumed"]
        assert losses(folder) == losses("whole")
        for name in ("eval_loss", "final_train_loss", "steps"):
            assert summary(folder)["results"][name] == summary("whole")["results"][name]
        adapter = load_file(f"{folder}/adapter/adapter_model.safetensors")
        assert adapter.keys() == whole.keys()
        assert all(torch.equal(adapter[name], whole[name]) for name in whole)
    print(f"{done} kills in {tries} runs, {resumed} of them resumed from a checkpoint")
    assert resumed > 0


def test_killed_scoring_resumes_to_the_same_numbers(
    make_lm: Callable[..., Any], manager: TaskManager, adapter: Path, tmp_path: Path
) -> None:
    numbers = random.Random(2)

    def run(folder: str) -> Callable[[], None]:
        def work() -> None:
            lm = make_lm(peft=str(adapter), results_dir=str(tmp_path / folder), batch_size=1)
            evaluate(lm, manager)

        return work

    def questions(folder: str) -> Any:
        (path,) = (tmp_path / folder).glob("mmlu_progress_*.json")
        return read(path)["tasks"]

    duration = seconds_of(run("whole"))
    done = tries = journals = 0
    while done < KILLS:
        folder = f"run{tries}"
        tries += 1
        while not forked(run(folder), numbers.uniform(0, duration) if done < KILLS else None):
            done += 1
            journals += any((tmp_path / folder).glob(".mmlu_progress_*.jsonl*"))
        assert questions(folder) == questions("whole")
    print(f"{done} kills in {tries} runs, {journals} of them with answers in the journal")
    assert journals > 0

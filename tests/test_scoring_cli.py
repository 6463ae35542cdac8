"""Scoring through the command lines that users type, in processes of their own.

lm-eval reads its 14,000 task files in each of them, so every command runs once, all start together
(two at a time), and the tests share what they left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lm_eval.__main__ import cli_evaluate

BIN = Path(sys.executable).parent
DEMO = ["--tasks", "mmlu_qlora_demo", "--model", "qlora_adapter"]


# lm_eval, killed by the system in the middle of its scoring.
KILLED = """
import os, signal, sys
from lm_eval.__main__ import cli_evaluate
from qlora_harness.score.packed_forward import PackedModel

start, packs = PackedModel.start, []

def killed(self, pack):
    if len(packs) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    packs.append(pack)
    return start(self, pack)

PackedModel.start = killed
sys.argv[0] = "lm_eval"
cli_evaluate()
"""


class Run(NamedTuple):
    """A command that has ended, and the folder it ran in."""

    status: int
    output: str
    errors: str
    folder: Path

    def record(self, name: str = "evaluation_results.json") -> dict[str, Any]:
        return json.loads((self.folder / "results" / "tiny_llama_base_4bit" / name).read_text())

    def harness_json(self) -> dict[str, Any]:
        (path,) = self.folder.glob("out/*/results_*.json")
        return json.loads(path.read_text())

    def error_line(self) -> str:
        """The one line that the user is told; there is no traceback."""
        assert self.status != 0
        assert "Traceback" not in self.errors
        lines = [s for s in self.errors.splitlines() if s.startswith("qlora-harness: error: ")]
        assert len(lines) == 1
        return lines[0].removeprefix("qlora-harness: error: ")


def commands(model: Path) -> dict[str, list[str]]:
    lm_eval, accelerate = str(BIN / "lm_eval"), str(BIN / "accelerate")
    nf4 = ["--model_args", f"pretrained={model},quant=nf4"]
    saved = ["--output_path", "out", "--log_samples"]
    blocked = ["--output_path", "blocked"]
    one_process = ["launch", "--quiet", "--num_processes", "1", "-m", "lm_eval"]
    # `accelerate launch` starts several processes on a CPU through MPI only; this is what it does.
    two_processes = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lm_eval"]
    killed = ["-c", KILLED, *DEMO, *nf4[:1], f"{nf4[1]},pack_tokens=1024", "--limit", "3"]
    return {
        "single": [lm_eval, *DEMO, *nf4, "--limit", "3", *saved],
        "two processes": [sys.executable, *two_processes, *DEMO, *nf4, "--limit", "3", *saved],
        "sharded": [
            *("env", "ACCELERATE_USE_FSDP=true", sys.executable, *two_processes, *DEMO),
            *(nf4[0], f"{nf4[1]},pack_tokens=1024", "--limit", "3"),
        ],
        "accelerate, not saved": [accelerate, *one_process, *DEMO, *nf4, "--limit", "1", *blocked],
        "wrong folder": [
            *(lm_eval, "--tasks", "mmlu_qlora_5shot", "--model", "qlora_adapter"),
            *("--model_args", "pretrained=no/such/model", "--metadata", "mmlu_dir=nowhere"),
        ],
        "killed": [sys.executable, *killed],
    }


@pytest.fixture(scope="module")
def runs(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Run]]]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    for name in ("QLORA_HARNESS_NO_HOOK", "QLORA_MMLU_DIR", "LMEVAL_LOG_LEVEL"):
        environment.pop(name, None)

    def run(words: list[str]) -> Run:
        folder = tmp_path_factory.mktemp("cli")
        (folder / "blocked").write_text("a file in the way")
        done = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
        )
        return Run(done.returncode, done.stdout, done.stderr, folder)

    pool = ThreadPoolExecutor(2)
    yield {name: pool.submit(run, words) for name, words in commands(tiny_llama).items()}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def single(runs: dict[str, Future[Run]]) -> Run:
    return runs["single"].result()


def test_lm_eval_scores_the_demo_tasks(single: Run) -> None:
    assert single.status == 0, single.errors
    results = single.harness_json()
    assert results["config"]["model"] == "qlora_adapter"
    assert results["config"]["quant"] == "nf4"
    assert results["config"]["softmax_dtype"] == "float32"
    assert results["n-samples"]["mmlu_qlora_demo_astronomy"] == {"original": 12, "effective": 3}
    samples = list(single.folder.glob("out/*/samples_mmlu_qlora_demo_*.jsonl"))
    assert len(samples) == 8
    assert all(len(path.read_text().splitlines()) == 3 for path in samples)
    task = single.record()["tasks"]["mmlu_qlora_demo"]
    assert (task["n"], task["n_total"]) == (24, 96)
    assert task["acc"] == pytest.approx(results["results"]["mmlu_qlora_demo"]["acc,none"])
    table = [line.split("|")[1].strip() for line in single.output.splitlines() if "|" in line]
    assert {"mmlu_qlora_demo", "- stem", "- nutrition"} <= set(table)


def test_record_equals_the_logged_samples(single: Run) -> None:
    rows = single.record("mmlu_progress_tiny_llama_4bit_base.json")["tasks"]["mmlu_qlora_demo"]
    stored = {row["index"]: row for row in rows}
    assert list(stored) == sorted(stored)
    logged = {}
    for path in single.folder.glob("out/*/samples_*.jsonl"):
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            logged[sample["doc"]["index"]] = sample
    assert set(stored) == set(logged)
    for index, sample in logged.items():
        logprobs = [float(pair[0]) for pair in sample["filtered_resps"]]
        assert list(stored[index]["logprobs"].values()) == pytest.approx(logprobs, abs=1e-6)
        assert stored[index]["correct"] == bool(sample["acc"])
        # lm_eval's own hash of the prompt begins with ours.
        assert sample["prompt_hash"].startswith(stored[index]["prompt_sha256"])
        assert sample["arguments"]["gen_args_0"]["arg_0"] == sample["doc"]["input"]


def test_two_processes_leave_the_same_record(single: Run, runs: dict[str, Future[Run]]) -> None:
    both = runs["two processes"].result()
    assert both.status == 0, both.errors
    expected = single.record()["tasks"]["mmlu_qlora_demo"]
    stored = both.record()["tasks"]["mmlu_qlora_demo"]
    assert stored.pop("settings") == expected.pop("settings") | {"processes": 2}
    assert stored == expected
    name = "mmlu_progress_tiny_llama_4bit_base.json"
    rows, others = (run.record(name)["tasks"]["mmlu_qlora_demo"] for run in (single, both))
    assert rows == others  # to the last bit: both compute the same packs
    theirs = both.harness_json()["results"]["mmlu_qlora_demo"]
    assert theirs["acc,none"] == pytest.approx(stored["acc"], abs=1e-12)


def test_a_base_spread_over_two_processes_scores_alike(
    single: Run, runs: dict[str, Future[Run]]
) -> None:
    """Though the processes compute different numbers of packs, which each gathers for the other."""
    sharded = runs["sharded"].result()
    assert sharded.status == 0, sharded.errors
    assert not sharded.record()["tasks"]["mmlu_qlora_demo"]["settings"]["expanded_once"]
    name = "mmlu_progress_tiny_llama_4bit_base.json"
    rows, others = (run.record(name)["tasks"]["mmlu_qlora_demo"] for run in (single, sharded))
    for row, other in zip(rows, others, strict=True):
        assert other["logprobs"] == pytest.approx(row["logprobs"], abs=1e-5)


def test_accelerate_launch_scores_and_says_that_the_results_cannot_be_saved(
    runs: dict[str, Future[Run]],
) -> None:
    run = runs["accelerate, not saved"].result()
    assert run.error_line().startswith("--output_path blocked: lm_eval could not save")
    assert (run.folder / "blocked").read_text() == "a file in the way"
    # What was scored is not lost with it.
    task = run.record()["tasks"]["mmlu_qlora_demo"]
    assert (task["n"], task["settings"]["processes"]) == (8, 1)


def test_a_wrong_folder_is_noticed_before_the_model_is_looked_for(
    runs: dict[str, Future[Run]],
) -> None:
    line = runs["wrong folder"].result().error_line()
    assert line.startswith("--metadata mmlu_dir: folder nowhere does not exist")


def test_after_kill_9_the_same_command_scores_only_what_is_missing(
    single: Run, runs: dict[str, Future[Run]], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, unchanged_tracker: None,
) -> None:  # fmt: skip
    first = runs["killed"].result()
    assert first.status == -9
    (journal,) = (first.folder / "results" / "tiny_llama_base_4bit").iterdir()
    done = len(journal.read_text().splitlines()) - 1
    assert 0 < done < 96
    model_args = f"pretrained={tiny_llama},quant=nf4,pack_tokens=1024"
    monkeypatch.chdir(first.folder)
    words = ["lm_eval", *DEMO, "--model_args", model_args, "--limit", "3"]
    monkeypatch.setattr("sys.argv", words)
    cli_evaluate()
    assert f"{done} texts were scored before the interruption" in caplog.messages
    assert first.record()["tasks"] == single.record()["tasks"]
    assert not journal.exists()

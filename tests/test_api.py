"""`qh.train` and `qh.compare` from Python; docs/quickstart.ipynb scores as well."""

from __future__ import annotations

from pathlib import Path

import pytest

import qlora_harness as qh
from qlora_harness.errors import RunError, SettingsError


def test_two_arms_are_trained_and_compared(
    tiny_llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": str(tiny_llama), "dataset": str(rows), "max_steps": 2, "batch_size": 4,
        "grad_accum": 1, "optimizer": "adamw_torch", "max_length": 96, "lora_r": 4,
        "eval_fraction": 0.25, "compute_dtype": "float32",
    }  # fmt: skip
    runs = [qh.train({**settings, "quant": quant}) for quant in ("nf4", "bf16")]
    assert [str(run.path) for run in runs] == ["results/4bit", "results/16bit"]
    assert runs[0].training is not None
    assert runs[0].training.results.steps == 2
    item = qh.compare([run.path for run in runs]).contrasts[0]
    assert (item.arm, item.baseline) == ("NF4", "bf16")
    assert item["eval_loss"].reason == "random weights"
    log = runs[0].log
    assert log is not None
    assert len(log.evaluation.nll_before) == len(log.evaluation.nll) > 0


def test_mistakes_are_errors_of_ours(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="quant"):
        qh.train({"quant": "int3"})
    with pytest.raises(RunError, match="lm_eval failed with status"):
        qh.score(tmp_path, tasks="mmlu_qlora_demo", pretrained=tmp_path / "nothing")

"""Resuming from a damaged run folder: a run starts, or one line says why not."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from mutations import Reader, damaged_bytes, damaged_json
from training_runs import change_summary, write_checkpoint, write_summary

from qlora_harness.settings_checks import build_settings
from qlora_harness.train.checkpoints import checkpoint_step
from qlora_harness.train.run_folder import earlier_steps, find_start

ZIPPED = (".pt", ".pth")
VALUES = {"max_steps": 8, "lora_r": 2}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    write_summary(folder, "interrupted", build_settings(VALUES).flat())
    change_summary(
        folder, started="2026-11-28T05:00:00+00:00",
        process={"id": 2, "host": "0" * 16, "started": 1.0},
        model={"weights_fingerprint": "sha256:0"}, quantization={"compute_dtype": "float32"},
        computation={"padding": "none"}, data={"train": {"fingerprint": "x"}},
        runtime={"train_seconds": 1.5},
    )  # fmt: skip
    step = {"step": 1, "loss": 1.0, "seconds": 0.5, "tokens": 5, "supervised_tokens": 2}
    log = {"schema_version": 1, "kind": "training_logs", "steps": [step, step | {"step": 2}]}
    (folder / "training_logs.json").write_text(json.dumps(log))
    for number in (2, 4):
        write_checkpoint(folder, number)
    return folder


def loads(path: Path) -> bool:
    """Whether torch can load a file that was judged intact; if so, it holds what was saved."""
    try:
        state = torch.load(path)["state"]
    except Exception:  # noqa: BLE001  # torch raises many kinds
        return False
    assert state.equal(torch.arange(50))
    return True


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("inputs", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_run_folder_is_resumed_or_refused_in_one_line(run_dir: Path, inputs: int) -> None:
    rng = random.Random(3)
    paths = sorted(path for path in run_dir.rglob("*") if path.is_file())
    settings = build_settings(VALUES)
    outcomes: Counter[str] = Counter()

    def resume() -> None:
        start = find_start(run_dir, settings, resume_given=False)
        assert start.checkpoint is not None
        earlier_steps(start.checkpoint)
        is_newest = checkpoint_step(start.checkpoint) == 4
        outcomes["resumed" if is_newest else "stepped back"] += 1
        if is_newest and path.parent == start.checkpoint and path.suffix in ZIPPED:
            outcomes["not loaded"] += not loads(path)

    reader = Reader()
    for number in range(inputs):
        path = rng.choice(paths)
        content = path.read_bytes()
        if path.suffix == ".json" and rng.random() < 0.6:
            text = damaged_json(rng, json.loads(content))
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        else:
            path.write_bytes(damaged_bytes(rng, content))
        try:
            reader.read(resume, (number, path.name))
        finally:
            path.write_bytes(content)
    assert outcomes["not loaded"] < inputs / 100  # then training refuses it in one line
    assert min(outcomes["resumed"], outcomes["stepped back"], reader.outcomes["refused"]) > 0

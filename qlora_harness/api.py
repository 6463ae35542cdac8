"""`qlora_harness.train` and `qlora_harness.score`: training and scoring from Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_harness.errors import RunError
from qlora_harness.recipes import with_recipe
from qlora_harness.record import ADAPTER_DIR
from qlora_harness.results.runs import Run, load_run
from qlora_harness.score.suite import benchmarks, lm_eval_words
from qlora_harness.settings import Settings
from qlora_harness.settings_checks import build_settings


def train(settings: Settings | Mapping[str, Any], *, recipe: str | None = None) -> Run:
    """Trains one arm in this process; use `launch/train.py` for several GPUs.

    `settings` are its flags by name, such as {"quant": "nf4", "max_steps": 100}; `recipe` supplies
    the others. Raises HarnessError, after which the run's record says "failed".
    """
    from qlora_harness.train.run import run_training

    if isinstance(settings, Mapping):
        settings = build_settings(with_recipe(recipe, settings)[0])
    run_training(settings, resume_given=False)
    return load_run(settings.run_dir)


def score(
    run: str | Path,
    *,
    tasks: str = "mmlu_qlora_5shot",
    limit: int | None = None,
    batch_size: int | str = 1,
    **model_args: Any,
) -> Run:
    """Scores a run with `lm_eval --model qlora_adapter` in its own process.

    `run` is the folder of a trained run or, with `pretrained`, the folder for the records of a base
    without an adapter. `tasks` are those of `qlora-harness score --suite`, and `limit` is in
    questions of each. `model_args` are further arguments of the model, such as kernels="none".
    Raises RunError with lm_eval's last line if it fails.
    """
    folder = Path(run)
    if "pretrained" not in model_args:
        model_args = {"peft": folder / ADAPTER_DIR, **model_args}
    model_args = {**model_args, "results_dir": folder}
    chosen = [task for part in benchmarks(tasks.split(","), "tasks") for task in part]
    words = lm_eval_words(model_args, chosen, batch_size, folder / "lm_eval")
    command = [sys.executable, "-m", "lm_eval", *words]
    command += [] if limit is None else ["--limit", str(limit)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RunError(
            f"lm_eval failed with status {done.returncode}: {lines[-1]}",
            "Run lm_eval in a shell to see all of its output",
        )
    return load_run(folder)

"""`qlora_harness.train` and `qlora_harness.score`: the two commands, from Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_harness.errors import RunError
from qlora_harness.record import ADAPTER_DIR
from qlora_harness.results.runs import Run, load_run
from qlora_harness.settings import Settings, build_settings, with_recipe


def train(settings: Settings | Mapping[str, Any], *, recipe: str | None = None) -> Run:
    """Trains one arm in this process, as `launch/train.py` does; for several GPUs use that.

    Args:
        settings: Flags of launch/train.py by name, such as {"quant": "nf4", "max_steps": 100}.
        recipe: Recipe that supplies every value missing from `settings`.

    Raises:
        HarnessError: Anything the user can mend; the run's record then says "failed".
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
    """Scores a run with `lm_eval --model qlora_adapter` in a process of its own.

    Args:
        run: Folder of a trained run; of a base without an adapter, the folder for its records.
        tasks: Of lm_eval, separated by commas.
        limit: Questions of each task.
        batch_size: Of lm_eval.
        **model_args: Others of the model, such as kernels="none"; `pretrained` scores a base.

    Raises:
        RunError: lm_eval failed; the message holds its last line.
    """
    folder = Path(run)
    if "pretrained" not in model_args:
        model_args = {"peft": folder / ADAPTER_DIR, **model_args}
    arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "qlora_adapter"]
    command += ["--model_args", f"{arguments},results_dir={folder}", "--tasks", tasks]
    command += ["--batch_size", str(batch_size), "--output_path", str(folder / "lm_eval")]
    command += ["--log_samples"] + ([] if limit is None else ["--limit", str(limit)])
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RunError(
            f"lm_eval failed with status {done.returncode}: {lines[-1]}", "Run it in a shell"
        )
    return load_run(folder)

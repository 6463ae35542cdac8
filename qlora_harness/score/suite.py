"""The names of benchmarks, and the lm_eval command that scores them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_harness.errors import SettingsError

SUITE = {
    "mmlu": ("mmlu_qlora_5shot",),
    "truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2"),
    "gsm8k": ("gsm8k",),
    "ifeval": ("ifeval",),
}


def benchmarks(names: Sequence[str], flag: str) -> list[tuple[str, ...]]:
    """Returns the lm_eval tasks of each benchmark; a name that isn't in `SUITE` is a task itself.

    Raises SettingsError, which names the flag, if a name is empty or a task is named twice.
    """
    if not all(names):
        raise SettingsError(
            f"{flag}: the name of a task is empty", f"Choose from {', '.join(SUITE)}"
        )
    chosen = [SUITE.get(name, (name,)) for name in names]
    tasks = [task for part in chosen for task in part]
    if twice := [task for task in tasks if tasks.count(task) > 1]:
        raise SettingsError(f"{flag}: task {twice[0]!r} is given twice", "Remove one")
    return chosen


def lm_eval_words(
    model_args: Mapping[str, object],
    tasks: Sequence[str],
    batch_size: int | str,
    output_path: Path,
    data_dir: str | None = None,
    include_path: str | None = None,
) -> list[str]:
    """Returns the words after `lm_eval` of the command that scores a model on tasks."""
    arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
    words = ["run", "--model", "qlora_adapter", "--model_args", arguments]
    words += ["--tasks", ",".join(tasks), "--batch_size", str(batch_size)]
    words += ["--output_path", str(output_path), "--log_samples"]
    words += [] if include_path is None else ["--include_path", include_path]
    return words if data_dir is None else [*words, "--metadata", f"data_dir={data_dir}"]


def lm_eval_command(words: Sequence[str]) -> str:
    """Returns `lm_eval` and its words as a line for a shell."""
    return f"lm_eval {shlex.join(words)}"

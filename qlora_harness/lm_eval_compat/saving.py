"""Makes a run fail if lm_eval can't save its results; lm_eval itself would exit with 0."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from qlora_harness.errors import ResultsError


def verify_saved_results() -> None:
    """Patches lm_eval's tracker once to raise ResultsError for a missing or partial file."""
    from lm_eval.loggers import EvaluationTracker

    if getattr(EvaluationTracker, "_qlora_harness", False):
        return
    for name, pattern, is_whole in (
        ("save_results_aggregated", "*.json", _is_json),
        ("save_results_samples", "samples_*.jsonl", _has_all_lines),
    ):
        save = getattr(EvaluationTracker, name)
        setattr(EvaluationTracker, name, _checked(save, pattern, is_whole))
    EvaluationTracker._qlora_harness = True  # noqa: SLF001  # our own mark


def _checked(save: Any, pattern: str, is_whole: Callable[..., bool]) -> Any:
    @wraps(save)
    def saved(tracker: Any, *args: Any, **kwargs: Any) -> Any:
        if not tracker.output_path:
            return save(tracker, *args, **kwargs)
        folder = Path(tracker.output_path)
        folder = folder.parent if folder.suffix == ".json" else folder
        before = _sizes(folder, pattern)
        outcome = save(tracker, *args, **kwargs)
        fresh = [path for path, size in _sizes(folder, pattern).items() if before.get(path) != size]
        if not fresh or not all(is_whole(path, *args, **kwargs) for path in fresh):
            raise ResultsError(
                f"--output_path {tracker.output_path}: lm_eval could not save the results",
                "Check that the folder can be written and the disk has room",
            )
        return outcome

    return saved


def _is_json(path: Path, *args: Any, **kwargs: Any) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _has_all_lines(path: Path, task_name: str, samples: Sequence[object]) -> bool:
    lines = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            lines += block.count(b"\n")
    return lines >= len(samples)


def _sizes(folder: Path, pattern: str) -> dict[Path, int]:
    return {
        path: path.stat().st_size for at in (pattern, f"*/{pattern}") for path in folder.glob(at)
    }

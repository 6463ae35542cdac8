"""lm-eval swallows errors while it saves results and exits with 0; here they end the run."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from qlora_harness.errors import ResultsError


def verify_saved_results() -> None:
    """Lets lm-eval's tracker check that each file it was asked to save is there (once a process).

    Raises (from the tracker, later):
        ResultsError: A results or samples file is missing after it was saved.
    """
    from lm_eval.loggers import EvaluationTracker

    if getattr(EvaluationTracker, "_qlora_harness", False):
        return
    for name, pattern in (
        ("save_results_aggregated", "*.json"),
        ("save_results_samples", "samples_*.jsonl"),
    ):
        setattr(EvaluationTracker, name, _checked(getattr(EvaluationTracker, name), pattern))
    EvaluationTracker._qlora_harness = True


def _checked(save: Any, pattern: str) -> Any:
    @wraps(save)
    def saved(tracker: Any, *args: Any, **kwargs: Any) -> Any:
        if not tracker.output_path:
            return save(tracker, *args, **kwargs)
        folder = Path(tracker.output_path)
        folder = folder.parent if folder.suffix == ".json" else folder
        before = _sizes(folder, pattern)
        outcome = save(tracker, *args, **kwargs)
        if _sizes(folder, pattern) == before:
            raise ResultsError(
                f"--output_path {tracker.output_path}: lm_eval could not save the results",
                "Check that the folder can be written and the disk has room",
            )
        return outcome

    return saved


def _sizes(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob(pattern)} if folder.is_dir() else {}

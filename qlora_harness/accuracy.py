"""Accuracies and their standard errors, as lm-eval computes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def accuracy(correct: Sequence[bool]) -> tuple[float, float | None]:
    """Returns mean and standard error, the sample standard deviation over the root of n.

    This is lm-eval's `mean_stderr`. The error is None for fewer than two values.

    Args:
        correct: One value a question, at least one.
    """
    n = len(correct)
    mean = sum(correct) / n
    return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None


def micro_macro(subjects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns micro and macro accuracy of some subjects; errors as lm-eval pools them for groups.

    Args:
        subjects: Of each "acc", "acc_stderr", "n" and "correct".
    """
    n = sum(s["n"] for s in subjects)
    errors = [s["acc_stderr"] for s in subjects]
    pooled = macro_error = None
    known = [e for e in errors if e is not None]
    if len(known) == len(errors):
        macro_error = math.sqrt(sum(e**2 for e in known)) / len(known)
        # lm-eval's pooled_sample_stderr: within-subject variances, weighted by their freedom.
        weighted = sum((s["n"] - 1) * s["acc_stderr"] ** 2 * s["n"] for s in subjects)
        freedom = n - len(subjects)
        pooled = math.sqrt(weighted / freedom / n) if freedom else None
    return {
        "acc": sum(s["correct"] for s in subjects) / n,
        "acc_stderr": pooled,
        "acc_macro": sum(s["acc"] for s in subjects) / len(subjects),
        "acc_macro_stderr": macro_error,
        "n": n,
    }

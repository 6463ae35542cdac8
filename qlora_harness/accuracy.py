"""Accuracies and their standard errors, as lm-eval computes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def accuracy(correct: Sequence[bool]) -> tuple[float, float | None]:
    """Returns the mean of one or more values, and the standard error of lm-eval's `mean_stderr`.

    That is the sample standard deviation over the root of n; None for a single value.
    """
    n = len(correct)
    mean = sum(correct) / n
    return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None


def micro_macro(subjects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns micro and macro accuracy of subjects; errors as lm-eval pools them for groups.

    Each subject has "acc", "acc_stderr", "n" and "correct".
    """
    n = sum(s["n"] for s in subjects)
    errors = [s["acc_stderr"] for s in subjects]
    pooled = macro_error = None
    if None not in errors:
        macro_error = math.sqrt(sum(e**2 for e in errors)) / len(errors)
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

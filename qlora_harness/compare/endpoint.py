"""An endpoint: one quantity of two arms, their difference, and what is shown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from qlora_harness.compare.statistics import Estimate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Unit = Literal["bytes", "seconds", "nats", "share", "metric"]
Word = Literal["better", "worse", "same", "unclear", "no measurement"]


class Result(BaseModel):
    """A part of a comparison."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Spec(NamedTuple):
    """What is known of an endpoint beforehand; the margin is that within which arms are the same.

    Of relative endpoints the difference is arm / baseline - 1, and so is the margin.
    """

    name: str
    unit: Unit
    margin: float | None = None
    lower_is_better: bool = True
    relative: bool = False


# 0.01 nats are 1% of perplexity.
SPECS = {
    "memory": Spec("peak memory", "bytes", 0.02, relative=True),
    "time": Spec("train time", "seconds", 0.02, relative=True),
    "eval_loss": Spec("eval loss", "nats", 0.01),
    "loss_before": Spec("eval loss before training", "nats", 0.01),
    "loss_change": Spec("eval loss, change by training", "nats", 0.01),
    "first_step_loss": Spec("training loss, first step", "nats", 0.01),
    "last_steps_loss": Spec("training loss, last tenth of the steps", "nats", 0.01),
    "accuracy": Spec("accuracy", "share", lower_is_better=False),
    "macro": Spec("macro accuracy", "share", lower_is_better=False),
    "nll": Spec("NLL", "nats", 0.01),
    "brier": Spec("Brier", "metric"),
    "letter_centred": Spec("letter-centred accuracy", "share", lower_is_better=False),
}


class Endpoint(Result):
    """One quantity of both arms and their difference, the arm's less the baseline's."""

    key: str
    """For programs, for example eval_loss."""
    name: str
    """For people."""
    unit: Unit
    """Of the values, and of the difference unless it is relative."""
    arm: float | None = None
    """The arm's value, the mean over its seeds."""
    baseline: float | None = None
    """The baseline's."""
    difference: float | None = None
    """Arm less baseline."""
    relative: bool = False
    """Whether the difference is arm / baseline - 1."""
    stderr: float | None = None
    """Standard error of the difference (of a relative one, of the ratio's logarithm)."""
    low: float | None = None
    """Lower end of the 95% interval, which holds for all primary arms together."""
    high: float | None = None
    """Upper end."""
    inner_low: float | None = None
    """Lower end of the 90% interval, by which equivalence is judged."""
    inner_high: float | None = None
    """Upper end."""
    p: float | None = None
    """Two-sided, of no difference, corrected for the primary arms together as the interval is."""
    freedom: float | None = None
    """Degrees of freedom; null for Tango's interval."""
    margin: float | None = None
    """Within which the arms count as the same."""
    lower_is_better: bool = True
    """Which way is better."""
    word: Word = "no measurement"
    """What is shown."""
    within: bool = False
    """Whether the difference is shown to be within the margin."""
    letters: bool = False
    """Whether most of an accuracy difference is a preference for letters."""
    reason: str | None = None
    """Why there is no measurement, or what limits it."""
    n: int | None = None
    """Questions, conversations or groups of steps."""
    clustered_stderr: float | None = None
    """Standard error with questions of one subject depending on each other."""


def absent(key: str, reason: str) -> Endpoint:
    """Returns an endpoint without a measurement."""
    return Endpoint(key=key, name=SPECS[key].name, unit=SPECS[key].unit, reason=reason)


def measured(
    key: str,
    values: tuple[NDArray[np.float64], NDArray[np.float64]],
    estimate: Estimate,
    *,
    spec: Spec | None = None,
    n: int | None = None,
    clustered: float | None = None,
    reason: str | None = None,
) -> Endpoint:
    """Returns the endpoint of an estimate, with the word for what it shows.

    Args:
        key: Of SPECS.
        values: Of arm and baseline; their means are shown.
        estimate: Of the difference, or of the logarithm of the ratio where it is relative.
        spec: In place of that of SPECS.
        n: Questions, conversations or groups of steps.
        clustered: Standard error by subject.
        reason: What limits the estimate.
    """
    spec = spec or SPECS[key]
    limit = spec.margin if not spec.relative or spec.margin is None else math.log1p(spec.margin)
    within = limit is not None and estimate.within(limit)
    word: Word = "same" if within else "unclear"
    if (estimate.low or 0) > 0 or (estimate.high or 0) < 0:
        word = "better" if (estimate.difference < 0) == spec.lower_is_better else "worse"

    names = ("difference", "low", "high", "inner_low", "inner_high")
    ends = {name: getattr(estimate, name) for name in names}
    if spec.relative:
        known = {name: end for name, end in ends.items() if end is not None}
        ends = {name: math.expm1(min(end, 700.0)) for name, end in known.items()}
    return Endpoint(
        key=key,
        arm=float(values[0].mean()),
        baseline=float(values[1].mean()),
        stderr=estimate.stderr,
        p=estimate.p,
        freedom=estimate.freedom,
        word=word,
        within=within,
        reason=reason,
        n=n,
        clustered_stderr=clustered,
        **ends,
        **spec._asdict(),
    )

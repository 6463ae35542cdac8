"""The specification of each endpoint, and how an estimate becomes an endpoint."""

from __future__ import annotations

import math
from typing import NamedTuple

from qlora_harness.compare.record import Endpoint, Estimate, Unit, Word
from qlora_harness.compare.statistics import Floats


class Spec(NamedTuple):
    """An endpoint's name and unit, and the difference within which arms count as the same.

    Difference and margin of a relative endpoint are arm / baseline - 1.
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
    "accuracy": Spec("accuracy", "share", lower_is_better=False),
    "macro": Spec("macro accuracy", "share", lower_is_better=False),
    "nll": Spec("NLL", "nats", 0.01),
    "brier": Spec("Brier", "metric"),
    "letter_centred": Spec("letter-centred accuracy", "share", lower_is_better=False),
}


def heading(endpoint: Endpoint) -> str:
    """Returns the name with a capital; that of a task stays as it is."""
    name = endpoint.name
    return name[:1].upper() + name[1:] if endpoint.key in SPECS else name


def absent(key: str, reason: str) -> Endpoint:
    """Returns an endpoint without a measurement."""
    return Endpoint(key=key, name=SPECS[key].name, unit=SPECS[key].unit, reason=reason)


def measured(
    key: str,
    values: tuple[Floats, Floats],
    estimate: Estimate,
    *,
    spec: Spec | None = None,
    n: int | None = None,
    clustered: float | None = None,
    reason: str | None = None,
) -> Endpoint:
    """Returns the endpoint of an estimate, with the word for what it shows.

    `values` are those of arm and baseline; their means are reported. The estimate of a relative
    endpoint is that of the logarithm of their ratio. `spec` replaces that of the key.
    """
    spec = spec or SPECS[key]
    limit = spec.margin if not spec.relative or spec.margin is None else math.log1p(spec.margin)
    within = limit is not None and estimate.is_within(limit)
    word: Word = "same" if within else "unclear"
    if (estimate.low or 0) > 0 or (estimate.high or 0) < 0:
        word = "better" if ((estimate.difference or 0) < 0) == spec.lower_is_better else "worse"
    numbers = estimate.model_dump()
    if spec.relative:
        for name in ("difference", "low", "high", "inner_low", "inner_high"):
            if numbers[name] is not None:
                numbers[name] = math.expm1(min(numbers[name], 700.0))
    return Endpoint(
        key=key,
        arm=float(values[0].mean()),
        baseline=float(values[1].mean()),
        word=word,
        within=within,
        reason=reason,
        n=n,
        clustered_stderr=clustered,
        **numbers,
        **spec._asdict(),
    )

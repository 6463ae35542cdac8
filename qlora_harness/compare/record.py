"""comparison.json: contrasts of arms on each endpoint, and the settings that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, PrivateAttr

from qlora_harness.results.runs import Run

if TYPE_CHECKING:
    import pandas as pd

Unit = Literal["bytes", "seconds", "nats", "share", "metric"]
Word = Literal["better", "worse", "same", "unclear", "no measurement"]
Kind = Literal["category", "subject"]


class Part(BaseModel):
    """A part of a comparison."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Estimate(Part):
    """A difference, arm less baseline, and its error; null if unknown."""

    difference: float | None = None
    stderr: float | None = None
    """Standard error of the difference (of a relative one, of the ratio's logarithm)."""
    low: float | None = None
    """The 95% interval, for all primary arms together."""
    high: float | None = None
    inner_low: float | None = None
    """The 90% interval, by which equivalence is judged."""
    inner_high: float | None = None
    p: float | None = None
    """Two-sided p of no difference, corrected for several arms as the interval is."""
    freedom: float | None = None
    """Degrees of freedom; null for Tango's interval."""

    def is_within(self, margin: float) -> bool:
        """Returns whether the difference is shown to be within ± margin (two one-sided tests)."""
        if self.inner_low is None or self.inner_high is None:
            return False
        return -margin < self.inner_low and self.inner_high < margin


class Endpoint(Estimate):
    """One quantity of both arms, means over seeds, and the word for what they show."""

    key: str
    name: str
    unit: Unit
    """Of the values, and of the difference unless it is relative."""
    arm: float | None = None
    baseline: float | None = None
    relative: bool = False
    """Whether the difference is arm / baseline - 1."""
    margin: float | None = None
    lower_is_better: bool = True
    word: Word = "no measurement"
    within: bool = False
    letters: bool = False
    """Whether a preference for letters makes most of an accuracy difference."""
    reason: str | None = None
    n: int | None = None
    clustered_stderr: float | None = None
    """Standard error when questions of one subject may depend on each other."""


class Detail(Part):
    """More on the answers of two arms; pairs are arm and baseline."""

    flips: float
    """Share of questions whose best choice differs, mean over pairs of runs; the floor is that
    between two seeds of one arm."""
    flips_floor: float | None = None
    divergence: float
    """KL(baseline ‖ arm) of the choices, nats, and its floor."""
    divergence_floor: float | None = None
    calibration: tuple[float, float]
    letters: tuple[list[float], list[float]] | None = None
    explained: float | None = None
    """Accuracy difference that the letter mixes alone would make, a share of the questions."""
    ties: tuple[float, float]
    tie_effect: float
    """Accuracy difference with the first tied choice counted, less that with shared credit."""
    lost: int
    """Questions that only the baseline got right, first seeds."""
    won: int
    """Questions that only the arm got right, first seeds."""


class GroupDifference(Part):
    """The accuracies of both arms on the n questions of a subject or category, means over seeds."""

    kind: Kind
    name: str
    n: int
    arm: float
    baseline: float
    low: float
    """The 95% interval of the difference over questions, uncorrected."""
    high: float
    p: float
    """Two-sided p, after Holm's correction over the groups of its kind."""


class Chance(Part):
    """Whether an arm beats chance."""

    arm: str
    centred: float
    """Letter-centred accuracy above that of the arm's own letters, a share."""
    stderr: float
    """Its standard error over subjects (if there are few, over questions) and seeds."""
    at_chance: bool
    """Whether it isn't shown to be above 0 (one-sided, 5%)."""


class Contrast(Part):
    """One arm against its baseline on every recorded endpoint."""

    arm: str
    baseline: str
    primary: bool
    seeds: tuple[int, int]
    paired: bool
    """Whether answers were paired question by question."""
    endpoints: dict[str, Endpoint]
    detail: Detail | None = None
    groups: list[GroupDifference] = []

    def __getitem__(self, key: str) -> Endpoint:
        """Returns an endpoint by its key."""
        return self.endpoints[key]

    def measured(self, key: str) -> Endpoint | None:
        """Returns an endpoint if it has a difference."""
        endpoint = self.endpoints.get(key)
        return None if endpoint is None or endpoint.difference is None else endpoint


class LossCurve(Part):
    """The held-out loss of an arm at the steps at which all its runs were evaluated."""

    arm: str
    seeds: int
    steps: list[int]
    """0 is before training."""
    mean: list[float]
    """Over seeds, nats per token."""
    low: list[float]
    """Of the seed with the lowest loss."""
    high: list[float]


class RunInfo(Part):
    """One run; losses are nats per token, `value` is the metric as recorded."""

    label: str
    path: str
    """As given, without the home folder."""
    arm: str
    seed: int | None
    model: str | None
    quant: str | None
    double_quant: bool | None = None
    """Of NF4 and FP4."""
    device: str | None
    status: str | None
    peak_bytes: float | None
    train_seconds: float | None
    eval_loss: float | None
    perplexity: float | None
    value: float | None
    stderr: float | None
    answers: bool
    benchmarks: dict[str, float] = {}
    """The metric of each other task, as recorded."""


class Setting(Part):
    """One recorded setting."""

    name: str
    values: list[Any]
    """The value in each run, null if it isn't recorded; a single value if all agree."""


class Source(NamedTuple):
    """The runs as read from their files, and their aligned answers by label, if recorded."""

    runs: Sequence[Run]
    frames: Mapping[str, pd.DataFrame]


class ComparisonRecord(BaseModel):
    """A comparison; comparison.json holds exactly this."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    schema_version: Literal[2] = 2
    """Version of this record."""
    kind: Literal["comparison"] = "comparison"
    """What the file is."""
    created: str
    """ISO 8601."""
    task: str | None
    """Task that was scored."""
    metric: str | None
    """Metric of the task."""
    questions: int | None
    """Questions compared."""
    benchmarks: list[str] = []
    """Other tasks; the endpoint of that name is the usual metric."""
    dropped: dict[str, int]
    """With --intersect, questions of each run that others lack."""
    model: str | None
    """The base model, if all runs have the same."""
    dataset: str | None
    """The training data, if all runs have the same."""
    margin: float
    """Accuracies within this difference count as the same, a share of the questions."""
    runs: list[RunInfo]
    """In the order given."""
    arms: list[str]
    """Names of the arms."""
    contrasts: list[Contrast]
    """Primary ones first."""
    chance: list[Chance]
    """One for each arm."""
    curves: list[LossCurve] = []
    """One for each arm that was evaluated during training."""
    besides: list[str]
    """What differs besides quantisation and seed."""
    different: list[Setting]
    """Recorded settings that differ."""
    same: list[Setting]
    """Recorded settings that agree."""
    notes: list[str]
    """What to know before quoting numbers."""

    _source: Source = PrivateAttr(default_factory=lambda: Source((), {}))

    def attach(self, source: Source) -> None:
        """Sets what the numbers were computed from."""
        self._source = source

    @property
    def source(self) -> Source:
        """What the numbers were computed from; empty for a record read from a file."""
        return self._source

    @property
    def primary(self) -> list[Contrast]:
        """The contrasts that answer the question."""
        return [item for item in self.contrasts if item.primary]

    @property
    def headline(self) -> Contrast:
        """The primary contrast that sentences are about: that of NF4, else the first."""
        nf4 = {run.arm for run in self.runs if run.quant == "nf4"}
        return min(self.primary, key=lambda item: (item.arm != "NF4", item.arm not in nf4))

    def before(self, item: Contrast) -> Contrast | None:
        """Returns the contrast of the untrained bases, held as the arms of `item` hold them."""
        held = {run.arm: (run.quant, run.double_quant) for run in self.runs}
        trained = {run.arm for run in self.runs if run.status is not None}
        for base in self.contrasts:
            if base.primary or {base.arm, base.baseline} & trained:
                continue
            if (held[base.arm], held[base.baseline]) == (held[item.arm], held[item.baseline]):
                return base
        return None

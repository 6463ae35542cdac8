"""What `comparison.json` holds: contrasts of arms, endpoint by endpoint, and what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr

from qlora_harness.results.runs import Run

if TYPE_CHECKING:
    import pandas as pd

Unit = Literal["bytes", "seconds", "nats", "share", "metric"]
Word = Literal["better", "worse", "same", "unclear", "no measurement"]
Kind = Literal["category", "subject"]


class Result(BaseModel):
    """A part of a comparison."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Quantity(Result):
    """One quantity of both arms."""

    key: str
    """For programs, for example eval_loss."""
    name: str
    """For people."""
    unit: Unit
    """Of the values, and of the difference unless it is relative."""
    arm: float | None = None
    """The arm's value, the mean over its seeds."""
    baseline: float | None = None
    """The baseline's value."""
    relative: bool = False
    """Whether the difference is arm / baseline - 1."""


class Estimate(Result):
    """A difference, the arm's value less the baseline's, and its error; null where unknown."""

    difference: float | None = None
    """Arm less baseline."""
    stderr: float | None = None
    """Standard error of the difference (of a relative one, of the ratio's logarithm)."""
    low: float | None = None
    """Lower end of the 95% interval, which holds for all primary arms together."""
    high: float | None = None
    """Upper end of the 95% interval."""
    inner_low: float | None = None
    """Lower end of the 90% interval, by which equivalence is judged."""
    inner_high: float | None = None
    """Upper end of the 90% interval."""
    p: float | None = None
    """Two-sided p of no difference, corrected for all primary arms together as the interval is."""
    freedom: float | None = None
    """Degrees of freedom; null for Tango's interval."""

    def is_within(self, margin: float) -> bool:
        """Returns whether the difference is shown to be within ± margin (two one-sided tests)."""
        if self.inner_low is None or self.inner_high is None:
            return False
        return -margin < self.inner_low and self.inner_high < margin


class Endpoint(Estimate, Quantity):
    """One quantity of both arms, the difference between them, and what it shows."""

    margin: float | None = None
    """Difference within which the arms count as the same."""
    lower_is_better: bool = True
    """Which way is better."""
    word: Word = "no measurement"
    """What the difference shows."""
    within: bool = False
    """Whether the difference is shown to be within the margin."""
    letters: bool = False
    """Whether a preference for letters makes most of an accuracy difference."""
    reason: str | None = None
    """Why there is no measurement, or what limits it."""
    n: int | None = None
    """Questions, conversations or groups of steps."""
    clustered_stderr: float | None = None
    """Standard error when questions of one subject may depend on each other."""


class Detail(Result):
    """What else the answers of two arms say; pairs are arm and baseline."""

    flips: float
    """Share of questions whose best choice differs, mean over pairs of runs."""
    flips_floor: float | None = None
    """The same between two seeds of one arm."""
    divergence: float
    """KL(baseline ‖ arm) of the choices, nats."""
    divergence_floor: float | None = None
    """The same between two seeds of one arm."""
    calibration: tuple[float, float]
    """Expected calibration error."""
    letters: tuple[list[float], list[float]] | None = None
    """How often each letter was chosen."""
    explained: float | None = None
    """Accuracy difference that the letter mixes alone would make, a share of the questions."""
    ties: tuple[float, float]
    """Share of questions with tied best choices."""
    tie_effect: float
    """Accuracy difference with the first tied choice counted, less that with shared credit."""
    lost: int
    """Questions that only the baseline got right, first seeds."""
    won: int
    """Questions that only the arm got right, first seeds."""
    mcnemar_midp: float
    """Mid-p of McNemar's test of lost and won."""


class GroupDifference(Result):
    """The accuracies of one subject or category, means over seeds."""

    kind: Kind
    """Whether the group is a subject or a category."""
    name: str
    """Name of the group."""
    n: int
    """Questions."""
    arm: float
    """The arm's accuracy."""
    baseline: float
    """The baseline's accuracy."""
    low: float
    """Lower end of the 95% interval of the difference over questions, uncorrected."""
    high: float
    """Upper end."""
    p: float
    """Two-sided p, after Holm's correction over the groups of its kind."""


class Chance(Result):
    """Whether an arm's answers follow the questions at all."""

    arm: str
    """Name of the arm."""
    centred: float
    """Letter-centred accuracy above that of the arm's own letters, a share."""
    stderr: float
    """Its standard error over subjects (questions where subjects are few) and seeds."""
    at_chance: bool
    """Whether it isn't shown to be above 0 (one-sided, 5%)."""


class Contrast(Result):
    """One arm against its baseline, on every endpoint that the records have."""

    arm: str
    """Name of the arm."""
    baseline: str
    """Name of the baseline."""
    primary: bool
    """Whether this contrast answers the question of the comparison."""
    seeds: tuple[int, int]
    """Number of runs of the arm and of the baseline."""
    paired: bool
    """Whether answers were paired question by question."""
    endpoints: dict[str, Endpoint]
    """By key."""
    detail: Detail | None = None
    """What else the answers say, where the task has choices."""
    groups: list[GroupDifference] = []
    """Subjects and categories."""

    def __getitem__(self, key: str) -> Endpoint:
        """Returns an endpoint by its key."""
        return self.endpoints[key]

    def measured(self, key: str) -> Endpoint | None:
        """Returns an endpoint if it has a difference."""
        endpoint = self.endpoints.get(key)
        return None if endpoint is None or endpoint.difference is None else endpoint


class RunInfo(Result):
    """One run, in short."""

    label: str
    """Name of the run."""
    path: str
    """As given, without the home folder."""
    arm: str
    """The arm that the run belongs to."""
    seed: int | None
    """Seed of its training."""
    model: str | None
    """Base model."""
    quant: str | None
    """nf4, fp4, bf16 or another."""
    device: str | None
    """Device that it was trained on."""
    status: str | None
    """Status of its training."""
    peak_bytes: float | None
    """Peak memory."""
    train_seconds: float | None
    """Training time."""
    eval_loss: float | None
    """Nats per token."""
    perplexity: float | None
    """exp(eval_loss)."""
    value: float | None
    """The metric as recorded."""
    stderr: float | None
    """Its standard error as recorded."""
    answers: bool
    """Whether its answers are known question by question."""


class Setting(Result):
    """One recorded setting."""

    name: str
    """Dotted name in the records."""
    values: list[Any]
    """The value in each run, null where it isn't recorded; one value where all agree."""


class ComparisonRecord(BaseModel):
    """The numbers of a comparison; comparison.json holds exactly these."""

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
    dropped: dict[str, int]
    """With --intersect, questions of each run that others had not answered."""
    model: str | None
    """The base model, where all runs have the same."""
    dataset: str | None
    """The training data, where all runs have the same."""
    margin: float
    """Accuracies within this difference count as the same, a share of the questions."""
    runs: list[RunInfo]
    """In the order given."""
    arms: list[str]
    """Names of the arms."""
    contrasts: list[Contrast]
    """Primary ones first."""
    effects: list[Contrast] = []
    """Base and adapter in 4 and 16 bits: what training gains, and the interaction."""
    chance: list[Chance]
    """One for each arm."""
    besides: list[str]
    """What differs besides quantisation and seed."""
    different: list[Setting]
    """Recorded settings that differ."""
    same: list[Setting]
    """Recorded settings that agree."""
    notes: list[str]
    """What a reader has to know before quoting numbers."""

    _loaded: Sequence[Run] = PrivateAttr(default=())
    _frames: Mapping[str, pd.DataFrame] = PrivateAttr(default_factory=dict)

    def attach(self, runs: Sequence[Run], frames: Mapping[str, pd.DataFrame]) -> None:
        """Keeps what the numbers were computed from: the runs, and their answers by label."""
        self._loaded, self._frames = runs, frames

    @property
    def loaded(self) -> Sequence[Run]:
        """The runs as read from their files; none if the record itself was read from a file."""
        return self._loaded

    @property
    def frames(self) -> Mapping[str, pd.DataFrame]:
        """The aligned answers of each run whose answers are known."""
        return self._frames

    @property
    def primary(self) -> list[Contrast]:
        """The contrasts that answer the question."""
        return [item for item in self.contrasts if item.primary]

    def values_of(self, arm: str) -> list[float]:
        """Returns the recorded metric of each run of an arm."""
        return [run.value for run in self.runs if run.arm == arm and run.value is not None]

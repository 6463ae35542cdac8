"""What the benchmarks measure, how it is stored, and the tables of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from qlora_harness.record import now


class TrainingMeasurement(BaseModel):
    """Optimizer steps of one way to train (see `training.WAYS`) on one base."""

    way: str
    quant: str
    changes: dict[str, Any]
    """Settings that differ from the published recipe."""
    steps: int = 0
    """Steps that were timed; those of the warm-up are not."""
    tokens: int = 0
    """Real tokens of the timed steps, without padding."""
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    median_tokens_per_second: float = 0.0
    peak_allocated_bytes: int | None = None
    """None on a CPU, as is the next."""
    peak_reserved_bytes: int | None = None
    losses: list[float] = []
    """Nats, of every step, the warm-up included."""
    ratio: float | None = None
    """tokens_per_second over that of the first way on the same base."""
    failure: str | None = None
    """Why there are no numbers."""
    versions: dict[str, str] = {}
    """Packages of a peer's process; our own are in the record's environment."""


class ScoringMeasurement(BaseModel):
    """One way to score one set of questions."""

    name: str
    questions: int
    encoding_seconds: float
    """Texts to token ids."""
    scoring_seconds: float
    """Token ids to log-probabilities, planning included."""
    prompt_tokens: int
    """Tokens of all prompts, shared ones counted each time."""
    computed_tokens: int
    """Tokens that went through the model, without padding."""
    peak_allocated_bytes: int | None
    ties: int
    """Questions whose best log-probability several letters share."""
    ratio: float = 1.0
    """Seconds of the baseline over these, encoding and scoring. A baseline that ran on a sample is
    scaled by prompt tokens."""
    scoring_ratio: float = 1.0
    """The same without encoding."""
    largest_difference: float | None = None
    """Of any log-probability from the baseline, nats; None for the baseline itself."""
    same_predictions: float | None = None
    """Share of the baseline's questions with the same predicted letter."""
    untied_predictions: float | None = None
    """The same share, of the questions without a tie in either."""
    accuracy_difference: float | None = None
    float32_difference: float | None = None
    """Mean distance of log-probabilities from those of the same weights in float32, nats."""
    float32_predictions: float | None = None
    """Share of the baseline's questions with the letter that float32 predicts."""


class TrainingBenchmark(BaseModel):
    """The record of `qlora-harness benchmark-training`."""

    schema_version: Literal[1] = 1
    kind: Literal["training_benchmark"] = "training_benchmark"
    created: str = Field(default_factory=now)
    title: str
    measurements: list[TrainingMeasurement]
    environment: dict[str, Any]

    def table(self) -> str:
        """Returns a Markdown table, a way a row, and the packages of each peer below it."""
        head = (
            "| way | base | tokens/step | tokens/s | median | ratio | peak allocated, GiB | "
            "peak reserved, GiB | last loss |"
        )
        rows = map(training_row, self.measurements)
        lines = [self.title, "", head, "|---|---|" + "---:|" * 7, *rows]
        versions = {m.way.partition("-")[0]: m.versions for m in self.measurements if m.versions}
        for peer, packages in versions.items():
            lines += ["", f"{peer}: {', '.join(map(' '.join, packages.items()))}"]
        return "\n".join(lines)


class ScoringBenchmark(BaseModel):
    """The record of `qlora-harness benchmark-scoring`."""

    schema_version: Literal[3] = 3
    kind: Literal["scoring_benchmark"] = "scoring_benchmark"
    created: str = Field(default_factory=now)
    title: str
    measurements: list[ScoringMeasurement]
    environment: dict[str, Any]

    def table(self) -> str:
        """Returns a Markdown table, a way a row."""
        head = (
            "| | questions | encoding, s | scoring, s | prompt tokens | computed tokens | ratio | "
            "ratio of scoring | peak GiB | largest difference, nats | same prediction | without "
            "ties | accuracy | ties | from float32, nats | letter of float32 |"
        )
        lines = [self.title, "", head, "|---|" + "---:|" * 15]
        for m in self.measurements:
            cells = [
                f"{m.questions:,}",
                f"{m.encoding_seconds:.1f}",
                f"{m.scoring_seconds:.1f}",
                f"{m.prompt_tokens:,}",
                f"{m.computed_tokens:,}",
                f"{m.ratio:.2f}",
                f"{m.scoring_ratio:.2f}",
                _gib(m.peak_allocated_bytes),
                _cell(m.largest_difference, "{:.2g}"),
                _cell(m.same_predictions, "{:.2%}"),
                _cell(m.untied_predictions, "{:.2%}"),
                "–"
                if m.accuracy_difference is None
                else f"{100 * m.accuracy_difference:+.2f} points",
                f"{m.ties:,}",
                _cell(m.float32_difference, "{:.2g}"),
                _cell(m.float32_predictions, "{:.2%}"),
            ]
            lines.append(f"| {m.name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def training_row(m: TrainingMeasurement) -> str:
    """Returns one row of the training table."""
    if m.failure is not None:
        return f"| {m.way} | {m.quant} | {m.failure} |" + " |" * 6
    cells = [
        m.way,
        m.quant,
        f"{m.tokens / m.steps:,.0f}",
        f"{m.tokens_per_second:,.0f}",
        f"{m.median_tokens_per_second:,.0f}",
        _cell(m.ratio, "{:.2f}"),
        _gib(m.peak_allocated_bytes),
        _gib(m.peak_reserved_bytes),
        f"{m.losses[-1]:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _gib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**30:.2f}"

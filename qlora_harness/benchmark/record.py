"""The records of the benchmarks and their tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from qlora_harness.record import environment, now, write_json
from qlora_harness.results.terminal import gib, optional

if TYPE_CHECKING:
    from typing_extensions import Self


class TrainingMeasurement(BaseModel):
    """Optimizer steps of one way to train (see `training.WAYS`) on one base."""

    way: str
    quant: str
    changes: dict[str, Any]  # from the published recipe
    steps: int = 0  # timed, after the warm-up; so are the next four
    tokens: int = 0  # without padding
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    median_tokens_per_second: float = 0.0
    peak_allocated_bytes: int | None = None  # None on a CPU, as is the next
    peak_reserved_bytes: int | None = None
    # The same of each process; what `plan` predicts, with fused layers.
    peaks_allocated_bytes: list[int] = []
    planned_peak_bytes: int | None = None
    losses: list[float] = []  # nats, of every step with the warm-up
    ratio: float | None = None  # of tokens_per_second to the first way's on the same base
    failure: str | None = None  # why there are no numbers
    versions: dict[str, str] = {}  # of a peer's packages; ours are in the environment


class ScoringMeasurement(BaseModel):
    """One way to score one set of questions."""

    name: str
    questions: int
    encoding_seconds: float
    scoring_seconds: float  # with planning
    prompt_tokens: int  # shared ones count each time
    computed_tokens: int  # went through the model, without padding
    peak_allocated_bytes: int | None
    ties: int  # questions for which several letters share the best log-probability
    # Seconds of the first way, the baseline, scaled by prompt tokens if on a sample, over these.
    ratio: float = 1.0
    scoring_ratio: float = 1.0  # without encoding
    # The rest is over the baseline's questions; None for the baseline itself.
    largest_difference: float | None = None  # of a log-probability, nats
    same_predictions: float | None = None  # share of the questions
    untied_predictions: float | None = None  # share of those without a tie in either
    accuracy_difference: float | None = None
    # Against the same weights in float32; None without --float32-reference.
    float32_difference: float | None = None  # mean over log-probabilities, nats
    float32_predictions: float | None = None  # share of the questions with the same letter
    # Only of a peer, which loads the model itself; against packed scoring, over all questions.
    loading_seconds: float | None = None
    packed_difference: float | None = None  # mean over log-probabilities, nats
    packed_predictions: float | None = None  # share of the questions with the same letter


class GenerationMeasurement(BaseModel):
    """One way to continue one set of prompts."""

    name: str
    questions: int
    seconds: float  # with encoding and decoding
    peak_allocated_bytes: int | None  # None on a CPU
    ratio: float = 1.0  # seconds per question of the baseline, over these
    same_texts: float | None = None  # share of the baseline's; None for the baseline itself


class _Benchmark(BaseModel):
    """What the records of both benchmarks hold."""

    schema_version: int
    kind: str
    created: str = Field(default_factory=now)
    title: str
    measurements: Any
    environment: dict[str, Any]
    # Each with its own device. Tokens are those of all; peaks are the largest in training, and
    # those of the first process in scoring.
    processes: int = 1
    engine: Literal["ddp", "fsdp2"] | None = None  # None for one process

    @classmethod
    def of(cls, title: str, measurements: Any, device: str) -> Self:
        """Makes a record of measurements on a device, here and now."""
        here = environment() | {"device": device}
        fields = {"title": title, "measurements": measurements, "environment": here}
        return cls.model_validate(fields)

    def write(self, path: Path) -> None:
        """Writes the record as JSON."""
        write_json(path, self.model_dump())


class TrainingBenchmark(_Benchmark):
    """The record of `qlora-harness benchmark-training`."""

    schema_version: Literal[1] = 1
    kind: Literal["training_benchmark"] = "training_benchmark"
    measurements: list[TrainingMeasurement]

    def table(self) -> str:
        """Returns a Markdown table with a row per way, and below it each peer's packages."""
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


class ScoringBenchmark(_Benchmark):
    """The record of `qlora-harness benchmark-scoring`."""

    schema_version: Literal[3] = 3
    kind: Literal["scoring_benchmark"] = "scoring_benchmark"
    measurements: list[ScoringMeasurement]

    def table(self) -> str:
        """Returns a Markdown table with a row per way, and below it what only a peer has."""
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
                gib(m.peak_allocated_bytes),
                optional(m.largest_difference, "{:.2g}"),
                optional(m.same_predictions, "{:.2%}"),
                optional(m.untied_predictions, "{:.2%}"),
                "–"
                if m.accuracy_difference is None
                else f"{100 * m.accuracy_difference:+.2f} points",
                f"{m.ties:,}",
                optional(m.float32_difference, "{:.2g}"),
                optional(m.float32_predictions, "{:.2%}"),
            ]
            lines.append(f"| {m.name} | {' | '.join(cells)} |")
        lines += [
            f"\n{m.name}: loaded in {m.loading_seconds:.1f} s; {m.packed_difference:.2g} nats from "
            f"packed in the mean, {m.packed_predictions:.2%} same prediction"
            for m in self.measurements
            if m.loading_seconds is not None
        ]
        return "\n".join(lines)


class GenerationBenchmark(_Benchmark):
    """The record of `qlora-harness benchmark-scoring --generate`."""

    schema_version: Literal[1] = 1
    kind: Literal["generation_benchmark"] = "generation_benchmark"
    measurements: list[GenerationMeasurement]

    def table(self) -> str:
        """Returns a Markdown table with a row per way."""
        head = "| | questions | seconds | ratio | peak GiB | same texts |"
        rows = [
            f"| {m.name} | {m.questions:,} | {m.seconds:.1f} | {m.ratio:.2f} | "
            f"{gib(m.peak_allocated_bytes)} | {optional(m.same_texts, '{:.2%}')} |"
            for m in self.measurements
        ]
        return "\n".join([self.title, "", head, "|---|" + "---:|" * 5, *rows])


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
        optional(m.ratio, "{:.2f}"),
        gib(m.peak_allocated_bytes),
        gib(m.peak_reserved_bytes),
        f"{m.losses[-1]:.4f}",
    ]
    return f"| {' | '.join(cells)} |"

"""What the scoring benchmark finds of each way, and the table of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class Measurement:
    """One way of scoring one set of questions.

    Attributes:
        name: What was measured.
        questions: How many.
        encoding_seconds: Texts to token ids.
        scoring_seconds: Token ids to log-probabilities; with planning.
        prompt_tokens: Tokens of the prompts, each counted as often as it is asked.
        computed_tokens: Tokens that went through the model, without padding.
        peak_allocated_bytes: On CUDA, else None.
        ties: Questions whose best log-probability is shared by several letters.
        ratio: Seconds of the baseline on these questions (scaled by prompt tokens where it ran on
            a sample) over these seconds, encoding and scoring.
        scoring_ratio: The same of scoring alone.
        largest_difference: Of any log-probability from the baseline, nats; None for the baseline.
        same_predictions: Share of the baseline's questions with the same predicted letter.
        untied_predictions: The share among those of the baseline's questions that neither ties on.
        accuracy_difference: Accuracy on the baseline's questions less the baseline's.
        float32_difference: Mean distance of log-probabilities from those of the same weights in
            float32, nats; None where that was not asked for.
        float32_predictions: Share of the baseline's questions with the letter of float32.
    """

    name: str
    questions: int
    encoding_seconds: float
    scoring_seconds: float
    prompt_tokens: int
    computed_tokens: int
    peak_allocated_bytes: int | None
    ties: int
    ratio: float = 1.0
    scoring_ratio: float = 1.0
    largest_difference: float | None = None
    same_predictions: float | None = None
    untied_predictions: float | None = None
    accuracy_difference: float | None = None
    float32_difference: float | None = None
    float32_predictions: float | None = None


def report(measurements: Sequence[Measurement], title: str) -> str:
    """Returns the measurements as a Markdown table.

    Args:
        measurements: From `benchmark.benchmark`.
        title: What was measured, on which device.
    """
    lines = [
        title,
        "",
        "| | questions | encoding, s | scoring, s | prompt tokens | computed tokens | ratio | "
        "ratio of scoring | peak GiB | largest difference, nats | same prediction | without ties | "
        "accuracy | ties | from float32, nats | letter of float32 |",
        "|---|" + "---:|" * 15,
    ]
    for m in measurements:
        cells = [
            f"{m.questions:,}",
            f"{m.encoding_seconds:.1f}",
            f"{m.scoring_seconds:.1f}",
            f"{m.prompt_tokens:,}",
            f"{m.computed_tokens:,}",
            f"{m.ratio:.2f}",
            f"{m.scoring_ratio:.2f}",
            _shown(m.peak_allocated_bytes, lambda v: f"{v / 2**30:.2f}"),
            _shown(m.largest_difference, lambda v: f"{v:.2g}"),
            _shown(m.same_predictions, lambda v: f"{100 * v:.2f}%"),
            _shown(m.untied_predictions, lambda v: f"{100 * v:.2f}%"),
            _shown(m.accuracy_difference, lambda v: f"{100 * v:+.2f} points"),
            f"{m.ties:,}",
            _shown(m.float32_difference, lambda v: f"{v:.2g}"),
            _shown(m.float32_predictions, lambda v: f"{100 * v:.2f}%"),
        ]
        lines.append(f"| {m.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "–" if value is None else form(value)

"""Measures packed scoring against HFLM's own path: one process, one model, the same prompts."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_harness.model.lora import attach_lora, fuse_lora
from qlora_harness.record import environment, now, write_json
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.encoding import encode_pairs
from qlora_harness.score.mmlu_files import LETTERS, Question, load_questions

Pair = tuple[str, str]


@dataclass
class Measurement:
    """One way of scoring one set of questions.

    Attributes:
        name: What was measured.
        questions: How many.
        seconds: Encoding, planning and scoring together.
        prompt_tokens: Tokens of the prompts, each counted as often as it is asked.
        computed_tokens: Tokens that went through the model.
        prompt_tokens_per_second: prompt_tokens over seconds.
        peak_allocated_bytes: On CUDA, else None.
        ratio: Seconds of the baseline on these questions (scaled by prompt tokens where it ran on
            a sample) over these seconds.
        largest_difference: Of any log-probability from the baseline, nats; None for the baseline.
        same_predictions: Share of the baseline's questions with the same predicted letter.
    """

    name: str
    questions: int
    seconds: float
    prompt_tokens: int
    computed_tokens: int
    prompt_tokens_per_second: float
    peak_allocated_bytes: int | None
    ratio: float | None = None
    largest_difference: float | None = None
    same_predictions: float | None = None


def choose_questions(
    file: str, folder: str | None, subjects: Sequence[str] | None, rows: int | None
) -> list[Question]:
    """Returns the questions to measure with.

    Args:
        file: Name of an MMLU file.
        folder: Where it is, or None.
        subjects: Only these, or None for all.
        rows: At most so many of each subject, or None for all.
    """
    taken: dict[str, int] = {}
    chosen = []
    for question in load_questions(file, folder):
        if subjects is not None and question.subject not in subjects:
            continue
        taken[question.subject] = taken.get(question.subject, 0) + 1
        if rows is None or taken[question.subject] <= rows:
            chosen.append(question)
    return chosen


def benchmark(
    lm: QloraAdapterLM,
    questions: Sequence[Question],
    *,
    baseline_questions: int | None,
    adapter_rank: int | None,
) -> list[Measurement]:
    """Measures HFLM's path, the packed path, and the packed path with an unmerged adapter.

    Args:
        lm: A base without adapter.
        questions: What is scored.
        baseline_questions: A random sample of so many for HFLM's path, or None for all.
        adapter_rank: Rank of a random adapter on all linear layers to measure as well, or None.
    """
    sample = list(questions)
    if baseline_questions is not None and baseline_questions < len(sample):
        sample = random.Random(0).sample(sample, baseline_questions)
    # Kernels are chosen and compiled, and memory is mapped, before anything is timed.
    warm = list(questions[: min(len(questions), 64)])
    _score(lm, warm[:8], "hf")
    _score(lm, warm, "packed")
    baseline, expected = _measure(lm, sample, "hf", f"HFLM, batch size {lm.batch_size}")
    baseline.ratio = 1.0
    results = [baseline]
    packed, found = _measure(lm, questions, "packed", "packed")
    _relate(packed, found, baseline, expected, sample)
    results.append(packed)
    if adapter_rank is not None:
        lm._model = attach_lora(
            lm.model, r=adapter_rank, alpha=16, dropout=0.0, targets="all-linear"
        ).eval()
        with torch.no_grad():
            for name, parameter in lm.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=1e-3)
        fuse_lora(lm._model, lm._compute_dtype)
        _score(lm, warm, "packed")
        adapted, _ = _measure(
            lm, questions, "packed", f"packed, unmerged adapter of rank {adapter_rank}"
        )
        adapted.ratio = _baseline_seconds(baseline, adapted) / adapted.seconds
        results.append(adapted)
    return results


def _pairs(questions: Sequence[Question]) -> list[Pair]:
    return [(q.prompt, f" {letter}") for q in questions for letter in LETTERS]


def _score(lm: QloraAdapterLM, questions: Sequence[Question], way: str) -> dict[Pair, float]:
    lm._scoring = way
    pairs = list(dict.fromkeys(_pairs(questions)))
    encoded = [(pair, *ids) for pair, ids in zip(pairs, encode_pairs(lm, pairs), strict=True)]
    scores = lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    return {pair: logprob for pair, (logprob, _) in zip(pairs, scores, strict=True)}


def _measure(
    lm: QloraAdapterLM, questions: Sequence[Question], way: str, name: str
) -> tuple[Measurement, dict[Pair, float]]:
    cuda = lm.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    scores = _score(lm, questions, way)
    seconds = time.perf_counter() - started
    tokens = sum(len(ids) for ids in lm.tokenizer([q.prompt for q in questions])["input_ids"])
    plan = lm.last_plan if way == "packed" else None
    return (
        Measurement(
            name,
            len(questions),
            seconds,
            tokens,
            plan.computed_tokens if plan is not None else tokens,
            tokens / seconds,
            torch.cuda.max_memory_allocated() if cuda else None,
        ),
        scores,
    )


def _baseline_seconds(baseline: Measurement, other: Measurement) -> float:
    return baseline.seconds * other.prompt_tokens / baseline.prompt_tokens


def _relate(
    packed: Measurement,
    found: dict[Pair, float],
    baseline: Measurement,
    expected: dict[Pair, float],
    sample: Sequence[Question],
) -> None:
    packed.ratio = _baseline_seconds(baseline, packed) / packed.seconds
    packed.largest_difference = max(abs(found[pair] - expected[pair]) for pair in expected)
    same = 0
    for question in sample:
        pairs = _pairs([question])
        same += max(pairs, key=found.__getitem__) == max(pairs, key=expected.__getitem__)
    packed.same_predictions = same / len(sample)


def report(measurements: Sequence[Measurement], title: str) -> str:
    """Returns the measurements as a Markdown table.

    Args:
        measurements: From `benchmark`.
        title: What was measured, on which device.
    """
    lines = [
        title,
        "",
        "| | questions | seconds | prompt tokens/s | computed tokens | ratio | peak GiB | "
        "largest difference | same prediction |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for m in measurements:
        peak = "–" if m.peak_allocated_bytes is None else f"{m.peak_allocated_bytes / 2**30:.2f}"
        far = "–" if m.largest_difference is None else f"{m.largest_difference:.2g}"
        same = "–" if m.same_predictions is None else f"{100 * m.same_predictions:.2f}%"
        ratio = "–" if m.ratio is None else f"{m.ratio:.2f}"
        lines.append(
            f"| {m.name} | {m.questions:,} | {m.seconds:.1f} | {m.prompt_tokens_per_second:,.0f} | "
            f"{m.computed_tokens:,} | {ratio} | {peak} | {far} | {same} |"
        )
    return "\n".join(lines)


def run(
    *,
    model: str,
    quant: str,
    file: str,
    folder: str | None,
    subjects: Sequence[str] | None,
    rows: int | None,
    batch_size: int,
    dtype: str,
    pack_tokens: int | None,
    baseline_questions: int | None,
    adapter_rank: int | None,
    kernels: str,
    output: Path | None,
) -> str:
    """Loads a base, measures, and returns the table.

    Args:
        model: Base model.
        quant: How it is held.
        file: Name of an MMLU file.
        folder: Where it is, or None.
        subjects: Only these, or None.
        rows: At most so many of each subject, or None.
        batch_size: Of HFLM's path.
        dtype: Compute dtype.
        pack_tokens: Most tokens in a pack, or None for what fits.
        baseline_questions: Sample size for HFLM's path, or None.
        adapter_rank: Rank of a random adapter to measure as well, or None.
        kernels: "auto" or "none".
        output: JSON file to write, or None.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    questions = choose_questions(file, folder, subjects, rows)
    lm = QloraAdapterLM(
        pretrained=model,
        quant=quant,
        dtype=dtype,
        batch_size=batch_size,
        device=device,
        pack_tokens=pack_tokens,
        kernels=kernels,
    )
    measurements = benchmark(
        lm, questions, baseline_questions=baseline_questions, adapter_rank=adapter_rank
    )
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    random_weights = ", random weights" if lm._source.random_weights else ""
    title = f"{model}{random_weights}, {quant}, {lm._compute_dtype}, {file}, {name}"
    title += ", fused kernels" if lm._fused_kernels else ""
    if output is not None:
        record: dict[str, Any] = {
            "schema_version": 1,
            "kind": "scoring_benchmark",
            "created": now(),
            "title": title,
            "measurements": [asdict(m) for m in measurements],
            "environment": environment() | {"device": name},
        }
        write_json(output, record)
    return report(measurements, title)

"""Measures packed scoring against lm-eval's `hf` model: one process, one base, the same prompts."""

from __future__ import annotations

import copy
import difflib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_harness.errors import SettingsError
from qlora_harness.families import LETTERS
from qlora_harness.lm_eval_compat.hflm import StockHFLM
from qlora_harness.model.lora import attach_lora
from qlora_harness.record import write_measurements
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.benchmark_table import Measurement, report
from qlora_harness.score.encoding import encode_pairs
from qlora_harness.score.mmlu import is_tie, predict
from qlora_harness.score.mmlu_files import Question, known_files, load_questions
from qlora_harness.score.session import TokenScores

Pair = tuple[str, str]
Encoded = tuple[Pair, list[int], list[int]]


@dataclass
class _Way:
    """A way of scoring: how texts are encoded and how token ids are scored."""

    name: str
    encode: Callable[[Sequence[Pair]], list[Encoded]]
    score: Callable[[list[Encoded]], TokenScores]


def choose_questions(
    file: str, folder: str | None, subjects: Sequence[str] | None, rows: int | None
) -> list[Question]:
    """Returns the questions to measure with.

    Args:
        file: Name of an MMLU file.
        folder: Where it is, or None.
        subjects: Only these, or None for all.
        rows: At most so many of each subject, or None for all.

    Raises:
        SettingsError: There is no such file, or the file has no such subject.
        DataError: The file can't be read; see `load_questions`.
    """
    if file not in known_files():
        raise SettingsError(
            f"--file: {file!r} is not one of {', '.join(known_files())}", "Choose one of these"
        )
    questions = load_questions(file, folder, argument="--mmlu-dir")
    _check_subjects(file, subjects or (), {question.subject for question in questions})
    taken: dict[str, int] = {}
    chosen = []
    for question in questions:
        if subjects is not None and question.subject not in subjects:
            continue
        taken[question.subject] = taken.get(question.subject, 0) + 1
        if rows is None or taken[question.subject] <= rows:
            chosen.append(question)
    return chosen


def _check_subjects(file: str, asked: Sequence[str], known: set[str]) -> None:
    for subject in asked:
        if subject not in known:
            near = difflib.get_close_matches(subject, sorted(known), n=1)
            raise SettingsError(
                f"--subjects: {file} has no subject {subject!r}",
                f"The nearest is {near[0]!r}" if near else f"It has {', '.join(sorted(known))}",
            )


def benchmark(
    lm: QloraAdapterLM,
    questions: Sequence[Question],
    *,
    batch_size: int,
    margin_batch_size: int | None,
    baseline_questions: int | None,
    adapter_rank: int | None,
    kernels: str,
    float32_reference: bool = False,
) -> list[Measurement]:
    """Measures lm-eval's `hf`, the packed path, and the packed path with an unmerged adapter.

    Args:
        lm: A base without adapter that has scored nothing yet; it is changed.
        questions: What is scored.
        batch_size: Of `hf`.
        margin_batch_size: Another batch size of `hf`, to see how far that alone moves the numbers;
            or None.
        baseline_questions: A random sample of so many for `hf`, or None for all.
        adapter_rank: Rank of a random adapter on all linear layers to measure as well, or None.
        kernels: "auto" computes packs through fused layers where they take the model; "none".
        float32_reference: Also packed with the weights in float32: how far each way is from it.
    """
    sample = list(questions)
    if baseline_questions is not None and baseline_questions < len(sample):
        sample = random.Random(0).sample(sample, baseline_questions)
    warm = list(questions[:64])
    lm.session.expand_base()
    plain = _plain(lm, batch_size)
    _run(plain, warm[: 2 * batch_size])
    baseline, expected, encoded = _measure(lm, plain, sample)
    results = [baseline]
    kept = [(baseline, expected)]

    def relate(measured: Measurement, logprobs: list[list[float]] | None) -> None:
        scale = baseline.prompt_tokens / measured.prompt_tokens
        seconds = baseline.encoding_seconds + baseline.scoring_seconds
        own = measured.encoding_seconds + measured.scoring_seconds
        measured.ratio = seconds / scale / own
        measured.scoring_ratio = baseline.scoring_seconds / scale / measured.scoring_seconds
        if logprobs is not None:
            _compare(measured, logprobs, expected, sample)
            kept.append((measured, logprobs))
        results.append(measured)

    if margin_batch_size is not None:
        way = _plain(lm, margin_batch_size)
        margin, found, _ = _measure(lm, way, sample, (encoded, baseline.encoding_seconds))
        relate(margin, found)
    exact: list[list[float]] | None = None
    base = lm.model
    if float32_reference:
        lm.take(copy.deepcopy(base).float(), kernels)
        way = _packed(lm, "packed, weights in float32")
        _run(way, warm)
        measured, exact, _ = _measure(lm, way, sample)
        relate(measured, exact)
    lm.take(base, kernels)
    _run(_packed(lm, "packed"), warm)
    measured, found, _ = _measure(lm, _packed(lm, "packed"), questions)
    by_prompt = {q.prompt: values for q, values in zip(questions, found, strict=True)}
    relate(measured, [by_prompt[q.prompt] for q in sample])
    if adapter_rank is not None:
        lm.take(_with_random_adapter(lm.model, adapter_rank), kernels)
        way = _packed(lm, f"packed, unmerged adapter of rank {adapter_rank}")
        _run(way, warm)
        relate(_measure(lm, way, questions)[0], None)
    if exact is not None:
        for measured, found in kept:
            distances = [abs(a - b) for a, b in _both(found, exact)]
            measured.float32_difference = sum(distances) / len(distances)
            measured.float32_predictions = _agreement(found, exact)
    return results


def _plain(lm: QloraAdapterLM, batch_size: int) -> _Way:
    """lm-eval's own model around the same weights."""
    hf = StockHFLM(lm, batch_size)
    return _Way(
        f"lm-eval hf, batch size {batch_size}",
        hf.encode,
        lambda encoded: TokenScores(hf.score(encoded), None),
    )


def _packed(lm: QloraAdapterLM, name: str) -> _Way:
    return _Way(
        name,
        lambda pairs: [
            (pair, *ids) for pair, ids in zip(pairs, encode_pairs(lm, pairs), strict=True)
        ],
        lm.session.score_tokens,
    )


def _with_random_adapter(model: Any, rank: int) -> Any:
    adapted = attach_lora(model, r=rank, alpha=16, dropout=0.0, targets="all-linear").eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    return adapted


def _pairs(questions: Sequence[Question]) -> list[Pair]:
    return list(dict.fromkeys((q.prompt, f" {letter}") for q in questions for letter in LETTERS))


def _run(
    way: _Way, questions: Sequence[Question], known: tuple[list[Encoded], float] | None = None
) -> tuple[dict[Pair, float], float, float, list[Encoded], int | None]:
    """Log-probabilities, seconds of encoding and of scoring, token ids, and computed tokens.

    `known` are ids and seconds of a way that encodes alike.
    """
    pairs = _pairs(questions)
    started = time.perf_counter()
    encoded = way.encode(pairs) if known is None else known[0]
    between = time.perf_counter()
    scores, computed = way.score(encoded)
    ended = time.perf_counter()
    logprobs = {pair: logprob for pair, (logprob, _) in zip(pairs, scores, strict=True)}
    encoding = between - started if known is None else known[1]
    return logprobs, encoding, ended - between, encoded, computed


def _measure(
    lm: QloraAdapterLM,
    way: _Way,
    questions: Sequence[Question],
    known: tuple[list[Encoded], float] | None = None,
) -> tuple[Measurement, list[list[float]], list[Encoded]]:
    """The measurement, the four log-probabilities of each question, and the token ids."""
    cuda = lm.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    scores, encoding, scoring, encoded, computed = _run(way, questions, known)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    length = {context: len(ids) for (context, _), ids, _ in encoded}
    tokens = sum(length[q.prompt] for q in questions)
    logprobs = [[scores[q.prompt, f" {letter}"] for letter in LETTERS] for q in questions]
    return (
        Measurement(
            way.name,
            len(questions),
            encoding,
            scoring,
            tokens,
            computed or tokens,
            peak,
            sum(map(is_tie, logprobs)),
        ),
        logprobs,
        encoded,
    )


def _compare(
    measured: Measurement,
    found: Sequence[Sequence[float]],
    expected: Sequence[Sequence[float]],
    questions: Sequence[Question],
) -> None:
    measured.largest_difference = max(abs(a - b) for a, b in _both(found, expected))
    measured.same_predictions = _agreement(found, expected)
    measured.untied_predictions = _agreement(
        found, expected, lambda a, b: not is_tie(a) and not is_tie(b)
    )
    mine, theirs = list(map(predict, found)), list(map(predict, expected))
    right = [
        sum(letter == q.answer for letter, q in zip(letters, questions, strict=True))
        for letters in (mine, theirs)
    ]
    measured.accuracy_difference = (right[0] - right[1]) / len(questions)


def _both(
    found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]
) -> Iterator[tuple[float, float]]:
    """Each log-probability of two ways."""
    for mine, theirs in zip(found, expected, strict=True):
        yield from zip(mine, theirs, strict=True)


def _agreement(
    found: Sequence[Sequence[float]],
    expected: Sequence[Sequence[float]],
    counts: Callable[[Sequence[float], Sequence[float]], bool] = lambda mine, theirs: True,
) -> float | None:
    """The share of the questions that count with the same letter, None where none counts."""
    same = [predict(a) == predict(b) for a, b in zip(found, expected, strict=True) if counts(a, b)]
    return sum(same) / len(same) if same else None


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
    margin_batch_size: int | None,
    baseline_questions: int | None,
    adapter_rank: int | None,
    kernels: str,
    float32_reference: bool,
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
        batch_size: Of lm-eval's `hf`.
        dtype: Compute dtype.
        pack_tokens: Most tokens in a pack, or None for what fits.
        margin_batch_size: A second batch size of `hf`, or None.
        baseline_questions: Sample size for `hf`, or None.
        adapter_rank: Rank of a random adapter to measure as well, or None.
        kernels: "auto" or "none".
        float32_reference: Whether to measure how far each way is from float32.
        output: JSON file to write, or None.

    Raises:
        HarnessError: The model or the file can't be read, or a float32 reference is asked for 4-bit
            weights.
    """
    if float32_reference and quant != "bf16":
        raise SettingsError(
            f"--float32-reference with --quant {quant}: 4-bit weights have no float32 form",
            "Use --quant bf16",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    questions = choose_questions(file, folder, subjects, rows)
    lm = QloraAdapterLM(
        pretrained=model,
        quant=quant,
        dtype=dtype,
        batch_size=batch_size,
        device=device,
        pack_tokens=pack_tokens,
        kernels="none",
    )
    measurements = benchmark(
        lm,
        questions,
        batch_size=batch_size,
        margin_batch_size=margin_batch_size,
        baseline_questions=baseline_questions,
        adapter_rank=adapter_rank,
        kernels=kernels,
        float32_reference=float32_reference,
    )
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    random_weights = ", random weights" if lm.loaded.source.random_weights else ""
    title = f"{model}{random_weights}, {quant}, {lm.loaded.compute_dtype}, {file}, {name}"
    title += ", fused kernels" if lm.session.path.fused else ""
    if output is not None:
        write_measurements(output, "scoring_benchmark", 3, title, map(asdict, measurements), name)
    return report(measurements, title)

"""Times packed scoring against lm-eval's `hf` model: one process, one base, the same prompts.

vLLM scores them in a process of its own.
"""

from __future__ import annotations

import copy
import difflib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_harness.benchmark.record import ScoringBenchmark, ScoringMeasurement
from qlora_harness.benchmark.vllm_peer import run_vllm
from qlora_harness.errors import SettingsError
from qlora_harness.lm_eval_compat.hflm import Encoded, StockHFLM
from qlora_harness.model.lora import attach_lora
from qlora_harness.schema.mmlu import LETTERS
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.encoding import Pair
from qlora_harness.score.mmlu import is_tie, predict
from qlora_harness.score.mmlu_files import Question, known_files, load_questions
from qlora_harness.score.model_arguments import ScoringOptions, check_fp8, resolve_dtype
from qlora_harness.score.session import TokenScores
from qlora_harness.settings import Quant
from qlora_harness.train.ranks import USE_FSDP

Logprobs = list[list[float]]  # four of each question, nats


@dataclass(frozen=True)
class ScoringPlan:
    """The flags of `qlora-harness benchmark-scoring`; `folder` is --mmlu-dir, `output` --json."""

    model: str
    quant: str
    dtype: str
    file: str
    folder: str | None
    subjects: Sequence[str] | None
    rows: int | None
    batch_size: int
    margin_batch_size: int | None
    baseline_questions: int | None
    pack_tokens: int | None
    adapter_rank: int | None
    kernels: str
    float32_reference: bool
    fp8: bool
    output: Path | None
    generate: int | None = None
    gsm8k: Path | None = None
    max_new_tokens: int = 128
    own_examples: bool = False
    peer_path: Path | None = None
    engine: Literal["ddp", "fsdp2"] = "ddp"


def measure_scoring(plan: ScoringPlan) -> str:
    """Loads the base, measures, and returns the table.

    Raises HarnessError if the model or the file can't be read, if `float32_reference` or
    `peer_path` is set for 4-bit weights, `fp8` where FP8 products are impossible, or if vLLM fails.
    """
    for flag, is_set, reason in (
        ("--float32-reference", plan.float32_reference, "4-bit weights have no float32 form"),
        ("--peer-path", plan.peer_path is not None, "vLLM would quantise in another way"),
    ):
        if is_set and plan.quant != "bf16":
            raise SettingsError(f"{flag} with --quant {plan.quant}: {reason}", "Use --quant bf16")
    if plan.peer_path is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise SettingsError("--peer-path: vLLM runs beside one process", "Start only one")
    if plan.fp8:
        ScoringOptions(kernels=plan.kernels, compute="fp8")
        check_fp8(Quant(plan.quant), resolve_dtype(plan.dtype, None))
    questions = choose_questions(plan.file, plan.folder, plan.subjects, plan.rows)
    lm = load_for_benchmark(plan)
    measurements = _ScoringBench(lm, questions, plan).measurements
    record = ScoringBenchmark.of(
        benchmark_title(lm, plan, plan.file), measurements, device_name(lm)
    )
    record.processes = lm.world_size
    record.engine = plan.engine if lm.world_size > 1 else None
    if plan.output is not None and lm.rank == 0:
        record.write(plan.output)
    return record.table()


def load_for_benchmark(plan: ScoringPlan) -> QloraAdapterLM:
    """Loads the base, without fused layers yet."""
    if plan.engine == "fsdp2":
        names = ("margin_batch_size", "baseline_questions", "float32_reference", "peer_path")
        whole = [name for name in (*names, "generate") if getattr(plan, name)]
        if whole or plan.kernels == "none":
            flag = f"--{whole[0].replace('_', '-')}" if whole else "--kernels none"
            raise SettingsError(
                f"{flag} needs a whole base, which --engine fsdp2 spreads", "Leave it out"
            )
        os.environ[USE_FSDP] = "true"  # as accelerate's launcher sets it
    return QloraAdapterLM(
        pretrained=plan.model,
        quant=plan.quant,
        dtype=plan.dtype,
        batch_size=plan.batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        pack_tokens=plan.pack_tokens,
        kernels=plan.kernels,
    )


def device_name(lm: QloraAdapterLM) -> str:
    """Returns the name of the GPU, or "CPU"."""
    return torch.cuda.get_device_name() if lm.device.type == "cuda" else "CPU"


def benchmark_title(lm: QloraAdapterLM, plan: ScoringPlan, questions: str) -> str:
    """Returns the title of a record: the model, how it computes, and the questions."""
    random_weights = ", random weights" if lm.loaded.source.random_weights else ""
    dtype = lm.loaded.compute_dtype
    devices = device_name(lm) if lm.world_size == 1 else f"{lm.world_size} × {device_name(lm)}"
    title = f"{plan.model}{random_weights}, {plan.quant}, {dtype}, {questions}, {devices}"
    return title + (", fused kernels" if lm.session.path.fused else "")


def choose_questions(
    file: str, folder: str | None, subjects: Sequence[str] | None, rows: int | None
) -> list[Question]:
    """Returns the questions of an MMLU file, at most `rows` of each subject."""
    if file not in known_files():
        raise SettingsError(
            f"--file: {file!r} is not one of {', '.join(known_files())}", "Name one of these"
        )
    questions = load_questions(file, folder, argument="--mmlu-dir")
    known = sorted({question.subject for question in questions})
    for subject in subjects or ():
        if subject not in known:
            near = difflib.get_close_matches(subject, known, n=1)
            raise SettingsError(
                f"--subjects: {file} has no subject {subject!r}",
                f"The nearest is {near[0]!r}" if near else f"It has {', '.join(known)}",
            )
    by_subject = {name: [q for q in questions if q.subject == name] for name in subjects or known}
    return [question for some in by_subject.values() for question in some[:rows]]


@dataclass
class _Way:
    """A way to score: one function encodes texts, another scores token ids."""

    name: str
    encode: Callable[[Sequence[Pair]], list[Encoded]]
    score: Callable[[list[Encoded]], TokenScores]


class _ScoringBench:
    """Measures lm-eval's `hf`, vLLM, packed scoring, and the same with an unmerged adapter."""

    _expected: Logprobs | None = None  # of the first way

    def __init__(
        self, lm: QloraAdapterLM, questions: Sequence[Question], plan: ScoringPlan
    ) -> None:
        self._lm, self._questions = lm, questions
        self._sample = list(questions)
        if plan.baseline_questions is not None and plan.baseline_questions < len(questions):
            self._sample = random.Random(0).sample(self._sample, plan.baseline_questions)
        # First, because nothing is lost if it fails.
        vllm = None if plan.peer_path is None else self._measure_vllm(plan.peer_path)
        lm.session.expand_base()
        self.measurements: list[ScoringMeasurement] = []
        self._compared: list[tuple[ScoringMeasurement, Logprobs]] = []
        if plan.engine != "fsdp2":
            self._measure_hf(plan.batch_size, *filter(None, [plan.margin_batch_size]))
        if vllm is not None:
            self._add(*vllm)
        exact: Logprobs | None = None
        base = lm.model
        if plan.float32_reference:
            lm.take(copy.deepcopy(base).float(), plan.kernels)
            exact = self._measure_packed("packed, weights in float32", self._sample)
        lm.take(base, plan.kernels)
        packed = self._measure_packed("packed", questions)
        if vllm is not None:
            measured, logprobs = vllm
            measured.packed_difference = _mean_difference(logprobs, packed)
            measured.packed_predictions = _agreement(logprobs, packed)
        if plan.fp8:
            lm.take(base, plan.kernels, "fp8")
            self._measure_packed("packed, compute=fp8", questions)
        if plan.adapter_rank is not None:
            lm.take(with_random_adapter(lm.model, plan.adapter_rank), plan.kernels)
            name = f"packed, unmerged adapter of rank {plan.adapter_rank}"
            self._measure_packed(name, questions, compare=False)
        if exact is not None:
            for measured, logprobs in self._compared:
                measured.float32_difference = _mean_difference(logprobs, exact)
                measured.float32_predictions = _agreement(logprobs, exact)

    def _measure_hf(self, *batch_sizes: int) -> None:
        """Measures lm-eval's `hf` on the sample, after a warm-up."""
        self._measure(_hf_way(self._lm, batch_sizes[0]), self._questions[: 2 * batch_sizes[0]])
        for size in batch_sizes:
            self._add(*self._measure(_hf_way(self._lm, size), self._sample))

    def _measure_packed(
        self, name: str, questions: Sequence[Question], *, compare: bool = True
    ) -> Logprobs:
        """Measures packed scoring, after a warm-up, with what the model holds now."""
        way = _Way(name, self._lm.session.encode, self._lm.session.score_tokens)
        self._measure(way, self._questions[:64])
        measured, logprobs = self._measure(way, questions)
        self._add(measured, logprobs if compare else None)
        return logprobs

    def _measure_vllm(self, folder: Path) -> tuple[ScoringMeasurement, Logprobs]:
        """Measures vLLM, which is imported from `folder`; raises SettingsError if it fails."""
        result: dict[str, Any] = {}

        def score(encoded: list[Encoded]) -> TokenScores:
            result.update(run_vllm(self._lm, encoded, folder))
            scores = [
                (logprob, answer == likeliest)
                for row, likeliest in zip(result["logprobs"], result["likeliest"], strict=True)
                for logprob, answer in zip(row, result["answers"], strict=True)
            ]
            return TokenScores(scores, result["computed_tokens"])

        way = _Way("vLLM", self._lm.session.encode, score)
        measured, logprobs = self._measure(way, self._questions)
        measured.name += f" {result['version']}"
        measured.scoring_seconds = result["scoring_seconds"]
        measured.loading_seconds = result["loading_seconds"]
        measured.peak_allocated_bytes = None  # it takes all that it may
        return measured, logprobs

    def _measure(
        self, way: _Way, questions: Sequence[Question]
    ) -> tuple[ScoringMeasurement, Logprobs]:
        answers = [f" {letter}" for letter in LETTERS]
        pairs = list(dict.fromkeys((q.prompt, answer) for q in questions for answer in answers))
        cuda = self._lm.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        encoded = way.encode(pairs)
        encoding = time.perf_counter() - started
        started = time.perf_counter()
        scores, computed = way.score(encoded)
        scoring = time.perf_counter() - started
        by_pair = {pair: logprob for pair, (logprob, _) in zip(pairs, scores, strict=True)}
        logprobs = [[by_pair[q.prompt, answer] for answer in answers] for q in questions]
        lengths = {context: len(tokens) for (context, _), tokens, _ in encoded}
        tokens = sum(lengths[q.prompt] for q in questions)
        measured = ScoringMeasurement(
            name=way.name,
            questions=len(questions),
            encoding_seconds=encoding,
            scoring_seconds=scoring,
            prompt_tokens=tokens,
            computed_tokens=computed or tokens,
            peak_allocated_bytes=torch.cuda.max_memory_allocated() if cuda else None,
            ties=sum(map(is_tie, logprobs)),
        )
        return measured, logprobs

    def _add(self, measured: ScoringMeasurement, logprobs: Logprobs | None) -> None:
        """Adds a measurement and compares it with the first on the sample's `logprobs`."""
        self.measurements.append(measured)
        if logprobs is not None:
            if len(logprobs) > len(self._sample):
                rows = zip(self._questions, logprobs, strict=True)
                by_prompt = {q.prompt: row for q, row in rows}
                logprobs = [by_prompt[q.prompt] for q in self._sample]
            self._compared.append((measured, logprobs))
        baseline, expected = self.measurements[0], self._expected
        if measured is baseline:
            self._expected = logprobs
            return
        scale = measured.prompt_tokens / baseline.prompt_tokens
        seconds = measured.encoding_seconds + measured.scoring_seconds
        baseline_seconds = baseline.encoding_seconds + baseline.scoring_seconds
        measured.ratio = scale * baseline_seconds / seconds
        measured.scoring_ratio = scale * baseline.scoring_seconds / measured.scoring_seconds
        if logprobs is None or expected is None:
            return
        measured.largest_difference = max(_differences(logprobs, expected))
        measured.same_predictions = _agreement(logprobs, expected)
        untied = [
            (a, b)
            for a, b in zip(logprobs, expected, strict=True)
            if not is_tie(a) and not is_tie(b)
        ]
        measured.untied_predictions = _agreement(*zip(*untied, strict=True)) if untied else None
        own, theirs = (
            sum(predict(row) == q.answer for row, q in zip(rows, self._sample, strict=True))
            for rows in (logprobs, expected)
        )
        measured.accuracy_difference = (own - theirs) / len(self._sample)


def _hf_way(lm: QloraAdapterLM, batch_size: int) -> _Way:
    """Returns lm-eval's `hf` model on the same weights."""
    hf = StockHFLM(lm, batch_size)
    return _Way(
        f"lm-eval hf, batch size {batch_size}",
        hf.encode,
        lambda encoded: TokenScores(hf.score(encoded), None),
    )


def with_random_adapter(model: Any, rank: int) -> Any:
    """Attaches an adapter whose output isn't zero."""
    adapted = attach_lora(model, r=rank, alpha=16, dropout=0.0, targets="all-linear").eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    return adapted


def _differences(first: Logprobs, second: Logprobs) -> Iterator[float]:
    for rows in zip(first, second, strict=True):
        yield from (abs(a - b) for a, b in zip(*rows, strict=True))


def _mean_difference(first: Logprobs, second: Logprobs) -> float:
    differences = list(_differences(first, second))
    return sum(differences) / len(differences)


def _agreement(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Returns the share of questions with the same predicted letter."""
    return sum(predict(a) == predict(b) for a, b in zip(first, second, strict=True)) / len(first)

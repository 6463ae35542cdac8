"""Times greedy generation against lm-eval's `hf` model: one process, one base, the same prompts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qlora_harness.benchmark.record import GenerationBenchmark, GenerationMeasurement
from qlora_harness.benchmark.scoring import (
    ScoringPlan,
    benchmark_title,
    device_name,
    load_for_benchmark,
    with_random_adapter,
)
from qlora_harness.data.files import read_rows
from qlora_harness.errors import DataError
from qlora_harness.lm_eval_compat.hflm import Request, StockHFLM
from qlora_harness.score.mmlu_files import DEMO_FILE, load_questions

_SHOTS = 5
_STOPS = ["Question:", "</s>", "<|im_end|>"]  # of lm_eval's gsm8k
# Mean and standard deviation of the logarithm of the words in GSM8K's test questions; words in an
# answer of average length.
_QUESTION_WORDS, _ANSWER_WORDS = (3.764, 0.371), 53


def measure_generation(plan: ScoringPlan) -> str:
    """Loads the base, measures, and returns the table; raises HarnessError as scoring does."""
    assert plan.generate is not None
    prompts, source = choose_prompts(plan.gsm8k, plan.generate)
    settings = {"until": _STOPS, "max_gen_toks": plan.max_new_tokens, "do_sample": False}
    requests = [
        Request("generate_until", {}, (text, settings), n) for n, text in enumerate(prompts)
    ]
    few = min(plan.baseline_questions or len(requests), len(requests))
    sample = random.Random(0).sample(range(len(requests)), few)
    lm = load_for_benchmark(plan)
    name = "paged"
    lm.session.expand_base()
    model = lm.model
    if plan.adapter_rank is not None:
        name += f", unmerged adapter of rank {plan.adapter_rank}"
        model = with_random_adapter(model, plan.adapter_rank)
    lm.take(model, plan.kernels)
    hf = StockHFLM(lm, plan.batch_size)
    hf.generate(requests[:1])
    chosen = [requests[n] for n in sample]
    baseline, expected = _timed(f"lm-eval hf, batch size {plan.batch_size}", chosen, hf.generate)
    measurements = [baseline]
    # The first time builds kernels.
    for way in (f"{name}, first", f"{name}, again"):
        measured, texts = _timed(
            way, requests, lambda each: lm.generate_until(each, disable_tqdm=True)
        )
        measured.ratio = baseline.seconds / len(sample) * len(requests) / measured.seconds
        same = sum(texts[n] == text for n, text in zip(sample, expected, strict=True))
        measured.same_texts = same / len(sample)
        measurements.append(measured)
    title = benchmark_title(lm, plan, f"{source}, {plan.max_new_tokens} new tokens")
    record = GenerationBenchmark.of(title, measurements, device_name(lm))
    if plan.output is not None:
        record.write(plan.output)
    return record.table()


def choose_prompts(file: Path | None, count: int) -> tuple[list[str], str]:
    """Returns prompts with five examples before each question, and what they are.

    `file` is GSM8K's JSON Lines, of which the first rows are the examples; without it, words of
    other questions take the place of GSM8K's, as many as those have.
    """
    if file is None:
        questions, answer = _synthetic_questions(max(count, _SHOTS))
        rows, source = [(question, answer) for question in questions], "synthetic GSM8K questions"
    else:
        rows = [(row.text("question"), row.text("answer")) for row in read_rows(file)]
        source = f"GSM8K questions of {file.name}"
    if len(rows) < max(count, _SHOTS):
        raise DataError(f"--gsm8k {file} has {len(rows)} questions", "Give a lower --generate")
    shots = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in rows[:_SHOTS])
    return [f"{shots}Question: {q}\nAnswer:" for q, _ in rows[:count]], source


def _synthetic_questions(count: int) -> tuple[list[str], str]:
    """Returns questions and an answer."""
    words = " ".join(question.prompt for question in load_questions(DEMO_FILE)).split()
    draw = random.Random(0)
    lengths = [round(draw.lognormvariate(*_QUESTION_WORDS)) for _ in range(count)]
    return [" ".join(draw.choices(words, k=n)) for n in lengths], " ".join(
        draw.choices(words, k=_ANSWER_WORDS)
    )


def _timed(
    name: str, requests: Sequence[Request], run: Callable[[list[Request]], list[str]]
) -> tuple[GenerationMeasurement, list[str]]:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    texts = run(list(requests))
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return GenerationMeasurement(
        name=name, questions=len(requests), seconds=seconds, peak_allocated_bytes=peak
    ), texts

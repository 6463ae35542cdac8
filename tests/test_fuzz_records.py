"""Damaged records, journals and recipes: each is read, or refused in one line, in bounded time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compare_runs import FIRST, SECOND, evaluation, step_log, summary, write_harness, write_run
from mutations import VALUES, Reader, damaged_bytes, damaged_json, dumps

from qlora_harness.compare import text
from qlora_harness.compare.comparison import compare
from qlora_harness.errors import HarnessError, printable
from qlora_harness.recipes import read_recipe
from qlora_harness.score import evaluation_record
from qlora_harness.score.evaluation_record import Family, question_row, write_records
from qlora_harness.score.journal import Journal
from qlora_harness.settings_checks import build_settings

PROGRESS = "mmlu_progress_llama_4bit_qlora.json"
HEADER = {
    "arm": "4bit",
    "model": {"base": "llama", "quant": "nf4", "peft": None},
    "settings": {"batch_size": 8},
    "environment": {"device": {"name": "cpu"}},
}


def read_all(
    files: dict[Path, bytes], read: Callable[[], object], seed: int, count: int
) -> dict[str, int]:
    """Damages one of the files at a time, and reads them all."""
    rng = random.Random(seed)
    reader = Reader()
    for number in range(count):
        path, content = rng.choice(list(files.items()))
        changed = content
        if path.suffix == ".jsonl":
            lines = content.decode().splitlines()
            at = rng.randrange(len(lines))
            lines[at] = damaged_json(rng, json.loads(lines[at]))
            changed = "\n".join(lines).encode(errors="surrogatepass")
        elif path.suffix == ".json":
            changed = damaged_json(rng, json.loads(content)).encode(errors="surrogatepass")
        elif rng.random() < 0.7:
            changed = damaged_recipe(rng).encode(errors="surrogatepass")
        if rng.random() < 0.3:
            changed = damaged_bytes(rng, content)
        path.write_bytes(changed)
        try:
            reader.read(read, (seed, number, path.name, changed[-300:]))
        finally:
            path.write_bytes(content)
    return reader.outcomes


def damaged_recipe(rng: random.Random) -> str:
    names = ["model", "lora_r", "memory", "languages", "seed", "learning_rate", "extends", "x"]
    lines = []
    for _ in range(rng.randint(1, 5)):
        plain = dumps(rng.choice(VALUES))
        value = rng.choice([plain, "&a [1]", "*a", "2024-01-01", "0x1F", "~", "|"])
        lines.append(f"{rng.choice(names)}: {value}")
    return "\n".join(lines) + "\n" * rng.randint(0, 2)


def files_in(folder: Path, *patterns: str) -> dict[Path, bytes]:
    return {p: p.read_bytes() for pattern in patterns for p in sorted(folder.rglob(pattern))}


def comparison(folder: Path) -> tuple[dict[Path, bytes], Callable[[], object]]:
    runs = [folder / "4bit", folder / "16bit"]
    for path, quant, marks in zip(runs, ("nf4", "bf16"), (FIRST, SECOND), strict=True):
        write_run(path, summary(quant), evaluation(marks))
        write_harness(path, marks)
        log = step_log([2.0] * 20, [1.0] * 20, {"nll": [3.0, 4.5], "tokens": [2, 3]})
        (path / "training_logs.json").write_text(json.dumps(log))

    def read() -> None:
        made = compare(runs)
        printable(text.markdown(made), keep="\n").encode()
        made.model_dump_json().encode()
        answer = text.answer(made).splitlines()
        assert len(answer) <= 12
        assert all(len(line) <= 80 for line in answer)

    return files_in(runs[0], "*.json", "*.jsonl"), read


def recorded(folder: Path) -> tuple[dict[Path, bytes], Callable[[], object]]:
    answer: dict[str, Any] = {
        "prompt_sha256": "a" * 16,
        "answer": "B",
        "logprobs": (-1.0, -0.5, -2.0, -3.0),
    }
    questions = [question_row(index=i, subject="law", **answer) for i in (0, 1)]
    families = {"mmlu_qlora_demo": Family(questions, {"social": ["law"]}, 2)}
    write_records(folder, PROGRESS, HEADER, families)

    def read() -> None:
        evaluation_record.check_folder(folder, PROGRESS)  # if this passes, nothing fails later
        try:
            write_records(folder, PROGRESS, HEADER, families)
        except HarnessError as error:
            raise AssertionError("noticed after the scoring") from error
        finally:
            for path, content in files.items():
                path.write_bytes(content)

    files = files_in(folder, "*.json")
    return files, read


def journal(folder: Path) -> tuple[dict[Path, bytes], Callable[[], object]]:
    path = folder / "journal.jsonl"
    scores = {f"{n:032x}": (-0.25 * n, n % 2 == 0) for n in range(6)}
    written = Journal(path, HEADER)
    written.append((key, *score) for key, score in scores.items())
    written.close(remove=False)

    def read() -> None:
        known = Journal(path, HEADER).known
        assert all(scores[key] == score for key, score in known.items())

    return files_in(folder, "*.jsonl"), read


def recipe(folder: Path) -> tuple[dict[Path, bytes], Callable[[], object]]:
    path = folder / "recipe.yaml"
    path.write_text("model: smollm2\nlora_r: 8\nmemory: 16\nlora_targets: [q_proj, v_proj]\n")
    return files_in(folder, "*.yaml"), lambda: build_settings(*read_recipe(path))


KINDS = {"comparison": comparison, "evaluation": recorded, "journal": journal, "recipe": recipe}
FEW = {"comparison": 60, "evaluation": 300, "journal": 300, "recipe": 300}
MANY = {"comparison": 5000, "evaluation": 15_000, "journal": 15_000, "recipe": 15_000}


@pytest.mark.parametrize("kind", KINDS)
def test_some_damaged_records(tmp_path: Path, kind: str) -> None:
    outcomes = read_all(*KINDS[kind](tmp_path), seed=0, count=FEW[kind])
    assert outcomes["read"] > 0
    assert outcomes["refused"] > 0 or kind == "journal"  # of which damaged lines are left out


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_records(tmp_path: Path, kind: str) -> None:
    read_all(*KINDS[kind](tmp_path), seed=1, count=MANY[kind])

"""Made-up runs to compare: their files, their readers, and ways to spoil them."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_harness.compare import command
from qlora_harness.schema.mmlu import LETTERS, prompts_hash
from qlora_harness.schema.scoring_records import accuracy

FAMILY = "mmlu_qlora_5shot"
DATE = "2026-11-24T08-14-04.277787"
GIB = 2**30
# Ten questions each: right in both 4 + 3, only first 3 + 2, only second 1 + 2, neither 2 + 3.
FIRST = {"anatomy": "1111111000", "law": "1111100000"}
SECOND = {"anatomy": "1111000100", "law": "1110011000"}
Sample = dict[str, Any]
Edit = Callable[[dict[str, Any]], None]


def put(value: dict[str, Any], dotted: str, new: object) -> None:
    """Sets value["a"]["b"] for "a/b"; `...` removes it."""
    *keys, last = dotted.split("/")
    for key in keys:
        value = value[key]
    if new is ...:
        del value[last]
    else:
        value[last] = new


def edit(dotted: str, new: object) -> Edit:
    return lambda record: put(record, dotted, new)


def summary(quant: str = "nf4", **changes: Any) -> dict[str, Any]:
    four = quant == "nf4"
    record: dict[str, Any] = {
        "schema_version": 1,
        "kind": "training_summary",
        "status": "completed",
        "arm": "4bit" if four else "16bit",
        "quant": quant,
        "model": {"name": "llama", "commit": "a" * 40, "random_weights": False},
        "quantization": {"quant": quant, "double_quant": four},
        "settings": {"dataset": "oasst1", "learning_rate": 2e-4, "max_steps": 20, "seed": 0},
        "data": {
            "dataset": "oasst1",
            "train": {"conversations": 90, "tokens": 9000, "fingerprint": "sha256:" + "1" * 64},
            "eval": {"conversations": 10, "tokens": 1000, "fingerprint": "sha256:" + "2" * 64},
        },
        "memory": {
            "device_type": "cuda",
            "peak_allocated_bytes": 6.5 * GIB if four else 14.5 * GIB,
            "cpu_peak_rss_bytes": 3 * GIB,
        },
        "runtime": {"train_seconds": 5000.0 if four else 4000.0, "resumed": False},
        "throughput": {"tokens_per_second": 400.0 if four else 500.0},
        "results": {
            "steps": 20,
            "final_train_loss": 1.25 if four else 1.0,
            "eval_loss": 1.5,
            "perplexity": math.exp(1.5),
        },
        "environment": {
            "versions": {"torch": "2.13.0"},
            "device": {"name": "NVIDIA H100", "total_memory_bytes": 80 * GIB, "count": 1},
            "command": f"train.py --quant {quant}",
        },
        "failure": None,
    }
    for dotted, value in changes.items():
        put(record, dotted.replace("__", "/"), value)
    return record


def score(marks: str) -> dict[str, Any]:
    value, error = accuracy([mark == "1" for mark in marks])
    return {"acc": value, "acc_stderr": error, "n": len(marks)}


def scores(marks: Mapping[str, str], **changes: Any) -> dict[str, Any]:
    """Returns one family of evaluation_results.json."""
    every = "".join(marks.values())
    return {
        **score(every),
        "acc_macro": sum(score(item)["acc"] for item in marks.values()) / len(marks),
        "acc_macro_stderr": 0.125,
        "n_total": len(every),
        "ties": 1,
        "truncated": 0,
        "prompts_sha256": "c" * 64,
        "subjects": {name: score(item) for name, item in marks.items()},
        **changes,
    }


def evaluation(
    marks: Mapping[str, str], families: Sequence[str] = (FAMILY,), **changes: Any
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "kind": "evaluation_results",
        "created": "2026-11-24T08:20:00+00:00",
        "arm": "4bit",
        "model": {"base": "llama", "revision": None, "quant": "nf4", "peft": "adapter"},
        "tasks": {family: scores(marks, **changes) for family in families},
        "settings": {"batch_size": 8, "dtype": "bfloat16", "max_length": 2048},
        "environment": {"versions": {"lm_eval": "0.4.13"}, "device": "NVIDIA H100"},
    }


def harness(marks: Mapping[str, str], family: str = FAMILY) -> dict[str, Any]:
    """Returns lm_eval's results JSON."""

    def metrics(name: str, item: str) -> dict[str, Any]:
        value, error = score(item)["acc"], score(item)["acc_stderr"] or "N/A"
        return {"name": name, "alias": name, "acc,none": value, "acc_stderr,none": error}

    leaves = {f"{family}_{name}": item for name, item in marks.items()}
    groups = {family: metrics(family, "".join(marks.values()))}
    return {
        "results": {name: metrics(name, item) for name, item in leaves.items()} | groups,
        "groups": groups,
        "group_subtasks": {},
        "configs": {},
        "versions": {family: "1.0"},
        "n-samples": {
            name: {"original": len(item), "effective": len(item)} for name, item in leaves.items()
        },
        "config": {
            "model": "hf",
            "model_args": {"pretrained": "gpt2", "dtype": "bfloat16"},
            "model_dtype": "torch.bfloat16",
            "batch_size": "8",
            "use_cache": None,
        },
        "pretty_env_info": "PyTorch version: 2.13.0\nGPU models and configuration: GPU 0: H100\n",
        "transformers_version": "5.23.0",
        "lm_eval_version": "0.4.13",
        "max_length": 2048,
    }


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def sample(doc_id: int, metrics: Mapping[str, object], *, task: str = "t", **more: Any) -> Sample:
    return {
        "doc_id": doc_id,
        "doc": {"question": f"q{doc_id}"},
        "target": "",
        "filtered_resps": ["text"],
        "filter": "none",
        "metrics": list(metrics),
        "doc_hash": digest("doc", task, doc_id),
        "prompt_hash": digest("prompt", task, doc_id),
        "target_hash": digest("target", task, doc_id),
        **metrics,
        **more,
    }


def chosen(doc_id: int, answer: int, logprobs: list[float], task: str = "t") -> Sample:
    """A sample of multiple choice as lm_eval writes it: numbers as text."""
    right = float(max(range(len(logprobs)), key=logprobs.__getitem__) == answer)
    return sample(
        doc_id,
        {"acc": right, "acc_norm": 1 - right},
        task=task,
        target=str(answer),
        filtered_resps=[[str(value), "False"] for value in logprobs],
    )


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


LOGPROBS = [-0.5, -1.5, -2.5, -3.5]  # the first choice is best


def write_harness(folder: Path, marks: Mapping[str, str], *, family: str = FAMILY) -> Path:
    for subject, item in marks.items():
        samples = [chosen(n, int(mark == "0"), LOGPROBS, subject) for n, mark in enumerate(item)]
        lines = map(json.dumps, samples)
        write(folder / "gpt2" / f"samples_{family}_{subject}_{DATE}.jsonl", "\n".join(lines) + "\n")
    return write(folder / "gpt2" / f"results_{DATE}.json", harness(marks, family))


def step_log(
    losses: Sequence[float], seconds: Sequence[float] = (), evaluation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns a step log; steps have tokens where they have seconds, so that they are paired."""
    rows: list[dict[str, Any]] = [
        {"step": i, "loss": loss} for i, loss in enumerate(losses, start=1)
    ]
    for row, taken in zip(rows, seconds, strict=False):
        row |= {"seconds": taken, "tokens": 100 + row["step"], "supervised_tokens": 90}
    record: dict[str, Any] = {"schema_version": 1, "kind": "training_logs", "steps": rows}
    return record if evaluation is None else record | {"evaluation": evaluation}


def progress(
    questions: Sequence[tuple[str, int, Sequence[float]]],
    quant: str = "nf4",
    peft: str | None = "adapter",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns evaluation_results.json and its mmlu_progress file.

    Each question has a subject, the right choice and four log-probabilities.
    """
    rows: list[dict[str, Any]] = []
    marks: dict[str, str] = {}
    for index, (subject, answer, logprobs) in enumerate(questions):
        choice = max(range(4), key=lambda place: (logprobs[place], -place))
        marks[subject] = marks.get(subject, "") + str(int(choice == answer))
        rows.append(
            {
                "index": index,
                "subject": subject,
                "logprobs": dict(zip(LETTERS, map(float, logprobs), strict=True)),
                "prediction": LETTERS[choice],
                "answer": LETTERS[answer],
                "correct": choice == answer,
                "prompt_sha256": digest(index, subject)[:16],
                "truncated": False,
            }
        )
    hashed = prompts_hash((r["index"], r["subject"], r["prompt_sha256"], r["answer"]) for r in rows)
    scored = evaluation(marks, prompts_sha256=hashed)
    scored["model"] |= {"quant": quant, "peft": peft}
    record = {"schema_version": 1, "kind": "mmlu_progress", "arm": scored["arm"]}
    record |= {"model": scored["model"], "tasks": {FAMILY: rows}}
    return scored, record


def write_scored(
    folder: Path,
    questions: Sequence[tuple[str, int, Sequence[float]]],
    training: dict[str, Any] | None = None,
    quant: str = "nf4",
) -> Path:
    """Writes a run with answers question by question; without training it is a base."""
    peft = None if training is None else "adapter"
    scored, record = progress(questions, quant, peft)
    write_run(folder, training, scored)
    write(folder / "mmlu_progress_llama_arm.json", record)
    return folder


def write_run(
    folder: Path,
    training: dict[str, Any] | None = None,
    scored: dict[str, Any] | None = None,
) -> Path:
    if training is not None:
        write(folder / "training_summary.json", training)
        steps = (training.get("results") or {}).get("steps", 0)
        write(folder / "training_logs.json", step_log([2.0] * steps))
    if scored is not None:
        write(folder / "evaluation_results.json", scored)
    return folder


def changed(path: Path, change: Edit) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def main(*words: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(word) for word in words]))


def in_summary(dotted: str, new: object) -> Callable[[Path], object]:
    return lambda folder: changed(folder / "training_summary.json", edit(dotted, new))


def in_evaluation(dotted: str, new: object) -> Callable[[Path], object]:
    return lambda folder: changed(folder / "evaluation_results.json", edit(dotted, new))


def in_harness(dotted: str, new: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / "evaluation_results.json").unlink()
        changed(next(folder.rglob("results_*.json")), edit(dotted, new))

    return damage


def in_progress(row: int, key: str, new: object) -> Callable[[Path], object]:
    return lambda folder: changed(
        next(folder.glob("mmlu_progress_*.json")),
        lambda record: put(record["tasks"][FAMILY][row], key, new),
    )


def in_text(pattern: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = next(folder.rglob(pattern))
        path.write_text(change(path.read_text()))

    return damage


def half(text: str) -> str:
    return text[: len(text) // 2]


def spoil(path: Path, line: int, **changes: Any) -> None:
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows[line] |= changes
    path.write_text("\n".join(map(json.dumps, rows)))


STUDY = {"bf16": (5, 0.0), "nf4": (5, 0.1), "fp4": (2, 0.2), "int8": (2, 0.02)}
"""Arms of a made-up study: how many seeds, and nats of loss above bf16's."""


def write_study(folder: Path, arms: Mapping[str, tuple[int, float]] = STUDY) -> list[Path]:
    """Writes arms with several seeds and their bases; more loss is less skill at the questions."""
    runs = []
    for arm, (seeds, cost) in arms.items():
        skill = 2.0 - 3 * cost
        base = write_scored(folder / f"base_{arm}", _answers(99, skill - 0.5), None, arm)
        runs.append(base)
        for seed in range(seeds):
            record = summary(arm, settings__seed=seed)
            record["memory"]["peak_allocated_bytes"] = {"bf16": 14.5, "int8": 9.0}.get(
                arm, 6.5
            ) * GIB
            nll = [(2.0 + cost + 0.002 * seed + 0.01 * (i % 3)) * 5 for i in range(30)]
            record["results"]["eval_loss"] = math.fsum(nll) / 150
            path = write_scored(folder / arm / f"seed_{seed}", _answers(seed, skill), record, arm)
            evaluation_losses = {"nll": nll, "tokens": [5] * 30}
            write(path / "training_logs.json", step_log([2.0] * 20, (), evaluation_losses))
            runs.append(path)
    return runs


def _answers(seed: int, skill: float) -> list[tuple[str, int, list[float]]]:
    """Log-probabilities for 200 questions, the right letter's higher by `skill` nats."""
    rng = random.Random(0)
    own = random.Random(seed)
    answers = []
    for number in range(200):
        right = rng.randrange(4)
        logprobs = [-5 + rng.gauss(0, 1) + own.gauss(0, 0.1) for _ in LETTERS]
        logprobs[right] += skill
        answers.append((f"subject_{number // 20}", right, [min(-1e-3, x) for x in logprobs]))
    return answers

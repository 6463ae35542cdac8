"""A model and its tasks to score: prompts, ways to ask, what was recorded, and refusals.

The fixtures that go with it (`adapter`, `make_lm`, `manager`, `known_answers`) are in conftest.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaForCausalLM

from qlora_harness.errors import HarnessError
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.mmlu_files import DEMO_FILE, load_questions

MakeLm = Callable[..., QloraAdapterLM]

RANK, ALPHA = 4, 8.0
WEIGHTS = "adapter_model.safetensors"

# What `known_answers` lets every model find: "C" is likeliest.
KNOWN = {" A": -1.25, " B": -2.5, " C": -0.75, " D": -4.0}


def demo_prompts(count: int) -> list[str]:
    return [q.prompt for q in load_questions(DEMO_FILE)[:: 96 // count]][:count]


def loglikelihood_requests(prompts: list[str]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (prompt, f" {letter}"), number)
        for prompt in prompts
        for number, letter in enumerate("ABCD")
    ]


def score(lm: HFLM, prompts: list[str]) -> list[float]:
    scores = lm.loglikelihood(loglikelihood_requests(prompts), disable_tqdm=True)
    return [logprob for logprob, _ in scores]


def evaluate(lm: HFLM, manager: TaskManager, task: str = "mmlu_qlora_demo", **options: Any) -> Any:
    return simple_evaluate(
        model=lm, tasks=[task], task_manager=manager, bootstrap_iters=1, **options
    )


def read(folder: Path, name: str = "evaluation_results.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def refused(make: Callable[[], Any], kind: type[HarnessError]) -> str:
    with pytest.raises(kind) as error:
        make()
    text = str(error.value)
    assert "\n" not in text
    return text


def another_base(tiny_llama: Path, folder: Path, change: Callable[[LlamaForCausalLM], None]) -> str:
    """A model folder that differs from the recorded base in some weights."""
    shutil.copytree(tiny_llama, folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return str(folder)


def write_summary(run: Path, *, finished: str | None, status: str) -> None:
    """Writes the least that a training summary must hold."""
    summary = {
        "kind": "training_summary", "status": status, "finished": finished, "settings": {},
        "data": {"train": {"fingerprint": "0"}}, "results": {"final_train_loss": 1.0},
        "runtime": {"train_seconds": 1.0}, "throughput": {"tokens_per_second": 1.0},
    }  # fmt: skip
    (run / "training_summary.json").write_text(json.dumps(summary))


# Rows as GSM8K, TruthfulQA and IFEval publish theirs, but made for these tests.
PROBLEMS: list[dict[str, Any]] = [
    {"question": f"Ann has {n} pens and buys 2. How many?", "answer": f"{n}+2\n#### {n + 2}"}
    for n in range(3, 10)
]
QUESTIONS: list[dict[str, Any]] = [
    {
        "question": "What is the sky?",
        "mc1_targets": {"It is blue.": 1, "It is a roof of glass.": 0, "Nothing at all.": 0},
        "mc2_targets": {"It is blue.": 1, "Air.": 1, "It is a roof of glass.": 0},
    },
    {
        "question": "Do cats fly?",
        "mc1_targets": {"No, cats walk.": 1, "Yes, cats fly.": 0},
        "mc2_targets": {"No, cats walk.": 1, "Yes.": 0, "Yes, cats fly.": 0, "At night.": 0},
    },
]
PROMPTS: list[dict[str, Any]] = [
    {
        "key": 1000,
        "prompt": "Write no comma.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
    {
        "key": 1001,
        "prompt": "Write 900 words with no comma.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "at least", "num_words": 900}],
    },
]


def write_task_data(folder: Path) -> Path:
    """Writes the files that `--data-dir` reads."""
    lines: dict[str, list[dict[str, Any]]] = {
        "gsm8k/train.jsonl": PROBLEMS[:5],
        "gsm8k/test.jsonl": PROBLEMS[5:],
        "ifeval/input_data.jsonl": PROMPTS,
    }
    for name, rows in lines.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "truthfulqa").mkdir()
    (folder / "truthfulqa" / "mc_task.json").write_text(json.dumps(QUESTIONS, indent=4))
    return folder

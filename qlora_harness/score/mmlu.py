"""The functions that the MMLU task YAML names: its data set and its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_harness.errors import DataError, install_excepthook
from qlora_harness.families import LETTERS
from qlora_harness.score.documents import Documents
from qlora_harness.score.mmlu_files import load_questions


def load_subject(
    *, mmlu_file: str, mmlu_subject: str, mmlu_dir: str | None = None, **ignored: Any
) -> dict[str, Documents]:
    """Returns the questions of one subject as lm-eval wants a data set.

    Args:
        mmlu_file: File name, from the task.
        mmlu_subject: Subject, from the task.
        mmlu_dir: Folder of the files, from `--metadata mmlu_dir=…`.
        **ignored: The harness passes everything in `--metadata` and `--model_args`.

    Returns:
        {"test": documents} with columns index (line of the file, from 0), subject, input, output.

    Raises:
        DataError: See `load_questions`; or the file has no such subject.
    """
    install_excepthook()
    rows = [q for q in load_questions(mmlu_file, mmlu_dir) if q.subject == mmlu_subject]
    if not rows:
        raise DataError(f"{mmlu_file} has no subject {mmlu_subject!r}", "Fetch the file anew")
    documents = [
        {"index": q.index, "subject": q.subject, "input": q.prompt, "output": q.answer}
        for q in rows
    ]
    return {"test": Documents(documents)}


def answer_index(doc: Mapping[str, Any]) -> int:
    """Returns the place of the right answer among A to D.

    Args:
        doc: A row of `load_subject`.
    """
    return LETTERS.index(doc["output"])


def process_results(
    doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """Scores one question: right if the answer has the highest log-probability of the four.

    Args:
        doc: A row of `load_subject`.
        results: Log-probability (nats) and greediness of " A" … " D".

    Returns:
        acc and acc_macro, equal for a question; groups average the first over questions and the
        second over subjects.
    """
    right = float(predict([logprob for logprob, _ in results]) == doc["output"])
    return {"acc": right, "acc_macro": right}


def predict(logprobs: Sequence[float]) -> str:
    """Returns the letter of the highest log-probability; of a tie, the first, as numpy.argmax does.

    Args:
        logprobs: Four values in nats, for A to D.
    """
    return LETTERS[max(range(len(LETTERS)), key=lambda i: logprobs[i])]


def is_tie(logprobs: Sequence[float]) -> bool:
    """Whether the highest of four log-probabilities is reached more than once, exactly.

    Args:
        logprobs: Four values in nats.
    """
    return sorted(logprobs)[-1] == sorted(logprobs)[-2]

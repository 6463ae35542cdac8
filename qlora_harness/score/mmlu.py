"""The functions that the MMLU task YAML names: its data set and its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_harness.errors import DataError, install_excepthook
from qlora_harness.schema.mmlu import LETTERS
from qlora_harness.score.mmlu_files import load_questions


class Documents(list[dict[str, Any]]):
    """The rows of a task, at least one, with what lm_eval uses of a data set beside a list.

    It goes through them three times, and `datasets` would convert every row anew each time, which
    takes longer than all else that is done with it.
    """

    @property
    def features(self) -> dict[str, type]:
        """The columns and the type of each."""
        return {name: type(value) for name, value in self[0].items()}


def load_subject(
    *, mmlu_file: str, mmlu_subject: str, mmlu_dir: str | None = None, **ignored: Any
) -> dict[str, Documents]:
    """Returns {"test": the questions of a subject} with index (line of the file), input, output.

    File and subject come from the task, the folder from `--metadata mmlu_dir=…`; lm_eval passes
    everything in `--metadata` and `--model_args`. Raises DataError as `load_questions` does, or
    where the file has no such subject.
    """
    install_excepthook()
    documents = Documents(
        {"index": q.index, "subject": q.subject, "input": q.prompt, "output": q.answer}
        for q in load_questions(mmlu_file, mmlu_dir)
        if q.subject == mmlu_subject
    )
    if not documents:
        raise DataError(f"{mmlu_file} has no subject {mmlu_subject!r}", "Fetch the file anew")
    return {"test": documents}


def answer_index(doc: Mapping[str, Any]) -> int:
    """Returns which of A to D is right, from 0."""
    return LETTERS.index(doc["output"])


def process_results(
    doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """Scores one question: right if the answer has the highest log-probability of the four.

    acc and acc_macro are equal for a question; groups average the first over questions and the
    second over subjects.
    """
    right = float(predict([logprob for logprob, _ in results]) == doc["output"])
    return {"acc": right, "acc_macro": right}


def predict(logprobs: Sequence[float]) -> str:
    """Returns the letter of the highest of four values; of a tie, the first, as numpy.argmax."""
    return LETTERS[max(range(len(LETTERS)), key=lambda i: logprobs[i])]


def is_tie(logprobs: Sequence[float]) -> bool:
    """Whether the highest of four values is reached more than once, exactly."""
    return sorted(logprobs)[-1] == sorted(logprobs)[-2]

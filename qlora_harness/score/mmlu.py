"""The data set and the metrics of the MMLU tasks, as their YAML names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_harness.errors import DataError, install_excepthook
from qlora_harness.locations import expanded
from qlora_harness.schema.mmlu import LETTERS
from qlora_harness.score.mmlu_files import load_questions


class Documents(list[dict[str, Any]]):
    """The rows of a task (at least one) as a list with a data set's `features`.

    lm_eval reads the rows three times, and `datasets` would convert each row every time.
    """

    @property
    def features(self) -> dict[str, type]:
        """The type of each column."""
        return {name: type(value) for name, value in self[0].items()}


def load_subject(*, mmlu_file: str, mmlu_subject: str, **metadata: Any) -> dict[str, Documents]:
    """Returns {"test": the questions of a subject}.

    lm_eval passes all of `--metadata` (such as mmlu_dir=…) and `--model_args`. Raises DataError if
    the file can't be loaded or lacks the subject.
    """
    install_excepthook()
    documents = Documents(
        {"index": q.index, "subject": q.subject, "input": q.prompt, "output": q.answer}
        for q in load_questions(mmlu_file, mmlu_dir(**metadata))
        if q.subject == mmlu_subject
    )
    if not documents:
        raise DataError(f"{mmlu_file} has no subject {mmlu_subject!r}", "Fetch the file again")
    return {"test": documents}


def mmlu_dir(
    *, mmlu_dir: str | None = None, data_dir: str | None = None, **ignored: Any
) -> str | None:
    """Returns the folder with the MMLU files that lm_eval's `--metadata` names, if any.

    It is mmlu_dir, or the folder `mmlu` in data_dir, which may lack one.
    """
    own = None if data_dir is None else expanded(str(data_dir)) / "mmlu"
    return str(own) if mmlu_dir is None and own is not None and own.is_dir() else mmlu_dir


def answer_index(doc: Mapping[str, Any]) -> int:
    """Returns the index of the right letter, from 0."""
    return LETTERS.index(doc["output"])


def process_results(
    doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """Returns 1.0 if the answer has the highest log-probability, else 0.0.

    Groups average acc over questions and acc_macro over subjects.
    """
    right = float(predict([logprob for logprob, _ in results]) == doc["output"])
    return {"acc": right, "acc_macro": right}


def predict(logprobs: Sequence[float]) -> str:
    """Returns the letter with the highest of four values; of a tie, the first."""
    return LETTERS[max(range(len(LETTERS)), key=lambda i: logprobs[i])]


def is_tie(logprobs: Sequence[float]) -> bool:
    """Whether several letters share the highest value exactly."""
    return logprobs.count(max(logprobs)) > 1

"""Benchmarks whose data come from files instead of the Hub: `--metadata data_dir=FOLDER`.

The rows get the form in which the Hub has them, which lm_eval's tasks expect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qlora_harness.data.files import read_rows
from qlora_harness.errors import DataError, first_line, install_excepthook
from qlora_harness.locations import expanded
from qlora_harness.schema.section import first_problem


class _Row(BaseModel):
    model_config = ConfigDict(strict=True)


class _Problem(_Row):
    """A row of GSM8K, as OpenAI's repository has it."""

    question: str
    answer: str


def _true_first(choices: dict[str, int]) -> dict[str, int]:
    """As on the Hub: lm_eval takes the first choice of mc1 for the true one."""
    if 1 not in choices.values():
        raise ValueError("no choice is true")
    return dict(sorted(choices.items(), key=lambda choice: -choice[1]))


def _one_true(choices: dict[str, int]) -> dict[str, int]:
    if sum(choices.values()) != 1:
        raise ValueError("not exactly one choice is true")
    return choices


_Choices = Annotated[dict[str, Literal[0, 1]], AfterValidator(_true_first)]


class _Question(_Row):
    """A question of TruthfulQA's mc_task.json: each choice, and 1 if it is true."""

    question: str
    mc1_targets: Annotated[_Choices, AfterValidator(_one_true)]
    mc2_targets: _Choices


class _Prompt(_Row):
    """A prompt of IFEval's input_data.jsonl, with the arguments of each instruction."""

    key: int
    prompt: str
    instruction_id_list: list[str] = Field(min_length=1)
    kwargs: list[dict[str, Any]]


def _with_lists(row: dict[str, Any]) -> dict[str, Any]:
    """The choices of TruthfulQA as two lists, as the Hub has them."""
    return {"question": row["question"]} | {
        name: {"choices": list(row[name]), "labels": list(row[name].values())}
        for name in ("mc1_targets", "mc2_targets")
    }


class _Source(NamedTuple):
    files: Mapping[str, str]  # by split, below the folder
    row: type[_Row]
    converted: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row


_TRUTHFULQA = _Source({"validation": "truthfulqa/mc_task.json"}, _Question, _with_lists)
SOURCES = {
    "gsm8k": _Source({"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}, _Problem),
    "truthfulqa_mc1": _TRUTHFULQA,
    "truthfulqa_mc2": _TRUTHFULQA,
    "ifeval": _Source({"train": "ifeval/input_data.jsonl"}, _Prompt),
}


def load_local(*, local_task: str, data_dir: str, **ignored: Any) -> dict[str, Any]:
    """Returns the data set of each split of a task in `SOURCES`, from the files in a folder.

    lm_eval passes all of `--metadata` and `--model_args`. Raises DataError for a missing file or a
    row of another form.
    """
    install_excepthook()
    source = SOURCES[local_task]
    return {
        split: _data_set(expanded(str(data_dir)) / name, source)
        for split, name in source.files.items()
    }


def _data_set(path: Path, source: _Source) -> Any:
    from datasets import Dataset
    from pyarrow import ArrowException

    try:
        return Dataset.from_list(_rows(path, source))
    except ArrowException as error:  # only IFEval's arguments have free types
        raise DataError(
            f"data_dir: {path}: {first_line(error)}", "Give an argument one type in all rows"
        ) from None


def _rows(path: Path, source: _Source) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(
            f"data_dir: {path} does not exist",
            f"Put {', '.join(source.files.values())} into the folder",
        )
    rows = []
    for row in read_rows(path):
        try:
            checked = source.row.model_validate(dict(row.values))
        except ValidationError as error:
            remedy = f"A row holds {', '.join(source.row.model_fields)}"
            raise DataError(f"{row.place}: {first_problem(error)}", remedy) from None
        rows.append(source.converted(checked.model_dump()))
    if not rows:
        raise DataError(f"data_dir: {path} holds no row", "Copy the file again")
    return rows

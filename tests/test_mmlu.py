"""The functions that the task YAML names: a subject's questions, and right or wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from qlora_harness.errors import DataError
from qlora_harness.locations import demo_dir
from qlora_harness.score.mmlu import is_tie, load_subject, predict, process_results

DEMO = "five_shot_mmlu_demo.json"


def demo_rows(subject: str) -> list[dict[str, object]]:
    lines = (demo_dir() / DEMO).read_text(encoding="utf-8").splitlines()
    rows = [{"index": number} | json.loads(line) for number, line in enumerate(lines)]
    return [row for row in rows if row["subject"] == subject]


def test_subject_is_what_a_data_set_of_its_lines_would_be() -> None:
    loaded = load_subject(
        mmlu_file=DEMO,
        mmlu_subject="nutrition",
        pretrained="smollm2",  # lm_eval passes on whatever it has
        peft=None,
        version=1.0,
        mmlu_dir="/no/such/folder",  # the embedded file is in no folder of the user's
    )
    assert list(loaded) == ["test"]
    ours, theirs = loaded["test"], datasets.Dataset.from_list(demo_rows("nutrition"))
    assert list(ours.features) == list(theirs.features) == ["index", "subject", "input", "output"]
    assert len(ours) == len(theirs) == 12
    assert list(ours) == list(theirs)
    assert ours[-1] == theirs[-1]


def test_folder_is_passed_on(shared_data: Path) -> None:
    loaded = load_subject(
        mmlu_file="five_shot_mmlu_val.json",
        mmlu_subject="anatomy",
        mmlu_dir=str(shared_data / "mmlu"),
    )
    assert len(loaded["test"]) == 14
    assert {doc["subject"] for doc in loaded["test"]} == {"anatomy"}
    assert [doc["index"] for doc in loaded["test"]] == list(range(11, 25))


def test_subject_that_the_file_lacks_is_an_error() -> None:
    with pytest.raises(DataError) as error:
        load_subject(mmlu_file=DEMO, mmlu_subject="anatomy")
    assert str(error.value).startswith(f"{DEMO} has no subject 'anatomy'")


def test_error_ends_a_program_with_one_line_whatever_model_it_scores() -> None:
    code = (
        "from qlora_harness.score.mmlu import load_subject\n"
        "load_subject(mmlu_file='five_shot_mmlu_val.json', mmlu_subject='anatomy', "
        "mmlu_dir='/no/such/folder')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("qlora-harness: error: --metadata mmlu_dir: folder /no/such/")


@pytest.mark.parametrize(
    ("logprobs", "letter"),
    [
        ((-1.0, -2.0, -3.0, -4.0), "A"),
        ((-4.0, -1.0, -3.0, -2.0), "B"),
        ((-4.0, -3.0, -1.0, -2.0), "C"),
        ((-4.0, -3.0, -2.0, -1.0), "D"),
        ((-2.0, -1.0, -1.0, -3.0), "B"),  # of a tie, the first, as numpy.argmax does
        ((-1.0, -1.0, -1.0, -1.0), "A"),
        ((-math.inf, -math.inf, -9.0, -math.inf), "C"),
    ],
)
def test_prediction_is_the_likeliest_letter(logprobs: tuple[float, ...], letter: str) -> None:
    assert predict(logprobs) == letter
    results = [(value, n == 1) for n, value in enumerate(logprobs)]  # greediness does not count
    for answer in "ABCD":
        expected = 1.0 if answer == letter else 0.0
        assert process_results({"output": answer}, results) == {
            "acc": expected,
            "acc_macro": expected,
        }


def test_tie_is_a_shared_highest_value_and_nothing_else() -> None:
    assert is_tie((-1.0, -1.0, -2.0, -3.0))
    assert is_tie((-3.0, -1.0, -2.0, -1.0))
    assert not is_tie((-1.0, -2.0, -2.0, -2.0))
    assert not is_tie((-1.0, -1.0 - 1e-12, -2.0, -3.0))

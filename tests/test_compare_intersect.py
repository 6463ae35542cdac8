"""`--intersect`: runs over different sets of questions, compared on those that both answered."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import pytest
from compare_runs import (
    FAMILY,
    FIRST,
    SECOND,
    cells,
    edit,
    evaluation,
    four,
    in_sample,
    main,
    scores,
    summary,
    table,
    texts,
    write_harness,
    write_run,
)

from qlora_harness.compare import report
from qlora_harness.compare.answers import Answer, Question
from qlora_harness.compare.comparison import compare
from qlora_harness.compare.evaluation import Evaluation, SubjectScore
from qlora_harness.compare.figures import figures
from qlora_harness.compare.intersection import common_to_all, restrict
from qlora_harness.errors import ComparisonError

# Of the second run: the first six of anatomy, all of law. Over these 16 questions FIRST has 6 + 5
# right and PART 4 + 5; right in both 4 + 3, only first 2 + 2, only second 0 + 2, neither 0 + 3.
PART = {"anatomy": "111100", "law": "1110011000"}


def run(folder: Path, marks: Mapping[str, str], n_total: int = 20, quant: str = "bf16") -> Path:
    write_run(folder, summary(quant), evaluation(marks, n_total=n_total))
    write_harness(folder, marks)
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """The first run answered all 20 questions, the second 16 of them."""
    return (
        run(tmp_path / "results" / "4bit", FIRST, quant="nf4"),
        run(tmp_path / "results" / "16bit", PART),
    )


def test_common_questions_are_compared(parts: tuple[Path, Path]) -> None:
    comparison = compare(parts, intersect=True)
    found = {row.key: row.cells[0].value for row in table(comparison, "paired").rows}
    counted = ("common", "both", "only_first", "only_second", "neither")
    assert [found[key] for key in counted] == [16, 7, 4, 2, 3]
    assert found["difference"] == pytest.approx(-12.5)
    assert found["common_acc_first"] == pytest.approx(100 * 11 / 16)
    assert found["common_acc_second"] == pytest.approx(100 * 9 / 16)
    # Mean of the subjects: 6/6 and 5/10, 4/6 and 5/10.
    assert found["common_acc_macro_first"] == pytest.approx(75.0)
    assert found["common_acc_macro_second"] == pytest.approx(100 * (4 / 6 + 0.5) / 2)
    assert found["macro"] == pytest.approx(100 * (4 / 6 - 1) / 2)
    assert found["agreement"] == 100.0
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 6 + 15) / 2**6)
    names = {row.key: row.name for row in table(comparison, "paired").rows}
    assert names["common_acc_first"] == "4bit: micro, common questions (%)"
    assert names["common_acc_macro_second"] == "16bit: macro, common questions (%)"
    assert table(comparison, "paired").title.endswith("common questions only")
    assert [row.name for row in comparison.details[0].rows] == ["anatomy (n = 6)", "law (n = 10)"]


def test_dropped_questions_are_counted_by_task_and_in_all(parts: tuple[Path, Path]) -> None:
    run(parts[1], {**PART, "virology": "11"}, 18)
    comparison = compare(parts, intersect=True)
    shown = table(comparison, "common")
    assert [column.heading for column in shown.columns] == [
        "16bit: common",
        "dropped of 4bit",
        "dropped of 16bit",
    ]
    (record,) = (item for item in report.to_json(comparison)["tables"] if item["key"] == "common")
    for row in record["rows"]:
        assert [cell["run"] for cell in row["cells"]] == ["16bit", "4bit", "16bit"]
    assert {row.name: [cell.value for cell in row.cells] for row in shown.rows} == {
        "All tasks": [16, 4, 2],
        "anatomy": [6, 4, 0],
        "virology": [0, 0, 2],
    }
    assert comparison.notes == (
        "16bit against 4bit: compared on the 16 questions of mmlu_qlora_5shot that both answered "
        "(--intersect); dropped: 4 of 4bit, 2 of 16bit.",
    )
    assert report.to_json(comparison)["intersection"] == [
        {
            "baseline": "4bit",
            "run": "16bit",
            "common": 16,
            "dropped_baseline": 4,
            "dropped_run": 2,
            "tasks": [
                {
                    "task": f"{FAMILY}_{subject}",
                    "common": common,
                    "dropped_baseline": first,
                    "dropped_run": second,
                }
                for subject, common, first, second in (
                    ("anatomy", 6, 4, 0),
                    ("law", 10, 0, 0),
                    ("virology", 0, 0, 2),
                )
            ],
        }
    ]


def test_own_accuracies_are_labelled_and_not_subtracted(parts: tuple[Path, Path]) -> None:
    comparison = compare(parts, intersect=True)
    assert table(comparison, "mmlu").title == (
        f"MMLU: {FAMILY}, each run over its own questions (4bit 20, 16bit 16)"
    )
    assert texts(comparison, "mmlu", "acc") == ["60.00 ± 11.24", "56.25 ± 12.81", "–"]
    assert texts(comparison, "mmlu", "ties")[2] == "–"
    assert (
        "differs on the 16 common questions of mmlu_qlora_5shot by −12.50"
        in (comparison.verdict[0])
    )


def test_the_limit_needs_no_other_flag_and_is_said(parts: tuple[Path, Path]) -> None:
    assert (
        "16bit: only 16 of 20 questions of mmlu_qlora_5shot were asked: this is not a result on "
        "mmlu_qlora_5shot."
    ) in compare(parts, intersect=True).notes


def test_terminal_markdown_and_page_say_it(
    parts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*parts, "--intersect", "--html", tmp_path / "page.html") == 0
    outputs = [
        capsys.readouterr().out,
        (parts[0].parent / "comparison.md").read_text(),
        (tmp_path / "page.html").read_text(),
    ]
    for text in outputs:
        assert "dropped of 4bit" in text
        assert "dropped: 4 of 4bit, 0 of 16bit." in " ".join(text.split())
    assert "accuracy, %, 16 questions common to all runs" in outputs[2]
    schema = json.loads(Path(report.__file__).with_name("comparison.schema.json").read_text())
    record = json.loads((parts[0].parent / "comparison.json").read_text())
    jsonschema.validate(record, schema)
    del record["intersection"][0]["tasks"][0]["common"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, schema)


def test_equal_questions_lose_none(pair: tuple[Path, Path]) -> None:
    before, after = compare(pair), compare(pair, intersect=True)
    assert [item.key for item in after.tables] == [
        "training",
        "mmlu",
        "common",
        "paired",
        "categories",
    ]
    assert [item for item in after.tables if item.key != "common"] == list(before.tables)
    assert [cell.value for cell in cells(after, "common", "common.all")] == [20, 0, 0]
    assert len(table(after, "common").rows) == 1
    assert (after.details, after.verdict, after.notes) == (before.details, before.verdict, ())
    assert before.intersection is None
    assert report.to_json(before)["intersection"] is None


def test_each_run_has_its_own_part_of_the_baseline(parts: tuple[Path, Path]) -> None:
    third = run(parts[0].parent / "fp4", {"law": "11000"}, 10)
    comparison = compare([*parts, third], intersect=True)
    shown = table(comparison, "common")
    assert [cell.value for cell in shown.rows[0].cells] == [16, 4, 0, 5, 15, 0]
    paired = {
        row.key: [cell.value for cell in row.cells] for row in table(comparison, "paired").rows
    }
    assert paired["common"] == [16, 5]
    # Of the first five of law: all right in the baseline.
    assert paired["common_acc_first"] == [pytest.approx(68.75), 100.0]
    assert paired["common_acc_second"] == [pytest.approx(56.25), 40.0]
    anatomy, law = comparison.details[0].rows
    assert anatomy.name == "anatomy (n = 6, 0)"
    assert [cell.text for cell in anatomy.cells[3:]] == ["–", "–", "–"]
    assert law.name == "law (n = 10, 5)"
    # Figures put all runs together: over the five questions that all three answered.
    assert comparison.evidence.common == 5
    assert {name: item.acc for name, item in comparison.evidence.evaluations.items()} == {
        "4bit": 1.0,
        "16bit": 0.6,
        "fp4": 0.4,
    }
    assert len(figures(comparison.evidence)) == 4


def test_runs_without_a_question_common_to_all_have_no_joint_figures(
    parts: tuple[Path, Path],
) -> None:
    anatomy = run(parts[0].parent / "a", {"anatomy": "1110000000"})
    law = run(parts[0].parent / "l", {"law": "1110000000"})
    comparison = compare([parts[0], anatomy, law], intersect=True)
    assert [item.total.common for item in comparison.intersection or ()] == [10, 10]
    assert comparison.evidence.evaluations == {}
    assert (
        "No question was answered by all runs: nothing that puts more than two together is shown."
    ) in comparison.notes


def test_the_design_is_over_questions_common_to_all(tmp_path: Path) -> None:
    runs = four(tmp_path)
    # The 4-bit base lost the last half of law, of which it had none right.
    marks = {"anatomy": "1100000000", "law": "11100"}
    write_run(runs[1], None, evaluation(marks, n_total=20))
    (runs[1] / "evaluation_results.json").write_text(
        json.dumps(
            {
                **evaluation(marks, n_total=20),
                "model": {"base": "llama", "revision": None, "quant": "nf4", "peft": None},
            }
        )
    )
    write_harness(runs[1], marks)
    comparison = compare(runs, intersect=True)
    shown = table(comparison, "design")
    assert shown.title.endswith(", 15 questions common to all runs")
    assert "paired" in shown.columns[0].heading and "unpaired" not in shown.columns[0].heading
    assert {row.key: row.cells[0].value for row in shown.rows} == pytest.approx(
        {
            "quantisation_base": -100 / 15,
            "quantisation_tuned": -100 / 15,
            "tuning_16bit": 300 / 15,
            "tuning_4bit": 300 / 15,
            "interaction": 0.0,
        }
    )


def test_refusals_offer_the_flag(pair: tuple[Path, Path], parts: tuple[Path, Path]) -> None:
    offer = "pass --intersect to compare on the questions that both answered"
    run(parts[1], PART, n_total=16)
    with pytest.raises(
        ComparisonError, match=f"anatomy has 10 and 6 questions.*template, or {offer}"
    ):
        compare(parts)
    for path in parts[1].rglob("samples_*"):
        path.unlink()
    with pytest.raises(
        ComparisonError, match=f"or log the samples of both .*log_samples. and {offer}"
    ):
        compare(parts)


def test_refused_places_and_limits_offer_the_flag(parts: tuple[Path, Path]) -> None:
    with pytest.raises(ComparisonError, match="--allow-limit where .*, or --intersect to compare"):
        compare(parts)
    with pytest.raises(ComparisonError, match="different limits: .*pass --intersect to compare"):
        compare(parts, allow_limit=True)
    run(parts[1], SECOND)
    in_sample("doc_id", 99)(parts[1])
    with pytest.raises(ComparisonError, match="doc_id 2 is in only one of them.*pass --intersect"):
        compare(parts)
    comparison = compare(parts, intersect=True)
    assert [cell.value for cell in cells(comparison, "common", "common.all")] == [19, 1, 1]


@pytest.mark.parametrize("part", ["doc_hash", "prompt_hash", "target_hash"])
def test_other_hashes_of_the_same_question_are_refused(parts: tuple[Path, Path], part: str) -> None:
    in_sample(part, "x")(parts[1])
    name = {"doc_hash": "document", "prompt_hash": "prompt", "target_hash": "target"}[part]
    with pytest.raises(
        ComparisonError, match=f"anatomy, doc_id 2: the {name} hash differs"
    ) as caught:
        compare(parts, intersect=True)
    assert "--intersect" not in str(caught.value)


def test_other_prompts_and_data_are_refused(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "evaluation_results.json"
    before = path.read_text()
    path.write_text(json.dumps(evaluation(SECOND, prompts_sha256="d" * 64)))
    with pytest.raises(ComparisonError, match="prompts_sha256 is c{12} and d{12}"):
        compare(pair, intersect=True)
    path.write_text(before)
    record = json.loads((pair[1] / "training_summary.json").read_text())
    edit("data/eval/fingerprint", "sha256:" + "9" * 64)(record)
    (pair[1] / "training_summary.json").write_text(json.dumps(record))
    with pytest.raises(ComparisonError, match="different data: data.eval.fingerprint"):
        compare(pair, intersect=True)


def test_nothing_in_common_is_refused(parts: tuple[Path, Path]) -> None:
    run(parts[1], {"virology": "110"})
    with pytest.raises(ComparisonError) as caught:
        main(*parts, "--intersect")
    assert str(caught.value) == (
        "--intersect: 4bit and 16bit have no question of mmlu_qlora_5shot in common (20 and 3 "
        "answered). Score both on the same questions, or leave one out."
    )
    assert not (parts[0].parent / "comparison.json").exists()


def test_samples_and_scores_are_needed(parts: tuple[Path, Path]) -> None:
    for path in parts[1].rglob("samples_*"):
        path.unlink()
    with pytest.raises(
        ComparisonError,
        match="--intersect: no logged samples and no mmlu_progress file of .* in 16bit, so",
    ):
        compare(parts, intersect=True)
    unscored = write_run(parts[0].parent / "u", summary())
    with pytest.raises(ComparisonError, match="--intersect: u not scored on mmlu_qlora_5shot, so"):
        compare([parts[0], unscored], intersect=True)
    trained = write_run(parts[0].parent / "v", summary())
    with pytest.raises(ComparisonError, match="u, v not scored on any MMLU task"):
        compare([unscored, trained], intersect=True)


def test_restricted_evaluation_is_that_of_its_questions(parts: tuple[Path, Path]) -> None:
    from qlora_harness.compare.runs import load_run

    loaded = load_run(parts[0], "4bit")
    recorded, others = loaded.answers(FAMILY), load_run(parts[1], "16bit").answers(FAMILY)
    assert recorded is not None and others is not None
    answers, other = recorded.by_question, others.by_question
    questions = common_to_all({"4bit": answers, "16bit": other, "none": None})
    assert len(questions) == 16
    found: Evaluation = restrict(loaded.evaluations[FAMILY], answers, questions)
    wanted = scores({"anatomy": "111111", "law": "1111100000"})
    for name in ("acc", "acc_macro", "n"):
        assert getattr(found, name) == pytest.approx(wanted[name])
    law = 0.5 * 0.5 / 9  # the variance of its mean; anatomy has none
    assert found.acc_stderr == pytest.approx(math.sqrt(9 * law * 10 / (16 - 2) / 16))
    assert found.acc_macro_stderr == pytest.approx(math.sqrt(law) / 2)
    assert found.subjects["anatomy"].n == 6
    (stem,) = found.categories.items()
    assert (stem[0], stem[1].acc, stem[1].acc_stderr, stem[1].n) == ("stem", 1.0, 0.0, 6)


def test_all_questions_give_the_numbers_of_the_record() -> None:
    from qlora_harness.compare.runs import load_run

    folder = Path(__file__).parent.parent / "results" / "published" / "smollm2" / "4bit"
    if not folder.is_dir():
        pytest.skip("the published records are not there")
    loaded = load_run(folder, "4bit")
    recorded = loaded.answers("mmlu_qlora_5shot")
    assert recorded is not None
    whole = loaded.evaluations["mmlu_qlora_5shot"]
    found = restrict(whole, recorded.by_question, recorded.by_question.keys())
    for name in ("acc", "acc_stderr", "acc_macro", "acc_macro_stderr", "n", "ties"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-12), name


def test_one_question_has_no_standard_error() -> None:
    two = Evaluation(
        family=FAMILY,
        path=Path("x"),
        ended=None,
        unquantised_share=None,
        model=None,
        random_weights=False,
        acc=0.5,
        acc_stderr=0.5,
        acc_macro=0.5,
        acc_macro_stderr=0.5,
        n=2,
        n_total=2,
        ties=None,
        truncated=None,
        prompts_sha256="c" * 64,
        subjects={"anatomy": SubjectScore(0.5, 2)},
        categories={},
        conditions={},
    )
    answers = {Question("anatomy", i): Answer("d", "p", "t", i == 0, i == 0, 0) for i in (0, 1)}
    found = restrict(two, answers, [Question("anatomy", 0)])
    assert (found.acc, found.acc_stderr, found.n, found.ties) == (1.0, None, 1, 1)
    assert (found.acc_macro, found.acc_macro_stderr, found.prompts_sha256) == (1.0, None, None)

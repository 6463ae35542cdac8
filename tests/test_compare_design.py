"""The four-row design and several seeds an arm, against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_runs import (
    cells,
    changed,
    edit,
    four,
    in_summary,
    summary,
    table,
    texts,
    write_harness,
    write_run,
)

from qlora_harness.compare import report
from qlora_harness.compare.answers import Answer, Question
from qlora_harness.compare.comparison import compare
from qlora_harness.compare.design import ArmSeeds, question_stderr, seed_difference
from qlora_harness.compare.exports import to_csv
from qlora_harness.compare.report import Comparison
from qlora_harness.errors import SettingsError


def test_effects_of_quantisation_and_fine_tuning(tmp_path: Path) -> None:
    comparison = compare(four(tmp_path))
    assert [row.name for row in table(comparison, "design").rows] == [
        "Change by 4 bits, base model",
        "Change by 4 bits, fine-tuned model",
        "Gain by fine-tuning in 16 bits",
        "Gain by fine-tuning in 4 bits",
        "How much more fine-tuning gains in 4 bits",
    ]
    values = {
        row.key: (row.cells[0].value, row.cells[0].stderr)
        for row in table(comparison, "design").rows
    }
    assert {key: value for key, (value, _) in values.items()} == pytest.approx(
        {
            "quantisation_base": -5.0,
            "quantisation_tuned": -5.0,
            "tuning_16bit": 15.0,
            "tuning_4bit": 15.0,
            "interaction": 0.0,
        }
    )
    # Over the 20 questions: one became wrong.
    changes = [-1] + [0] * 19
    assert values["quantisation_base"][1] == pytest.approx(
        100 * statistics.pstdev(changes) / math.sqrt(20)
    )
    assert "paired" in table(comparison, "design").columns[0].heading


def labels(comparison: Comparison, key: str) -> dict[str, list[str]]:
    """Whose value each cell of a table is, by row, in JSON; CSV must say the same."""
    (shown,) = (item for item in report.to_json(comparison)["tables"] if item["key"] == key)
    found = {row["key"]: [cell["run"] for cell in row["cells"]] for row in shown["rows"]}
    lines = [row for row in csv.DictReader(io.StringIO(to_csv(comparison))) if row["table"] == key]
    assert [line["run"] for line in lines] == [run for runs in found.values() for run in runs]
    return found


def test_each_effect_is_that_of_its_run(tmp_path: Path) -> None:
    assert labels(compare(four(tmp_path)), "design") == {
        "quantisation_base": ["nf4"],
        "quantisation_tuned": ["nf4_tuned"],
        "tuning_16bit": ["bf16_tuned"],
        "tuning_4bit": ["nf4_tuned"],
        "interaction": ["nf4_tuned less nf4"],
    }


def test_cells_over_seeds_are_those_of_their_arm(tmp_path: Path) -> None:
    runs = seeded(tmp_path, {"nf4": {0: 1.5, 1: 1.6}, "bf16": {0: 1.3, 1: 1.4}, "fp4": {0: 1.7}})
    wanted = ["nf4", "bf16", "fp4", "bf16", "fp4"]
    key = "seeds.eval_loss"
    assert labels(compare(runs), key) == {
        key: wanted,
        f"{key}.range": wanted,
        f"{key}.sd": wanted,
        f"{key}.relative_stderr": wanted,
        f"{key}.freedom": wanted,
    }


def test_without_samples_the_effects_are_unpaired(tmp_path: Path) -> None:
    shown = table(compare(four(tmp_path, samples=False)), "design")
    assert "unpaired" in shown.columns[0].heading
    errors = {row.key: float(row.cells[0].stderr or 0) for row in shown.rows}
    assert errors["interaction"] > errors["quantisation_base"] > 0


def test_other_sets_of_runs_have_no_design(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert "design" not in [item.key for item in compare(pair).tables]
    runs = four(tmp_path / "four")
    assert "design" not in [item.key for item in compare(runs[:3]).tables]


def test_a_place_that_is_taken_twice_is_noted(tmp_path: Path) -> None:
    runs = four(tmp_path)
    more = four(tmp_path / "more")
    comparison = compare([*runs, more[3]], labels=["base", "base4", "tuned", "tuned4", "again"])
    assert "design" not in [item.key for item in comparison.tables]
    assert (
        "No table of what the 4 bits cost and what fine-tuning gains, which takes one run for each "
        "of its four places: tuned4 and again are both fine-tuned in 4 bits."
    ) in comparison.notes
    assert not any("No table" in note for note in compare(runs).notes)
    assert not any("No table" in note for note in compare(runs[:3]).notes)


def test_a_design_over_two_base_models_is_noted(tmp_path: Path) -> None:
    runs = four(tmp_path)
    changed(runs[0] / "evaluation_results.json", edit("model/base", "other"))
    comparison = compare(runs)
    assert "design" not in [item.key for item in comparison.tables]
    assert any(note.endswith("the base models differ (llama, other).") for note in comparison.notes)


def seeded(folder: Path, values: dict[str, dict[int, float]]) -> list[Path]:
    runs = []
    for quant, losses in values.items():
        for seed, loss in losses.items():
            changes: dict[str, Any] = {"settings__seed": seed, "results__eval_loss": loss}
            runs.append(write_run(folder / f"{quant}-{seed}", summary(quant, **changes)))
    return runs


def seeds_of(comparison: Comparison) -> list[str]:
    return texts(comparison, "seeds.eval_loss", "seeds.eval_loss")


def test_means_and_ranges_over_seeds(tmp_path: Path) -> None:
    runs = seeded(tmp_path, {"nf4": {0: 1.5, 1: 1.6, 2: 1.4}, "bf16": {0: 1.3, 1: 1.4, 2: 1.5}})
    comparison = compare(runs)
    stderr = math.hypot(0.1 / math.sqrt(3), 0.1 / math.sqrt(3))
    assert seeds_of(comparison) == [
        "1.5000",
        "1.4000",
        f"−0.1000 ± {stderr:.4f}",
    ]
    ranges = texts(comparison, "seeds.eval_loss", "seeds.eval_loss.range")
    assert ranges == ["1.4000 to 1.6000", "1.3000 to 1.5000", "–"]
    assert cells(comparison, "seeds.eval_loss", "seeds.eval_loss")[2].stderr == pytest.approx(
        stderr
    )
    headings = [column.heading for column in table(comparison, "seeds.eval_loss").columns]
    assert headings == ["nf4, 3 seeds", "bf16, 3 seeds", "bf16 less nf4, ± of the seeds"]


def test_the_relative_standard_error_of_a_difference(tmp_path: Path) -> None:
    runs = seeded(tmp_path, {"nf4": {0: 1.5, 1: 1.6, 2: 1.4}, "bf16": {0: 1.3, 1: 1.5}})
    comparison = compare(runs)
    # Squares within arms 0 + 0.01 + 0.01 and 0.01 + 0.01, on 2 + 1 degrees of freedom.
    sd = math.sqrt(0.04 / 3)
    stderr = sd * math.sqrt(1 / 3 + 1 / 2)
    assert texts(comparison, "seeds.eval_loss", "seeds.eval_loss.sd") == [
        "0.1000",
        "0.1414",
        f"{sd:.4f} (pooled)",
    ]
    assert seeds_of(comparison)[2] == f"−0.1000 ± {stderr:.4f}"
    shares = cells(comparison, "seeds.eval_loss", "seeds.eval_loss.relative_stderr")
    assert [cell.text for cell in shares] == ["–", "–", f"{100 * stderr / 0.1:.2f}"]
    assert shares[2].value == pytest.approx(100 * stderr / 0.1)
    freedom = texts(comparison, "seeds.eval_loss", "seeds.eval_loss.freedom")
    assert freedom == ["–", "–", "3"]
    row = report.to_json(comparison)["tables"][-1]["rows"][3]
    assert (row["key"], row["unit"]) == ("seeds.eval_loss.relative_stderr", "%")
    assert row["cells"][2]["value"] == shares[2].value


def test_a_difference_over_seeds_is_that_of_a_one_way_layout() -> None:
    from statsmodels.regression.linear_model import OLS

    generator = np.random.default_rng(5)
    arms = [
        ArmSeeds(name, tuple(range(size)), tuple(generator.normal(mean, 0.1, size).tolist()))
        for name, size, mean in (("nf4", 5, 1.5), ("bf16", 3, 1.4), ("fp4", 4, 1.6))
    ]
    values = np.concatenate([arm.values for arm in arms])
    groups = np.repeat([0, 1, 2], [5, 3, 4])
    design = np.column_stack([np.ones(12), groups == 1, groups == 2]).astype(float)
    fitted = OLS(values, design).fit()
    for place in (1, 2):
        found = seed_difference(arms[0], arms[place], arms)
        assert found.value == pytest.approx(fitted.params[place], rel=1e-9)
        assert found.pooled_sd == pytest.approx(math.sqrt(fitted.mse_resid), rel=1e-9)
        assert found.stderr == pytest.approx(fitted.bse[place], rel=1e-9)
        assert found.freedom == fitted.df_resid
        assert found.relative_stderr == pytest.approx(1 / abs(fitted.tvalues[place]), rel=1e-9)


def test_no_difference_has_no_relative_error() -> None:
    # The means of the same numbers in another order may differ in their last digit.
    arms = [ArmSeeds("nf4", (0, 1), (1.0, 2.0)), ArmSeeds("bf16", (0, 1), (1.0, 2.0 + 4e-16))]
    assert arms[1].mean != arms[0].mean
    found = seed_difference(*arms, arms)
    assert (found.value, found.relative_stderr) == (0.0, None)
    assert found.stderr == pytest.approx(math.sqrt(0.5))


def test_seeds_are_needed_for_a_spread() -> None:
    arms = [ArmSeeds(name, (0,), (1.0,)) for name in ("nf4", "bf16")]
    with pytest.raises(ValueError, match="no arm has two seeds"):
        seed_difference(*arms, arms)


def test_one_seed_has_no_error(tmp_path: Path) -> None:
    comparison = compare(seeded(tmp_path, {"nf4": {0: 1.5, 1: 1.7}, "bf16": {0: 1.3}}))
    assert seeds_of(comparison) == ["1.6000", "1.3000", "−0.3000"]
    rows = table(comparison, "seeds.eval_loss").rows
    assert [cell.text for cell in rows[1].cells] == ["1.5000 to 1.7000", "–", "–"]
    assert [cell.text for cell in rows[2].cells] == ["0.1414", "–", "0.1414 (pooled)"]
    assert [cell.text for cell in rows[3].cells] == ["–", "–", "–"]


def test_one_seed_an_arm_has_no_table(tmp_path: Path) -> None:
    runs = seeded(tmp_path, {"nf4": {0: 1.5}, "bf16": {0: 1.3}})
    assert "seeds.eval_loss" not in [item.key for item in compare(runs).tables]


TWO_SEEDS = {"nf4": {0: 1.5, 1: 1.6}, "bf16": {0: 1.3, 1: 1.4}}


@pytest.mark.parametrize(
    ("dotted", "value", "problem"),
    [
        ("settings/learning_rate", 1.0, "nf4-0 and nf4-1 differ in learning_rate, not only in the"),
        ("model/commit", "x", "nf4-0 and nf4-1 differ in model.commit, not only in the seed"),
        ("data/train/fingerprint", "x", "nf4-0 and nf4-1 were trained on different data"),
        ("data/eval/fingerprint", "x", "nf4-0 and nf4-1 were evaluated on different data"),
    ],
)
def test_why_there_is_no_table_over_seeds_is_noted(
    tmp_path: Path, dotted: str, value: object, problem: str
) -> None:
    runs = seeded(tmp_path, TWO_SEEDS | {"bf16": {0: 1.3, 1: 1.4, 2: 1.5}})
    in_summary(dotted, value)(runs[1])
    comparison = compare(runs, allow_different_data=True)
    assert "seeds.eval_loss" not in [item.key for item in comparison.tables]
    assert any(
        note.startswith(f"No table over seeds (Evaluation loss): {problem}")
        for note in comparison.notes
    )


def test_a_seed_that_is_there_twice_is_noted(tmp_path: Path) -> None:
    runs = seeded(tmp_path / "a", TWO_SEEDS)
    again = seeded(tmp_path / "b", {"nf4": {1: 1.6}})
    comparison = compare([*runs, *again], labels=["n0", "n1", "b0", "b1", "n1b"])
    assert "seeds.eval_loss" not in [item.key for item in comparison.tables]
    wanted = "No table over seeds (Evaluation loss): n1 and n1b have the same seed, 1."
    assert wanted in comparison.notes


def test_arms_may_be_trained_on_different_data(tmp_path: Path) -> None:
    runs = seeded(tmp_path, TWO_SEEDS)
    for run in runs[2:]:
        in_summary("data/train/fingerprint", "sha256:" + "9" * 64)(run)
    comparison = compare(runs, allow_different_data=True)
    assert "seeds.eval_loss" in [item.key for item in comparison.tables]


def test_data_are_the_same_or_not_for_each_pair(tmp_path: Path) -> None:
    runs = seeded(tmp_path, TWO_SEEDS)
    in_summary("data/eval/fingerprint", "sha256:" + "9" * 64)(runs[2])
    verdict = compare(runs, allow_different_data=True).verdict
    assert [("changes the evaluation loss" in text) for text in verdict] == [True, False, True]


def test_runs_without_several_seeds_have_no_note(tmp_path: Path) -> None:
    runs = seeded(tmp_path, {"nf4": {0: 1.5}, "bf16": {0: 1.3}})
    copy = write_run(tmp_path / "rate", summary(settings__seed=0, settings__learning_rate=1.0))
    comparison = compare([*runs, copy])
    assert comparison.notes == (
        "The runs differ in training settings other than quantisation and seed: learning_rate.",
        "No run has an MMLU evaluation.",
    )


def test_baseline_comes_first(tmp_path: Path) -> None:
    runs = seeded(tmp_path, {"nf4": {0: 1.5}, "bf16": {0: 1.3}})
    assert [run.label for run in compare(runs, baseline="bf16-0").runs] == ["bf16-0", "nf4-0"]
    with pytest.raises(SettingsError, match="--baseline x is none of the runs"):
        compare(runs, baseline="x")


def answered(marks: Any) -> dict[Question, Answer]:
    return {
        Question("anatomy", place): Answer(None, str(place), "t", bool(mark), False, 0, 0)
        for place, mark in enumerate(marks)
    }


def test_questions_and_seeds_both_make_the_error_of_two_arms() -> None:
    """Against the spread of the difference over 300 draws of questions and of seeds."""
    generator = np.random.default_rng(0)
    first = ArmSeeds("nf4", (0, 1, 2), (), ("a0", "a1", "a2"))
    other = ArmSeeds("bf16", (0, 1), (), ("b0", "b1"))
    found, predicted = [], []
    for _ in range(300):
        # Questions differ in how hard they are, and the arms in which they find hard.
        level = generator.normal(0, 1, (2, 400))
        means, answers = {}, {}
        for arm, hard in zip((first, other), level, strict=True):
            for run in arm.runs:
                shift = generator.normal(0, 0.1)
                marks = hard + shift + generator.normal(0, 1, 400) > 0
                answers[run], means[run] = answered(marks), marks.mean()
        arms = [
            ArmSeeds(arm.name, arm.seeds, tuple(means[run] for run in arm.runs), arm.runs)
            for arm in (first, other)
        ]
        over_seeds = seed_difference(arms[0], arms[1], arms)
        over_questions = question_stderr(arms[0], arms[1], answers)
        assert over_questions is not None
        assert over_seeds.stderr is not None
        found.append(over_seeds.value)
        predicted.append(over_questions**2 + over_seeds.stderr**2)
    # A little too wide, as the noise of a run at a question counts in both.
    assert np.var(found) == pytest.approx(np.mean(predicted), rel=0.35)
    assert np.var(found) < 1.1 * np.mean(predicted)


def test_the_error_over_questions_is_that_of_the_mean_difference() -> None:
    arms = ArmSeeds("nf4", (0, 1), (), ("a", "b")), ArmSeeds("bf16", (0,), (), ("c",))
    marks = {"a": [1, 1, 0, 0], "b": [1, 0, 0, 0], "c": [1, 1, 1, 0]}
    answers: dict[str, Any] = {name: answered(item) for name, item in marks.items()}
    wanted = np.std([0, 0.5, 1, 0]) / 2
    assert question_stderr(*arms, answers) == pytest.approx(wanted)
    assert question_stderr(*arms, answers | {"c": None}) is None
    assert question_stderr(*arms, answers | {"c": answered([1, 1, 1])}) is None


def test_seeds_with_answers_show_the_error_of_both(tmp_path: Path) -> None:
    marks = {"nf4": ["1100110", "1000110"], "bf16": ["1110011", "1111011"]}
    runs = []
    for quant, items in marks.items():
        for seed, item in enumerate(items):
            folder = tmp_path / f"{quant}-{seed}"
            write_run(folder, summary(quant, settings__seed=seed))
            write_harness(folder, {"anatomy": item})
            runs.append(folder)
    comparison = compare(runs)
    key = "seeds.acc"
    differences = [
        (int(c) + int(d) - int(a) - int(b)) / 2
        for a, b, c, d in zip(*marks["nf4"], *marks["bf16"], strict=True)
    ]
    questions = 100 * np.std(differences) / math.sqrt(7)
    shown = cells(comparison, key, f"{key}.questions")
    assert [cell.text for cell in shown] == ["–", "–", f"{questions:.2f}"]
    seeds_only = cells(comparison, key, key)[2].stderr
    assert seeds_only is not None
    both = cells(comparison, key, f"{key}.both")[2]
    assert both.value == pytest.approx(math.hypot(questions, seeds_only))

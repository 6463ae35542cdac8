"""A study of several quantisations: names, dose and the answer."""

# Endpoints without a value are None, on which arithmetic fails a test as it should.
# mypy: disable-error-code="operator,union-attr"
from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest
from compare_runs import FAMILY, FIRST, changed, edit, evaluation, summary, write_run, write_study

from qlora_harness.cli import main
from qlora_harness.compare import page, text
from qlora_harness.compare.comparison import Comparison, compare
from qlora_harness.compare.methods import methods
from qlora_harness.results.runs import load_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def study(runs: list[Path]) -> Comparison:
    return compare(runs)


def test_arms_are_in_the_order_of_their_dose(study: Comparison) -> None:
    pairs = [(item.arm, item.baseline, item.seeds) for item in study.primary]
    assert pairs == [("FP4", "bf16", (2, 5)), ("NF4", "bf16", (5, 5)), ("int8", "bf16", (2, 5))]
    assert study.headline.arm == "NF4"
    assert study.besides == []  # two of the five seeds are no other seeds
    bases = [item.arm for item in study.contrasts if not item.primary]
    assert bases == ["FP4 base", "NF4 base", "int8 base"]


def test_the_answer_has_a_row_for_each_arm(study: Comparison) -> None:
    lines = str(study).splitlines()
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 80
    assert "2–5 seeds per arm" in lines[0]
    assert [line.split()[0] for line in lines[2:6]] == ["FP4", "NF4", "int8", "bf16"]
    nll = study.headline["nll"]
    half = max(nll.high - nll.difference, nll.difference - nll.low)
    assert f"{nll.difference:+.3f} ±{half:.3f} ✗" in lines[3]
    assert lines[5].endswith(f"{nll.baseline:.3f}")
    before = next(item for item in study.contrasts if item.arm == "NF4 base")["accuracy"]
    assert f"{100 * before.difference:.2f} pts".replace("-", "−") in "\n".join(lines[7:])


def test_other_seeds_are_a_difference(runs: list[Path]) -> None:
    chosen = {"bf16": ("seed_0", "seed_1"), "nf4": ("seed_1", "seed_2")}
    some = [run for run in runs if run.name in chosen.get(run.parent.name, ())]
    assert compare(some).besides == ["seeds"]


@pytest.mark.parametrize(("shared", "used"), [(3, 3), (2, 5)])
def test_losses_are_matched_by_seed(tmp_path: Path, shared: int, used: int) -> None:
    """With three or more seeds in common, others would only add their spread."""
    arms = {"bf16": (5, 0.0), "nf4": (shared, 0.1)}
    item = compare(write_study(tmp_path, arms)).primary[0]
    loss = item["eval_loss"]
    assert item.seeds == (shared, 5)
    assert loss.baseline == pytest.approx(2.01 + 0.002 * (used - 1) / 2)
    assert loss.difference == pytest.approx(0.1 + 0.002 * (shared - used) / 2)
    assert item["memory"].n is None


def variants(folder: Path, *changes: dict[str, Any]) -> Comparison:
    paths = []
    for number, change in enumerate(changes):
        quant = change.pop("quant", "nf4")
        record = summary(quant)
        record["settings"] |= change
        paths.append(write_run(folder / str(number), record, evaluation(FIRST)))
    return compare(paths)


def test_names_say_what_tells_arms_apart(tmp_path: Path) -> None:
    comparison = variants(
        tmp_path, {"quant": "bf16"}, {"quant": "bf16", "use_dora": True},
        {"quant": "bf16", "use_rslora": True, "lora_r": 64},
        {"double_quant": True, "use_dora": True},
        {"double_quant": True, "init_lora_weights": "loftq"}, {"double_quant": False},
        {"double_quant": True}, {"quant": "hqq"},
    )  # fmt: skip
    names = ["bf16", "bf16 DoRA", "bf16 rsLoRA", "NF4 DoRA", "NF4 LoftQ", "NF4 no DQ", "NF4", "HQQ"]
    assert comparison.arms == names
    pairs = [(item.arm, item.baseline) for item in comparison.primary]
    assert pairs == [
        ("NF4 DoRA", "bf16 DoRA"), ("NF4 LoftQ", "bf16"), ("NF4", "bf16"), ("NF4 no DQ", "bf16"),
        ("HQQ", "bf16"), ("bf16 rsLoRA", "bf16"),
    ]  # fmt: skip
    assert "6 arms vs their bf16 arms" in text.title(comparison)
    assert comparison.headline.arm == "NF4"


def test_fp8_products_are_named_wherever_their_numbers_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for number, (quant, compute) in enumerate(
        [("nf4", ...), ("nf4", "fp8"), ("bf16", "bf16"), ("bf16", "fp8"), ("bf16", ...)]
    ):
        record, scores = summary(quant), evaluation(FIRST)
        if compute is not ...:
            record["settings"]["compute"] = compute
        if number == 4:
            record["settings"]["seed"] = 1
            scores["tasks"][FAMILY]["settings"] = scores["settings"] | {"compute": "fp8"}
        paths.append(write_run(tmp_path / str(number), record, scores))
    result = compare(paths)
    assert result.arms == ["NF4", "NF4 in FP8", "bf16", "bf16 in FP8", "bf16 scored in FP8"]
    pairs = {(item.arm, item.baseline) for item in result.primary}
    assert {("NF4", "bf16"), ("NF4 in FP8", "bf16 in FP8")} <= pairs
    different = {setting.name: setting.values for setting in result.different}
    assert different["training.settings.compute"] == ["bf16", "fp8", "bf16", "fp8", "bf16"]
    assert different["evaluation.settings.compute"] == ["bf16"] * 4 + ["fp8"]
    noted = [note.partition(":")[0] for note in result.notes if "FP8" in note]
    assert noted == ["1", "3", "4"]
    assert "in FP8" in text.title(result) + str(result)
    assert "NF4 in FP8 vs bf16 in FP8" in page.head(compare([paths[1], paths[3]]))
    few = compare([paths[3], paths[1], paths[2]])
    pairs = {(item.arm, item.baseline) for item in few.primary}
    assert pairs == {("NF4 in FP8", "bf16 in FP8"), ("bf16 in FP8", "bf16")}
    (alone,) = compare([paths[3], paths[2]]).primary
    assert (alone.arm, alone.baseline) == ("bf16 in FP8", "bf16")
    assert methods([load_run(path) for path in paths]).count("FP8 (e4m3)") == 3
    assert main(["runs", str(tmp_path)]) == 0
    listed = capsys.readouterr().out.splitlines()[1:]
    assert ["in FP8" in line for line in listed] == [False, True, False, True, True]
    # A record of an earlier version is no other arm than one that says bf16.
    older = compare([paths[0], paths[2]])
    assert "training.settings.compute" not in {setting.name for setting in older.different}


def test_runs_in_float16_keep_their_arms_and_show_the_dtype(tmp_path: Path) -> None:
    paths = []
    for quant, dtype in (("nf4", "float16"), ("bf16", "float16"), ("bf16", "bfloat16")):
        record = summary(quant, quantization__compute_dtype=dtype, settings__compute_dtype=dtype)
        paths.append(write_run(tmp_path / f"{quant}-{dtype}", record, evaluation(FIRST)))
    result = compare(paths)
    assert result.arms == ["NF4", "bf16 float16", "bf16 bfloat16"]
    different = {setting.name: setting.values for setting in result.different}
    assert different["training.quantization.compute_dtype"] == ["float16", "float16", "bfloat16"]
    paragraph = methods([load_run(path) for path in paths])
    assert "float16, products in float16 (bf16 float16)" in paragraph


def test_folders_whose_names_differ_in_white_space(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, summary(quant), evaluation(FIRST))
        for name, quant in (("a b", "nf4"), ("a  b", "bf16"))
    ]
    assert [run.label for run in compare(runs).runs] == ["a b (1)", "a b (2)"]


def test_a_long_title_leaves_the_data_out(study: Comparison) -> None:
    named = study.model_copy(update={"model": "org/a-model-with-a-long-name.gguf"})
    assert text.title(named).split(" · ")[3:] == ["a-model-with-a-long-name", "oasst1"]
    first = str(named).splitlines()[0]
    assert "oasst1" not in first
    assert first.split(" · ")[2:] == ["200 questions", "a-model-with-a-long-name"]


def test_a_long_line_of_differences_says_how_many_more(study: Comparison) -> None:
    names = [f"difference_{number}" for number in range(9)]
    long = study.model_copy(update={"besides": names})
    assert text.differences_line(long).count("difference_") == 9
    short = text.differences_line(long, 80)
    assert len(short) <= 80
    assert short.endswith(f"and {9 - short.count('difference_')} more.")


def test_methods_hold_what_the_records_say(tmp_path: Path) -> None:
    folders = write_study(tmp_path, {"bf16": (3, 0.0), "nf4": (3, 0.1), "int8": (1, 0.02)})
    for path in tmp_path.rglob("training_summary.json"):
        changed(path, edit("settings/lora_r", 32))
        changed(path, edit("model/weights_fingerprint", "sha256:" + "ab" * 32))
        if path.parts[-3] == "int8":
            changed(path, edit("environment/device/name", "NVIDIA H200"))
    paragraph = methods([load_run(folder).on(FAMILY) for folder in folders])
    for fact in (
        "llama", "commit aaaaaaaaaaaa", "weights abababababab",
        "NF4, double quantisation (NF4)", "oasst1", "90 conversations", "9,000 tokens",
        "SHA-256 111111111111", "10 conversations", "lora_r 32", "learning_rate 0.0002", "steps 20",
        "0, 1 and 2 (bf16, NF4); 0 (int8)", f"200 questions of {FAMILY}",
        "1 × NVIDIA H100 (bf16, NF4); 1 × NVIDIA H200 (int8)", "torch 2.13.0", "Bonferroni",
    ):  # fmt: skip
        assert fact in paragraph
    for absent in ("None", "dropout", "use_dora", "Tango"):
        assert absent not in paragraph
    assert methods([]) == ""


def test_the_paragraph_is_in_the_markdown_and_on_the_page(study: Comparison) -> None:
    pytest.importorskip("plotly")
    paragraph = methods(study.source.runs)
    assert "## Methods" in text.markdown(study)
    assert paragraph in html.unescape(page.to_html(study))
    assert paragraph not in str(study)


def test_figures_show_each_arm_by_dose(study: Comparison) -> None:
    pytest.importorskip("plotly")
    from qlora_harness.compare.figures import figures

    losses, nlls, accuracies, *_ = figures(study)
    for figure, key, scale in (
        (losses, "eval_loss", 1),
        (nlls, "nll", 1),
        (accuracies, "accuracy", 100),
    ):
        points = [t for t in figure.plot.data if t.marker.symbol == "circle"]
        assert [t.x[0] for t in points] == [scale * item[key].difference for item in study.primary]
        ends = [(t.x[0] - t.error_x.arrayminus[0], t.x[0] + t.error_x.array[0]) for t in points]
        assert ends[1] == pytest.approx(
            (scale * study.headline[key].low, scale * study.headline[key].high)
        )
        assert figure.plot.layout.yaxis.ticktext == ("FP4", "NF4", "int8")
    before = [t.x[0] for t in nlls.plot.data if t.marker.symbol == "diamond-open"]
    bases = [item["nll"].difference for item in study.contrasts if not item.primary]
    assert before == bases


@pytest.mark.parametrize("value", [[1], {"a": 1}, "x", -1.5, True])
def test_odd_settings_have_names(tmp_path: Path, value: object) -> None:
    odd = dict.fromkeys(("use_dora", "init_lora_weights", "mask"), value)
    comparison = variants(tmp_path, odd, {"quant": "bf16"}, {"quant": "bf16", "use_dora": True})
    assert comparison.arms[0] == "NF4"
    assert methods(comparison.source.runs)

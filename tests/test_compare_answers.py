"""Answers of any lm_eval task: read, checked, paired by document, and what is refused."""

from __future__ import annotations

import json
import lzma
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from compare_runs import DATE, Sample, changed, chosen, edit, sample, spoil, write
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks._index import TaskIndex

from qlora_harness.compare.comparison import Comparison, compare
from qlora_harness.compare.figures import figures
from qlora_harness.compare.numbers import points
from qlora_harness.compare.page import tiles
from qlora_harness.compare.verdict import verdict
from qlora_harness.errors import ComparisonError, ResultsError
from qlora_harness.results.runs import load_run


def random_logprobs(rng: np.random.Generator, choices: int = 4) -> list[float]:
    return [-float(value) for value in rng.exponential(2, choices)]


def write_task(
    folder: Path, tasks: dict[str, list[Sample]], *, groups: dict[str, list[str]] | None = None,
    filters: tuple[str, ...] = ("none",), better: bool = True, **changes: Any,
) -> Path:  # fmt: skip
    """Writes lm_eval's results file and samples of tasks; values are those of the samples."""
    results: dict[str, Any] = {}
    sizes = {}
    for task, samples in tasks.items():
        results[task] = {"name": task, "alias": task, "sample_len": len(samples)}
        for name in filters:
            mine = [item for item in samples if item["filter"] == name]
            for metric in mine[0]["metrics"] if mine else ():
                values = [item[metric] for item in mine]
                if all(isinstance(value, int | float | list) for value in values):
                    results[task][f"{metric},{name}"] = float(np.mean(np.hstack(values)))
                    results[task][f"{metric}_stderr,{name}"] = 0.01
        count = len({item["doc_id"] for item in samples})
        sizes[task] = {"original": count, "effective": count}
        lines = "\n".join(json.dumps(item) for item in samples)
        write(folder / "model" / f"samples_{task}_{DATE}.jsonl", lines + "\n")
    for group in groups or {}:
        results[group] = {"name": group, "alias": group, "sample_len": 0}
    record = {
        "results": results,
        "group_subtasks": groups or {task: [] for task in tasks},
        "versions": {task: 1.0 for task in tasks},
        "n-shot": {task: 0 for task in tasks},
        "higher_is_better": {task: {m: better for m in ("acc", "loss", "score")} for task in tasks},
        "n-samples": sizes,
        "config": {"model": "hf", "model_args": {"pretrained": folder.name}, "model_dtype": "x"},
    }
    write(folder / "model" / f"results_{DATE}.json", record | changes)
    return folder


def choice_task(folder: Path, seed: int, n: int = 40, first: int = 0) -> Path:
    """Questions with two to five choices, the same in every run."""
    rng = np.random.default_rng(seed)
    samples = [chosen(i, i % 2, random_logprobs(rng, 2 + i % 4)) for i in range(first, first + n)]
    return write_task(folder, {"arc": samples})


@pytest.fixture
def arcs(tmp_path: Path) -> list[Path]:
    return [choice_task(tmp_path / name, seed) for seed, name in enumerate("ab")]


def accuracy(comparison: Comparison) -> Any:
    return comparison.primary[0]["accuracy"]


def samples_of(folder: Path, task: str = "arc") -> Path:
    return folder / "model" / f"samples_{task}_{DATE}.jsonl"


def change(
    folders: list[Path], metric: str, task: str = "arc", chosen_filter: str = "none"
) -> float:
    """The mean of a metric in the second run less that in the first, of the questions of both."""
    values = []
    for folder in folders:
        rows = [json.loads(line) for line in samples_of(folder, task).read_text().splitlines()]
        known = {
            row["doc_hash"]: float(row[metric]) for row in rows if row["filter"] == chosen_filter
        }
        values.append(pd.Series(known))
    return float((values[1] - values[0]).dropna().mean())


def test_multiple_choice_of_any_number_of_choices(arcs: list[Path]) -> None:
    comparison = compare(arcs)
    item = comparison.primary[0]
    assert (comparison.task, item.arm, item.baseline) == ("arc", "b", "a")
    assert item["accuracy"].difference == pytest.approx(change(arcs, "acc"))
    assert item["nll"].n == 40
    assert "letter_centred" not in item.endpoints
    frame = load_run(arcs[0]).answers("arc")
    assert frame is not None
    last = frame.iloc[3]  # five choices
    logprobs = last[[f"logprob_{k}" for k in range(5)]].to_numpy(float)
    assert last["choice"] == logprobs.argmax()
    assert not np.isnan(logprobs).any()
    assert math.isnan(frame.iloc[0]["logprob_2"])
    item = compare(arcs, metric="acc_norm").primary[0]
    assert item["accuracy"].difference == pytest.approx(change(arcs, "acc_norm"))
    assert "nll" not in item.endpoints  # the log-probabilities don't make this metric


def test_continuous_metrics_and_those_of_which_less_is_better(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(20, 3, (2, 60))
    folders = [
        write_task(
            tmp_path / str(k),
            {"bleu": [sample(i, {"loss": table[k, i]}) for i in range(60)]},
            better=False,
        )
        for k in (0, 1)
    ]
    endpoint = accuracy(compare(folders))
    changes = table[1] - table[0]
    assert endpoint.difference == pytest.approx(changes.mean())
    assert endpoint.stderr == pytest.approx(changes.std(ddof=1) / math.sqrt(60))
    assert (endpoint.lower_is_better, endpoint.margin, endpoint.unit) == (True, None, "metric")


def test_bits_per_byte_are_weighted_by_bytes(tmp_path: Path) -> None:
    """As lm_eval logs them: the log-probability and the bytes, or the words, of each text."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 500, 30)
    bits, folders = [], []
    for k in (0, 1):
        nats = rng.normal(-1, 0.1, 30) * sizes
        bits.append(-nats.sum() / sizes.sum() / math.log(2))
        samples = [
            sample(i, {name: [n, int(size)] for name in ("bits_per_byte", "word_perplexity")})
            for i, (n, size) in enumerate(zip(nats, sizes, strict=True))
        ]
        folder = write_task(tmp_path / str(k), {"wiki": samples})
        path = next((folder / "model").glob("results_*"))
        record = json.loads(path.read_text())
        values = {"bits_per_byte,none": bits[k], "word_perplexity,none": 2 ** bits[k]}
        record["results"]["wiki"] |= values
        record["higher_is_better"]["wiki"] = {"bits_per_byte": False, "word_perplexity": False}
        write(path, record)
        folders.append(folder)
    comparison = compare(folders)
    endpoint = accuracy(comparison)
    assert (endpoint.name, endpoint.lower_is_better) == ("bits_per_byte", True)
    assert endpoint.difference == pytest.approx(bits[1] - bits[0])
    (note,) = [note for note in comparison.notes if "word_perplexity" in note]
    assert "not one number for each question" in note


def test_groups_are_tasks_with_subjects_and_categories(tmp_path: Path) -> None:
    groups = {"big": ["big_x", "big_y"], "big_x": ["big_a", "big_b"], "big_y": ["big_c"]}
    folders = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        tasks = {
            leaf: [chosen(i, 1, random_logprobs(rng), leaf) for i in range(size)]
            for leaf, size in (("big_a", 30), ("big_b", 20), ("big_c", 10))
        }
        folders.append(write_task(tmp_path / str(seed), tasks, groups=groups))
    comparison = compare(folders)
    item = comparison.primary[0]
    assert (comparison.task, item["accuracy"].n, item["macro"].n) == ("big", 60, 3)
    assert {(g.kind, g.name, g.n) for g in item.groups} == {
        ("category", "x", 50), ("category", "y", 10),
        ("subject", "a", 30), ("subject", "b", 20), ("subject", "c", 10),
    }  # fmt: skip


def test_paired_by_document_whatever_the_order(arcs: list[Path]) -> None:
    before = accuracy(compare(arcs))
    path = samples_of(arcs[1])
    rows = [json.loads(line) for line in path.read_text().splitlines()][::-1]
    path.write_text("\n".join(json.dumps(row | {"doc_id": n}) for n, row in enumerate(rows)))
    assert accuracy(compare(arcs)) == before


def test_intersection_is_an_inner_join(tmp_path: Path, arcs: list[Path]) -> None:
    runs = [arcs[0], choice_task(tmp_path / "b", 1, n=30, first=20)]
    with pytest.raises(ComparisonError, match="different questions: 30 are in only one"):
        compare(runs)
    comparison = compare(runs, intersect=True)
    assert accuracy(comparison).n == 20
    assert accuracy(comparison).difference == pytest.approx(change(runs, "acc"))
    assert comparison.dropped == {"a": 20, "b": 10}
    with pytest.raises(ComparisonError, match="no question in common"):
        compare([arcs[0], choice_task(tmp_path / "c", 2, first=900)], intersect=True)


def test_same_document_twice(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        samples = [chosen(i, 0, random_logprobs(rng)) for i in range(10)]
        for item in samples[5:]:
            item |= {k: samples[0][k] for k in ("doc_hash", "prompt_hash", "target_hash")}
        folders.append(write_task(tmp_path / str(seed), {"t": samples}))
    assert accuracy(compare(folders)).n == 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_text(p.read_text()[:-400]), r"line 40: not valid JSON"),
        (
            lambda p: p.write_text("\n".join(p.read_text().splitlines()[:-1])),
            r"acc is 0\.\d+ over 39 answers, but results_.* says 0\.\d+ of 40",
        ),
        (lambda p: p.write_text("[]\n"), "line 1: not a JSON object"),
        (lambda p: spoil(p, 3, acc=None), r"line 4: acc is None"),
        (lambda p: spoil(p, 3, doc_hash=7), r"line 4: doc_hash is 7"),
        (lambda p: spoil(p, 3, doc_id=2), "a doc_id is repeated"),
        (lambda p: spoil(p, 3, doc_id="x"), r"line 4: doc_id is 'x'"),
    ],
)
def test_spoilt_samples_are_refused_with_their_line(
    arcs: list[Path], damage: Callable[[Path], object], message: str
) -> None:
    damage(samples_of(arcs[1]))
    with pytest.raises(ResultsError, match=message) as caught:
        compare(arcs)
    assert len(str(caught.value)) <= 500
    assert "\n" not in str(caught.value)


def test_unpaired_single_runs_have_an_interval(arcs: list[Path]) -> None:
    for folder in arcs:  # without samples the numbers of the results file are left
        samples_of(folder).unlink()
    comparison = compare(arcs)
    endpoint = accuracy(comparison)
    assert not comparison.primary[0].paired
    assert "unpaired" in " ".join(comparison.notes)
    assert endpoint.stderr == pytest.approx(0.01 * math.sqrt(2))
    assert endpoint.high - endpoint.difference == pytest.approx(1.959964 * endpoint.stderr)


@pytest.mark.parametrize(
    ("in_sample", "in_results", "message"),
    [
        ({"prompt_hash": "0" * 64}, {}, "the prompt hash differs in 1 of 40"),
        ({"target_hash": "0" * 64}, {}, "the target hash differs in 1 of 40"),
        ({}, {"versions": {"arc": 2.0}}, r"version of arc is 1\.0 and 2\.0"),
        ({}, {"n-shot": {"arc": 5}}, "shots of arc is 0 and 5"),
    ],
)
def test_other_prompts_versions_and_shots_are_other_questions(
    arcs: list[Path], in_sample: dict[str, str], in_results: dict[str, Any], message: str
) -> None:
    spoil(samples_of(arcs[1]), 5, **in_sample)
    spoil(arcs[1] / "model" / f"results_{DATE}.json", 0, **in_results)
    with pytest.raises(ComparisonError, match=message):
        compare(arcs)


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}\\nAnswer:"
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of lm_eval itself, with its dummy model, on tasks of three kinds."""
    folder = tmp_path_factory.mktemp("real")
    rows = [
        {"question": f"q{i}", "choices": [f"c{j}" for j in range(2 + i % 3)], "gold": i % 2}
        for i in range(25)
    ]
    data = write(folder / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    kinds = {
        "my_choice": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n",
        "my_generated": "output_type: generate_until\ndoc_to_target: gold\ngeneration_kwargs: "
        "{until: ['\\n']}\nmetric_list: [{metric: exact_match}]\n",
    }
    for name, text in kinds.items():
        write(folder / "tasks" / f"{name}.yaml", TASK.format(name=name, data=data) + text)
    runs = [folder / f"run_{seed}" for seed in (0, 1)]
    words = ["lm_eval", "run", "--model", "dummy", "--tasks", ",".join(kinds), "--log_samples"]
    words += ["--include_path", str(folder / "tasks")]
    with pytest.MonkeyPatch.context() as patch:
        own = staticmethod(lambda root: root.glob("my_*.yaml"))  # lm_eval's take seconds to read
        patch.setattr(TaskIndex, "_iter_yaml_files", own)
        for seed, run in enumerate(runs):
            random.seed(seed)
            patch.setattr("sys.argv", [*words, "--seed", str(seed), "--output_path", str(run)])
            cli_evaluate()
    return runs


@pytest.mark.parametrize(
    ("task", "metric"), [("my_choice", "acc"), ("my_generated", "exact_match")]
)
def test_what_lm_eval_itself_writes(real: list[Path], task: str, metric: str) -> None:
    endpoint = accuracy(compare(real, task=task))
    means = []
    for folder in real:
        rows = [
            json.loads(line)
            for path in folder.rglob(f"samples_{task}_*.jsonl")
            for line in path.read_text().splitlines()
        ]
        means.append(np.mean([row[metric] for row in rows]))
    assert endpoint.n == 25
    assert (endpoint.baseline, endpoint.arm) == pytest.approx(tuple(means))


def test_a_metric_is_that_of_the_task_alone(tmp_path: Path) -> None:
    """What other tasks of the folder are like doesn't matter, and a group's parts can be chosen."""
    folders = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        tasks = {
            "g_a": [chosen(i, 1, random_logprobs(rng)) for i in range(9)],
            "g_b": [sample(i, {"mc2": float(rng.random())}) for i in range(7)],
            "odd": [sample(i, {"f1": 0.5}) for i in range(3)],
        }
        folder = write_task(tmp_path / str(seed), tasks, groups={"g": ["g_a", "g_b"], "odd": []})
        folders.append(folder)
    comparison = compare(folders, task="g_a", metric="acc_norm")
    assert accuracy(comparison).n == 9
    assert comparison.benchmarks == []
    for task in ("g", "odd"):
        assert sum(note.startswith(f"{task} is not compared") for note in comparison.notes) == 1
    assert accuracy(compare(folders, task="g_b")).name == "mc2"
    with pytest.raises(ResultsError, match="holds no number for acc_norm"):
        compare(folders, task="odd", metric="acc_norm")


def test_choices_count_where_all_runs_and_questions_have_them(
    tmp_path: Path, arcs: list[Path]
) -> None:
    spoil(samples_of(arcs[1]), 3, filtered_resps=["text"])
    for runs in (arcs, arcs[::-1]):
        item = compare(runs).primary[0]
        assert item["accuracy"].n == 40
        assert "nll" not in item.endpoints
        assert item.detail is None
    # A part of the questions may have fewer choices.
    three = choice_task(tmp_path / "c", 2, n=2)
    assert compare([arcs[0], three], intersect=True).primary[0]["nll"].n == 2


def test_scores_of_true_and_false_and_more_choices_than_a_byte_holds(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        samples = [chosen(i, i, random_logprobs(rng, 150)) for i in range(150)]
        samples = [item | {"acc": bool(item["acc"])} for item in samples]
        folders.append(write_task(tmp_path / str(seed), {"big": samples}))
    assert accuracy(compare(folders)).n == 150


def test_values_as_recorded_of_groups_that_weigh_their_parts(tmp_path: Path) -> None:
    tasks = {
        leaf: [chosen(i, 1, [-2.0, -1.0 - (i >= right), -1.5], leaf) for i in range(n)]
        for leaf, n, right in (("g_a", 8, 2), ("x", 4, 4))
    }
    groups = {"g": ["g_a", "x", "g_a"]}
    folders = [write_task(tmp_path / name, tasks, groups=groups) for name in "ab"]

    def record(value: float) -> None:
        for folder in folders:
            path = folder / "model" / f"results_{DATE}.json"
            changed(path, edit("results/g/acc,none", value))

    record((2 / 8 + 1) / 2)
    comparison = compare(folders)
    assert [run.value for run in comparison.runs] == [(2 / 8 + 1) / 2] * 2
    assert (accuracy(comparison).arm, accuracy(comparison).n) == (6 / 12, 12)
    record(1.2)
    with pytest.raises(ResultsError, match=r"acc,none is 1\.2 ± None, but its parts have 0\.25"):
        compare(folders)


def test_one_result_or_one_model_a_run(tmp_path: Path, arcs: list[Path]) -> None:
    with pytest.raises(ComparisonError, match=r"a and .* are both "):
        compare([arcs[0], arcs[0] / "model" / f"results_{DATE}.json"])
    both = tmp_path / "both"
    both.mkdir()
    for folder in arcs:
        folder.rename(both / folder.name)
    with pytest.raises(ResultsError, match="are of different models"):
        compare([both, both / "a"])


def suite_run(folder: Path, seed: int) -> Path:
    """What TruthfulQA, GSM8K and IFEval leave: 30 questions each, answered by a seed."""
    rng = np.random.default_rng(seed)
    right = [bool(value) for value in rng.integers(0, 2, 30)]
    instructions = [[bool(v) for v in rng.integers(0, 2, 1 + i % 3)] for i in range(30)]
    return write_task(
        folder,
        {
            "truthfulqa_mc1": [chosen(i, 0, random_logprobs(rng), "mc1") for i in range(30)],
            "truthfulqa_mc2": [sample(i, {"acc": float(rng.random())}) for i in range(30)],
            "gsm8k": [
                sample(i, {"exact_match": float(hit and lenient)}, filter=name)
                for lenient, name in ((1, "flexible-extract"), (seed, "strict-match"))
                for i, hit in enumerate(right)
            ],
            "ifeval": [
                sample(i, {"inst_level_strict_acc": hits, "prompt_level_strict_acc": all(hits)})
                for i, hits in enumerate(instructions)
            ],
        },
        filters=("none", "flexible-extract", "strict-match"),
    )


def test_every_task_is_compared_with_all_its_metrics(tmp_path: Path) -> None:
    folders = [suite_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    comparison = compare(folders)
    assert comparison.task == "truthfulqa_mc1"
    assert comparison.benchmarks == ["truthfulqa_mc2", "gsm8k", "ifeval"]
    endpoints = comparison.primary[0].endpoints
    assert list(endpoints) == [
        "accuracy",
        *("nll", "brier"),  # the right choice is always the first: no preference to take out
        "truthfulqa_mc1 acc_norm,none",
        "truthfulqa_mc2",
        *("gsm8k", "gsm8k exact_match,flexible-extract"),
        *("ifeval", "ifeval inst_level_strict_acc,none"),
    ]
    for key, metric, task, part in (
        ("accuracy", "acc", "truthfulqa_mc1", "none"),
        ("truthfulqa_mc2", "acc", "truthfulqa_mc2", "none"),
        ("gsm8k", "exact_match", "gsm8k", "strict-match"),
        ("gsm8k exact_match,flexible-extract", "exact_match", "gsm8k", "flexible-extract"),
        ("ifeval", "prompt_level_strict_acc", "ifeval", "none"),
    ):
        assert (endpoints[key].n, endpoints[key].unit) == (30, "share")
        assert endpoints[key].difference == pytest.approx(change(folders, metric, task, part))
        assert endpoints[key].stderr
    assert [run.benchmarks["gsm8k"] for run in comparison.runs] == [0, endpoints["gsm8k"].arm]
    shown = str(comparison).splitlines()
    assert [line.split()[0] for line in shown[4:7]] == comparison.benchmarks
    assert [tile.name for tile in tiles(comparison)][1:] == [
        "truthfulqa_mc2 acc",
        "gsm8k exact_match (strict-match)",
        "ifeval prompt_level_strict_acc",
    ]
    headings = [figure.heading for figure in figures(comparison)]
    assert sum(name in heading for heading in headings for name in comparison.benchmarks) == 3


def test_compressed_samples_without_texts_give_the_same_comparison(tmp_path: Path) -> None:
    folders = [suite_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    before = compare(folders).primary[0].endpoints
    assert before["gsm8k"].word == "better"
    for path in tmp_path.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [json.dumps({k: v for k, v in row.items() if k != "doc"}) for row in rows]
        path.with_name(f"{path.name}.xz").write_bytes(lzma.compress("\n".join(lines).encode()))
        path.unlink()
    comparison = compare(folders)
    assert comparison.primary[0].endpoints == before
    size = points(before["gsm8k"].difference or 0).lstrip("+")
    assert f"gains {size} points of gsm8k" in verdict(comparison)


def test_instructions_of_one_prompt_are_weighted_together(tmp_path: Path) -> None:
    folders = [suite_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    first, second = (
        [row["inst_level_strict_acc"] for row in map(json.loads, samples_of(f, "ifeval").open())]
        for f in folders
    )
    change = np.array([sum(b) - sum(a) for a, b in zip(first, second, strict=True)])
    counts = np.array(list(map(len, first)))
    difference = change.sum() / counts.sum()
    parts = (change - difference * counts) / counts.sum()
    for comparison, key in (
        (compare(folders), "ifeval inst_level_strict_acc,none"),
        (compare(folders, task="ifeval", metric="inst_level_strict_acc"), "accuracy"),
    ):
        endpoint = comparison.primary[0][key]
        assert endpoint.difference == pytest.approx(difference)
        assert endpoint.stderr == pytest.approx(np.sqrt(30 / 29 * parts @ parts))
        assert endpoint.arm == pytest.approx(np.mean(np.hstack(second)))


def test_another_task_that_cannot_be_compared_is_a_note(tmp_path: Path) -> None:
    folders = [suite_run(tmp_path / name, seed) for seed, name in enumerate("abc")]
    spoil(samples_of(folders[1], "gsm8k"), 30, doc_hash="another")
    for path in folders[2].rglob("samples_ifeval_*"):
        path.unlink()
    comparison = compare(folders)
    assert comparison.benchmarks == ["truthfulqa_mc2", "ifeval"]
    assert sum(note.startswith("gsm8k is not compared: ") for note in comparison.notes) == 1
    assert [item["ifeval"].reason is None for item in comparison.primary] == [True, False]
    assert sum(line.startswith("ifeval: b ") for line in str(comparison).splitlines()) == 1
    with pytest.raises(ComparisonError, match="different questions"):
        compare(folders, task="gsm8k")


def test_what_differs_in_the_scoring_of_another_task_is_named(tmp_path: Path) -> None:
    folders = [suite_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    (path,) = folders[1].rglob("results_*.json")
    tuned = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 32}}
    own = path.with_name("results_2026-11-25T08-14-04.277787.json")  # GSM8K's, scored later
    own.write_text(path.read_text())
    for samples in path.parent.glob(f"samples_gsm8k_{DATE}*"):
        samples.rename(samples.with_name(samples.name.replace("11-24", "11-25")))
    changed(own, edit("n-samples", {"gsm8k": {"original": 30, "effective": 30}}))
    changed(own, edit("config/model_args/max_gen_toks", 32))
    changed(own, edit("config/use_cache", "cache.db"))
    comparison = compare(folders, task="truthfulqa_mc2")
    assert "gsm8k" in comparison.benchmarks
    names = {setting.name: setting.values for setting in comparison.different}
    assert names["gsm8k.model_args.max_gen_toks"] == [None, 32]
    assert "max_gen_toks" in comparison.besides
    assert sum(note.startswith("b: gsm8k: ") and "use_cache" in note for note in comparison.notes)
    assert not any(setting.name.startswith("gsm8k.") for setting in comparison.same)
    changed(own, edit("configs", {"gsm8k": tuned}))
    changed(
        folders[0] / "model" / f"results_{DATE}.json", edit("configs", {"gsm8k": {**tuned, "a": 1}})
    )
    assert "gsm8k" in compare(folders, task="truthfulqa_mc2").benchmarks
    changed(own, edit("configs/gsm8k/generation_kwargs", {"until": ["\n"]}))
    comparison = compare(folders, task="truthfulqa_mc2")
    assert "gsm8k" not in comparison.benchmarks
    assert sum("generation_kwargs of gsm8k" in note for note in comparison.notes) == 1

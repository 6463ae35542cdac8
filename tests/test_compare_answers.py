"""Answers of any lm_eval task: read, checked, paired by document, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from compare_runs import DATE, digest, write

from qlora_harness.compare.comparison import Comparison, compare
from qlora_harness.errors import ComparisonError, ResultsError
from qlora_harness.results.harness import read_file
from qlora_harness.results.runs import load_run

Sample = dict[str, Any]


def sample(doc_id: int, metrics: dict[str, float], *, task: str = "t", **more: Any) -> Sample:
    found = {
        "doc_id": doc_id,
        "doc": {"question": f"q{doc_id}"},
        "target": "",
        "arguments": {"gen_args_0": {"arg_0": f"Shots\n\nQuestion {doc_id}?\nAnswer:"}},
        "filtered_resps": ["text"],
        "filter": "none",
        "metrics": list(metrics),
        "doc_hash": digest("doc", task, doc_id),
        "prompt_hash": digest("prompt", task, doc_id),
        "target_hash": digest("target", task, doc_id),
        **metrics,
    }
    return found | more


def chosen(doc_id: int, answer: int, logprobs: list[float]) -> Sample:
    """A sample of multiple choice as lm_eval writes it: numbers as text."""
    right = float(max(range(len(logprobs)), key=logprobs.__getitem__) == answer)
    return sample(
        doc_id,
        {"acc": right, "acc_norm": 1 - right},
        target=str(answer),
        filtered_resps=[[str(value), "False"] for value in logprobs],
    )


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
            for metric in mine[0]["metrics"]:
                values = [item[metric] for item in mine]
                if all(isinstance(value, int | float) for value in values):
                    results[task][f"{metric},{name}"] = float(np.mean(values))
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
    """Questions with two to five choices, which every run asks alike."""
    rng = np.random.default_rng(seed)
    samples = [
        chosen(i, i % 2, (-rng.exponential(2, 2 + i % 4)).tolist()) for i in range(first, first + n)
    ]
    return write_task(folder, {"arc": samples})


def accuracy(comparison: Comparison) -> Any:
    return comparison.primary[0]["accuracy"]


def values(folder: Path, task: str, metric: str, chosen_filter: str = "none") -> pd.Series:
    lines = (folder / "model" / f"samples_{task}_{DATE}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return pd.Series(
        {row["doc_hash"]: row[metric] for row in rows if row["filter"] == chosen_filter}
    )


def test_multiple_choice_of_any_number_of_choices(tmp_path: Path) -> None:
    one, two = (choice_task(tmp_path / name, seed) for seed, name in enumerate(("a", "b")))
    comparison = compare([one, two])
    expected = values(two, "arc", "acc") - values(one, "arc", "acc")
    item = comparison.primary[0]
    assert (comparison.task, item.arm, item.baseline) == ("arc", "b", "a")
    assert item["accuracy"].difference == pytest.approx(expected.mean())
    assert item["nll"].n == 40
    assert "letter_centred" not in item.endpoints
    frame = load_run(one).answers("arc")
    assert frame is not None
    last = frame.iloc[3]  # five choices
    logprobs = last[[f"logprob_{k}" for k in range(5)]].to_numpy(float)
    assert last["choice"] == logprobs.argmax()
    assert not np.isnan(logprobs).any()
    assert math.isnan(frame.iloc[0]["logprob_2"])


def test_other_metric_of_the_same_task(tmp_path: Path) -> None:
    one, two = (choice_task(tmp_path / name, seed) for seed, name in enumerate(("a", "b")))
    item = compare([one, two], metric="acc_norm").primary[0]
    expected = values(two, "arc", "acc_norm") - values(one, "arc", "acc_norm")
    assert item["accuracy"].difference == pytest.approx(expected.mean())
    assert "nll" not in item.endpoints  # the log-probabilities don't make this metric


def test_generated_answers_with_two_filters(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        samples = [
            sample(i, {"exact_match": float(rng.random() < share)}, filter=name)
            for name, share in (("strict-match", 0.3), ("flexible-extract", 0.6))
            for i in range(50)
        ]
        filters = ("strict-match", "flexible-extract")
        folders.append(write_task(tmp_path / str(seed), {"gsm": samples}, filters=filters))
    for asked, used in ((None, "strict-match"), ("exact_match,flexible-extract",) * 2):
        used = used.rpartition(",")[2]
        endpoint = accuracy(compare(folders, metric=asked))
        change = values(folders[1], "gsm", "exact_match", used) - values(
            folders[0], "gsm", "exact_match", used
        )
        assert endpoint.difference == pytest.approx(change.mean())
        assert endpoint.n == 50
        assert endpoint.name == "exact_match"


def test_continuous_metrics_and_those_of_which_less_is_better(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(20, 3, (2, 60))
    folders = [
        write_task(
            tmp_path / str(k),
            {"bleu": [sample(i, {"loss": table[k, i]}) for i in range(60)]},
            better=False,
        )
        for k in (0, 1)
    ]
    endpoint = accuracy(compare(folders))
    change = table[1] - table[0]
    assert endpoint.difference == pytest.approx(change.mean())
    assert endpoint.stderr == pytest.approx(change.std(ddof=1) / math.sqrt(60))
    assert endpoint.lower_is_better
    assert endpoint.margin is None
    assert endpoint.unit == "metric"


def test_groups_are_tasks_with_subjects_and_categories(tmp_path: Path) -> None:
    groups = {"big": ["big_x", "big_y"], "big_x": ["big_a", "big_b"], "big_y": ["big_c"]}
    folders = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        tasks = {
            leaf: [chosen(i, 1, (-rng.exponential(2, 4)).tolist()) for i in range(size)]
            for leaf, size in (("big_a", 30), ("big_b", 20), ("big_c", 10))
        }
        for leaf, samples in tasks.items():
            for item in samples:
                item["doc_hash"] = digest(leaf, item["doc_id"])
        folders.append(write_task(tmp_path / str(seed), tasks, groups=groups))
    comparison = compare(folders)
    item = comparison.primary[0]
    assert (comparison.task, item["accuracy"].n, item["macro"].n) == ("big", 60, 3)
    assert {(g.kind, g.name, g.n) for g in item.groups} == {
        ("category", "x", 50), ("category", "y", 10),
        ("subject", "a", 30), ("subject", "b", 20), ("subject", "c", 10),
    }  # fmt: skip


def test_paired_by_document_whatever_the_order(tmp_path: Path) -> None:
    one, two = choice_task(tmp_path / "a", 0), choice_task(tmp_path / "b", 1)
    before = accuracy(compare([one, two]))
    path = two / "model" / f"samples_arc_{DATE}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()][::-1]
    for number, row in enumerate(rows):
        row["doc_id"] = number
    path.write_text("\n".join(map(json.dumps, rows)))
    assert accuracy(compare([one, two])) == before


def test_intersection_is_an_inner_join(tmp_path: Path) -> None:
    one, two = choice_task(tmp_path / "a", 0), choice_task(tmp_path / "b", 1, n=30, first=20)
    with pytest.raises(ComparisonError, match="different questions: 30 are in only one"):
        compare([one, two])
    comparison = compare([one, two], intersect=True)
    both = pd.concat([values(one, "arc", "acc"), values(two, "arc", "acc")], axis=1).dropna()
    assert accuracy(comparison).n == len(both) == 20
    assert accuracy(comparison).difference == pytest.approx((both[1] - both[0]).mean())
    assert comparison.dropped == {"a": 20, "b": 10}
    with pytest.raises(ComparisonError, match="no question in common"):
        compare([one, choice_task(tmp_path / "c", 2, first=900)], intersect=True)


def test_same_document_twice(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        samples = [chosen(i, 0, (-rng.exponential(2, 4)).tolist()) for i in range(10)]
        for item in samples[5:]:
            item |= {k: samples[0][k] for k in ("doc_hash", "prompt_hash", "target_hash")}
        folders.append(write_task(tmp_path / str(seed), {"t": samples}))
    assert accuracy(compare(folders)).n == 10


def spoil(path: Path, line: int, **changes: Any) -> None:
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows[line] |= changes
    path.write_text("\n".join(map(json.dumps, rows)))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "half": (lambda p: p.write_text(p.read_text()[:-400]), r"line 40: not valid JSON"),
    "fewer": (
        lambda p: p.write_text("\n".join(p.read_text().splitlines()[:-1])),
        r"acc is 0\.\d+ over 39 answers, but results_.* says 0\.\d+ of 40",
    ),
    "not an object": (lambda p: p.write_text("[]\n"), "line 1: not a JSON object"),
    "no metric": (lambda p: spoil(p, 3, acc=None), r"line 4: acc is None, not one number"),
    "no hash": (lambda p: spoil(p, 3, doc_hash=7), r"line 4: doc_hash is 7"),
    "twice": (lambda p: spoil(p, 3, doc_id=2), "a doc_id is repeated"),
    "no number": (lambda p: spoil(p, 3, doc_id="x"), r"line 4: doc_id is 'x'"),
    "gone": (lambda p: p.rename(p.with_name("x")), ""),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_samples_are_refused_with_their_line(tmp_path: Path, kind: str) -> None:
    one, two = choice_task(tmp_path / "a", 0), choice_task(tmp_path / "b", 1)
    change, message = SPOILT[kind]
    change(two / "model" / f"samples_arc_{DATE}.jsonl")
    if not message:  # without samples the numbers of the results file are left
        assert not compare([one, two]).primary[0].paired
        return
    with pytest.raises(ResultsError, match=message) as caught:
        compare([one, two])
    assert len(str(caught.value)) <= 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_hash": "0" * 64}, "the prompt hash differs in 1 of 40"),
        ({"target_hash": "0" * 64}, "the target hash differs in 1 of 40"),
    ],
)
def test_other_prompts_are_other_questions(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    one, two = choice_task(tmp_path / "a", 0), choice_task(tmp_path / "b", 1)
    spoil(two / "model" / f"samples_arc_{DATE}.jsonl", 5, **change)
    with pytest.raises(ComparisonError, match=message):
        compare([one, two])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": {"arc": 2.0}}, r"version of arc is 1\.0 and 2\.0"),
        ({"n-shot": {"arc": 5}}, "shots of arc is 0 and 5"),
    ],
)
def test_other_versions_and_shots_are_other_questions(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    one, two = choice_task(tmp_path / "a", 0), choice_task(tmp_path / "b", 1)
    path = two / "model" / f"results_{DATE}.json"
    write(path, json.loads(path.read_text()) | changes)
    with pytest.raises(ComparisonError, match=message):
        compare([one, two])


def test_results_files_that_are_none(tmp_path: Path) -> None:
    for record in (
        {},
        {"results": {}, "n-samples": {}},
        {"results": [], "n-samples": {}, "config": {}},
    ):
        path = write(tmp_path / f"results_{DATE}.json", record)
        with pytest.raises(ResultsError, match="not a results file of lm_eval"):
            read_file(path)


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
    # Both in one process, as lm_eval takes seconds to start.
    code = (
        "import random, sys\n"
        "from lm_eval.__main__ import cli_evaluate\n"
        "words, outputs = sys.argv[1:-2], sys.argv[-2:]\n"
        "for seed, output in enumerate(outputs):\n"
        "    random.seed(seed)\n"
        "    sys.argv[1:] = [*words, '--seed', str(seed), '--output_path', output]\n"
        "    cli_evaluate()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, "run", "--model", "dummy", "--tasks", ",".join(kinds),
         "--include_path", str(folder / "tasks"), "--log_samples", *map(str, runs)],
        check=True, capture_output=True, timeout=240, cwd=folder,
    )  # fmt: skip
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


def test_a_metric_is_asked_of_the_task_alone(tmp_path: Path) -> None:
    """What other tasks of the folder are like doesn't matter, and a group's parts can be chosen."""
    folders = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        tasks = {
            "g_a": [chosen(i, 1, (-rng.exponential(2, 4)).tolist()) for i in range(9)],
            "g_b": [sample(i, {"mc2": float(rng.random())}) for i in range(7)],
            "odd": [sample(i, {"f1": 0.5}) for i in range(3)],
        }
        folder = write_task(tmp_path / str(seed), tasks, groups={"g": ["g_a", "g_b"], "odd": []})
        folders.append(folder)
    assert accuracy(compare(folders, task="g_a", metric="acc_norm")).n == 9
    assert accuracy(compare(folders, task="g_b")).name == "mc2"
    with pytest.raises(ComparisonError, match="several tasks in common: g, odd"):
        compare(folders)
    with pytest.raises(ResultsError, match="holds no number for acc_norm"):
        compare(folders, task="odd", metric="acc_norm")


def test_choices_count_where_all_runs_and_questions_have_them(tmp_path: Path) -> None:
    one, two = choice_task(tmp_path / "a", 0), choice_task(tmp_path / "b", 1)
    path = two / "model" / f"samples_arc_{DATE}.jsonl"
    spoil(path, 3, filtered_resps=["text"])
    for runs in ([one, two], [two, one]):
        item = compare(runs).primary[0]
        assert item["accuracy"].n == 40
        assert "nll" not in item.endpoints
        assert item.detail is None
    # A part of the questions may have fewer choices.
    three = choice_task(tmp_path / "c", 2, n=2)
    assert compare([one, three], intersect=True).primary[0]["nll"].n == 2


def test_scores_of_true_and_false_and_more_choices_than_a_byte_holds(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        samples = [chosen(i, i, (-rng.exponential(2, 150)).tolist()) for i in range(150)]
        for item in samples:
            item["acc"] = bool(item["acc"])
        folders.append(write_task(tmp_path / str(seed), {"big": samples}))
    assert accuracy(compare(folders)).n == 150


def test_values_as_recorded_of_groups_that_weigh_their_parts(tmp_path: Path) -> None:
    tasks = {
        leaf: [chosen(i, 1, [-2.0, -1.0 - (i >= right), -1.5]) for i in range(n)]
        for leaf, n, right in (("g_a", 8, 2), ("x", 4, 4))
    }
    for leaf, samples in tasks.items():
        for item in samples:
            item["doc_hash"] = digest(leaf, item["doc_id"])
    folders = [
        write_task(tmp_path / name, tasks, groups={"g": ["g_a", "x", "g_a"]}) for name in "ab"
    ]
    for folder in folders:
        path = folder / "model" / f"results_{DATE}.json"
        record = json.loads(path.read_text())
        record["results"]["g"]["acc,none"] = (2 / 8 + 1) / 2
        write(path, record)
    comparison = compare(folders)
    assert [run.value for run in comparison.runs] == [(2 / 8 + 1) / 2] * 2
    assert accuracy(comparison).arm == 6 / 12
    assert accuracy(comparison).n == 12
    record["results"]["g"]["acc,none"] = 1.2
    write(path, record)
    with pytest.raises(ResultsError, match=r"acc,none is 1\.2 ± None, but its parts have 0\.25"):
        compare(folders)


def test_one_result_or_one_model_a_run(tmp_path: Path) -> None:
    one, two = choice_task(tmp_path / "a", 0), choice_task(tmp_path / "b", 1)
    with pytest.raises(ComparisonError, match=r"a and .* are both "):
        compare([one, one / "model" / f"results_{DATE}.json"])
    both = tmp_path / "both"
    (both).mkdir()
    for folder in (one, two):
        folder.rename(both / folder.name)
    with pytest.raises(ResultsError, match="are of different models"):
        compare([both, both / "a"])


def test_unpaired_single_runs_have_an_interval(tmp_path: Path) -> None:
    folders = [choice_task(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for folder in folders:
        (folder / "model" / f"samples_arc_{DATE}.jsonl").unlink()
    endpoint = accuracy(compare(folders))
    assert endpoint.stderr == pytest.approx(0.01 * math.sqrt(2))
    assert endpoint.high - endpoint.difference == pytest.approx(1.959964 * endpoint.stderr)

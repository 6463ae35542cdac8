"""`qlora-harness score`: benchmarks of lm_eval, on files and in packs, as its command scores."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from scoring_runs import PROBLEMS, PROMPTS, QUESTIONS, MakeLm, refused, write_task_data

from qlora_harness import cli
from qlora_harness.errors import DataError, HarnessError, SettingsError
from qlora_harness.lm_eval_compat.in_process import InProcessScorer, check_tasks
from qlora_harness.lm_eval_compat.tasks import check_ifeval
from qlora_harness.results.lm_eval_files import read_file
from qlora_harness.results.runs import load_run
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.packed_forward import PackedModel
from qlora_harness.score.suite import benchmarks
from qlora_harness.score.task_data import load_local
from qlora_harness.study.definition import build_study

PROMPT = '{{"key": 1, "prompt": "a", "instruction_id_list": ["b"], "kwargs": [{{"n": {}}}]}}\n'


OWN_TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]
"""
OWN_ROWS = [
    {"question": "Which is red?", "choices": ["a rose", "the sea"], "answer": 0},
    {"question": "Which flies?", "choices": ["a fish", "an old stone", "a bird"], "answer": 2},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_task_data(tmp_path / "data")


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def requests_of(task: str, data: Path) -> list[Instance]:
    manager = check_tasks([task], str(data))
    loaded = manager.load([task])["tasks"][task]
    loaded.build_all_requests()
    return list(loaded.instances)


def test_a_run_is_scored_as_by_the_printed_commands(
    own_adapter: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    unchanged_tracker: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.yaml").write_text(OWN_TASK)
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in OWN_ROWS))
    words = ["score", "4bit", "--suite", "truthfulqa,gsm8k,own,mmlu_qlora_demo"]
    words += ["--data-dir", "data", "--include-path", "own"]
    load = Mock(wraps=QloraAdapterLM.create_from_arg_obj)
    monkeypatch.setattr(QloraAdapterLM, "create_from_arg_obj", load)
    assert cli.main(words) == 0
    assert load.call_count == 1
    run = load_run("4bit")
    recorded = {read_file(path).record.model.base for path in Path("4bit").rglob("results_*.json")}
    assert len(recorded) == 1
    assert recorded.isdisjoint({"4bit/adapter", None})  # the base, not the adapter
    compared = ("truthfulqa_mc1", "truthfulqa_mc2", "gsm8k", "own")
    assert set(run.tasks) == {"mmlu_qlora_demo", *compared}
    assert len(list((tmp_path / "4bit" / "lm_eval").rglob("results_*.json"))) == 4
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("lm_eval ")]
    names = [command[command.index("--tasks") + 1] for command in commands]
    assert names == ["truthfulqa_mc1,truthfulqa_mc2", "gsm8k", "own", "mmlu_qlora_demo"]

    shutil.move("4bit/lm_eval", "ours")
    for command in commands[:3]:
        monkeypatch.setattr("sys.argv", command)
        cli_evaluate()
    for task in compared:
        assert samples(Path("4bit/lm_eval"), task) == samples(Path("ours"), task)
        assert load_run("4bit").scored[task].value == run.scored[task].value
    folders = {path.parent.relative_to("4bit/lm_eval") for path in Path("4bit").rglob("samples_*")}
    assert folders == {path.parent.relative_to("ours") for path in Path("ours").rglob("results_*")}
    prompt = samples(Path("ours"), "gsm8k")[0]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.count("Question:") == 6
    assert all(row["question"] in prompt for row in PROBLEMS[:6])


def test_a_projection_generates_one_batch(
    own_adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def answers(self: HFLM, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        counts.append(len(requests))
        time.sleep(0.5)
        return [""] * len(requests)

    monkeypatch.setattr(QloraAdapterLM, "generate_until", answers, raising=False)
    arguments = {"peft": str(own_adapter), "results_dir": str(tmp_path)}
    scorer = InProcessScorer([("gsm8k",)], 1, str(data))
    began = time.perf_counter()
    projected = scorer.project(arguments)
    assert counts == [1]  # of 2 problems
    assert projected > time.perf_counter() - began + 0.4


def test_truthfulqa_in_one_pack_equals_lm_eval_and_computes_each_prefix_once(
    make_lm: MakeLm, tiny_llama: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [r for n in (1, 2) for r in requests_of(f"truthfulqa_mc{n}", data)]
    assert len(requests) == 12  # of 8 texts
    packs = []
    start = PackedModel.start

    def counted(self: PackedModel, pack: Any, *options: Any) -> Any:
        packs.append(pack)
        return start(self, pack, *options)

    monkeypatch.setattr(PackedModel, "start", counted)
    lm = make_lm(quant="bf16")
    scores = lm.loglikelihood(requests, disable_tqdm=True)
    hflm = HFLM(str(tiny_llama), dtype="float32", device="cpu", batch_size=1)
    expected = hflm.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert [x for x, _ in scores] == pytest.approx([x for x, _ in expected], abs=1e-4)
    prefixes = {
        prefix
        for request in requests
        for prefix in accumulate(
            [(token,) for token in lm.tok_encode("".join(request.args))[:-1]], lambda a, b: a + b
        )
    }
    assert [len(pack.tokens) for pack in packs] == [len(prefixes)]
    lengths = [len(lm.tok_encode("".join(r.args), add_special_tokens=False)) for r in requests]
    assert len(prefixes) < sum(lengths) / 6


def test_the_metrics_of_truthfulqa_are_those_of_its_log_probabilities(
    make_lm: MakeLm, data: Path
) -> None:
    lm = make_lm()
    for number, name in ((1, "mc1_targets"), (2, "mc2_targets")):
        task = f"truthfulqa_mc{number}"
        loaded = check_tasks([task], str(data)).load([task])["tasks"][task]
        for doc, question in zip(loaded.validation_docs(), QUESTIONS, strict=True):
            labels: dict[str, int] = question[name]
            assert doc[name] == {"choices": list(labels), "labels": list(labels.values())}
            context = loaded.fewshot_context(doc, 0)
            pairs = [(context, f" {choice}") for choice in labels]
            asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
            scores = lm.loglikelihood(asked, disable_tqdm=True)
            shares = [math.exp(logprob) for logprob, _ in scores]
            true = sum(p for p, label in zip(shares, labels.values(), strict=True) if label)
            expected = true / sum(shares) if number == 2 else float(shares[0] == max(shares))
            assert loaded.process_results(doc, scores)["acc"] == pytest.approx(expected)


def test_data_have_the_form_of_the_hub(data: Path) -> None:
    problems = load_local(local_task="gsm8k", data_dir=str(data))
    assert list(problems["train"]) == PROBLEMS[:5]
    assert list(problems["test"]) == PROBLEMS[5:]
    prompts = list(load_local(local_task="ifeval", data_dir=str(data))["train"])
    empty = {"relation": None, "num_words": None}
    assert prompts[0] == {**PROMPTS[0], "kwargs": [empty]}
    assert prompts[1] == {**PROMPTS[1], "kwargs": [empty, PROMPTS[1]["kwargs"][1]]}


def test_ifeval_reads_files(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("langdetect", reason="lm_eval's ifeval needs it")
    pytest.importorskip("immutabledict", reason="lm_eval's ifeval needs it")
    monkeypatch.setattr("nltk.download", lambda name: False)
    task = check_tasks(["ifeval"], str(data)).load(["ifeval"])["tasks"]["ifeval"]
    docs = list(task.test_docs())
    scores = [task.process_results(doc, ["No comma."]) for doc in docs]
    assert [score["prompt_level_strict_acc"] for score in scores] == [True, False]
    assert scores[1]["inst_level_strict_acc"] == [True, False]


class _Prompts:
    """A task with one instruction, whose check splits sentences."""

    def test_docs(self) -> Iterator[dict[str, Any]]:
        yield {"key": 7, "instruction_id_list": ["length_constraints:number_sentences"]}

    def process_results(self, doc: dict[str, Any], texts: list[str]) -> None:
        pass


def test_an_instruction_without_a_check_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(self: _Prompts, doc: dict[str, Any], texts: list[str]) -> None:
        raise KeyError("length:lines")

    monkeypatch.setattr(_Prompts, "process_results", unknown)
    message = refused(lambda: check_ifeval(_Prompts()), DataError)
    assert "prompt 7" in message
    assert "length:lines" in message


def test_true_choices_come_first(data: Path) -> None:
    # lm_eval takes the first choice of mc1 for the true one.
    choices = {"Yes.": 0, "No.": 1, "At night.": 0}
    rows = [{"question": "Do cats fly?", "mc1_targets": choices, "mc2_targets": choices}]
    (data / "truthfulqa" / "mc_task.json").write_text(json.dumps(rows))
    (row,) = load_local(local_task="truthfulqa_mc1", data_dir=str(data))["validation"]
    expected = {"choices": ["No.", "Yes.", "At night."], "labels": [1, 0, 0]}
    assert row["mc1_targets"] == row["mc2_targets"] == expected


def test_missing_data_of_nltk_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    assert "NLTK_DATA" in refused(lambda: check_ifeval(_Prompts()), SettingsError)
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)
    check_ifeval(_Prompts())


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("gsm8k/test.jsonl", None, ["gsm8k/test.jsonl", "does not exist"]),
        ("gsm8k/test.jsonl", "", ["gsm8k/test.jsonl", "no row"]),
        ("gsm8k/test.jsonl", '{"question": "a"}', ["line 1", "answer"]),
        ("gsm8k/train.jsonl", '{"question": "a"', ["line 1", "JSON"]),
        ("truthfulqa/mc_task.json", '[{"question": "a", "mc1_targets": []}]', ["row 1", "mc1"]),
        (
            "truthfulqa/mc_task.json",
            '[{"question": "a", "mc1_targets": {"b": 1, "c": 1}, "mc2_targets": {"b": 1}}]',
            ["row 1", "mc1_targets"],
        ),
        (
            "truthfulqa/mc_task.json",
            '[{"question": "a", "mc1_targets": {"b": 1}, "mc2_targets": {"b": 0}}]',
            ["row 1", "mc2_targets"],
        ),
        ("ifeval/input_data.jsonl", '{"key": "x"}', ["line 1", "key"]),
        ("ifeval/input_data.jsonl", "".join(map(PROMPT.format, ("1", '"x"'))), ["'x'"]),
    ],
)
def test_files_of_another_form_are_refused(
    data: Path, name: str, text: str | None, parts: list[str]
) -> None:
    (data / name).unlink() if text is None else (data / name).write_text(text)
    task = {"truthfulqa": "truthfulqa_mc1"}.get(name.split("/")[0], name.split("/")[0])
    message = refused(lambda: load_local(local_task=task, data_dir=str(data)), DataError)
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--suite", "mmlu_qlora_demo,gsm9k"], ["--suite", "'gsm9k'", "'gsm8k'"]),
        (["--suite", "truthfulqa,truthfulqa_mc2"], ["--suite", "truthfulqa_mc2"]),
        (["--suite", "gsm8k", "--data-dir", "nowhere"], ["nowhere/gsm8k/train.jsonl"]),
        (["--suite", "gsm8k,"], ["--suite", "empty"]),
        (["--suite", "gsm8k", "--data-dir", "few"], ["gsm8k", "5", "3"]),
        (["--suite", "gsm8k", "--batch-size", "0"], ["--batch-size", "0"]),
        (["--suite", "hellaswag"], ["--suite", "hellaswag"]),  # no network
        (["--suite", "gsm8k", "--include-path", "nowhere"], ["--include-path", "nowhere"]),
    ],
)
def test_mistakes_are_noticed_before_the_model_is_loaded(
    own_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    few = write_task_data(tmp_path / "few") / "gsm8k" / "train.jsonl"
    few.write_text("".join(f"{json.dumps(row)}\n" for row in PROBLEMS[:3]))
    monkeypatch.setattr(QloraAdapterLM, "__init__", None)
    assert cli.main(["score", "4bit", *words]) == HarnessError.exit_status
    (line,) = [s for s in capsys.readouterr().err.splitlines() if "error: " in s]
    assert all(part in line for part in parts)


def test_a_folder_without_an_adapter_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["score", str(tmp_path), "--suite", "gsm8k"]) == HarnessError.exit_status
    assert str(tmp_path) in capsys.readouterr().err


def test_the_run_may_be_the_working_folder(
    own_adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "4bit")
    monkeypatch.setattr(QloraAdapterLM, "create_from_arg_obj", Mock())
    monkeypatch.setattr(InProcessScorer, "_evaluate", Mock(side_effect=SettingsError("a", "b")))
    words = ["score", ".", "--suite", "gsm8k", "--data-dir", "../data"]
    assert cli.main(words) == HarnessError.exit_status


def test_a_study_takes_the_same_names() -> None:
    names = ["mmlu", "truthfulqa", "arc_easy"]
    tasks = ("mmlu_qlora_5shot", "truthfulqa_mc1", "truthfulqa_mc2", "arc_easy")
    assert [task for part in benchmarks(names, "--suite") for task in part] == list(tasks)
    content = {"arms": {"nf4": {"quant": "nf4"}}, "tasks": ",".join(names), "data_dir": "files"}
    study = build_study(content, {})
    assert study.tasks == tasks
    assert study.commands(study.cells[0])[1].endswith("--metadata data_dir=files")

"""Our tasks in lm-eval's index: which names there are, what they ask, and that nothing else moved.

The index of all built-in tasks takes lm-eval many seconds to read; it is made once (`full_index`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval.tasks
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind, TaskIndex

from qlora_harness.families import families
from qlora_harness.score import task_index
from qlora_harness.score.mmlu_files import DEMO_FILE, load_questions
from qlora_harness.score.task_index import extend_index, task_entries

BUILT_IN = Path(lm_eval.tasks.__file__).parent

FILES = {
    "mmlu_qlora_5shot": "five_shot_mmlu_test.json",
    "mmlu_qlora_5shot_val": "five_shot_mmlu_val.json",
    "mmlu_qlora_0shot": "zero_shot_mmlu_test.json",
    "mmlu_qlora_0shot_val": "zero_shot_mmlu_val.json",
    "mmlu_qlora_demo": "five_shot_mmlu_demo.json",
}
CATEGORIES = ["stem", "humanities", "social_sciences", "other"]
DEMO_SUBJECTS = {
    "stem": [
        "astronomy",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_computer_science",
    ],
    "humanities": ["world_religions"],
    "social_sciences": ["high_school_geography"],
    "other": ["miscellaneous", "nutrition"],
}


class FullIndex(NamedTuple):
    """What lm-eval found by itself, and what a user's TaskManager holds."""

    stock: dict[str, Any]
    manager: TaskManager


@pytest.fixture(scope="module")
def full_index() -> FullIndex:
    seen: list[dict[str, Any]] = []

    def note_and_extend(index: dict[str, Any], paths: Any) -> dict[str, Any]:
        seen.append(dict(index))
        return extend_index(index, paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_index, "extend_index", note_and_extend)
        manager = TaskManager()
    assert len(seen) == 1
    return FullIndex(seen[0], manager)


@pytest.fixture
def quick_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets lm-eval read only its stock MMLU of all its folders, which takes a second."""
    walk: Callable[[Path], Any] = TaskIndex._iter_yaml_files

    def few(root: Path) -> Any:
        return (
            sorted((root / "mmlu" / "default").glob("*.yaml")) if root == BUILT_IN else walk(root)
        )

    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(few))


@pytest.fixture
def manager(quick_index: None) -> TaskManager:
    return TaskManager()


class Recorder(LM):
    """Notes what it is asked and answers that "B" is likeliest."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(-1.0 if request.args[1] == " B" else -2.0, False) for request in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError


def test_index_holds_our_names_and_all_of_lm_evals(full_index: FullIndex) -> None:
    index = full_index.manager.task_index
    ours = set(index) - set(full_index.stock)
    expected = set(FILES)
    for family in FILES:
        expected |= {f"{family}_{category}" for category in CATEGORIES}
        expected |= {
            f"{family}_{subject}"
            for members in families()[family]["categories"].values()
            for subject in members
        }
    assert ours == expected
    assert len(ours) == 5 * (1 + 4) + 4 * 57 + 8
    assert len(full_index.stock) > 10_000
    assert all(index[name] is entry for name, entry in full_index.stock.items())


def test_groups_and_tasks_are_listed_as_such(full_index: FullIndex) -> None:
    manager = full_index.manager
    groups = {name for name in manager.all_groups if name.startswith("mmlu_qlora")}
    tasks = {name for name in manager.all_subtasks if name.startswith("mmlu_qlora")}
    assert groups == set(FILES) | {f"{family}_{c}" for family in FILES for c in CATEGORIES}
    assert len(tasks) == 4 * 57 + 8
    assert manager.match_tasks(["mmlu_qlora_demo*"]) == sorted(
        name for name in groups | tasks if name.startswith("mmlu_qlora_demo")
    )


def test_categories_are_those_of_lm_evals_own_mmlu(full_index: FullIndex) -> None:
    index = full_index.stock
    stock = {
        category: sorted(
            name.removeprefix("mmlu_")
            for tag in index[f"mmlu_{category}"].cfg["task"]
            for name in index[tag].tags
        )
        for category in CATEGORIES
    }
    assert sum(map(len, stock.values())) == 57
    for family in list(FILES)[:4]:
        ours = families()[family]["categories"]
        assert {category: sorted(subjects) for category, subjects in ours.items()} == stock
    assert families()["mmlu_qlora_demo"]["categories"] == DEMO_SUBJECTS
    for category, subjects in DEMO_SUBJECTS.items():
        assert set(subjects) <= set(stock[category])


def test_stock_mmlu_is_untouched(full_index: FullIndex) -> None:
    index = full_index.manager.task_index
    assert index["mmlu"].cfg["task"] == [
        "mmlu_stem",
        "mmlu_other",
        "mmlu_social_sciences",
        "mmlu_humanities",
    ]
    assert index["mmlu_anatomy"].cfg["dataset_path"] == "cais/mmlu"
    assert index["mmlu_anatomy"].yaml_path == BUILT_IN / "mmlu" / "default" / "mmlu_anatomy.yaml"
    for entry in full_index.stock.values():
        assert not any(tag.startswith("mmlu_qlora") for tag in entry.tags)


@pytest.mark.parametrize("family", FILES)
def test_groups_contain_categories_and_categories_subjects(family: str) -> None:
    entries = task_entries()
    assert entries[family].kind is Kind.GROUP
    assert entries[family].cfg["task"] == [f"{family}_{category}" for category in CATEGORIES]
    subjects = []
    for category in CATEGORIES:
        entry = entries[f"{family}_{category}"]
        assert entry.kind is Kind.GROUP
        assert entry.cfg["group_alias"] == category
        subjects += [name.removeprefix(f"{family}_") for name in entry.cfg["task"]]
    assert len(subjects) == len(set(subjects)) == (8 if family == "mmlu_qlora_demo" else 57)
    for subject in subjects:
        entry = entries[f"{family}_{subject}"]
        assert entry.kind is Kind.TASK
        assert entry.cfg["task"] == f"{family}_{subject}"
        assert entry.cfg["task_alias"] == subject
        assert entry.cfg["dataset_kwargs"] == {
            "mmlu_file": FILES[family],
            "mmlu_subject": subject,
        }


def test_every_validation_subject_loads_by_name_and_asks_verbatim(
    manager: TaskManager, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_MMLU_DIR", str(shared_data / "mmlu"))
    subjects = [s for c in families()["mmlu_qlora_5shot_val"]["categories"].values() for s in c]
    tasks = manager.load([f"mmlu_qlora_5shot_val_{s}" for s in subjects])["tasks"]
    rows = load_questions("five_shot_mmlu_val.json")
    found = {}
    for task in tasks.values():
        assert task.get_config("num_fewshot") == 0
        for doc in task.test_docs():
            assert task.doc_to_choice(doc) == ["A", "B", "C", "D"]
            found[doc["index"]] = (
                task.config.task.removeprefix("mmlu_qlora_5shot_val_"),
                task.doc_to_text(doc),
                "ABCD"[int(task.doc_to_target(doc))],
            )
    assert found == {q.index: (q.subject, q.prompt, q.answer) for q in rows}
    assert len(tasks) == 57
    assert len(found) == 1531


def test_test_subject_is_read_from_xz_by_metadata(quick_index: None, shared_data: Path) -> None:
    manager = TaskManager(metadata={"mmlu_dir": str(shared_data / "mmlu"), "pretrained": "x"})
    task = manager.load("mmlu_qlora_5shot_anatomy")["tasks"]["mmlu_qlora_5shot_anatomy"]
    assert len(task.test_docs()) == 135


@pytest.mark.parametrize("num_fewshot", [None, 5])
def test_model_is_asked_the_prompts_of_the_file_and_nothing_else(
    manager: TaskManager, num_fewshot: int | None
) -> None:
    model = Recorder()
    results = simple_evaluate(
        model=model,
        tasks=["mmlu_qlora_demo"],
        num_fewshot=num_fewshot,  # can't add shots: they are in the text already
        task_manager=manager,
        bootstrap_iters=0,
    )
    questions = load_questions(DEMO_FILE)
    assert sorted(model.asked) == sorted((q.prompt, f" {x}") for q in questions for x in "ABCD")
    assert set(results["n-shot"].values()) == {0}
    right = [q.answer == "B" for q in questions]
    assert results["results"]["mmlu_qlora_demo"]["acc,none"] == pytest.approx(sum(right) / 96)
    assert results["results"]["mmlu_qlora_demo"]["acc_macro,none"] == pytest.approx(sum(right) / 96)


def test_group_averages_by_question_and_by_subject(manager: TaskManager) -> None:
    chosen = {f"mmlu_qlora_demo_{s}": [0] for c in DEMO_SUBJECTS.values() for s in c}
    chosen["mmlu_qlora_demo_nutrition"] = list(range(12))
    results = simple_evaluate(
        model=Recorder(),
        tasks=["mmlu_qlora_demo"],
        samples=chosen,
        task_manager=manager,
        bootstrap_iters=0,
    )["results"]
    right: dict[str, list[bool]] = {}
    for q in load_questions(DEMO_FILE):
        right.setdefault(q.subject, []).append(q.answer == "B")
    counted = {s: right[s] if s == "nutrition" else right[s][:1] for s in right}
    micro = sum(map(sum, counted.values())) / (7 + 12)
    macro = sum(sum(values) / len(values) for values in counted.values()) / 8
    assert micro != macro
    assert results["mmlu_qlora_demo"]["acc,none"] == pytest.approx(micro, abs=1e-12)
    assert results["mmlu_qlora_demo"]["acc_macro,none"] == pytest.approx(macro, abs=1e-12)
    other = [right["miscellaneous"][:1], right["nutrition"]]
    assert results["mmlu_qlora_demo_other"]["acc,none"] == pytest.approx(
        sum(map(sum, other)) / 13, abs=1e-12
    )
    assert results["mmlu_qlora_demo_other"]["acc_macro,none"] == pytest.approx(
        (sum(other[0]) + sum(other[1]) / 12) / 2, abs=1e-12
    )


def test_users_include_path_wins(quick_index: None, tmp_path: Path) -> None:
    own = tmp_path / "anatomy.yaml"
    own.write_text("task: mmlu_qlora_5shot_anatomy\noutput_type: generate_until\n")
    index = TaskManager(include_path=str(tmp_path)).task_index
    assert index["mmlu_qlora_5shot_anatomy"].yaml_path == own
    assert index["mmlu_qlora_5shot_virology"].yaml_path is None
    assert "mmlu_anatomy" in index


def test_manager_without_the_built_in_tasks_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\noutput_type: generate_until\n")
    assert TaskManager(include_defaults=False).all_tasks == []
    only_mine = TaskManager(include_defaults=False, include_path=str(tmp_path))
    assert only_mine.all_tasks == ["mine"]


def test_hint_about_metadata_is_hidden_for_our_tasks_only(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="lm_eval.api.task"):
        manager.load("mmlu_qlora_demo")
        logging.getLogger("lm_eval.api.task").warning(
            "another: Custom kwargs can be passed to `--metadata`"
        )
    hints = [r.getMessage() for r in caplog.records if "Custom kwargs" in r.getMessage()]
    assert hints == ["another: Custom kwargs can be passed to `--metadata`"]


def test_task_configuration_can_be_stored(manager: TaskManager) -> None:
    task = manager.load("mmlu_qlora_demo_nutrition")["tasks"]["mmlu_qlora_demo_nutrition"]
    dumped = json.loads(json.dumps(task.dump_config(), default=str))
    assert dumped["task"] == "mmlu_qlora_demo_nutrition"
    assert dumped["num_fewshot"] == 0
    assert dumped["target_delimiter"] == " "
    assert dumped["dataset_kwargs"]["mmlu_subject"] == "nutrition"

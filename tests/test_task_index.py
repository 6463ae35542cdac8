"""Our tasks in lm_eval's index: their names and prompts, and lm_eval's own, from a cache.

The index of all built-in tasks takes lm_eval many seconds to read; it is made once (`full_index`).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval.tasks
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex

from qlora_harness.errors import DataError
from qlora_harness.lm_eval_compat import tasks as compat_tasks
from qlora_harness.lm_eval_compat.index_cache import cached_index, cached_structure
from qlora_harness.lm_eval_compat.tasks import extend_index, task_entries
from qlora_harness.locations import demo_dir
from qlora_harness.schema.mmlu import families
from qlora_harness.score import mmlu_files
from qlora_harness.score.mmlu_files import DEMO_FILE, load_questions

BUILT_IN = Path(lm_eval.tasks.__file__).parent
VAL = "five_shot_mmlu_val.json"
FILES = {
    "mmlu_qlora_5shot": "five_shot_mmlu_test.json",
    "mmlu_qlora_5shot_val": VAL,
    "mmlu_qlora_0shot": "zero_shot_mmlu_test.json",
    "mmlu_qlora_0shot_val": "zero_shot_mmlu_val.json",
    "mmlu_qlora_demo": DEMO_FILE,
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
    """What lm_eval reads by itself, and what a user's TaskManager holds."""

    stock: dict[str, Any]
    manager: TaskManager


@pytest.fixture(scope="module")
def full_index() -> FullIndex:
    seen: list[dict[str, Any]] = []

    def note_and_extend(index: dict[str, Any], paths: Any) -> dict[str, Any]:
        seen.append(dict(index))
        return extend_index(index, paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat_tasks, "extend_index", note_and_extend)
        manager = TaskManager()
    (stock,) = seen
    return FullIndex(stock, manager)


@pytest.fixture
def quick_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets lm_eval read only its stock MMLU of all its folders, which takes a second."""
    walk: Callable[[Path], Any] = TaskIndex._iter_yaml_files

    def few(root: Path) -> Any:
        stock = sorted((root / "mmlu" / "default").glob("*.yaml"))
        return stock if root == BUILT_IN else walk(root)

    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(few))


@pytest.fixture
def manager(quick_index: None) -> TaskManager:
    return TaskManager()


class Recorder(LM):  # type: ignore[misc]
    """Notes the requests and answers that "B" is likeliest."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[str, str]] = []

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.pairs += [request.args for request in requests]
        return [(-1.0 if request.args[1] == " B" else -2.0, False) for request in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError


# Names and groups


def test_index_holds_our_names_and_all_of_lm_evals(full_index: FullIndex) -> None:
    index, stock = full_index.manager.task_index, full_index.stock
    groups = set(FILES) | {f"{family}_{c}" for family in FILES for c in CATEGORIES}
    tasks = {
        f"{family}_{subject}"
        for family in FILES
        for subjects in families()[family]["categories"].values()
        for subject in subjects
    }
    assert set(index) - set(stock) == groups | tasks
    assert (len(groups), len(tasks)) == (5 * (1 + 4), 4 * 57 + 8)
    assert len(stock) > 10_000
    assert all(index[name] is entry for name, entry in stock.items())
    assert not any(tag.startswith("mmlu_qlora") for e in stock.values() for tag in e.tags)
    assert index["mmlu_anatomy"].yaml_path == BUILT_IN / "mmlu" / "default" / "mmlu_anatomy.yaml"
    manager = full_index.manager
    assert {n for n in manager.all_groups if n.startswith("mmlu_qlora")} == groups
    assert {n for n in manager.all_subtasks if n.startswith("mmlu_qlora")} == tasks
    demo = sorted(name for name in groups | tasks if name.startswith("mmlu_qlora_demo"))
    assert manager.match_tasks(["mmlu_qlora_demo*"]) == demo


def test_categories_are_those_of_lm_evals_own_mmlu(full_index: FullIndex) -> None:
    index = full_index.stock
    stock = {
        category: sorted(
            name.removeprefix("mmlu_")
            for tag in TaskFactory()._load_full_config(index[f"mmlu_{category}"])["task"]
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


@pytest.mark.parametrize("family", FILES)
def test_groups_contain_categories_and_categories_subjects(family: str) -> None:
    entries = task_entries()
    assert entries[family].kind is Kind.GROUP
    assert entries[family].cfg["task"] == [f"{family}_{category}" for category in CATEGORIES]
    subjects = []
    for category in CATEGORIES:
        entry = entries[f"{family}_{category}"]
        assert (entry.kind, entry.cfg["group_alias"]) == (Kind.GROUP, category)
        subjects += [name.removeprefix(f"{family}_") for name in entry.cfg["task"]]
    assert len(subjects) == len(set(subjects)) == (8 if family == "mmlu_qlora_demo" else 57)
    for subject in subjects:
        entry = entries[f"{family}_{subject}"]
        assert entry.kind is Kind.TASK
        assert entry.cfg["task"] == f"{family}_{subject}"
        assert entry.cfg["task_alias"] == subject
        arguments = {"mmlu_file": FILES[family], "mmlu_subject": subject}
        assert entry.cfg["dataset_kwargs"] == arguments


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


# Prompts and metrics


def test_every_validation_subject_loads_by_name_and_asks_verbatim(
    manager: TaskManager, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_MMLU_DIR", str(shared_data / "mmlu"))
    subjects = [s for c in families()["mmlu_qlora_5shot_val"]["categories"].values() for s in c]
    tasks = manager.load([f"mmlu_qlora_5shot_val_{s}" for s in subjects])["tasks"]
    questions = {}
    for task in tasks.values():
        assert task.get_config("num_fewshot") == 0
        for doc in task.test_docs():
            assert task.doc_to_choice(doc) == ["A", "B", "C", "D"]
            questions[doc["index"]] = (
                task.config.task.removeprefix("mmlu_qlora_5shot_val_"),
                task.doc_to_text(doc),
                "ABCD"[int(task.doc_to_target(doc))],
            )
    rows = load_questions(VAL)
    assert questions == {q.index: (q.subject, q.prompt, q.answer) for q in rows}
    assert (len(tasks), len(questions)) == (57, 1531)


@pytest.mark.parametrize("num_fewshot", [None, 5])
def test_requests_are_the_prompts_of_the_file_and_nothing_else(
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
    assert sorted(model.pairs) == sorted((q.prompt, f" {x}") for q in questions for x in "ABCD")
    assert set(results["n-shot"].values()) == {0}
    right = sum(q.answer == "B" for q in questions) / 96
    for metric in ("acc,none", "acc_macro,none"):
        assert results["results"]["mmlu_qlora_demo"][metric] == pytest.approx(right)


def test_group_averages_by_question_and_by_subject(manager: TaskManager) -> None:
    chosen = {f"mmlu_qlora_demo_{s}": [0] for c in DEMO_SUBJECTS.values() for s in c}
    chosen["mmlu_qlora_demo_nutrition"] = list(range(12))
    results = simple_evaluate(
        model=Recorder(), tasks=["mmlu_qlora_demo"], samples=chosen, task_manager=manager,
        bootstrap_iters=0,
    )["results"]  # fmt: skip
    right: dict[str, list[bool]] = {}
    for q in load_questions(DEMO_FILE):
        right.setdefault(q.subject, []).append(q.answer == "B")
    counted = {s: right[s] if s == "nutrition" else right[s][:1] for s in right}

    def check(name: str, subjects: list[str]) -> None:
        parts = [counted[s] for s in subjects]
        micro = sum(map(sum, parts)) / sum(map(len, parts))
        macro = sum(sum(part) / len(part) for part in parts) / len(parts)
        assert micro != macro
        assert results[name]["acc,none"] == pytest.approx(micro, abs=1e-12)
        assert results[name]["acc_macro,none"] == pytest.approx(macro, abs=1e-12)

    check("mmlu_qlora_demo", list(counted))
    check("mmlu_qlora_demo_other", ["miscellaneous", "nutrition"])


def test_hint_about_metadata_is_hidden_for_our_tasks_only(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    other = "another: Custom kwargs can be passed to `--metadata`"
    with caplog.at_level(logging.WARNING, logger="lm_eval.api.task"):
        manager.load("mmlu_qlora_demo")
        logging.getLogger("lm_eval.api.task").warning(other)
    assert [m for m in caplog.messages if "Custom kwargs" in m] == [other]


def test_task_configuration_can_be_stored(manager: TaskManager) -> None:
    task = manager.load("mmlu_qlora_demo_nutrition")["tasks"]["mmlu_qlora_demo_nutrition"]
    dumped = json.loads(json.dumps(task.dump_config(), default=str))
    assert dumped["task"] == "mmlu_qlora_demo_nutrition"
    assert (dumped["num_fewshot"], dumped["target_delimiter"]) == (0, " ")
    assert dumped["dataset_kwargs"]["mmlu_subject"] == "nutrition"


# MMLU files, read before a model is loaded


@pytest.fixture
def process_tasks(no_mmlu_files: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What the command lm_eval does before it loads a model, without YAML of its own."""
    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(lambda root: []))

    def process(tasks: str, **metadata: Any) -> None:
        config = EvaluatorConfig(tasks=tasks.split(","), metadata=metadata)
        config.process_tasks(config.metadata)

    return process


def test_a_wrong_folder_is_refused_as_soon_as_the_tasks_are_known(
    process_tasks: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"^--metadata mmlu_dir: folder /no/such/folder does not"):
        process_tasks("mmlu_qlora_5shot", mmlu_dir="/no/such/folder")
    with pytest.raises(DataError, match=f"holds neither {VAL} nor {VAL}.xz"):
        process_tasks("mmlu_qlora_5shot_val_stem", mmlu_dir=str(tmp_path))
    monkeypatch.setenv("QLORA_MMLU_DIR", "/no/such/folder")
    with pytest.raises(DataError, match=r"^QLORA_MMLU_DIR: folder /no/such/folder does not exist"):
        process_tasks("mmlu_qlora_demo,mmlu_qlora_5shot_val_anatomy")
    process_tasks("mmlu_qlora_demo")  # which is in no folder
    mine = tmp_path / "mine.yaml"
    mine.write_text("task: mine\noutput_type: generate_until\n")
    process_tasks(str(mine))


def test_a_file_that_was_read_is_not_read_again_by_its_tasks(
    process_tasks: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = (demo_dir() / DEMO_FILE).read_bytes()
    (tmp_path / VAL).write_bytes(content)
    pin = mmlu_files.PinnedFile(hashlib.sha256(content).hexdigest(), 96)
    monkeypatch.setitem(mmlu_files.PINNED, VAL, pin)
    metadata = {"mmlu_dir": str(tmp_path)}
    process_tasks("mmlu_qlora_5shot_val", **metadata)
    assert mmlu_files._read.cache_info().misses == 1
    loaded = TaskManager(metadata=metadata).load("mmlu_qlora_5shot_val_nutrition")["tasks"]
    assert len(loaded["mmlu_qlora_5shot_val_nutrition"].test_docs()) == 12
    assert mmlu_files._read.cache_info().misses == 1


# The cache of lm_eval's own index

Index = dict[str, Entry]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for lm_eval/tasks; the user's cache is beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tasks" / "arc").mkdir(parents=True)
    (tmp_path / "tasks" / "arc" / "arc.yaml").write_text("task: arc\n")
    return tmp_path / "tasks"


def small_index(**cfg: Any) -> Index:
    path = Path("/x/arc.yaml")
    return {
        "arc": Entry("arc", Kind.TASK, path, {"task": "arc"}, {"t"}),
        "inline": Entry("inline", Kind.TASK, None, {"task": "inline", "n": [1, 2.5, None], **cfg}),
        "t": Entry("t", Kind.TAG, None, None, {"arc"}),
        "group": Entry("group", Kind.GROUP, path, {"group": "group", "task": ["arc"]}, set()),
    }


def builds(folder: Path, index: Index, times: int = 1) -> int:
    """How many builds `times` calls take."""
    calls: list[int] = []

    def build() -> Index:
        calls.append(1)
        return index

    for _ in range(times):
        cached = cached_index(folder, build)
        assert cached == {n: replace(e, cfg=None) if e.yaml_path else e for n, e in index.items()}
        assert list(cached) == list(index)
    return len(calls)


def cached_files(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache" / "qlora-harness" / "task-index").glob("*"))


@pytest.mark.parametrize(
    "change",
    [
        lambda arc: (arc / "arc.yaml").write_text("task: arc2\n"),
        lambda arc: os.utime(arc / "arc.yaml", ns=(1, 1)),
        lambda arc: (arc / "_template_yaml").write_text("a: 1\n"),
        lambda arc: (arc / "arc.yaml").rename(arc / "b.yaml"),
        lambda arc: (arc / "arc.yaml").unlink(),
    ],
)
def test_index_is_built_anew_only_after_a_change_of_a_file(
    folder: Path, change: Callable[[Path], Any]
) -> None:
    assert builds(folder, small_index(), 3) == 1
    change(folder / "arc")
    assert builds(folder, small_index(), 2) == 1
    assert len(cached_files(folder)) == 1


def test_lm_eval_reads_the_yaml_of_a_task_again(manager: TaskManager) -> None:
    entry = manager.task_index["mmlu_anatomy"]
    configs = [
        TaskFactory()._load_full_config(replace(entry, cfg=cfg)) for cfg in (None, {"task": "x"})
    ]
    assert configs[0] == configs[1]
    assert configs[0]["task"] == "mmlu_anatomy"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', '{"arc": {}}'])
def test_damaged_cache_is_passed_over(folder: Path, content: str) -> None:
    builds(folder, small_index())
    (path,) = cached_files(folder)
    path.write_text(content)
    assert builds(folder, small_index(), 2) == 1


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), {1: "a"}, (1, 2), {3}])
def test_what_json_would_change_is_not_cached(folder: Path, value: Any) -> None:
    assert builds(folder, small_index(odd=value), 2) == 2
    assert cached_files(folder) == []


def test_cache_that_cannot_be_written_does_no_harm(folder: Path) -> None:
    (folder.parent / "cache").write_text("a file in the way")
    assert builds(folder, small_index()) == 1


def test_index_that_lacks_most_files_is_not_cached(folder: Path) -> None:
    for n in range(5):
        (folder / "arc" / f"more{n}.yaml").write_text(f"task: t{n}\n")
    assert builds(folder, small_index(), 2) == 2  # four entries for six files
    assert builds(folder, {}) == 1
    assert cached_files(folder) == []


def test_import_structure_of_transformers_is_scanned_once(folder: Path) -> None:
    from transformers.utils import import_utils

    scan = import_utils.create_import_structure_from_path
    models = Path(import_utils.__file__).parents[1] / "models" / "auto"
    scanned = cached_structure(models, lambda: scan(str(models)))
    assert scanned == scan(str(models)) != {}
    (path,) = cached_files(folder)
    assert cached_structure(models, dict) == scanned
    small: dict[Any, Any] = {frozenset(): {"a": {"b"}}, frozenset({"torch"}): {}}
    path.write_text("{")
    assert cached_structure(models, lambda: small) == small

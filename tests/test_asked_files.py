"""The MMLU files that tasks need: found by the names of tasks, read before a model is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex

from qlora_harness.errors import DataError
from qlora_harness.locations import demo_dir
from qlora_harness.score import mmlu_files
from qlora_harness.score.asked_files import asked_files, read_asked_files

pytestmark = pytest.mark.usefixtures("no_mmlu_files")
TEST, VAL = "five_shot_mmlu_test.json", "five_shot_mmlu_val.json"
ZERO, DEMO = "zero_shot_mmlu_test.json", "five_shot_mmlu_demo.json"
NO_FOLDER = "folder /no/such/folder does not exist. Name the folder of the files."


@pytest.fixture
def no_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets lm-eval read no YAML of its own, which takes seconds."""
    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(lambda root: []))


def ask(tasks: str, **options: object) -> EvaluatorConfig:
    """What the command lm_eval does before it loads a model."""
    config = EvaluatorConfig(tasks=tasks.split(","), **options)
    config.process_tasks(config.metadata)
    return config


@pytest.mark.parametrize(
    ("tasks", "files"),
    [
        (["mmlu_qlora_5shot"], [TEST]),
        (["mmlu_qlora_5shot_val_stem"], [VAL]),
        (["mmlu_qlora_0shot_anatomy", "mmlu_qlora_0shot_virology"], [ZERO]),
        (
            ["mmlu_qlora_5shot_val_anatomy", "mmlu_qlora_demo", "mmlu_qlora_5shot"],
            [VAL, DEMO, TEST],
        ),
        (["hellaswag", {"task": "mine", "dataset_kwargs": {"mmlu_file": TEST}}], []),
    ],
)
def test_files_are_those_of_the_named_tasks(
    manager: TaskManager, tasks: list[object], files: list[str]
) -> None:
    assert sorted(asked_files(tasks, manager.task_index)) == sorted(files)


def test_a_users_group_and_tag_are_looked_into(manager: TaskManager) -> None:
    members = ["another", "hellaswag", "mmlu_qlora_demo", {"task": "mmlu_qlora_0shot"}]
    index = manager.task_index | {
        "mine": Entry("mine", Kind.GROUP, Path("mine.yaml"), {"group": "mine", "task": members}),
        "another": Entry("another", Kind.GROUP, None, {"task": ["mine", "tagged"]}),
        "tagged": Entry("tagged", Kind.TAG, None, None, {"mmlu_qlora_5shot_anatomy"}),
    }
    assert sorted(asked_files(["mine"], index)) == [DEMO, TEST]


def test_a_users_task_with_a_file_of_its_own_is_left_alone(manager: TaskManager) -> None:
    def entry(path: Path | None, file: object) -> Entry:
        return Entry(
            "mine", Kind.TASK, path, {"task": "mine", "dataset_kwargs": {"mmlu_file": file}}
        )

    for path, file in ((Path("mine.yaml"), TEST), (None, "my.json"), (None, [TEST])):
        assert asked_files(["mine"], manager.task_index | {"mine": entry(path, file)}) == []


def test_an_lm_eval_that_holds_its_tasks_otherwise_goes_on(no_own_tasks: None) -> None:
    """The tasks read their files themselves."""
    config = ask("mmlu_qlora_demo")
    read_asked_files(config, object())
    read_asked_files(object(), object())


def test_a_wrong_folder_is_refused_as_soon_as_the_tasks_are_known(
    no_own_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError) as error:
        ask("mmlu_qlora_5shot", metadata={"mmlu_dir": "/no/such/folder"})
    assert str(error.value) == f"--metadata mmlu_dir: {NO_FOLDER}"
    monkeypatch.setenv("QLORA_MMLU_DIR", "/no/such/folder")
    with pytest.raises(DataError) as error:
        ask("mmlu_qlora_demo,mmlu_qlora_5shot_val_anatomy")
    assert str(error.value) == f"QLORA_MMLU_DIR: {NO_FOLDER}"


def test_a_folder_without_the_asked_file_is_refused_as_well(
    no_own_tasks: None, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"holds neither {VAL} nor {VAL}.xz"):
        ask("mmlu_qlora_5shot_val", metadata={"mmlu_dir": str(tmp_path)})


def test_a_folder_that_no_asked_task_reads_does_not_matter(
    no_own_tasks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QLORA_MMLU_DIR", "/no/such/folder")
    assert len(ask("mmlu_qlora_demo").tasks) == 1
    mine = tmp_path / "mine.yaml"
    mine.write_text("task: mine\noutput_type: generate_until\n")
    assert ask(str(mine)).tasks == [{"task": "mine", "output_type": "generate_until"}]


def test_a_file_that_was_read_is_not_read_again_by_its_tasks(
    no_own_tasks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = (demo_dir() / DEMO).read_bytes()
    (tmp_path / VAL).write_bytes(content)
    pin = mmlu_files.PinnedFile(hashlib.sha256(content).hexdigest(), 96)
    monkeypatch.setitem(mmlu_files.PINNED, VAL, pin)
    ask("mmlu_qlora_5shot_val", metadata={"mmlu_dir": str(tmp_path)})
    assert mmlu_files._read.cache_info().misses == 1
    metadata = {"mmlu_dir": str(tmp_path)}
    loaded = TaskManager(metadata=metadata).load("mmlu_qlora_5shot_val_nutrition")["tasks"]
    assert len(loaded["mmlu_qlora_5shot_val_nutrition"].test_docs()) == 12
    assert mmlu_files._read.cache_info().misses == 1

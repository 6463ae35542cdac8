"""Adds our tasks to lm_eval's index, one entry per subject, from the YAML in tasks/."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import DataError, SettingsError, first_line, install_excepthook
from qlora_harness.lm_eval_compat.index_cache import cached_index
from qlora_harness.locations import tasks_dir
from qlora_harness.schema.mmlu import FOLDER, families
from qlora_harness.score.mmlu import mmlu_dir
from qlora_harness.score.mmlu_files import load_questions
from qlora_harness.score.task_data import SOURCES, load_local

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry

_INSTRUCTIONS = "instruction_id_list"  # of a prompt of IFEval
_SPLITTING = frozenset(
    {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
)


def task_entries() -> dict[str, Entry]:
    """Returns our groups and tasks by name."""
    from lm_eval.tasks._index import Entry, Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = tasks_dir() / FOLDER
    subject_config = load_yaml(folder / "_subject_yaml")
    group_config = load_yaml(folder / "_group_yaml")
    entries: dict[str, Entry] = {}

    def add_group(name: str, alias: str, members: list[str]) -> None:
        config = {**group_config, "group": name, "group_alias": alias, "task": members}
        entries[name] = Entry(name=name, kind=Kind.GROUP, yaml_path=None, cfg=config)

    for family, description in families().items():
        categories = description["categories"]
        add_group(family, family, [f"{family}_{category}" for category in categories])
        for category, subjects in categories.items():
            add_group(f"{family}_{category}", category, [f"{family}_{s}" for s in subjects])
            for subject in subjects:
                name = f"{family}_{subject}"
                config = {
                    **subject_config,
                    "task": name,
                    "task_alias": subject,
                    "dataset_kwargs": {"mmlu_file": description["file"], "mmlu_subject": subject},
                }
                entries[name] = Entry(name=name, kind=Kind.TASK, yaml_path=None, cfg=config)
    return entries


def build_index(
    build: Callable[..., dict[str, Entry]], paths: list[Path], options: dict[str, Any]
) -> dict[str, Entry]:
    """Builds an index with lm_eval's `build`, and adds our entries."""
    own = _own_folder()
    if paths == [own] and not options:
        index = cached_index(own, lambda: build(paths))
    else:
        index = build(paths, **options)
    return extend_index(index, paths)


def extend_index(index: dict[str, Entry], paths: Iterable[Path]) -> dict[str, Entry]:
    """Adds our entries in place, but only beside lm_eval's own tasks; existing names stay."""
    own = _own_folder()
    if any(Path(path) == own for path in paths):
        logging.getLogger("lm_eval.api.task").addFilter(_is_no_hint_about_our_tasks)
        for name, entry in task_entries().items():
            index.setdefault(name, entry)
    return index


def use_local_data(
    index: dict[str, Entry], tasks: Iterable[object], metadata: Mapping[str, Any]
) -> None:
    """Lets named benchmarks read the files in the folder that the metadata call data_dir, if any.

    The others stay as they are. A missing or damaged file raises DataError, and a package that a
    benchmark needs SettingsError.
    """
    from lm_eval.tasks._index import Entry
    from lm_eval.tasks._yaml_loader import load_yaml

    if "data_dir" not in metadata:
        return
    for name in [task for task in tasks if isinstance(task, str) and task in SOURCES]:
        source = {"custom_dataset": load_local, "dataset_kwargs": {"local_task": name}}
        load_local(local_task=name, data_dir=metadata["data_dir"])
        try:
            config = load_yaml(index[name].yaml_path) | source
        except ImportError as error:
            raise missing_package(name, error) from None
        index[name] = Entry(name=name, kind=index[name].kind, yaml_path=None, cfg=config)


def missing_package(task: str, error: ImportError) -> SettingsError:
    """Returns the error for a task whose own code needs another package."""
    return SettingsError(
        f"task {task}: {first_line(error)}", f"Install it, or try pip install 'lm_eval[{task}]'"
    )


def check_shots(task: Any) -> None:
    """Raises SettingsError if a task has fewer examples than it shows before each question."""
    shots = task.config.num_fewshot or 0
    if shots and (count := len(list(task.fewshot_docs()))) < shots:
        raise SettingsError(
            f"task {task.config.task}: {shots} examples come before each question, but its data "
            f"hold {count}",
            "Add some to the file of its training split",
        )


def check_ifeval(task: Any) -> None:
    """Raises DataError for an instruction that lm_eval can't check.

    Raises SettingsError if NLTK's data are missing. lm_eval would notice both after it has
    generated all answers.
    """
    import nltk

    for doc in task.test_docs():
        try:
            task.process_results(doc, [""])
        except Exception as error:  # noqa: BLE001  # each instruction's own code
            raise DataError(
                f"task ifeval: prompt {doc['key']}: {first_line(error)}",
                "Correct its instruction_id_list and kwargs",
            ) from None
    if _SPLITTING.isdisjoint(name for doc in task.test_docs() for name in doc[_INSTRUCTIONS]):
        return
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise SettingsError(
            "task ifeval: NLTK's punkt_tab is missing",
            "Run python -m nltk.downloader punkt_tab, or name the folder with it in NLTK_DATA",
        ) from None


def read_mmlu_files(tasks: Iterable[object], metadata: Mapping[str, Any]) -> None:
    """Loads the MMLU files of the named tasks; a missing or damaged file raises DataError."""
    names = {task for task in tasks if isinstance(task, str)}
    for family, description in families().items():
        categories = description["categories"]
        parts = [*categories, *(s for subjects in categories.values() for s in subjects)]
        if not names.isdisjoint([family, *(f"{family}_{part}" for part in parts)]):
            install_excepthook()
            load_questions(description["file"], mmlu_dir(**metadata))


def _own_folder() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _is_no_hint_about_our_tasks(record: logging.LogRecord) -> bool:
    """Hides lm_eval's hint for tasks with a custom_dataset, which comes 57 times per group."""
    text = record.getMessage()
    ours = text.startswith(("mmlu_qlora", *SOURCES))
    return not (ours and "Custom kwargs can be passed" in text)

"""Adds our tasks to lm_eval's index, one entry per subject, from the YAML in tasks/."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import install_excepthook
from qlora_harness.lm_eval_compat.index_cache import cached_index
from qlora_harness.locations import tasks_dir
from qlora_harness.schema.mmlu import FOLDER, families
from qlora_harness.score.mmlu_files import load_questions

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry


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


def read_mmlu_files(tasks: Iterable[object], metadata: Mapping[str, Any]) -> None:
    """Loads the MMLU files of the named tasks; a missing or damaged file raises DataError."""
    names = {task for task in tasks if isinstance(task, str)}
    for family, description in families().items():
        categories = description["categories"]
        parts = [*categories, *(s for subjects in categories.values() for s in subjects)]
        if not names.isdisjoint([family, *(f"{family}_{part}" for part in parts)]):
            install_excepthook()
            load_questions(description["file"], metadata.get("mmlu_dir"))


def _own_folder() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _is_no_hint_about_our_tasks(record: logging.LogRecord) -> bool:
    """Hides lm_eval's hint for tasks with a custom_dataset, which comes 57 times per group."""
    text = record.getMessage()
    return not (text.startswith("mmlu_qlora") and "Custom kwargs can be passed" in text)

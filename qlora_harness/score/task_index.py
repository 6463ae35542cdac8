"""From the YAML in tasks/ to lm-eval's task index: one entry a subject, without a file for each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.families import FOLDER, families
from qlora_harness.locations import tasks_dir
from qlora_harness.score.index_cache import cached_index

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry


def task_entries() -> dict[str, Entry]:
    """Returns our groups and tasks as lm-eval index entries, by name."""
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
                arguments = {"mmlu_file": description["file"], "mmlu_subject": subject}
                config = {
                    **subject_config,
                    "task": name,
                    "task_alias": subject,
                    "dataset_kwargs": arguments,
                }
                entries[name] = Entry(name=name, kind=Kind.TASK, yaml_path=None, cfg=config)
    return entries


def build_index(
    build: Callable[..., dict[str, Entry]], paths: list[Path], options: dict[str, Any]
) -> dict[str, Entry]:
    """Builds lm-eval's index with our entries; lm-eval's own part comes from a cache.

    Args:
        build: lm-eval's TaskIndex.build.
        paths: The folders it is asked to look into.
        options: Further arguments of it.
    """
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    if paths == [own] and not options:
        index = cached_index(own, lambda: build(paths))
    else:
        index = build(paths, **options)
    return extend_index(index, paths)


def extend_index(index: dict[str, Entry], paths: Iterable[Path]) -> dict[str, Entry]:
    """Adds our entries to an index that holds lm-eval's own tasks; names that exist stay.

    Args:
        index: What lm-eval found, changed in place.
        paths: The folders it looked into. An index without lm-eval's own folder (include_defaults
            False) is left alone.
    """
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    if any(Path(path) == own for path in paths):
        _quiet_dataset_hint()
        for name, entry in task_entries().items():
            index.setdefault(name, entry)
    return index


def _quiet_dataset_hint() -> None:
    """Hides a hint that lm-eval gives for every task with a custom_dataset: 57 times a group."""
    logger = logging.getLogger("lm_eval.api.task")
    if not any(getattr(f, "_qlora_harness", False) for f in logger.filters):

        def keep(record: logging.LogRecord) -> bool:
            text = record.getMessage()
            return not (text.startswith("mmlu_qlora") and "Custom kwargs can be passed" in text)

        keep._qlora_harness = True  # type: ignore[attr-defined]
        logger.addFilter(keep)

"""Reads the MMLU files that the asked tasks need before a model is loaded for them.

lm-eval builds tasks after the model: a wrong folder would be noticed after minutes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import install_excepthook
from qlora_harness.score.mmlu_files import known_files, load_questions

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry

logger = logging.getLogger("qlora_harness")


def read_asked_files(config: Any, manager: Any) -> None:
    """Reads the files of our MMLU tasks; they are kept for the tasks, which read them again.

    Of an lm-eval that holds its tasks in another way nothing is read here.

    Args:
        config: lm-eval's EvaluatorConfig, whose tasks are known.
        manager: Its TaskManager; mmlu_dir in the metadata is the folder of the files.

    Raises:
        DataError: A file is missing, can't be fetched, or is another; see `load_questions`.
    """
    try:
        names = asked_files(config.tasks, manager.task_index)
        folder = (manager.metadata or {}).get("mmlu_dir")
    except Exception as error:
        logger.debug("MMLU files are read with their tasks (%r)", error)
        return
    if names:
        install_excepthook()
    for name in names:
        load_questions(name, folder)


def asked_files(tasks: Iterable[object], index: Mapping[str, Entry]) -> list[str]:
    """Returns the names of the MMLU files that tasks need, each once.

    Only our own tasks are looked at, where they are asked for by name, also in groups of groups and
    under tags. What a user's own configuration needs is read with its task.

    Args:
        tasks: Names and configurations.
        index: lm-eval's task index.
    """
    files: dict[str, None] = {}
    seen: set[str] = set()
    pending = list(tasks)
    while pending:
        name = pending.pop(0)
        if not isinstance(name, str) or name in seen or name not in index:
            continue
        seen.add(name)
        entry = index[name]
        config = entry.cfg or {}
        members = config.get("task")  # of a task: its own name
        pending += sorted(entry.tags) if entry.kind.name == "TAG" else []
        pending += members if isinstance(members, list) else []
        arguments = config.get("dataset_kwargs")
        if entry.yaml_path is None and isinstance(arguments, Mapping):
            file = arguments.get("mmlu_file")
            if file in known_files():
                files[file] = None
    return list(files)

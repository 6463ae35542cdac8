"""Reads the MMLU files that the asked tasks need before a model is loaded for them.

lm-eval builds tasks after the model: a wrong folder would be noticed after minutes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import install_excepthook
from qlora_harness.score.mmlu_files import load_questions

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry


def read_asked_files(
    tasks: Iterable[object], index: Mapping[str, Entry], metadata: Mapping[str, Any] | None
) -> None:
    """Reads the files of our MMLU tasks; they are kept for the tasks, which read them again.

    Args:
        tasks: What lm-eval will load, names and configurations.
        index: lm-eval's task index.
        metadata: What lm-eval will give to the tasks; mmlu_dir is the folder of the files.

    Raises:
        DataError: A file is missing, can't be fetched, or is another; see `load_questions`.
    """
    names = asked_files(tasks, index)
    if names:
        install_excepthook()
    for name in names:
        load_questions(name, (metadata or {}).get("mmlu_dir"))


def asked_files(tasks: Iterable[object], index: Mapping[str, Entry]) -> list[str]:
    """Returns the names of the MMLU files that tasks need, each once.

    Only what is asked for by name is looked at, also in groups of groups and under tags. The files
    of a configuration that a user has written are read with its task.

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
        if isinstance(arguments, Mapping) and "mmlu_file" in arguments:
            files[arguments["mmlu_file"]] = None
    return list(files)

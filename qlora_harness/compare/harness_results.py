"""lm_eval's own results files, results_<time>.json: found, read and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_harness.compare import fields
from qlora_harness.compare.evaluation import (
    CATEGORIES,
    CategoryScore,
    Evaluation,
    SubjectScore,
    split_task,
)
from qlora_harness.errors import ResultsError
from qlora_harness.record import nested, read_json

# results_2026-11-24T08-14-04.277787.json; isoformat() leaves the fraction out when it is zero.
DATE_ID = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json$")
_TORCH_VERSION = re.compile(r"^PyTorch version: (.+)$", re.MULTILINE)
_GPU_NAME = re.compile(r"^(?:GPU models and configuration: )?GPU 0: (.+)$", re.MULTILINE)
# Fields of the file that are conditions of the evaluation, beside everything under "config".
_TOP_LEVEL = ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn")


@dataclass(frozen=True)
class HarnessFile:
    """One results file of lm_eval.

    Attributes:
        path: The file.
        written: The date in its name, on the clock of the machine that wrote it; "" without one.
        record: Its content.
        families: The whole MMLU families in it.
    """

    path: Path
    written: str
    record: Mapping[str, Any]
    families: tuple[str, ...]


def find_files(folder: Path) -> list[Path]:
    """Returns the harness's results files anywhere below a folder.

    Args:
        folder: For example results/4bit; lm_eval adds a level named after the model.
    """
    return sorted(path for path in folder.rglob("results_*.json") if path.is_file())


def read_file(path: Path) -> HarnessFile:
    """Reads one results file of lm_eval.

    Args:
        path: The file.

    Raises:
        ResultsError: It is unreadable or not a results file of lm_eval.
    """
    record = read_json(path)
    for key in ("results", "n-samples", "config"):
        if not isinstance(record.get(key), Mapping):
            raise ResultsError(
                f'{path}: not a results file of lm_eval (no object "{key}")',
                "Name a results_*.json, or the folder of a run; remove foreign results_*.json",
            )
    names = [split_task(task) for task in record["results"]]
    families = tuple(name[0] for name in names if name is not None and not name[1])
    date = DATE_ID.search(path.name)
    return HarnessFile(path, date[1] if date else "", record, families)


def newest(files: Sequence[HarnessFile], family: str) -> HarnessFile | None:
    """Returns the newest file, by the date in its name, that holds a family; None without any.

    Args:
        files: Results files of one run.
        family: For example mmlu_qlora_5shot.

    Raises:
        ResultsError: Two files that differ share the newest date, so that neither is the newest.
    """
    holding = sorted(
        (file for file in files if family in file.families),
        key=lambda file: file.written,
        reverse=True,
    )
    if not holding:
        return None
    rival = next(
        (
            file
            for file in holding
            if file.written == holding[0].written and file.record != holding[0].record
        ),
        None,
    )
    if rival is not None:
        raise ResultsError(
            f"{holding[0].path} and {rival.path} both hold {family} and have the same date "
            "in their names, so the newest can't be told",
            "Name one of the two files instead of the folder, or remove one",
        )
    return holding[0]


def read_evaluation(file: HarnessFile, family: str) -> Evaluation:
    """Reads one family out of a results file.

    Args:
        file: The results file; it must hold the family.
        family: For example mmlu_qlora_5shot.

    Raises:
        ResultsError: A metric or count is missing or NaN, or the file contradicts itself.
    """
    record, path = file.record, file.path
    tasks = subject_tasks(file, family)
    sizes = {
        subject: fields.count(record, path, "n-samples", task, "effective")
        for subject, task in tasks.items()
    }
    group = ("results", _full_name(file, family))
    return Evaluation(
        family=family,
        path=path,
        ended=_ended(file),
        unquantised_share=None,
        model=_model_name(record),
        random_weights=False,
        acc=fields.share(record, path, *group, "acc,none"),
        acc_stderr=fields.optional_number(record, path, *group, "acc_stderr,none"),
        acc_macro=fields.share(record, path, *group, "acc_macro,none"),
        acc_macro_stderr=fields.optional_number(record, path, *group, "acc_macro_stderr,none"),
        n=sum(sizes.values()),
        n_total=sum(
            fields.count(record, path, "n-samples", task, "original") for task in tasks.values()
        ),
        ties=None,
        truncated=None,
        prompts_sha256=None,
        subjects={
            subject: SubjectScore(
                fields.share(record, path, "results", task, "acc,none"), sizes[subject]
            )
            for subject, task in tasks.items()
        },
        categories=_read_categories(file, family),
        conditions=_read_conditions(record, family),
        notes=_read_notes(record),
    )


def _ended(file: HarnessFile) -> float | None:
    """When the evaluation ended, seconds since 1970: its start and duration stand in the file."""
    start = fields.optional_number(file.record, file.path, "date")
    try:
        duration = float(file.record.get("total_evaluation_time_seconds") or 0.0)
    except (TypeError, ValueError):
        duration = 0.0
    return None if start is None else start + duration


def _full_name(file: HarnessFile, name: str) -> str:
    """Returns a name as it stands in the file, with the groups before "::" if there are any."""
    names: Mapping[str, Any] = file.record["results"]
    return next(task for task in names if task.rsplit("::", 1)[-1] == name)


def subject_tasks(file: HarnessFile, family: str) -> dict[str, str]:
    """Returns the task name of each subject; "n-samples" lists the leaves and no groups.

    Args:
        file: The results file.
        family: For example mmlu_qlora_5shot.
    """
    tasks = {}
    for task in file.record["n-samples"]:
        name = split_task(task)
        if name is not None and name[0] == family and name[1]:
            tasks[name[1]] = task
    return tasks


def _read_categories(file: HarnessFile, family: str) -> dict[str, CategoryScore]:
    categories = {}
    for task in file.record["results"]:
        name = split_task(task)
        if name is None or name[0] != family or name[1] not in CATEGORIES:
            continue
        keys = ("results", task)
        categories[name[1]] = CategoryScore(
            fields.share(file.record, file.path, *keys, "acc,none"),
            fields.optional_number(file.record, file.path, *keys, "acc_stderr,none"),
            fields.optional_count(file.record, file.path, *keys, "sample_len"),
        )
    return categories


def _read_conditions(record: Mapping[str, Any], family: str) -> dict[str, object]:
    """Returns the settings under the names that evaluation_results.json has for them."""
    config = dict(record["config"])
    model_args = _model_args(config.pop("model_args", None))
    conditions: dict[str, object] = {
        "model.base": model_args.pop("pretrained", None),
        "model.peft": model_args.pop("peft", None),
        "settings.batch_size": _plain(config.pop("batch_size", None)),
        "settings.dtype": _plain(config.pop("model_dtype", None)),
        "settings.max_length": record.get("max_length"),
        "environment.versions.lm_eval": record.get("lm_eval_version"),
        "environment.versions.transformers": record.get("transformers_version"),
        "environment.versions.torch": _search(_TORCH_VERSION, record),
        "environment.device.name": _search(_GPU_NAME, record),
        "task_version": nested(record, "versions", family),
    }
    conditions.update((name, record.get(name)) for name in _TOP_LEVEL)
    conditions.update(fields.flatten(model_args, "model_args"))
    conditions.update(fields.flatten(config, "harness"))
    return {f"evaluation.{name}": value for name, value in conditions.items()}


def _model_args(value: object) -> dict[str, object]:
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, str):
        return {}
    pairs = (part.partition("=") for part in value.split(",") if part)
    return {key: text for key, _, text in pairs}


def _plain(value: object) -> object:
    """Returns "torch.bfloat16" as "bfloat16" and "8" as 8, as our own record has them."""
    if not isinstance(value, str):
        return value
    text = value.removeprefix("torch.")
    return int(text) if text.isdecimal() else text


def _search(pattern: re.Pattern[str], record: Mapping[str, Any]) -> str | None:
    found = pattern.search(str(record.get("pretty_env_info") or ""))
    return found[1].strip() if found else None


def _model_name(record: Mapping[str, Any]) -> str | None:
    model_args = _model_args(record["config"].get("model_args"))
    names = [str(model_args[key]) for key in ("pretrained", "peft") if model_args.get(key)]
    if names:
        return " + ".join(names)
    name = record.get("model_name") or record["config"].get("model")
    return None if name is None else str(name)


def _read_notes(record: Mapping[str, Any]) -> tuple[str, ...]:
    if record["config"].get("use_cache"):
        return (
            "scored with --use_cache, which is not keyed by the model: the answers may be "
            "another model's",
        )
    return ()

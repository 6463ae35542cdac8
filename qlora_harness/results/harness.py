"""lm_eval's own files: results_<date>.json and, with --log_samples, samples_<task>_<date>.jsonl."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_harness.results.scored import FAMILIES, HarnessFile, Scored, Subject, category_of
from qlora_harness.errors import ResultsError, shown
from qlora_harness.record import nested, read_json
from qlora_harness.schema.section import LARGEST, flatten

# results_2026-11-24T08-14-04.277787.json; isoformat() leaves the fraction out when it is zero.
_DATE = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json$")
_TORCH_VERSION = re.compile(r"^PyTorch version: (.+)$", re.MULTILINE)
_GPU_NAME = re.compile(r"^(?:GPU models and configuration: )?GPU 0: (.+)$", re.MULTILINE)
_DAMAGED = "The file is damaged or comes from another program; score again or remove it"
# Where a task has several metrics and none is asked for.
_METRICS = ("acc", "exact_match", "pass@1", "pass_at_1")
_FILTERS = ("none", "strict-match")


def read_file(path: Path) -> HarnessFile:
    """Reads one results file.

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
    date = _DATE.search(path.name)
    tasks, roots = _tasks(record)
    return HarnessFile(path, date[1] if date else "", record, tasks, roots)


def _tasks(record: Mapping[str, Any]) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    every = leaves = list(record["n-samples"])
    found: dict[str, tuple[str, ...]] = {}
    # Our subtasks are known by their names; lm_eval puts groups before inline definitions: "a::b".
    for family in sorted(FAMILIES, key=len, reverse=True):
        mine = tuple(leaf for leaf in leaves if leaf.rsplit("::", 1)[-1].startswith(f"{family}_"))
        leaves = [leaf for leaf in leaves if leaf not in mine]
        if mine and any(name.rsplit("::", 1)[-1] == family for name in record["results"]):
            found[family] = mine
    groups = record.get("group_subtasks") or {}
    if not isinstance(groups, Mapping):
        groups = {}

    def below(name: str, depth: int = 0) -> list[str]:
        parts = groups.get(name)
        if not isinstance(parts, list) or depth > 20:
            parts = []
        inner = [leaf for part in parts for leaf in below(str(part), depth + 1)]
        return list(dict.fromkeys(inner)) or ([name] if name in every else [])

    children = {str(part) for parts in groups.values() if isinstance(parts, list) for part in parts}
    roots, children = list(found), children.union(*found.values())
    for name in [*groups, *every]:
        if name not in found and (mine := tuple(below(name))):
            found[name] = mine
            roots += [name] if name not in children else []
    return found, tuple(roots)


def newest(files: Sequence[HarnessFile], task: str, *, one_model: bool) -> HarnessFile | None:
    """Returns the file with the newest date in its name that holds a task; None without any.

    Args:
        files: Results files of one run.
        task: For example hellaswag.
        one_model: Whether nothing else says that the files are of one model.

    Raises:
        ResultsError: Two files that differ share the newest date, or are of different models.
    """
    holding = sorted((f for f in files if task in f.tasks), key=lambda f: f.date, reverse=True)
    if not holding:
        return None
    for rival in holding[1:]:
        if one_model and _model(rival.record) != _model(holding[0].record):
            raise ResultsError(
                f"{holding[0].path} and {rival.path} are of different models, and both hold {task}",
                "Name the folder of one model, or one of the two files",
            )
        if rival.date == holding[0].date and rival.record != holding[0].record:
            raise ResultsError(
                f"{holding[0].path} and {rival.path} both hold {task} and have the same date "
                "in their names, so the newest can't be told",
                "Name one of the two files instead of the folder, or remove one",
            )
    return holding[0]


def read_scored(file: HarnessFile, task: str, metric: str | None = None) -> Scored:
    """Reads the result on one task.

    Args:
        file: It must hold the task.
        task: A task or a group.
        metric: "acc_norm" or "exact_match,flexible-extract"; by default the task's usual one.

    Raises:
        ResultsError: A number is missing, NaN or of another type, or the file contradicts itself.
    """
    record, path, leaves = file.record, file.path, file.tasks[task]
    name, chosen = choose_metric(file, leaves[0], metric)
    key = f"{name},{chosen}"
    subjects, total = {}, 0
    names = subject_names(task, leaves)
    for leaf in leaves:
        n = _count(record, path, "n-samples", leaf, "effective")
        subjects[names[leaf]] = Subject(_number(record, path, "results", leaf, key), n)
        total += _count(record, path, "n-samples", leaf, "original")
    n = sum(subject.n for subject in subjects.values())
    if n == 0 or n > total:
        raise ResultsError(f"{path}: {task}: {n} of {total} questions answered", _DAMAGED)
    by_question = sum(s.value * s.n for s in subjects.values()) / n
    whole = next((k for k in record["results"] if k.rsplit("::", 1)[-1] == task), task)
    value, stderr = by_question, None
    if key in (nested(record, "results", whole) or {}):
        value = _number(record, path, "results", whole, key)
        error = nested(record, "results", whole, f"{name}_stderr,{chosen}")
        if error not in (None, "N/A"):
            stderr = _number(record, path, "results", whole, f"{name}_stderr,{chosen}")
    values = [subject.value for subject in subjects.values()]
    if not min(values) - 1e-6 <= value <= max(values) + 1e-6 or (stderr or 0) < 0:
        raise ResultsError(
            f"{path}: results.{whole}: {key} is {value:g} ± {stderr}, but its tasks have "
            f"{min(values):g} to {max(values):g}",
            _DAMAGED,
        )
    if name == "acc" and not 0 <= min(values) <= max(values) <= 1:
        raise ResultsError(f"{path}: results: {key} of {task} is not from 0 to 1", _DAMAGED)
    if task in FAMILIES and abs(value - by_question) > 1e-6:
        raise ResultsError(
            f"{path}: {whole}: {key} is {value:.6f}, but its subjects give {by_question:.6f}",
            "The file contradicts itself; score again",
        )
    base, peft = _model(record)
    better = nested(record, "higher_is_better", leaves[0], name)
    return Scored(
        task=task,
        path=path,
        ended=_ended(record),
        metric=name,
        filter=chosen,
        higher_is_better=better is not False,
        value=value,
        stderr=stderr,
        n=n,
        n_total=total,
        subjects=subjects,
        category_of=category_of(task) or _categories(record, task, leaves),
        base=base,
        quant=_quant(record),
        tuned=peft is not None,
        versions={
            f"{what} of {leaf}": found
            for what, part in (("version", "versions"), ("shots", "n-shot"))
            for leaf in (*leaves, task)
            if (found := nested(record, part, leaf)) is not None
        },
        conditions=_conditions(record, base, peft),
        notes=_notes(record),
        harness=file,
    )


def choose_metric(file: HarnessFile, leaf: str, asked: str | None) -> tuple[str, str]:
    """Returns metric and filter of a task.

    Raises:
        ResultsError: The task has no such metric, or none that is a number.
    """
    results = nested(file.record, "results", leaf)
    if not isinstance(results, Mapping):
        raise ResultsError(f"{file.path}: results.{leaf} is missing", _DAMAGED)
    known = [
        (metric, chosen)
        for key, value in results.items()
        for metric, _, chosen in [str(key).partition(",")]
        if chosen and not metric.endswith("_stderr") and isinstance(value, int | float)
    ]
    if any(leaf in leaves for family, leaves in file.tasks.items() if family in FAMILIES):
        known = [("acc", "none")] if "acc,none" in results else []
    if asked is not None:
        metric, _, chosen = asked.partition(",")
        known = [pair for pair in known if pair[0] == metric and chosen in ("", pair[1])]

    def rank(pair: tuple[str, str]) -> tuple[int, int]:
        metric, chosen = pair
        return (
            _METRICS.index(metric) if metric in _METRICS else len(_METRICS),
            _FILTERS.index(chosen) if chosen in _FILTERS else len(_FILTERS),
        )

    if not known:
        there = ", ".join(str(key) for key in results if "," in str(key))
        raise ResultsError(
            f"{file.path}: results.{leaf} holds no number for {asked or 'the usual metric'}"
            f" ({there or 'no metric at all'})",
            "Choose a metric that is there with --metric" if there else _DAMAGED,
        )
    return min(known, key=rank)


def samples_path(file: HarnessFile, leaf: str) -> Path:
    """Returns where lm_eval logs the samples of a task."""
    return file.path.with_name(f"samples_{leaf}_{file.date}.jsonl")


def read_samples(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each logged sample and where it stands.

    Raises:
        ResultsError: The file is unreadable or a line is not a JSON object.
    """
    from pydantic_core import from_json

    try:
        with path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                where = f"{path}, line {line_number}"
                try:
                    sample = from_json(line)
                except ValueError as error:
                    raise ResultsError(f"{where}: not valid JSON ({error})", _DAMAGED) from None
                if not isinstance(sample, dict):
                    raise ResultsError(f"{where}: not a JSON object", _DAMAGED)
                yield where, sample
    except OSError as error:
        raise ResultsError(f"{path} can't be read: {error.strerror}", "Check the file") from None


def subject_names(task: str, leaves: Sequence[str]) -> dict[str, str]:
    """Returns the leaves' names without that of the task, where this tells them apart."""
    last = {leaf: leaf.rsplit("::", 1)[-1] for leaf in leaves}
    short = {leaf: name.removeprefix(f"{task}_") for leaf, name in last.items()}
    return short if len(set(short.values())) == len(leaves) else {leaf: leaf for leaf in leaves}


def _number(record: Mapping[str, Any], path: Path, *keys: str) -> float:
    value = nested(record, *keys)
    if isinstance(value, bool) or not isinstance(value, int | float):
        problem = "is missing" if value is None else f"is {shown(value)}, not a number"
        raise ResultsError(f"{path}: {'.'.join(keys)} {problem}", _DAMAGED)
    if not abs(value) <= LARGEST:
        raise ResultsError(f"{path}: {'.'.join(keys)} is {value}, not a finite number", _DAMAGED)
    return float(value)


def _count(record: Mapping[str, Any], path: Path, *keys: str) -> int:
    value = _number(record, path, *keys)
    if value < 0 or value != int(value):
        raise ResultsError(f"{path}: {'.'.join(keys)} is {value}, not a whole number", _DAMAGED)
    return int(value)


def _categories(record: Mapping[str, Any], task: str, leaves: Sequence[str]) -> dict[str, str]:
    """The groups directly below a group, for the leaves that they hold."""
    groups = record.get("group_subtasks")
    parts = groups.get(task) if isinstance(groups, Mapping) else None
    if not isinstance(parts, list):
        return {}
    found, names = {}, subject_names(task, leaves)
    for part in map(str, parts):
        members = groups.get(part) if isinstance(groups, Mapping) else None
        for leaf in members if isinstance(members, list) else []:
            if leaf in leaves:
                found[names[str(leaf)]] = part.removeprefix(f"{task}_")
    return found


def _ended(record: Mapping[str, Any]) -> float | None:
    """Start and duration stand in the file."""
    try:
        return float(record["date"]) + float(record.get("total_evaluation_time_seconds") or 0.0)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _model_args(record: Mapping[str, Any]) -> dict[str, object]:
    value = record["config"].get("model_args")
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, str):
        return {}
    pairs = (part.partition("=") for part in value.split(",") if part)
    return {key: text for key, _, text in pairs}


def _model(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    arguments = _model_args(record)
    base = arguments.get("pretrained") or record.get("model_name") or record["config"].get("model")
    peft = arguments.get("peft")
    return None if base is None else str(base), None if not peft else str(peft)


def _quant(record: Mapping[str, Any]) -> str | None:
    arguments = {key: str(value) for key, value in _model_args(record).items()}
    if "quant" in arguments:
        return arguments["quant"]
    if arguments.get("load_in_4bit", "").lower() == "true":
        return arguments.get("bnb_4bit_quant_type", "fp4")
    if arguments.get("load_in_8bit", "").lower() == "true":
        return "int8"
    dtype = _plain(record["config"].get("model_dtype"))
    return "bf16" if dtype == "bfloat16" else None


def _conditions(record: Mapping[str, Any], base: str | None, peft: str | None) -> dict[str, object]:
    """The settings, under the names that evaluation_results.json has for them."""
    config = {key: value for key, value in record["config"].items() if key != "model_args"}
    arguments = {
        key: value
        for key, value in _model_args(record).items()
        if key not in ("pretrained", "peft")
    }
    environment = str(record.get("pretty_env_info") or "")
    torch, gpu = _TORCH_VERSION.search(environment), _GPU_NAME.search(environment)
    conditions: dict[str, object] = {
        "model.base": base,
        "model.peft": peft,
        "settings.batch_size": _plain(config.pop("batch_size", None)),
        "settings.dtype": _plain(config.pop("model_dtype", None)),
        "settings.max_length": record.get("max_length"),
        "environment.versions.lm_eval": record.get("lm_eval_version"),
        "environment.versions.transformers": record.get("transformers_version"),
        "environment.versions.torch": torch[1].strip() if torch else None,
        "environment.device.name": gpu[1].strip() if gpu else None,
    }
    for name in ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn"):
        conditions[name] = record.get(name)
    conditions |= flatten(arguments, "model_args")
    conditions |= flatten(config, "harness")
    return {f"evaluation.{name}": value for name, value in conditions.items()}


def _plain(value: object) -> object:
    """Returns "torch.bfloat16" as "bfloat16" and "8" as 8, as our own record has them."""
    if not isinstance(value, str):
        return value
    text = value.removeprefix("torch.")
    return int(text) if text.isdecimal() else text


def _notes(record: Mapping[str, Any]) -> tuple[str, ...]:
    if record["config"].get("use_cache"):
        return (
            "scored with --use_cache, which is not keyed by the model: the answers may be "
            "another model's",
        )
    return ()

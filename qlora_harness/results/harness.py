"""lm_eval's own files: results_<date>.json and, with --log_samples, samples_<task>_<date>.jsonl."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_harness.errors import ResultsError, shown
from qlora_harness.record import nested, read_json
from qlora_harness.results.scored import FAMILIES, HarnessFile, Scored, Subject, category_of
from qlora_harness.schema.evaluation import EvaluatedModel
from qlora_harness.schema.section import LARGEST, flatten

# results_2026-11-24T08-14-04.277787.json; isoformat() leaves the fraction out when it is zero.
_DATE = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json$")
_TORCH_VERSION = re.compile(r"^PyTorch version: (.+)$", re.MULTILINE)
_GPU_NAME = re.compile(r"^(?:GPU models and configuration: )?GPU 0: (.+)$", re.MULTILINE)
_DAMAGED = "The file is damaged or comes from another program; score again or remove it"
# The metric of a task that has several, unless one is named.
_METRICS = ("acc", "exact_match", "pass@1", "pass_at_1")
_FILTERS = ("none", "strict-match")
_CACHED = "scored with --use_cache, which isn't keyed by model: the answers may be another model's"


def read_file(path: Path) -> HarnessFile:
    """Reads one results file; raises ResultsError if it is unreadable or not lm_eval's."""
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


def _own_name(name: str) -> str:
    """A task's own name: lm_eval puts groups before inline definitions, "a::b"."""
    return name.rsplit("::", 1)[-1]


def _groups(record: Mapping[str, Any]) -> dict[str, list[str]]:
    groups = record.get("group_subtasks")
    return {
        name: list(map(str, parts))
        for name, parts in (groups.items() if isinstance(groups, Mapping) else ())
        if isinstance(parts, list)
    }


def _tasks(record: Mapping[str, Any]) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    every = leaves = list(record["n-samples"])
    tasks: dict[str, tuple[str, ...]] = {}
    for family in sorted(FAMILIES, key=len, reverse=True):  # our subtasks are known by their names
        mine = tuple(leaf for leaf in leaves if _own_name(leaf).startswith(f"{family}_"))
        leaves = [leaf for leaf in leaves if leaf not in mine]
        if mine and any(_own_name(name) == family for name in record["results"]):
            tasks[family] = mine
    groups = _groups(record)

    def below(name: str, depth: int = 0) -> list[str]:
        parts = groups.get(name, []) if depth <= 20 else []
        inner = [leaf for part in parts for leaf in below(part, depth + 1)]
        return list(dict.fromkeys(inner)) or ([name] if name in every else [])

    children = {part for parts in groups.values() for part in parts}
    roots, children = list(tasks), children.union(*tasks.values())
    for name in [*groups, *every]:
        if name not in tasks and (mine := tuple(below(name))):
            tasks[name] = mine
            roots += [name] if name not in children else []
    return tasks, tuple(roots)


def newest(files: Sequence[HarnessFile], task: str, *, one_model: bool) -> HarnessFile | None:
    """Returns the file with the newest date in its name that holds a task; None without any.

    `one_model` says that nothing else tells whether the files of a run are of one model. Raises
    ResultsError if they aren't, or if two files that differ share the newest date.
    """
    holding = sorted((f for f in files if task in f.tasks), key=lambda f: f.date, reverse=True)
    for rival in holding[1:]:
        both = f"{holding[0].path} and {rival.path}"
        first, second = _model(holding[0].record), _model(rival.record)
        if one_model and (first.base, first.peft) != (second.base, second.peft):
            raise ResultsError(
                f"{both} are of different models, and both hold {task}",
                "Name the folder of one model, or one of the two files",
            )
        if rival.date == holding[0].date and rival.record != holding[0].record:
            raise ResultsError(
                f"{both} both hold {task} and have the same date in their names, so the newest "
                "can't be told",
                "Name one of the two files instead of the folder, or remove one",
            )
    return holding[0] if holding else None


def read_scored(file: HarnessFile, task: str, metric: str | None = None) -> Scored:
    """Reads the result on a task or group that the file holds.

    The metric is "acc_norm" or "exact_match,flexible-extract"; by default the task's usual one.
    Raises ResultsError if a number is missing, NaN or of another type, or contradicts others.
    """
    record, leaves = file.record, file.tasks[task]
    name, chosen = _choose_metric(file, leaves[0], metric)
    key = f"{name},{chosen}"
    names = _subject_names(task, leaves)
    subjects = {
        names[leaf]: Subject(
            _number(file, "results", leaf, key), _count(file, "n-samples", leaf, "effective")
        )
        for leaf in leaves
    }
    total = sum(_count(file, "n-samples", leaf, "original") for leaf in leaves)
    n = sum(subject.n for subject in subjects.values())
    if n == 0 or n > total:
        raise ResultsError(f"{file.path}: {task}: {n} of {total} questions answered", _DAMAGED)
    value, stderr = _whole(file, task, name, chosen, subjects)
    model = _model(record)
    return Scored(
        task=task,
        path=file.path,
        ended=_ended(record),
        metric=name,
        filter=chosen,
        higher_is_better=nested(record, "higher_is_better", leaves[0], name) is not False,
        value=value,
        stderr=stderr,
        n=n,
        n_total=total,
        subjects=subjects,
        category_of=category_of(task) or _categories(record, task, leaves),
        model=model,
        conditions=_conditions(record, model),
        versions={
            f"{what} of {leaf}": version
            for what, part in (("version", "versions"), ("shots", "n-shot"))
            for leaf in (*leaves, task)
            if (version := nested(record, part, leaf)) is not None
        },
        notes=(_CACHED,) if record["config"].get("use_cache") else (),
        harness=file,
    )


def _whole(
    file: HarnessFile, task: str, name: str, chosen: str, subjects: Mapping[str, Subject]
) -> tuple[float, float | None]:
    """The metric of a whole task and its standard error, which must fit those of its parts."""
    key, record = f"{name},{chosen}", file.record
    n = sum(subject.n for subject in subjects.values())
    by_question = sum(s.value * s.n for s in subjects.values()) / n
    whole = next((k for k in record["results"] if _own_name(k) == task), task)
    value, stderr = by_question, None
    if key in (nested(record, "results", whole) or {}):
        value = _number(file, "results", whole, key)
        error = f"{name}_stderr,{chosen}"
        if nested(record, "results", whole, error) not in (None, "N/A"):
            stderr = _number(file, "results", whole, error)
    values = [subject.value for subject in subjects.values()]
    low, high = min(values), max(values)
    fits = low - 1e-6 <= value <= high + 1e-6 and (stderr or 0) >= 0
    fits = fits and (name != "acc" or 0 <= low <= high <= 1)
    if not fits or (task in FAMILIES and abs(value - by_question) > 1e-6):
        raise ResultsError(
            f"{file.path}: results.{whole}: {key} is {value:g} ± {stderr}, but its parts have "
            f"{low:g} to {high:g}, {by_question:g} over all questions",
            _DAMAGED,
        )
    return value, stderr


def _choose_metric(file: HarnessFile, leaf: str, name: str | None) -> tuple[str, str]:
    """Metric and filter of a task, as named or else the usual ones."""
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
    if name is not None:
        metric, _, chosen = name.partition(",")
        known = [pair for pair in known if pair[0] == metric and chosen in ("", pair[1])]
    if not known:
        recorded = ", ".join(str(key) for key in results if "," in str(key))
        raise ResultsError(
            f"{file.path}: results.{leaf} holds no number for {name or 'the usual metric'}"
            f" ({recorded or 'no metric at all'})",
            "Choose a metric that is there with --metric" if recorded else _DAMAGED,
        )
    return min(known, key=lambda pair: (_rank(pair[0], _METRICS), _rank(pair[1], _FILTERS)))


def _rank(name: str, usual: Sequence[str]) -> int:
    return usual.index(name) if name in usual else len(usual)


def samples_path(file: HarnessFile, leaf: str) -> Path:
    """Returns where lm_eval logs the samples of a task."""
    return file.path.with_name(f"samples_{leaf}_{file.date}.jsonl")


def read_samples(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each logged sample and its file and line.

    Raises ResultsError if the file is unreadable or a line is not a JSON object.
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


def _subject_names(task: str, leaves: Sequence[str]) -> dict[str, str]:
    """The leaves' names without that of the task, where this tells them apart."""
    short = {leaf: _own_name(leaf).removeprefix(f"{task}_") for leaf in leaves}
    return short if len(set(short.values())) == len(leaves) else {leaf: leaf for leaf in leaves}


def _number(file: HarnessFile, *keys: str) -> float:
    value = nested(file.record, *keys)
    if value is None:
        problem = "is missing"
    elif isinstance(value, bool) or not isinstance(value, int | float):
        problem = f"is {shown(value)}, not a number"
    elif not abs(value) <= LARGEST:
        problem = f"is {value}, not a finite number"
    else:
        return float(value)
    raise ResultsError(f"{file.path}: {'.'.join(keys)} {problem}", _DAMAGED)


def _count(file: HarnessFile, *keys: str) -> int:
    value = _number(file, *keys)
    if value < 0 or value != int(value):
        raise ResultsError(
            f"{file.path}: {'.'.join(keys)} is {value}, not a whole number", _DAMAGED
        )
    return int(value)


def _categories(record: Mapping[str, Any], task: str, leaves: Sequence[str]) -> dict[str, str]:
    """The groups directly below a group, for the leaves that they hold."""
    groups, names = _groups(record), _subject_names(task, leaves)
    return {
        names[leaf]: part.removeprefix(f"{task}_")
        for part in groups.get(task, [])
        for leaf in groups.get(part, [])
        if leaf in leaves
    }


def _ended(record: Mapping[str, Any]) -> float | None:
    """Seconds since 1970, from the start and the duration in the file."""
    try:
        return float(record["date"]) + float(record.get("total_evaluation_time_seconds") or 0.0)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _model_args(record: Mapping[str, Any]) -> dict[str, object]:
    value = record["config"].get("model_args")
    if isinstance(value, str):
        return dict(part.partition("=")[::2] for part in value.split(",") if part)
    return dict(value) if isinstance(value, Mapping) else {}


def _model(record: Mapping[str, Any]) -> EvaluatedModel:
    arguments = _model_args(record)
    base = arguments.get("pretrained") or record.get("model_name") or record["config"].get("model")
    peft = arguments.get("peft")
    return EvaluatedModel(
        base=None if base is None else str(base),
        peft=str(peft) if peft else None,
        quant=_quant(record),
    )


def _quant(record: Mapping[str, Any]) -> str | None:
    arguments = {key: str(value) for key, value in _model_args(record).items()}
    if "quant" in arguments:
        return arguments["quant"]
    if arguments.get("load_in_4bit", "").lower() == "true":
        return arguments.get("bnb_4bit_quant_type", "fp4")
    if arguments.get("load_in_8bit", "").lower() == "true":
        return "int8"
    dtype = _as_recorded(record["config"].get("model_dtype"))
    return "bf16" if dtype == "bfloat16" else None


def _conditions(record: Mapping[str, Any], model: EvaluatedModel) -> dict[str, object]:
    """The settings, under the names that evaluation_results.json has for them."""
    config = {key: value for key, value in record["config"].items() if key != "model_args"}
    arguments = _model_args(record)
    environment = str(record.get("pretty_env_info") or "")
    torch, gpu = _TORCH_VERSION.search(environment), _GPU_NAME.search(environment)
    conditions: dict[str, object] = {
        "model.base": model.base,
        "model.peft": model.peft,
        "settings.batch_size": _as_recorded(config.pop("batch_size", None)),
        "settings.dtype": _as_recorded(config.pop("model_dtype", None)),
        "settings.max_length": record.get("max_length"),
        "environment.versions.lm_eval": record.get("lm_eval_version"),
        "environment.versions.transformers": record.get("transformers_version"),
        "environment.versions.torch": torch[1].strip() if torch else None,
        "environment.device.name": gpu[1].strip() if gpu else None,
    }
    for name in ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn"):
        conditions[name] = record.get(name)
    arguments.pop("pretrained", None)
    arguments.pop("peft", None)
    conditions |= flatten(arguments, "model_args")
    conditions |= flatten(config, "harness")
    return {f"evaluation.{name}": value for name, value in conditions.items()}


def _as_recorded(value: object) -> object:
    """Returns "torch.bfloat16" as "bfloat16" and "8" as 8, as our own record has them."""
    if not isinstance(value, str):
        return value
    text = value.removeprefix("torch.")
    return int(text) if text.isdecimal() else text

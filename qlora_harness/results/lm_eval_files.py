"""lm_eval's own files: results_<date>.json and, with --log_samples, samples_<task>_<date>.jsonl."""

# pydantic copies mutable defaults
from __future__ import annotations

import lzma
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError
from pydantic_core import from_json

from qlora_harness.errors import ResultsError, shown
from qlora_harness.record import EVALUATION_FILE, nested, read_json
from qlora_harness.results.scored import FAMILIES, Scored, Subject, category_of
from qlora_harness.schema.scoring_records import EvaluatedModel
from qlora_harness.schema.section import LARGEST, Count, Number, first_problem, flatten

# results_2026-11-24T08-14-04.277787.json; isoformat() omits a fraction of zero.
_DATE = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json$")
_TORCH_VERSION = re.compile(r"^PyTorch version: (.+)$", re.MULTILINE)
_GPU_NAME = re.compile(r"^(?:GPU models and configuration: )?GPU 0: (.+)$", re.MULTILINE)
_DAMAGED = "The file is damaged or comes from another program; score again or remove it"
# Preferred metrics and filters of a task that has several.
_METRICS = (
    *("acc", "exact_match", "pass@1", "pass_at_1", "prompt_level_strict_acc"),
    "bits_per_byte",
)
_FILTERS = ("none", "strict-match")
_CACHED = "scored with --use_cache, which isn't keyed by model: the answers may be another model's"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Size(_Part):
    original: Count
    effective: Count


class _Config(_Part):
    model: str | None = None
    model_args: dict[str, Any] | str | None = None
    model_dtype: Any = None
    base: Any = None  # what an adapter was scored on, as qlora_adapter records it
    batch_size: Any = None
    use_cache: Any = None

    @property
    def arguments(self) -> dict[str, Any]:
        """--model_args by name."""
        if isinstance(self.model_args, str):
            return dict(part.partition("=")[::2] for part in self.model_args.split(",") if part)
        return dict(self.model_args or {})

    @property
    def quant(self) -> str | None:
        """nf4, fp4, int8, hqq or bf16, if recorded."""
        arguments = {key: str(value) for key, value in self.arguments.items()}
        if "quant" in arguments:
            return arguments["quant"]
        if arguments.get("load_in_4bit", "").lower() == "true":
            return arguments.get("bnb_4bit_quant_type", "fp4")
        if arguments.get("load_in_8bit", "").lower() == "true":
            return "int8"
        return "bf16" if _as_recorded(self.model_dtype) in ("bfloat16", "float16") else None


class _ResultsFile(_Part):
    results: dict[str, dict[str, Any]]
    sizes: dict[str, _Size] = Field(alias="n-samples")
    config: _Config
    group_subtasks: dict[str, list[str]] = {}
    versions: dict[str, Any] = {}
    shots: dict[str, Any] = Field({}, alias="n-shot")
    configs: dict[str, Any] = {}
    higher_is_better: dict[str, dict[str, Any] | None] = {}
    model_name: str | None = None
    date: Number | None = None
    duration: Annotated[Number | None, Strict(False)] = Field(
        None, alias="total_evaluation_time_seconds"
    )

    @property
    def model(self) -> EvaluatedModel:
        arguments = self.config.arguments
        base = arguments.get("pretrained") or self.config.base
        base = base or self.model_name or self.config.model
        peft = arguments.get("peft")
        return EvaluatedModel(
            base=None if base is None else str(base),
            peft=str(peft) if peft else None,
            quant=self.config.quant,
        )


@dataclass(frozen=True)
class HarnessFile:
    """One results file of lm_eval.

    `date` is the one in its name, "" without one. `tasks` holds the leaves of each task: those
    below a group, or a single task itself. `roots` are the tasks that belong to no other.
    """

    path: Path
    date: str
    record: _ResultsFile
    tasks: Mapping[str, tuple[str, ...]]
    roots: tuple[str, ...]


def read_file(path: Path) -> HarnessFile:
    """Reads one results file; raises ResultsError if it is unreadable or not lm_eval's."""
    try:
        record = _ResultsFile.model_validate(read_json(path))
    except ValidationError as error:
        raise ResultsError(
            f"{path}: not a results file of lm_eval: {first_problem(error)}",
            "Name a results_*.json, or the folder of a run; remove foreign results_*.json",
        ) from None
    date = _DATE.search(path.name)
    tasks, roots = _tasks(record)
    return HarnessFile(path, date[1] if date else "", record, tasks, roots)


def _own_name(name: str) -> str:
    """The name of a task without its groups: lm_eval writes inline definitions as "a::b"."""
    return name.rsplit("::", 1)[-1]


def _tasks(record: _ResultsFile) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    every = leaves = list(record.sizes)
    groups = record.group_subtasks
    tasks: dict[str, tuple[str, ...]] = {}
    for family in sorted(FAMILIES, key=len, reverse=True):  # our subtasks begin with its name
        mine = tuple(leaf for leaf in leaves if _own_name(leaf).startswith(f"{family}_"))
        leaves = [leaf for leaf in leaves if leaf not in mine]
        if mine and any(_own_name(name) == family for name in record.results):
            tasks[family] = mine

    def below(name: str, depth: int = 0) -> list[str]:
        parts = groups.get(name, []) if depth <= 20 else []
        inner = [leaf for part in parts for leaf in below(part, depth + 1)]
        return list(dict.fromkeys(inner)) or ([name] if name in every else [])

    children = {part for parts in groups.values() for part in parts}.union(*tasks.values())
    roots = list(tasks)
    for name in [*groups, *every]:
        if name not in tasks and (mine := tuple(below(name))):
            tasks[name] = mine
            roots += [name] if name not in children else []
    return tasks, tuple(roots)


def newest(files: Sequence[HarnessFile], task: str, *, one_model: bool) -> HarnessFile | None:
    """Returns the file with the newest date in its name that holds a task; None without any.

    Raises ResultsError for two files of that date, or of two models with `one_model`.
    """
    holding = sorted((f for f in files if task in f.tasks), key=lambda f: f.date, reverse=True)
    for rival in holding[1:]:
        both = f"{holding[0].path} and {rival.path}"
        first, second = holding[0].record.model, rival.record.model
        if one_model and (first.base, first.peft) != (second.base, second.peft):
            raise ResultsError(
                f"{both} are of different models, and both hold {task}",
                "Name the folder of one model, or one of the two files",
            )
        if rival.date == holding[0].date and rival.record != holding[0].record:
            raise ResultsError(
                f"{both} both hold {task} and have the same date in their names",
                "Name one of the two files instead of the folder, or remove one",
            )
    return holding[0] if holding else None


def read_scored(file: HarnessFile, task: str, metric: str | None = None) -> Scored:
    """Reads the result on a task or group, by its usual metric or by "exact_match,FILTER".

    Raises ResultsError if a number is missing, NaN or of another type, or contradicts others.
    """
    record, leaves = file.record, file.tasks[task]
    name, filter_name = _choose_metric(file, leaves[0], metric)
    names = {leaf: _own_name(leaf).removeprefix(f"{task}_") for leaf in leaves}
    if len(set(names.values())) < len(names):
        names = {leaf: leaf for leaf in leaves}
    groups = record.group_subtasks
    categories = {
        names[leaf]: part.removeprefix(f"{task}_")
        for part in groups.get(task, [])
        for leaf in groups.get(part, [])
        if leaf in leaves
    }
    key = f"{name},{filter_name}"
    sizes = [record.sizes[leaf] for leaf in leaves]
    subjects = {
        names[leaf]: Subject(_number(file, leaf, key), size.effective)
        for leaf, size in zip(leaves, sizes, strict=True)
    }
    n, total = sum(size.effective for size in sizes), sum(size.original for size in sizes)
    if n == 0 or n > total:
        raise ResultsError(f"{file.path}: {task}: {n} of {total} questions answered", _DAMAGED)
    value, stderr = _total(file, task, name, filter_name, subjects)
    return Scored(
        task=task,
        path=file.path,
        ended=None if record.date is None else record.date + (record.duration or 0),
        metric=name,
        filter=filter_name,
        higher_is_better=(record.higher_is_better.get(leaves[0]) or {}).get(name) is not False,
        value=value,
        stderr=stderr,
        n=n,
        n_total=total,
        subjects=subjects,
        category_of=category_of(task) or categories,
        model=record.model,
        conditions=_conditions(record),
        versions={
            f"{what} of {leaf}": part[leaf]
            for what, part in (("version", record.versions), ("shots", record.shots))
            for leaf in (*leaves, task)
            if part.get(leaf) is not None
        }
        | {
            f"generation_kwargs of {leaf}": settings
            for leaf in leaves
            if (settings := nested(record.configs, leaf, "generation_kwargs"))
        },
        notes=(_CACHED,) if record.config.use_cache else (),
        samples={
            subject: _packed_if_only(file.path.with_name(f"samples_{leaf}_{file.date}.jsonl"))
            for leaf, subject in names.items()
            if file.date
        },
    )


def _total(
    file: HarnessFile, task: str, name: str, filter_name: str, subjects: Mapping[str, Subject]
) -> tuple[float, float | None]:
    """The metric of a whole task and its standard error; refused unless they fit its parts."""
    key, error = f"{name},{filter_name}", f"{name}_stderr,{filter_name}"
    n = sum(subject.n for subject in subjects.values())
    by_question = sum(s.value * s.n for s in subjects.values()) / n
    whole = next((k for k in file.record.results if _own_name(k) == task), task)
    recorded = file.record.results.get(whole, {})
    value, stderr = by_question, None
    if key in recorded:
        value = _number(file, whole, key)
        if recorded.get(error) not in (None, "N/A"):
            stderr = _number(file, whole, error)
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


def other_metrics(scored: Scored) -> dict[str, Scored]:
    """Returns the results with a task's other metrics in lm_eval's file, by "name,filter"."""
    if scored.path.name == EVALUATION_FILE:
        return {}
    file = read_file(scored.path)
    first, *rest = (_metrics(file, leaf) for leaf in file.tasks[scored.task])
    names = [
        f"{metric},{filter_name}"
        for metric, filter_name in first
        if all((metric, filter_name) in other for other in rest)
    ]
    mine = f"{scored.metric},{scored.filter}"
    return {name: read_scored(file, scored.task, name) for name in names if name != mine}


def _metrics(file: HarnessFile, leaf: str) -> list[tuple[str, str]]:
    """The metrics and filters of a task, the usual ones first."""
    results = file.record.results.get(leaf, {})
    if any(leaf in leaves for family, leaves in file.tasks.items() if family in FAMILIES):
        return [("acc", "none")] if "acc,none" in results else []
    known = [
        (metric, filter_name)
        for key, value in results.items()
        for metric, _, filter_name in [key.partition(",")]
        if filter_name and not metric.endswith("_stderr") and isinstance(value, int | float)
    ]

    def rank(name: str, usual: Sequence[str]) -> int:
        return usual.index(name) if name in usual else len(usual)

    return sorted(known, key=lambda pair: (rank(pair[0], _METRICS), rank(pair[1], _FILTERS)))


def _choose_metric(file: HarnessFile, leaf: str, name: str | None) -> tuple[str, str]:
    """Metric and filter of a task: the given ones, or else the usual ones."""
    results, known = file.record.results.get(leaf, {}), _metrics(file, leaf)
    if name is not None:
        metric, _, filter_name = name.partition(",")
        known = [pair for pair in known if pair[0] == metric and filter_name in ("", pair[1])]
    if not known:
        recorded = ", ".join(key for key in results if "," in key)
        raise ResultsError(
            f"{file.path}: results.{leaf} holds no number for {name or 'the usual metric'}"
            f" ({recorded or 'no metric at all'})",
            "Choose a recorded metric with --metric" if recorded else _DAMAGED,
        )
    return known[0]


def _packed_if_only(path: Path) -> Path:
    """The path with .xz added if only that exists: a user may compress samples."""
    packed = path.with_name(f"{path.name}.xz")
    return packed if packed.is_file() and not path.exists() else path


def read_samples(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the file and line of each logged sample, and the sample.

    The file may be an .xz. Raises ResultsError if it is unreadable or a line is not a JSON object.
    """
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                where = f"{path}, line {line_number}"
                try:
                    sample = from_json(line)
                except ValueError as error:
                    raise ResultsError(f"{where}: not valid JSON ({error})", _DAMAGED) from None
                if not isinstance(sample, dict):
                    raise ResultsError(f"{where}: not a JSON object", _DAMAGED)
                yield where, sample
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ResultsError(f"{path} can't be read: {error}", "Check the file") from None


def _number(file: HarnessFile, task: str, key: str) -> float:
    value = nested(file.record.results, task, key)
    if not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ResultsError(
            f"{file.path}: results.{task}.{key} is {shown(value)}, not a finite number", _DAMAGED
        )
    return float(value)


def _conditions(record: _ResultsFile) -> dict[str, object]:
    """The settings, under their names in evaluation_results.json."""
    config, others = record.config, record.model_extra or {}
    environment = str(others.get("pretty_env_info"))
    torch, gpu = _TORCH_VERSION.search(environment), _GPU_NAME.search(environment)
    conditions: dict[str, object] = {
        "model.base": record.model.base,
        "model.peft": record.model.peft,
        "settings.batch_size": _as_recorded(config.batch_size),
        "settings.dtype": _as_recorded(config.model_dtype),
        "settings.max_length": others.get("max_length"),
        "environment.versions.lm_eval": others.get("lm_eval_version"),
        "environment.versions.transformers": others.get("transformers_version"),
        "environment.versions.torch": torch[1].strip() if torch else None,
        "environment.device.name": gpu[1].strip() if gpu else None,
    }
    for name in ("chat_template_sha", "system_instruction_sha"):
        conditions[name] = others.get(name)
    # lm_eval's command and its Python entry have two defaults, which matter with a template only.
    multiturn = others.get("fewshot_as_multiturn") if others.get("chat_template_sha") else None
    conditions["fewshot_as_multiturn"] = multiturn
    arguments = config.arguments
    arguments.pop("pretrained", None)
    arguments.pop("peft", None)
    conditions |= flatten(arguments, "model_args")
    named = {"model_args", "batch_size", "model_dtype"}
    conditions |= flatten(config.model_dump(exclude=named, exclude_unset=True), "harness")
    return {f"evaluation.{name}": value for name, value in conditions.items()}


def _as_recorded(value: object) -> object:
    """Returns "torch.bfloat16" as "bfloat16" and "8" as 8, as our own record has them."""
    if not isinstance(value, str):
        return value
    text = value.removeprefix("torch.")
    return int(text) if text.isdecimal() else text

"""A study as the user describes it: model, data, arms, seeds and tasks become cells."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from qlora_harness.errors import SettingsError, shown
from qlora_harness.recipes import load_yaml, with_recipe
from qlora_harness.record import ADAPTER_DIR
from qlora_harness.schema.section import first_problem
from qlora_harness.score.suite import benchmarks, lm_eval_command, lm_eval_words
from qlora_harness.settings import (
    BOOKKEEPING,
    DataSettings,
    Quant,
    Settings,
    flag_of,
    setting_fields,
)
from qlora_harness.settings_checks import build_settings, unknown_name

# Settings that the study chooses for each cell.
OWN = ("seed", "resume", "overwrite")
# Settings that arms must share: runs on different data or models can't be compared.
_SHARED = frozenset({"model", "revision", *(f.name for f in fields(DataSettings))})
_NAME = re.compile(r"\w[\w.+-]{0,79}")
_FILES = (".json", ".md", ".html", ".log")  # of a study, beside the folders of arms
_MOST_SEEDS = 100


def _separated(value: Any) -> Any:
    """Names separated by commas as a list."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _counted(value: Any) -> Any:
    """A number of seeds, such as 3, as a list: 0, 1, 2."""
    if isinstance(value, str) and "," in value:
        return _separated(value)
    if isinstance(value, int | str) and str(value).isdecimal() and len(str(value)) < 4:
        return list(range(int(value)))
    return value


Names = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_separated)]
Seeds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**32)]],
    BeforeValidator(_counted),
    Field(min_length=1, max_length=_MOST_SEEDS),
]
_SEEDS: TypeAdapter[list[int]] = TypeAdapter(Seeds)


@dataclass(frozen=True)
class Cell:
    """One arm with one seed, or (`seed` is None) the base of an arm without an adapter."""

    arm: str
    seed: int | None
    settings: Settings

    @property
    def name(self) -> str:
        """ARM/SEED, or base_ARM."""
        return f"base_{self.arm}" if self.seed is None else f"{self.arm}/{self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder, which exists once the cell has begun."""
        return self.settings.run_dir

    @property
    def base(self) -> tuple[object, ...]:
        """Identifies its loaded base."""
        model = self.settings.model
        return (model.model, model.revision, *base_kind(self.settings))

    def model_args(self) -> dict[str, Any]:
        """Returns the `--model_args` that score it."""
        records = {"results_dir": str(self.folder)}
        if self.seed is not None:
            return {"peft": str(self.folder / ADAPTER_DIR), **records}
        model = self.settings.model
        arguments: dict[str, Any] = {"pretrained": model.model, "quant": model.quant}
        if self.settings.quant.is_4bit and not model.double_quant:
            arguments["double_quant"] = False
        if model.revision is not None:
            arguments["revision"] = model.revision
        if model.compute_dtype != "auto":
            arguments["dtype"] = model.compute_dtype
        if model.rope_scaling is not None:
            arguments["rope_scaling"] = model.rope_scaling
        return arguments | records


@dataclass(frozen=True)
class Study:
    """Everything that a study computes."""

    name: str
    folder: Path
    cells: tuple[Cell, ...]
    tasks: tuple[str, ...]
    batch_size: int  # of lm_eval's own batches
    data_dir: str | None = None  # of the tasks' files

    def arms(self) -> dict[str, Settings]:
        """Returns the settings of each arm, with its first seed."""
        arms: dict[str, Settings] = {}
        for cell in self.cells:
            arms.setdefault(cell.arm, cell.settings)
        return arms

    def cell(self, name: str) -> Cell:
        """Returns a cell by name; raises SettingsError if there is none."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        names = ", ".join(cell.name for cell in self.cells)
        raise SettingsError(f"--cell {shown(name)} is not a cell of this study", f"Cells: {names}")

    def commands(self, cell: Cell) -> list[str]:
        """Returns the commands that would write the records of a cell."""
        commands = []
        if cell.seed is not None:
            flags = shlex.join(_flags(cell.settings))
            commands.append(f"accelerate launch launch/train.py {flags}")
        if self.tasks:
            output = cell.folder / "lm_eval"
            words = lm_eval_words(
                cell.model_args(), self.tasks, self.batch_size, output, self.data_dir
            )
            commands.append(lm_eval_command(words))
        return commands


def base_kind(settings: Settings) -> tuple[object, ...]:
    """Returns what distinguishes bases of one model: quantisation, dtype and RoPE scaling."""
    model = settings.model
    double_quant = settings.quant.is_4bit and model.double_quant
    return (model.quant, double_quant, model.compute_dtype, model.rope_scaling)


def _flags(settings: Settings) -> list[str]:
    """The flags of launch/train.py that differ from their defaults, and --quant."""
    words = []
    defaults = build_settings({}).flat()
    for name, value in settings.flat().items():
        if value is None or (value == defaults[name] and name not in ("quant", "seed")):
            continue
        if isinstance(value, bool):
            words.append(flag_of(name) if value else f"--no-{flag_of(name)[2:]}")
        else:
            words += [flag_of(name), str(value)]
    return words


class StudyFile(BaseModel):
    """The keys of a study file; YAML values arrive as text."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    recipe: str | None = None
    settings: dict[str, Any] = {}
    arms: dict[str, dict[str, Any]] = {}
    seeds: Seeds = [0]
    tasks: Names = []
    score_batch_size: Annotated[int, Field(ge=1, le=2**20)] = 16
    score_bases: bool = False
    data_dir: str | None = None


def check_study(content: Mapping[str, Any], where: str) -> StudyFile:
    """Checks the keys of a study and their types; raises SettingsError that names `where`."""
    for key in content:
        if key not in StudyFile.model_fields:
            raise unknown_name(str(key), f"{where}, key {shown(str(key))}", StudyFile.model_fields)
    try:
        return StudyFile.model_validate({k: v for k, v in content.items() if v is not None})
    except ValidationError as error:
        raise SettingsError(f"{where}: {first_problem(error)}", "Correct the value") from None


def read_study(path: Path) -> dict[str, Any]:
    """Reads a study file and checks the types in it; raises SettingsError."""
    content = {str(k).replace("-", "_"): v for k, v in load_yaml(path, "study").items()}
    check_study(content, f"study {path}")
    return content


def build_study(
    content: Mapping[str, Any], flags: Mapping[str, Any], path: Path | None = None
) -> Study:
    """Turns a study file's content into cells; raises SettingsError.

    `flags` are settings of `launch/train.py` by name, which override it.
    """
    where = f"study {path}" if path else "study"
    file = check_study(content, where)
    shared, sources = _shared_settings(file, flags, where)
    folder = Path(str(shared.pop("output_dir", None) or Path("results") / _name(file, path)))
    if not file.arms:
        raise SettingsError(
            f"{where} has no arms", "Pass --arms bf16,nf4 or a study file with arms"
        )
    cells: list[Cell] = []
    for arm, values in file.arms.items():
        place = f"{where}, arm {shown(arm)}"
        _check_name(arm, place)
        values = {name.replace("-", "_"): value for name, value in values.items()}
        seeds = _seeds(values.pop("seeds", file.seeds), place)
        _check_arm(values, place)
        sources_here = {**sources, **{n: f"{place}, key {shown(n)}" for n in values}}
        for seed in seeds:
            own = {"seed": seed, "output_dir": str(folder / arm / f"seed_{seed}")}
            cells.append(Cell(arm, seed, build_settings({**shared, **values, **own}, sources_here)))
    _check_distinct(cells, where)
    tasks = [task for part in benchmarks(file.tasks, where) for task in part]
    if file.score_bases and not file.tasks:
        raise SettingsError(f"{where}: score_bases needs tasks", "Give --tasks mmlu_qlora_5shot")
    if file.score_bases:
        cells = [*_bases(cells, folder), *cells]
    size = file.score_batch_size
    return Study(folder.name, folder, tuple(cells), tuple(tasks), size, file.data_dir)


def _shared_settings(
    file: StudyFile, flags: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, str]]:
    given = {name.replace("-", "_"): value for name, value in file.settings.items()}
    known = setting_fields()
    for name in given:
        if name not in known:
            raise unknown_name(name, f"{where}, settings, key {shown(name)}", known)
    own = {name: f"{where}, settings, key {shown(name)}" for name in given}
    own |= {name: flag_of(name) for name in flags}
    values, sources = with_recipe(file.recipe, {**given, **flags})
    for name in ("quant", *OWN):
        if name in own:
            remedy = (
                "List it under arms instead"
                if name == "quant"
                else "Remove it: `seeds` sets the seeds, and a study resumes on its own"
            )
            raise SettingsError(f"{own[name]} is set by the study for each cell", remedy)
        values.pop(name, None)
    return values, {**sources, **own}


def _name(file: StudyFile, path: Path | None) -> str:
    name = file.name or (path.stem if path else "study")
    _check_name(name, "the study's name")
    return name


def _check_name(name: str, place: str) -> None:
    reserved = name.startswith("base_") or name.endswith(_FILES) or name == "logs"
    if reserved or not _NAME.fullmatch(name):
        raise SettingsError(
            f"{place}: {shown(name)} is not a valid name",
            "Use letters, digits, '-', '_', '.' and '+'; no 'base_' at the start, no file ending",
        )


def _check_arm(values: Mapping[str, Any], place: str) -> None:
    known = setting_fields()
    for name in values:
        if name not in known:
            raise unknown_name(name, f"{place}, key {shown(name)}", known)
        if name in _SHARED or name in OWN or name in BOOKKEEPING:
            raise SettingsError(
                f"{place}, key {shown(name)} can't differ between arms",
                "Move it to settings, or remove it; the key `seeds` sets an arm's seeds",
            )
    if "quant" not in values:
        names = ", ".join(quant.value for quant in Quant)
        raise SettingsError(f"{place} has no quant", f"Give it one of {names}")


def _check_distinct(cells: Sequence[Cell], where: str) -> None:
    """Refuses identical arms."""
    known: dict[str, str] = {}
    for cell in cells:
        settings = cell.settings.experiment() | {"seed": None}
        if not cell.settings.quant.is_4bit:
            settings["double_quant"] = None
        other = known.setdefault(repr(sorted(settings.items())), cell.arm)
        if other != cell.arm:
            raise SettingsError(
                f"{where}: arms {shown(other)} and {shown(cell.arm)} have the same settings",
                "Remove one, or change a setting",
            )


def _bases(cells: Sequence[Cell], folder: Path) -> list[Cell]:
    """One cell for each distinct base, named after the first arm that uses it."""
    bases: dict[tuple[object, ...], Cell] = {}
    for cell in cells:
        changes = {"output_dir": str(folder / f"base_{cell.arm}")}
        settings = build_settings(cell.settings.flat() | changes)
        bases.setdefault(base_kind(settings), Cell(cell.arm, None, settings))
    return list(bases.values())


def _seeds(value: Any, place: str) -> list[int]:
    """The seeds of an arm, from a number or a list."""
    try:
        seeds = _SEEDS.validate_python(value)
    except ValidationError as error:
        raise SettingsError(f"{place}, seeds: {first_problem(error)}", "Correct them") from None
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise SettingsError(f"{place}: seed {twice[0]} is given twice", "Remove one")
    return seeds

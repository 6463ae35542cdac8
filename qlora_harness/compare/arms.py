"""Arms: runs that differ in their seed alone. Arms are compared, not runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from qlora_harness.errors import SettingsError
from qlora_harness.results.runs import Run
from qlora_harness.settings import BOOKKEEPING

_NAMES = {"nf4": "NF4", "fp4": "FP4", "int4": "int4", "int8": "int8", "bf16": "bf16"}
# What follows from the quantisation, or names the run.
_FOLLOWING = ("double_quant", "quant", "seed")


@dataclass(frozen=True)
class Arm:
    """Runs of one kind.

    Attributes:
        name: For example NF4.
        runs: One a seed.
        quant: nf4, fp4, bf16 or another, if recorded.
        tuned: Whether the runs have adapters.
    """

    name: str
    runs: tuple[Run, ...]
    quant: str | None
    tuned: bool

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Of each run; None where it isn't recorded."""
        return tuple(None if run.training is None else run.training.seed for run in self.runs)


def settings_of(run: Run) -> dict[str, object]:
    """Returns the training settings that decide what a run computes."""
    if run.training is None:
        return {}
    return {name: value for name, value in run.training.settings.items() if name not in BOOKKEEPING}


def group(runs: Sequence[Run], *, labelled: bool = False) -> list[Arm]:
    """Groups runs into arms, in the order of their first runs.

    Args:
        runs: The runs.
        labelled: Whether the user named the runs, so that an arm of one run has its name.
    """
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        key = _key(run)
        seeds = {r.training.seed for r in groups.get(key, []) if r.training is not None}
        if run.training is None or run.training.seed in seeds:
            key = (*key, run.label)  # no further seed of an arm
        groups.setdefault(key, []).append(run)
    if len(groups) == 1:  # seeds of one arm, compared with each other
        groups = {(run.label,): [run] for run in runs}
    members = list(groups.values())
    names = _names(members, by_label=labelled)
    return [
        Arm(name, tuple(sorted(group, key=_seed)), group[0].quant, group[0].tuned)
        for name, group in zip(names, members, strict=True)
    ]


def _seed(run: Run) -> int:
    """For the order of an arm's runs, so that those of two arms with the same seeds are pairs."""
    return (run.training.seed if run.training is not None else None) or 0


def _key(run: Run) -> tuple[object, ...]:
    if run.training is None:
        return (run.quant, False, run.model)
    settings = {**settings_of(run), **run.training.model.model_dump(exclude={"commit"})}
    settings.pop("seed", None)
    data = run.training.data.train.fingerprint
    return (run.quant, True, run.training.status, data, repr(sorted(settings.items())))


def _names(groups: Sequence[Sequence[Run]], *, by_label: bool) -> list[str]:
    """The quantisation; beside it what tells two arms of the same apart."""
    names = []
    for group in groups:
        run = group[0]
        name = _NAMES.get(str(run.quant), run.quant or run.label)
        name = name if run.tuned or run.quant is None else f"{name} base"
        names.append(run.label if by_label and len(group) == 1 else name)
    for name in {name for name in names if names.count(name) > 1}:
        places = [place for place, other in enumerate(names) if other == name]
        settings = [settings_of(groups[place][0]) for place in places]
        differing = [
            key
            for key in dict.fromkeys(key for item in settings for key in item)
            if key not in _FOLLOWING and all(key in item for item in settings)
            if len({repr(item[key]) for item in settings}) > 1
        ]
        for place, item in zip(places, settings, strict=True):
            parts = [f"{key} {item.get(key)}" for key in differing[:2]]
            names[place] = ", ".join([name, *parts]) if parts else groups[place][0].label
        if len({names[place] for place in places}) < len(places):
            for place in places:
                names[place] = groups[place][0].label
    return [
        f"{name} ({group[0].label})" if names.count(name) > 1 else name
        for name, group in zip(names, groups, strict=True)
    ]


@dataclass(frozen=True)
class Plan:
    """Which arms are compared with which.

    Attributes:
        primary: Arm and baseline of the question that is asked; the first pair leads.
        secondary: Further pairs: the untrained bases, or what training gained.
    """

    primary: tuple[tuple[Arm, Arm], ...]
    secondary: tuple[tuple[Arm, Arm], ...]


def pair(arms: Sequence[Arm], baseline: str | None = None) -> Plan:
    """Decides which arms are compared.

    bf16 is the baseline wherever one arm is bf16: fine-tuned for fine-tuned arms, the base for
    bases, and of several the one with the most settings in common. Else the first arm is.

    Raises:
        SettingsError: There is no such arm.
    """
    if baseline is not None:
        chosen = [a for a in arms if a.name == baseline]
        chosen += [a for a in arms if baseline in [run.label for run in a.runs]]
        if not chosen:
            names = ", ".join(arm.name for arm in arms)
            raise SettingsError(f"--baseline {baseline} is neither arm nor run", f"Arms: {names}")
        return Plan(tuple((arm, chosen[0]) for arm in arms if arm is not chosen[0]), ())
    stages = [[a for a in arms if a.tuned], [a for a in arms if not a.tuned]]
    pairs = [_against_bf16(stage) for stage in stages]
    primary, secondary = pairs if pairs[0] else (pairs[1], [])
    if not primary:
        primary = _against_bf16(list(arms))
    elif not secondary:
        # A base or an adapter without a partner: what training gained in its quantisation.
        for tuned in stages[0]:
            secondary += [(tuned, base) for base in stages[1] if base.quant == tuned.quant]
    return Plan(tuple(primary), tuple(secondary))


def _against_bf16(arms: list[Arm]) -> list[tuple[Arm, Arm]]:
    """Each arm with the bf16 arm that is most like it; bf16 arms that no other arm meets last."""
    references = [arm for arm in arms if arm.quant == "bf16"] or arms[:1]
    others = [arm for arm in arms if arm not in references]
    pairs = [(arm, min(references, key=partial(_distance, arm))) for arm in others]
    met = [baseline for _, baseline in pairs] or references[:1]
    return pairs + [(arm, met[0]) for arm in references if arm not in met]


def _distance(arm: Arm, reference: Arm) -> int:
    mine, theirs = settings_of(arm.runs[0]), settings_of(reference.runs[0])
    names = (mine.keys() | theirs.keys()) - set(_FOLLOWING)
    return sum(mine.get(name) != theirs.get(name) for name in names)

"""Arms: runs that differ only in their seed. Arms are compared, not runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from qlora_harness.errors import SettingsError
from qlora_harness.results.runs import Run
from qlora_harness.settings import BOOKKEEPING

_NAMES = {"nf4": "NF4", "fp4": "FP4", "int4": "int4", "int8": "int8", "hqq": "HQQ", "bf16": "bf16"}
# Settings that follow from the quantisation, and the seed.
_FOLLOWING = ("double_quant", "quant", "seed")


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed; `tuned` ones have adapters."""

    name: str
    runs: tuple[Run, ...]
    quant: str | None
    tuned: bool

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seed of each run; None if it isn't recorded."""
        return tuple(run.seed for run in self.runs)


Pairs = list[tuple[Arm, Arm]]
"""Arms with their baselines."""


def settings_of(run: Run) -> dict[str, object]:
    """Returns the training settings that affect what a run computes."""
    if run.training is None:
        return {}
    return {name: value for name, value in run.training.settings.items() if name not in BOOKKEEPING}


def group(runs: Sequence[Run], *, labelled: bool = False) -> list[Arm]:
    """Groups runs into arms, in the order of their first runs.

    If the runs are `labelled` by the user, an arm of one run has its label.
    """
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        key = _key(run)
        if run.training is None or run.seed in [other.seed for other in groups.get(key, [])]:
            key = (*key, run.label)  # not a further seed of the arm
        groups.setdefault(key, []).append(run)
    if len(groups) == 1:  # seeds of one arm, compared with each other
        groups = {(run.label,): [run] for run in runs}
    members = list(groups.values())
    names = _names(members, by_label=labelled)
    return [
        Arm(name, tuple(sorted(part, key=lambda run: run.seed or 0)), part[0].quant, part[0].tuned)
        for name, part in zip(names, members, strict=True)
    ]


def _key(run: Run) -> tuple[object, ...]:
    if run.training is None:
        return (run.quant, False, run.model)
    settings = {**settings_of(run), **run.training.model.model_dump(exclude={"commit"})}
    settings.pop("seed", None)
    data = run.training.data.train.fingerprint
    return (run.quant, True, run.training.status, data, repr(sorted(settings.items())))


def _names(groups: Sequence[Sequence[Run]], *, by_label: bool) -> list[str]:
    """Each arm's quantisation, and the settings that tell arms of one quantisation apart."""
    names = []
    for group in groups:
        run = group[0]
        name = _NAMES.get(str(run.quant), run.quant or run.label)
        name = name if run.tuned or run.quant is None else f"{name} base"
        names.append(run.label if by_label and len(group) == 1 else name)
    for name in {name for name in names if names.count(name) > 1}:
        rows = [row for row, other in enumerate(names) if other == name]
        for row, part in zip(rows, _distinctions([groups[row][0] for row in rows]), strict=True):
            names[row] = ", ".join([name, *part]) if part else groups[row][0].label
    return [
        f"{name} ({group[0].label})" if names.count(name) > 1 else name
        for name, group in zip(names, groups, strict=True)
    ]


def _distinctions(runs: Sequence[Run]) -> list[list[str]]:
    """The first two settings in which runs differ, for each run."""
    settings = [settings_of(run) for run in runs]
    differing = [
        key
        for key in dict.fromkeys(key for item in settings for key in item)
        if key not in _FOLLOWING and all(key in item for item in settings)
        if len({repr(item[key]) for item in settings}) > 1
    ]
    return [[f"{key} {item[key]}" for key in differing[:2]] for item in settings]


def pair(arms: Sequence[Arm], baseline: str | None = None) -> tuple[Pairs, Pairs]:
    """Returns primary pairs, which answer the question, and secondary ones, about the bases.

    The default baseline is a bf16 arm, else the first arm: fine-tuned for fine-tuned arms, a base
    for bases, and among several the one with the most settings in common. Raises SettingsError if
    there is no such baseline.
    """
    if baseline is not None:
        chosen = [a for a in arms if a.name == baseline]
        chosen += [a for a in arms if baseline in [run.label for run in a.runs]]
        if not chosen:
            names = ", ".join(arm.name for arm in arms)
            raise SettingsError(f"--baseline {baseline} is neither arm nor run", f"Arms: {names}")
        return [(arm, chosen[0]) for arm in arms if arm is not chosen[0]], []
    tuned, bases = [a for a in arms if a.tuned], [a for a in arms if not a.tuned]
    primary, secondary = _against_bf16(tuned), _against_bf16(bases)
    if not primary:
        primary, secondary = secondary, []
    if not primary:
        primary = _against_bf16(list(arms))
    elif not secondary:
        # No second base: what training gained in its quantisation.
        secondary = [(arm, base) for arm in tuned for base in bases if base.quant == arm.quant]
    return primary, secondary


def _against_bf16(arms: list[Arm]) -> Pairs:
    """Each arm with the bf16 arm most like it; then bf16 arms that are nobody's baseline."""
    references = [arm for arm in arms if arm.quant == "bf16"] or arms[:1]
    others = [arm for arm in arms if arm not in references]
    pairs = [(arm, min(references, key=partial(_distance, arm))) for arm in others]
    met = [baseline for _, baseline in pairs] or references[:1]
    return pairs + [(arm, met[0]) for arm in references if arm not in met]


def _distance(arm: Arm, reference: Arm) -> int:
    mine, theirs = settings_of(arm.runs[0]), settings_of(reference.runs[0])
    names = (mine.keys() | theirs.keys()) - set(_FOLLOWING)
    return sum(mine.get(name) != theirs.get(name) for name in names)

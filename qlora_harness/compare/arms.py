"""Arms: runs that differ only in their seed. Arms are compared, not runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qlora_harness.errors import SettingsError
from qlora_harness.results.runs import Run
from qlora_harness.settings import BOOKKEEPING, COMPUTE_DTYPES

# Quantisations by dose: the most bits removed first.
NAMES = {"fp4": "FP4", "nf4": "NF4", "int4": "int4", "hqq": "HQQ", "int8": "int8", "bf16": "bf16"}
_DOSES = tuple(NAMES)
# Settings that follow from the quantisation, and the seed.
_FOLLOWING = ("double_quant", "quant", "seed")
# Short names of values; a setting's default has none.
_SHORT: dict[str, dict[object, str]] = {
    "compute_dtype": {name: name for name in COMPUTE_DTYPES},
    "double_quant": {False: "no DQ"},
    "use_rslora": {True: "rsLoRA"},
    "use_dora": {True: "DoRA"},
    "init_lora_weights": {
        "gaussian": "Gaussian", "pissa": "PiSSA", "loftq": "LoftQ", "eva": "EVA",
    },
}  # fmt: skip
_FEWEST_SHARED = 3  # two differences have one degree of freedom


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

    @property
    def model(self) -> str | None:
        """Name of the base model, if recorded."""
        return self.runs[0].model

    def only(self, seeds: Collection[int | None]) -> Arm:
        """Returns the arm with the runs of some seeds."""
        return replace(self, runs=tuple(run for run in self.runs if run.seed in seeds))


Pairs = list[tuple[Arm, Arm]]
"""Arms with their baselines."""


def settings_of(run: Run) -> dict[str, object]:
    """Returns the settings that affect what a run computes; of a base alone, how it is held."""
    if run.training is None:
        models = [scored.model for scored in run.scored.values()]
        names = ("double_quant", "rope_scaling")
        return {name: getattr(models[0], name) for name in names} if models else {}
    settings = run.training.settings
    return {name: value for name, value in settings.items() if name not in BOOKKEEPING}


def double_quant(run: Run) -> bool | None:
    """Returns whether the scales were quantised, too; None for other formats than NF4 and FP4."""
    value = settings_of(run).get("double_quant")
    return value if run.quant in ("nf4", "fp4") and isinstance(value, bool) else None


def group(runs: Sequence[Run]) -> list[Arm]:
    """Groups runs into arms, in the order of their first runs."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        key = _key(run)
        if run.training is None or run.seed in [other.seed for other in groups.get(key, [])]:
            key = (*key, run.label)  # not a further seed of the arm
        groups.setdefault(key, []).append(run)
    if len(groups) == 1:  # seeds of one arm, compared with each other
        groups = {(run.label,): [run] for run in runs}
    members = list(groups.values())
    names = _names(members)
    return [
        Arm(name, tuple(sorted(part, key=lambda run: run.seed or 0)), part[0].quant, part[0].tuned)
        for name, part in zip(names, members, strict=True)
    ]


def in_fp8(run: Run) -> str:
    """Returns what a name says of a run with FP8 products: in training, or in scoring only."""
    if run.training is not None and run.training.in_fp8:
        return " in FP8"
    return " scored in FP8" if any(scored.in_fp8 for scored in run.scored.values()) else ""


def _key(run: Run) -> tuple[object, ...]:
    if run.training is None:
        return (run.quant, False, run.model, in_fp8(run))
    settings = {**settings_of(run), **run.training.model.model_dump(exclude={"commit", "gguf"})}
    settings.pop("seed", None)
    settings.pop("model", None)  # the same GGUF file in another folder; its name is in `model`
    data = run.training.data.train.fingerprint
    kind = (run.quant, True, run.training.status, in_fp8(run), data)
    return (*kind, repr(sorted(settings.items())))


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Each arm's quantisation, and the settings that tell arms of one quantisation apart."""
    firsts = [group[0] for group in groups]
    names = [NAMES.get(str(run.quant), run.quant or run.label) + in_fp8(run) for run in firsts]
    bases = [not run.tuned and run.quant is not None for run in firsts]
    kinds = list(zip(names, bases, strict=True))
    for kind in {kind for kind in kinds if kinds.count(kind) > 1}:
        rows = [row for row, other in enumerate(kinds) if other == kind]
        parts = _distinctions([firsts[row] for row in rows])
        for row, part in zip(rows, parts, strict=True):
            if any(parts):
                names[row] = f"{names[row]} {', '.join(part)}".rstrip()
            else:
                names[row], bases[row] = firsts[row].label, False
    names = [f"{name} base" if base else name for name, base in zip(names, bases, strict=True)]
    return [
        f"{name} ({run.label})" if names.count(name) > 1 else name
        for name, run in zip(names, firsts, strict=True)
    ]


def _distinctions(runs: Sequence[Run]) -> list[list[str]]:
    """The first two settings in which runs of one quantisation differ, for each run."""
    settings = [settings_of(run) for run in runs]
    differing = [
        key
        for key in dict.fromkeys(key for item in settings for key in item)
        if key not in ("quant", "seed") and all(key in item for item in settings)
        if len({repr(item[key]) for item in settings}) > 1
    ]
    texts = [[_short(key, item[key]) for key in differing] for item in settings]
    return [[text for text in part if text][:2] for part in texts]


def _short(key: str, value: object) -> str:
    if key in _SHORT:
        return next((text for known, text in _SHORT[key].items() if known == value), "")
    return f"{'r' if key == 'lora_r' else key} {value}"


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


def by_dose(pairs: Pairs) -> Pairs:
    """Sorts pairs by their arms, the most bits removed first; as given if one is unknown."""
    known = all(arm.quant in _DOSES for arm, _ in pairs)
    return sorted(pairs, key=lambda both: _dose(both[0])) if known else pairs


def _dose(arm: Arm) -> tuple[int, bool]:
    return _DOSES.index(str(arm.quant)), double_quant(arm.runs[0]) is False


def matched(arm: Arm, baseline: Arm) -> tuple[Arm, Arm]:
    """Returns both arms with the seeds that both have, if those are three or more."""
    shared = set(arm.seeds) & set(baseline.seeds) - {None}
    if len(shared) < _FEWEST_SHARED:
        return arm, baseline
    return arm.only(shared), baseline.only(shared)


def _against_bf16(arms: list[Arm]) -> Pairs:
    """Each arm with the bf16 arm most like it; then bf16 arms that are nobody's baseline."""
    exact = sorted(arms, key=lambda arm: in_fp8(arm.runs[0]))  # FP8 is the treatment
    references = [arm for arm in exact if arm.quant == "bf16"] or exact[:1]
    others = [arm for arm in arms if arm not in references]
    pairs = [(arm, min(references, key=partial(_distance, arm))) for arm in others]
    met = [baseline for _, baseline in pairs] or references[:1]
    # Those are compared with the baseline that most arms have.
    names = [baseline.name for baseline in met]
    usual = max(met, key=lambda arm: names.count(arm.name), default=None)
    rest = [(arm, usual) for arm in references if usual and arm not in met]
    return pairs + [(a, b) if in_fp8(a.runs[0]) >= in_fp8(b.runs[0]) else (b, a) for a, b in rest]


def _distance(arm: Arm, reference: Arm) -> int:
    mine, theirs = settings_of(arm.runs[0]), settings_of(reference.runs[0])
    names = (mine.keys() | theirs.keys()) - set(_FOLLOWING)
    others = in_fp8(arm.runs[0]) != in_fp8(reference.runs[0])
    return others + sum(mine.get(name) != theirs.get(name) for name in names)

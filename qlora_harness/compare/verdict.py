"""The answer in sentences, the most important first."""

from __future__ import annotations

import math
import statistics

from qlora_harness.compare.comparison import Comparison
from qlora_harness.compare.contrast import Contrast
from qlora_harness.compare.endpoint import Endpoint
from qlora_harness.compare.numbers import difference, inner_interval, signed
from qlora_harness.study_plan import plan

_MOSTLY = 0.5  # of a difference, from which on its cause is named


def verdict(comparison: Comparison) -> str:
    """Returns the whole answer."""
    return " ".join(sentences(comparison))


def sentences(comparison: Comparison) -> list[str]:
    """Returns the sentences of the answer by their importance."""
    primary = comparison.primary
    if not primary:
        return ["There is nothing to compare."]
    found = [_validity(comparison)]
    if len(primary) == 1:
        found += [_costs(primary[0]), _accuracy(primary[0], comparison), _won_back(primary[0])]
    else:
        found.append(_counts(primary))
    found += [_secondary(item) for item in comparison.contrasts if not item.primary]
    return [sentence for sentence in found if sentence]


def _validity(comparison: Comparison) -> str:
    """States first what would make everything after it meaningless."""
    if any("random weights" in note for note in comparison.notes):
        return "The base has random weights: loss and accuracy say nothing."
    leading = {name for item in comparison.primary for name in (item.arm, item.baseline)}
    found = [one for one in comparison.chance if one.arm in leading and one.at_chance]
    if not found:
        return ""
    verb = "is" if len(found) == 1 else "are"
    sizes = [f"{signed(100 * one.centred, 2)} ± {100 * one.stderr:.2f}" for one in found]
    return (
        f"{_listed([one.arm for one in found])} {verb} not shown to answer better than chance "
        f"({_listed(sizes)} points without preference for letters): accuracy may be letters alone."
    )


def _costs(item: Contrast) -> str:
    """Memory, time, loss and NLL, where something is shown."""
    parts: dict[str, list[str]] = {"saves": [], "costs": [], "same": []}
    for key, less, more, name in (
        ("memory", "{} of memory", "{} more memory", "memory"),
        ("time", "{} of training time", "{} more training time", "training time"),
        ("eval_loss", "{} nats of eval loss", "{} nats of eval loss", "eval loss"),
        ("nll", "{} nats of NLL", "{} nats of NLL", "NLL"),
    ):
        endpoint = item.endpoints.get(key)
        if endpoint is None or endpoint.difference is None:
            continue
        size = difference(endpoint).lstrip("+−")
        if endpoint.within:
            parts["same"].append(name)
        elif endpoint.word == "better":
            parts["saves"].append(less.format(size))
        elif endpoint.word == "worse":
            parts["costs"].append(more.format(size))
    said = [f"{verb} {_listed(parts[verb])}" for verb in ("saves", "costs") if parts[verb]]
    if parts["same"]:
        said.append(f"has the same {_listed(parts['same'])} within the margin")
    text = f"{item.arm} {', and '.join(said)} against {item.baseline}"
    if not said:
        text = f"{item.arm} against {item.baseline}: no difference in cost is shown"
    if not said and "memory" not in item.endpoints:
        return ""  # neither was trained here
    if item.seeds == (1, 1) and "memory" in item.endpoints:
        return f"These two runs: {text}. A second seed would show what the seed does."
    if min(item.seeds) == 1 < max(item.seeds):
        text += "; the single-seed arm is assumed to vary as much as the other"
    return f"{text}."


def _counts(primary: list[Contrast]) -> str:
    """Of many arms: for how many something is shown, and which costs least."""
    parts = []
    for key in ("memory", "time", "eval_loss", "accuracy", "nll"):
        known = [item.endpoints[key] for item in primary if key in item.endpoints]
        for word in ("better", "worse"):
            count = sum(endpoint.word == word for endpoint in known)
            if count:
                parts.append(f"{known[0].name} {word} in {count}")
    text = f"Of {len(primary)} arms: {_listed(parts)}." if parts else ""
    nll = [item for item in primary if "nll" in item.endpoints]
    if nll:
        best = min(nll, key=lambda item: item["nll"].difference or 0)
        text += f" NLL compares best for {best.arm} ({difference(best['nll'])})."
    if any(item.seeds == (1, 1) for item in primary):
        text += " Where both arms have one seed, the result is about those two adapters only."
    return text.strip()


def _accuracy(item: Contrast, comparison: Comparison) -> str:
    endpoint = item.endpoints.get("accuracy")
    if endpoint is None or endpoint.difference is None:
        return ""
    text = f"{endpoint.name.capitalize()} on these questions: {_shown(endpoint)}"
    macro = item.endpoints.get("macro")
    if macro is not None and (macro.word, macro.within) == (endpoint.word, endpoint.within):
        text += f" (macro {difference(macro)})"
    elif macro is not None:
        text += f", but macro {difference(macro)} ({macro.word})"
    if not endpoint.within and endpoint.word == "unclear":
        text += _needed(item, comparison)
    return f"{text}{_letters(item)}."


def _shown(endpoint: Endpoint) -> str:
    margin = f"±{100 * (endpoint.margin or 0):g}"
    size = difference(endpoint)
    if endpoint.word == "unclear" and endpoint.margin is None:
        return f"{size}, no difference is shown"
    if endpoint.word == "unclear":
        return f"{size}, neither a difference nor equivalence within {margin} is shown"
    if endpoint.word == "same":
        return f"{size}, the same within {margin} (90% interval {inner_interval(endpoint)})"
    return f"{size}, {endpoint.word}{f', though within {margin}' if endpoint.within else ''}"


def _needed(item: Contrast, comparison: Comparison) -> str:
    """How many questions would show equivalence; nothing where these do or nothing tells it."""
    endpoint, detail = item.endpoints["accuracy"], item.detail
    if detail is None or not endpoint.n or endpoint.unit != "share":
        return ""
    discordance = max((detail.won + detail.lost) / endpoint.n, 1 / endpoint.n)
    values = [
        [run.value for run in comparison.runs if run.arm == arm and run.value is not None]
        for arm in (item.arm, item.baseline)
    ]
    spreads = [statistics.variance(part) for part in values if len(part) > 1]
    deviation = math.sqrt(statistics.fmean(spreads)) if spreads else 0.0
    need = plan(comparison.margin, discordance, deviation, (min(item.seeds),))[0].equivalence
    margin = f"±{100 * comparison.margin:g}"
    if need is None:
        return f"; with so few seeds no number of questions shows {margin}"
    if need <= endpoint.n:
        return ""
    step = 10 ** max(0, len(str(need)) - 2)
    return f"; if there is none, showing {margin} takes about {-(-need // step) * step:,} questions"


def _letters(item: Contrast) -> str:
    """How much of an accuracy difference is letters and ties."""
    detail, endpoint = item.detail, item.endpoints["accuracy"]
    if detail is None or not endpoint.difference or endpoint.word not in ("better", "worse"):
        return ""
    text = ""
    if endpoint.letters and detail.explained is not None:
        text = f"; preference for letters alone accounts for {signed(100 * detail.explained, 2)}"
        centred = item.endpoints.get("letter_centred")
        if centred is not None:
            text += f", and without it the arms differ by {difference(centred)} ({centred.word})"
    if abs(detail.tie_effect) > _MOSTLY * abs(endpoint.difference):
        text += f"; counting the first of tied letters adds {signed(100 * detail.tie_effect, 2)}"
    return text


def _won_back(item: Contrast) -> str:
    before, after, what = (*(item.endpoints.get(k) for k in ("loss_before", "eval_loss")), "")
    if before is None:
        before, after = (item.endpoints.get(k) for k in ("first_step_loss", "last_steps_loss"))
        what = "training "
    if before is None or after is None or not before.difference or after.difference is None:
        return ""
    if not 0 <= after.difference < before.difference or "better" in (before.word, after.word):
        return ""
    return (
        f"Training wins back {100 * (1 - after.difference / before.difference):.0f}% of the gap in "
        f"{what}loss ({difference(before)} before it, {difference(after)} after)."
    )


def _secondary(item: Contrast) -> str:
    parts = []
    for key in ("accuracy", "letter_centred", "nll"):
        endpoint = item.endpoints.get(key)
        if endpoint is None or endpoint.difference is None:
            continue
        parts.append(f"{endpoint.name} {difference(endpoint)} ({endpoint.word})")
    return f"{item.arm} against {item.baseline}: {_listed(parts)}." if parts else ""


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

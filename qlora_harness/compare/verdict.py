"""The verdict: the answer in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_harness.compare.numbers import difference, interval, listed, points, word
from qlora_harness.compare.power import discordance, questions_needed, seed_deviation
from qlora_harness.compare.record import ComparisonRecord, Contrast, Endpoint
from qlora_harness.compare.scores import MOSTLY

# The phrases for less and for more of an endpoint, and its name.
_COSTS = {
    "memory": ("{} of memory", "{} more memory", "memory"),
    "time": ("{} of training time", "{} more training time", "training time"),
    "eval_loss": ("{} nats of eval loss", "{} nats of eval loss", "eval loss"),
    "nll": ("{} nats of NLL", "{} nats of NLL", "NLL"),
}


def verdict(comparison: ComparisonRecord) -> str:
    """Returns the answer in sentences."""
    return " ".join(sentences(comparison))


def sentences(comparison: ComparisonRecord) -> list[str]:
    """Returns the sentences of the answer, the most important first."""
    if not comparison.primary:
        return ["There is nothing to compare."]
    item = comparison.headline
    parts = [_validity(comparison), _costs(item, comparison.benchmarks)]
    if len(comparison.primary) > 1:
        parts.append(_before(comparison, item))
    parts += [_accuracy(item, comparison), _won_back(item)]
    if len(comparison.primary) == 1:
        parts += [_secondary(item) for item in comparison.contrasts if not item.primary]
    return [sentence for sentence in parts if sentence]


def _validity(comparison: ComparisonRecord) -> str:
    """Why the other sentences may mean nothing; so it comes first."""
    if any("random weights" in note for note in comparison.notes):
        return "The base has random weights: loss and accuracy say nothing."
    chance = {one.arm: one for one in comparison.chance if one.at_chance}
    names = [item.arm for item in comparison.primary]
    names = list(dict.fromkeys(names + [item.baseline for item in comparison.primary]))
    guessing = [name for name in names if name in chance]
    if not guessing:
        return ""
    shown = f"{listed(guessing)} {'is' if len(guessing) == 1 else 'are'} not shown to beat chance"
    if len(names) < 3:
        sizes = [f"{points(chance[n].centred)} ± {100 * chance[n].stderr:.2f}" for n in guessing]
        shown += f" ({listed(sizes)} points without letter preference)"
    elif len(guessing) == len(names):
        shown = "No arm is shown to beat chance"
    return f"{shown}: accuracy may come from letter preference alone."


def _costs(item: Contrast, benchmarks: Sequence[str]) -> str:
    """The shown differences in memory, time, loss and NLL, and on tasks beside the first."""
    changes = _savings_and_costs(item, benchmarks)
    trained = "memory" in item.endpoints
    if not changes and not trained:
        return ""
    text = f"{item.arm} {changes} compared with {item.baseline}"
    if not changes:
        text = f"{item.arm} and {item.baseline} show no difference in cost"
    if item.seeds == (1, 1) and trained:
        return (
            f"In these two runs, {text}. With one seed each, the spread between seeds is unknown."
        )
    if min(item.seeds) == 1 < max(item.seeds):
        text += "; the single-seed arm is assumed to vary as much as the other"
    return f"{text}."


def _savings_and_costs(item: Contrast, benchmarks: Sequence[str]) -> str:
    saves, costs, same = [], [], []
    gains: list[str] = []
    for key, (less, more, name) in _COSTS.items():
        endpoint = item.measured(key)
        if endpoint is None:
            continue
        size = difference(endpoint).lstrip("+−")
        if endpoint.within:
            same.append(name)
        elif endpoint.word == "better":
            saves.append(less.format(size))
        elif endpoint.word == "worse":
            costs.append(more.format(size))
    for key in benchmarks:
        endpoint = item.measured(key)
        if endpoint is not None and endpoint.word in ("better", "worse"):
            size = difference(endpoint).lstrip("+−").replace("pts", "points")
            (gains if endpoint.word == "better" else costs).append(f"{size} of {key}")
    good = [f"{verb} {listed(p)}" for verb, p in (("saves", saves), ("gains", gains)) if p]
    changes = [" and ".join(good), f"costs {listed(costs)}" if costs else ""]
    parts = [" but ".join(filter(None, changes))] if any(changes) else []
    parts += [f"has the same {listed(same)} within the margin"] if same else []
    return ", and ".join(parts)


def _before(comparison: ComparisonRecord, item: Contrast) -> str:
    """What quantising the base alone does to accuracy."""
    base = comparison.before(item)
    accuracy = None if base is None else base.measured("accuracy")
    if accuracy is None:
        return ""
    size = f"{difference(accuracy)} ({interval(accuracy)}, {word(accuracy)})"
    return f"Before training, {item.arm} changes accuracy by {size}."


def _accuracy(item: Contrast, comparison: ComparisonRecord) -> str:
    endpoint = item.measured("accuracy")
    if endpoint is None:
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
        return f"{size}, the same within {margin} (90% interval {interval(endpoint, inner=True)})"
    return f"{size}, {endpoint.word}{f', though within {margin}' if endpoint.within else ''}"


def _needed(item: Contrast, comparison: ComparisonRecord) -> str:
    """How many questions would show equivalence; "" if these are enough, or it isn't known."""
    n, share = item["accuracy"].n, discordance(item)
    if share is None or not n or item["accuracy"].unit != "share":
        return ""
    deviation = seed_deviation(comparison, item) or 0.0
    need = questions_needed(comparison.margin, max(share, 1 / n), deviation, min(item.seeds))
    margin = f"±{100 * comparison.margin:g}"
    if need.equivalence is None:
        return f"; with so few seeds, no number of questions shows equivalence within {margin}"
    if need.equivalence <= n:
        return ""
    step = 10 ** max(0, len(str(need.equivalence)) - 2)
    count = -(-need.equivalence // step) * step
    return f"; if the arms are equal, showing it within {margin} takes {count:,} questions"


def _letters(item: Contrast) -> str:
    """How much of an accuracy difference comes from letters and ties."""
    detail, endpoint = item.detail, item["accuracy"]
    if detail is None or not endpoint.difference or endpoint.word not in ("better", "worse"):
        return ""
    text = ""
    if endpoint.letters and detail.explained is not None:
        text = f"; letter preference alone accounts for {points(detail.explained)}"
        centred = item.endpoints.get("letter_centred")
        if centred is not None:
            text += f", and without it the arms differ by {difference(centred)} ({centred.word})"
    if abs(detail.tie_effect) > MOSTLY * abs(endpoint.difference):
        text += f"; counting the first of tied letters adds {points(detail.tie_effect)}"
    return text


def _won_back(item: Contrast) -> str:
    """How much of a gap in held-out loss training closes."""
    before, after = item.measured("loss_before"), item.measured("eval_loss")
    if before is None or after is None or not before.difference or after.difference is None:
        return ""
    if not 0 <= after.difference < before.difference or "better" in (before.word, after.word):
        return ""
    return (
        f"Training closes {100 * (1 - after.difference / before.difference):.0f}% of the gap in "
        f"loss ({difference(before)} before it, {difference(after)} after)."
    )


def _secondary(item: Contrast) -> str:
    endpoints = [item.measured(key) for key in ("accuracy", "letter_centred", "nll")]
    parts = [f"{one.name} {difference(one)} ({one.word})" for one in endpoints if one]
    return f"{item.arm} against {item.baseline}: {listed(parts)}." if parts else ""

"""The answer in sentences, the most important first."""

from __future__ import annotations

from qlora_harness.compare.comparison import Comparison
from qlora_harness.compare.contrast import Contrast
from qlora_harness.compare.endpoint import Endpoint
from qlora_harness.compare.numbers import difference, signed
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
    """What takes the meaning from all that follows stands first."""
    if any("random weights" in note for note in comparison.notes):
        return "The base has random weights: loss and accuracy say nothing."
    leading = {name for item in comparison.primary for name in (item.arm, item.baseline)}
    found = [one for one in comparison.chance if one.arm in leading and one.at_chance]
    if not found:
        return ""
    parts = [
        f"{one.arm} answers at chance ({signed(100 * one.centred, 2)} ± {100 * one.stderr:.2f} "
        "points without its letter preference)"
        for one in found
    ]
    return f"{_listed(parts)}: accuracy says nothing about its knowledge."


def _costs(item: Contrast) -> str:
    """Memory, time, loss and NLL, where something is shown."""
    saved, paid = [], []
    for key, less, more in (
        ("memory", "{} of memory", "{} more memory"),
        ("time", "{} of training time", "{} more training time"),
        ("eval_loss", "{} of evaluation loss", "{} of evaluation loss"),
        ("nll", "{} nats of NLL", "{} nats of NLL"),
    ):
        endpoint = item.endpoints.get(key)
        if endpoint is None or endpoint.difference is None:
            continue
        size = difference(endpoint).lstrip("+−")
        if endpoint.word == "better":
            saved.append(less.format(size))
        elif endpoint.word == "worse":
            paid.append(more.format(size))
    parts = []
    if saved:
        parts.append(f"saves {_listed(saved)}")
    if paid:
        parts.append(f"costs {_listed(paid)}")
    if not parts:
        return f"{item.arm} against {item.baseline}: neither costs nor savings are shown."
    text = f"{item.arm} {', and '.join(parts)} against {item.baseline}"
    if item.seeds == (1, 1):
        return f"These two runs: {text}. A second seed would show what the seed does."
    if 1 in item.seeds:
        text += "; the arm of one seed is taken to vary as the other does"
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
        text += f" The best NLL is that of {best.arm} ({difference(best['nll'])})."
    if any(1 in item.seeds for item in primary):
        text += " Arms of one seed are about their adapters alone."
    return text.strip()


def _accuracy(item: Contrast, comparison: Comparison) -> str:
    endpoint = item.endpoints.get("accuracy")
    if endpoint is None or endpoint.difference is None:
        return ""
    text = f"{endpoint.name.capitalize()}: {_shown(endpoint)}"
    macro = item.endpoints.get("macro")
    if macro is not None and (macro.word, macro.within) == (endpoint.word, endpoint.within):
        text += f" (macro {difference(macro)})"
    elif macro is not None:
        text += f", but macro {difference(macro)} ({macro.word})"
    need = _needed(endpoint, comparison.margin)
    if not endpoint.within and endpoint.word == "unclear" and need is not None:
        text += f"; equivalence takes about {need:,} questions"
    return f"{text}{_letters(item)}."


def _shown(endpoint: Endpoint) -> str:
    margin = f"±{100 * (endpoint.margin or 0):g}"
    size = difference(endpoint)
    if endpoint.word == "unclear":
        return f"{size}, neither a difference nor equivalence within {margin} is shown"
    if endpoint.word == "same":
        return f"{size}, the same within {margin}"
    return f"{size}, {endpoint.word}{f', though within {margin}' if endpoint.within else ''}"


def _needed(endpoint: Endpoint, margin: float) -> int | None:
    """Questions that would show equivalence, if there is no difference; None if these do."""
    if endpoint.stderr is None or endpoint.n is None or endpoint.unit != "share":
        return None
    changed = endpoint.stderr**2 * endpoint.n
    need = plan(margin, max(changed, 1 / endpoint.n), 0.0, (1,))[0].equivalence
    if need is None or need <= endpoint.n:
        return None
    digits = max(0, len(str(need)) - 2)
    step = int(10**digits)
    return -(-need // step) * step


def _letters(item: Contrast) -> str:
    """How much of an accuracy difference is letters and ties."""
    detail, endpoint = item.detail, item.endpoints["accuracy"]
    if detail is None or not endpoint.difference or endpoint.word not in ("better", "worse"):
        return ""
    text = ""
    if endpoint.letters and detail.explained is not None:
        text = f"; {signed(100 * detail.explained, 2)} of it is letter preference"
        centred = item.endpoints.get("letter_centred")
        if centred is not None:
            text += f", without which it is {difference(centred)} ({centred.word})"
    if abs(detail.tie_effect) > _MOSTLY * abs(endpoint.difference):
        text += f"; the first of tied letters would move it by {signed(100 * detail.tie_effect, 2)}"
    return text


def _won_back(item: Contrast) -> str:
    before, after = item.endpoints.get("loss_before"), item.endpoints.get("eval_loss")
    if before is None:
        before, after = (item.endpoints.get(k) for k in ("first_step_loss", "last_steps_loss"))
    if before is None or after is None or not before.difference or after.difference is None:
        return ""
    if before.difference <= 0 or not 0 <= after.difference < before.difference:
        return ""
    return (
        f"Training wins back {100 * (1 - after.difference / before.difference):.0f}% of the "
        f"loss that quantising cost ({difference(before)} before, {difference(after)} after)."
    )


def _secondary(item: Contrast) -> str:
    parts = []
    for key in ("letter_centred", "accuracy", "nll"):
        endpoint = item.endpoints.get(key)
        if endpoint is None or endpoint.difference is None:
            continue
        if key == "accuracy" and "letter_centred" in item.endpoints:
            continue
        parts.append(f"{endpoint.name} {difference(endpoint)} ({endpoint.word})")
    return f"{item.arm} against {item.baseline}: {_listed(parts)}." if parts else ""


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

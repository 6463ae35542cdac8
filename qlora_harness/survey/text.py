"""A survey on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from qlora_harness.errors import printable
from qlora_harness.results.terminal import PrintableText
from qlora_harness.survey.overlap import LONGEST
from qlora_harness.survey.survey import Survey, length_bars, quantiles, turn_bars

_WIDEST_BAR = 40
_SHOWN_CHARACTERS = 600  # of a piece of an example
_SHOWN_QUESTIONS = 10
_LEARNED = Style(color="green", bold=True)


def print_survey(survey: Survey, console: Console) -> None:
    """Prints a survey."""
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for name, value in rows(survey):
        facts.add_row(Text(name, style="bold"), PrintableText(value))
    console.print(facts)
    if survey.lengths:
        _print_bars(console, f"{survey.unit} of a conversation", length_bars(survey.lengths))
        _print_bars(console, "turns of a conversation", turn_bars(survey.turns))
    for overlap in survey.overlaps[:_SHOWN_QUESTIONS]:
        more = f" and {overlap.rows - 1} more" if overlap.rows > 1 else ""
        console.print(
            PrintableText(f"\n{overlap.subject}: {overlap.question}\n  in {overlap.place}{more}")
        )
    if len(survey.overlaps) > _SHOWN_QUESTIONS:
        console.print(f"… and {len(survey.overlaps) - _SHOWN_QUESTIONS} more questions")
    for example in survey.examples:
        console.print(Text(f"\n{printable(example.place)}, learned in ⟦ ⟧:", style="bold"))
        text = Text()
        for piece, learned in example.pieces:
            shown = printable(shortened(piece), keep="\n")
            text.append(f"⟦{shown}⟧" if learned else shown, _LEARNED if learned else None)
        console.print(text)


def rows(survey: Survey) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each fact."""
    corpus, count = survey.corpus, len(survey.lengths)
    yield "data", f"{survey.source}, {survey.split}"
    yield "form", survey.form
    yield "rows", f"{corpus.messages:,}"
    system = f", {survey.with_system:,} with a system prompt" if survey.with_system else ""
    yield "conversations", f"{count:,}{system}"
    yield "left out", _counts(survey) or "nothing"
    if corpus.resolved:
        yield "decided", ", ".join(f"{n:,} {kind}" for kind, n in corpus.resolved.items())
    first = f", the first is {survey.first_duplicate}" if survey.duplicates else ""
    yield "duplicates", f"{survey.duplicates:,}{first}"
    if count:
        yield from _length_rows(survey, count)
    yield "MMLU", _overlap(survey)


def _length_rows(survey: Survey, count: int) -> Iterator[tuple[str, str]]:
    total = sum(survey.lengths)
    yield (
        survey.unit,
        f"{total:,}, {survey.learned:,} learned ({survey.learned / total:.0%}), with the template "
        f"{survey.template}",
    )
    ends = ", ".join(f"{name} {length:,}" for name, length in quantiles(survey.lengths).items())
    yield "length", ends
    if survey.unit == "tokens":
        cut = f"{survey.truncated:,} ({survey.truncated / count:.1%})"
        yield "truncated", f"{cut} are longer than --max-length {survey.max_length}"
    else:
        yield "truncated", "unknown in characters: --model NAME counts tokens"


def _counts(survey: Survey) -> str:
    dropped = sorted(survey.corpus.dropped.items())
    first = {reason: f" (first: {place})" for reason, place in survey.first.items()}
    return ", ".join(f"{n:,} {reason}{first.get(reason, '')}" for reason, n in dropped)


def _overlap(survey: Survey) -> str:
    if survey.questions is None:
        return "not compared: QLORA_MMLU_DIR names no folder with the questions"
    return (
        f"{len(survey.overlaps):,} of {survey.questions:,} questions have {LONGEST} words in a "
        "row, or all their words, in common with a conversation"
    )


def shortened(text: str) -> str:
    """Returns a text without its middle, if it is long."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"


def _print_bars(console: Console, title: str, bars: Mapping[str, int]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    most = max(bars.values())
    for label, count in bars.items():
        table.add_row(label, f"{count:,}", "█" * round(_WIDEST_BAR * count / most))
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)

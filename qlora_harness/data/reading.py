"""Reads the conversations of a split: finds the form of its rows, and counts what is left out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from qlora_harness.data.conversation import Conversation, Corpus
from qlora_harness.data.forms import FORMS, Form, check_columns, recognise
from qlora_harness.data.oasst1 import check_row, messages_of, read_trees
from qlora_harness.data.rows import DroppedRow, Row
from qlora_harness.data.sources import Split
from qlora_harness.errors import DataError
from qlora_harness.settings import DataSettings


@dataclass
class Reading:
    """The conversations of a split, to be read once, in file order.

    `corpus` has their counts after the last one, and no list of them. `first` is the place of the
    first row that was left out, by reason.
    """

    form: Form
    conversations: Iterator[Conversation]
    corpus: Corpus
    first: dict[str, str] = field(default_factory=dict)


def read_conversations(split: Split, settings: DataSettings, source: str) -> Reading:
    """Begins to read a split; raises DataError if it is empty or has no known form.

    So does reading on, for a row that can't be used.
    """
    rows = iter(split.rows)
    first = next(rows, None)
    if first is None:
        raise DataError(f"--dataset: {source} has no rows", "Check the data set")
    form = recognise(first, settings.format)
    rows = chain([first], rows)
    reading = Reading(form, iter(()), Corpus([]))
    if form.read is None:
        if form.name != "oasst":
            rows = chain.from_iterable(map(messages_of, rows))
        reading.conversations = _trees(rows, settings, source, reading.corpus)
    else:
        reading.conversations = _each(rows, form, reading)
    return reading


def _each(rows: Iterable[Row], form: Form, reading: Reading) -> Iterator[Conversation]:
    """Yields a conversation for each row that has one."""
    assert form.read is not None
    corpus = reading.corpus
    for row in rows:
        corpus.messages += 1
        check_columns(row, form)
        try:
            conversation = form.read(row)
        except DroppedRow as dropped:
            corpus.dropped[dropped.reason] += 1
            reading.first.setdefault(dropped.reason, row.place)
            continue
        corpus.trees += 1
        if conversation.resolved:
            corpus.resolved[conversation.resolved] += 1
        yield conversation


def _trees(
    rows: Iterable[Row], settings: DataSettings, source: str, corpus: Corpus
) -> Iterator[Conversation]:
    """Yields the conversations of OASST's trees; an error that names no file gets its name."""
    languages = parse_languages(settings.languages)
    checked = (check_row(row.values, row.place) for row in rows)
    try:
        yield from read_trees(checked, languages, settings.conversations, corpus)
    except DataError as error:
        if source in str(error):
            raise
        raise DataError(f"{source}: {error.problem}", error.remedy) from None


def check_tree_settings(forms: Collection[str], settings: DataSettings) -> None:
    """Raises DataError if a setting for trees has no effect, since none of the forms has trees."""
    if any(FORMS[form].read is None for form in forms):
        return
    ignored = {
        "--languages": settings.languages if settings.languages not in ("en", "all") else None,
        "--conversations": "all-paths" if settings.conversations == "all-paths" else None,
    }
    for flag, value in ignored.items():
        if value is not None:
            raise DataError(
                f"{flag} {value}: it is for trees (the form oasst), and {settings.dataset} has "
                f"rows of the form {', '.join(sorted(forms))}",
                f"Leave {flag} out, and filter the rows yourself if they need it",
            )


def parse_languages(languages: str) -> tuple[str, ...] | None:
    """Returns the codes of --languages, or None for "all"."""
    codes = tuple(code.strip() for code in languages.split(",") if code.strip())
    if "all" in codes and len(codes) > 1:
        raise DataError(
            f"--languages {languages}: 'all' can't be combined with codes", "Give one of the two"
        )
    return None if codes == ("all",) else codes

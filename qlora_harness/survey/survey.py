"""Takes the survey of a data set: one pass over its rows, in little memory."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from qlora_harness.data.chat_encoder import ChatEncoder
from qlora_harness.data.conversation import Conversation, Corpus
from qlora_harness.data.examples import SpannedIds
from qlora_harness.data.reading import Reading, read_conversations
from qlora_harness.data.sources import load_splits
from qlora_harness.data.text_ids import Tokenizer
from qlora_harness.settings import DataSettings
from qlora_harness.survey.characters import Characters
from qlora_harness.survey.overlap import Overlap, Questions

_BATCH = 1000  # conversations
_EXAMPLES = 3
_UNLEARNED = "without a supervised token"
_UNLIMITED = 1 << 30  # tokens: nothing is cut


@dataclass(frozen=True)
class ShownExample:
    """A conversation as pieces of text, each with whether it is learned."""

    place: str
    pieces: list[tuple[str, bool]]


@dataclass
class Survey:
    """What a split holds; `lengths` are in `unit`, "tokens" or "characters".

    `first` is the place of the first row that was left out, by reason. `duplicates` counts
    conversations that an earlier one equals.
    """

    source: str
    split: str
    form: str
    unit: str
    template: str
    max_length: int
    corpus: Corpus
    first: dict[str, str]
    lengths: array[int] = field(default_factory=lambda: array("q"))
    learned: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    with_system: int = 0
    duplicates: int = 0
    first_duplicate: str = ""
    examples: list[ShownExample] = field(default_factory=list)
    questions: int | None = None
    overlaps: list[Overlap] = field(default_factory=list)

    @property
    def truncated(self) -> int:
        """The number of conversations longer than `max_length`."""
        return sum(length > self.max_length for length in self.lengths)


def take_surveys(
    name: str, settings: DataSettings, tokenizer: Tokenizer | None, questions: Questions | None
) -> Iterator[Survey]:
    """Yields the survey of each split that training would use; characters without a `tokenizer`.

    Raises DataError for an unusable row, and SettingsError for an unusable template.
    """
    splits = load_splits(name, settings.dataset_revision)
    unlimited = replace(settings, max_length=_UNLIMITED)
    written_by = tokenizer or Characters()
    encoder = ChatEncoder(written_by, settings.template, _UNLIMITED, settings.mask)
    for label, split in (("train", splits.train), ("validation", splits.validation)):
        if split is None:
            continue
        reading = read_conversations(split, unlimited, splits.source)
        survey = Survey(
            source=splits.source,
            split=label,
            form=reading.form.name,
            unit="characters" if tokenizer is None else "tokens",
            template=settings.template,
            max_length=settings.max_length,
            corpus=reading.corpus,
            first=reading.first,
        )
        _fill(survey, reading, encoder, written_by, questions)
        yield survey


def _fill(
    survey: Survey,
    reading: Reading,
    encoder: ChatEncoder,
    tokenizer: Tokenizer,
    questions: Questions | None,
) -> None:
    seen: set[bytes] = set()
    if questions is not None:
        questions.overlaps.clear()
        survey.questions = len(questions)
    while batch := list(islice(reading.conversations, _BATCH)):
        for conversation, encoded in zip(batch, encoder.encode_all(batch), strict=True):
            if encoded is None:  # nothing was cut: the tokenizer's own template shows no reply
                survey.corpus.dropped[_UNLEARNED] += 1
                survey.first.setdefault(_UNLEARNED, conversation.place)
                continue
            _count(survey, conversation, encoded, seen)
            if len(survey.examples) < _EXAMPLES:
                survey.examples.append(_shown(conversation, encoded, tokenizer))
            if questions is not None:
                questions.look("\n".join(_texts(conversation)), conversation.place)
    if questions is not None:
        survey.overlaps = list(questions.overlaps.values())


def _count(
    survey: Survey, conversation: Conversation, encoded: SpannedIds, seen: set[bytes]
) -> None:
    survey.lengths.append(len(encoded.input_ids))
    borders = encoded.spans
    survey.learned += sum(borders[1::2]) - sum(max(1, border) for border in borders[::2])
    survey.turns[len(conversation.turns)] += 1
    survey.with_system += bool(conversation.system)
    text = "\0".join(_texts(conversation)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    if digest in seen:
        survey.duplicates += 1
        survey.first_duplicate = survey.first_duplicate or conversation.place
    seen.add(digest)


def _texts(conversation: Conversation) -> list[str]:
    texts = [conversation.system] if conversation.system else []
    return texts + [text for turn in conversation.turns for text in (turn.text, turn.context)]


def _shown(conversation: Conversation, encoded: SpannedIds, tokenizer: Tokenizer) -> ShownExample:
    pieces, at = [], 0
    ids = encoded.input_ids

    def text(begin: int, end: int) -> str:
        return str(tokenizer.decode(ids[begin:end], skip_special_tokens=False))

    for begin, end in zip(encoded.spans[::2], encoded.spans[1::2], strict=True):
        pieces += [(text(at, begin), False)] if begin > at else []
        pieces.append((text(begin, end), True))
        at = end
    return ShownExample(conversation.place, pieces)


def length_bars(lengths: Sequence[int]) -> dict[str, int]:
    """Returns a histogram with a bar for each doubling of the length."""
    counts = Counter(max(4, (length - 1).bit_length()) for length in lengths)  # from 16 on
    powers = range(min(counts), max(counts) + 1) if counts else ()
    return {f"{2 ** (n - 1) + 1 if n > 4 else 1}–{2**n}": counts[n] for n in powers}


def turn_bars(turns: Counter[int]) -> dict[str, int]:
    """Returns a histogram of the numbers of turns; from 20 on they share a bar."""
    bars = {str(number): turns[number] for number in sorted(turns) if number < 20}
    more = sum(count for number, count in turns.items() if number >= 20)
    return {**bars, "20 or more": more} if more else bars


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Returns the median, the 90th and 99th percentile and the longest, by nearest rank."""
    ordered, names = sorted(lengths), {"median": 50, "90%": 90, "99%": 99, "longest": 100}
    # The rank is rounded up.
    return {name: ordered[-(-percent * len(ordered) // 100) - 1] for name, percent in names.items()}

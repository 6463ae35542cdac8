"""Encoded splits in the cache of `datasets`, so that a data set is encoded once.

The key is a hash of all that the examples depend on: the content of the files, the settings, the
tokenizer and the code of this package. The processes of a run read the same file.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.data.chat_encoder import ChatEncoder
from qlora_harness.data.conversation import Conversation
from qlora_harness.data.examples import SpannedIds
from qlora_harness.data.reading import Reading, read_conversations
from qlora_harness.data.sources import Split
from qlora_harness.flag_checks import why_not_writable
from qlora_harness.settings import DataSettings

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

logger = logging.getLogger("qlora_harness")

_BATCH = 1000  # conversations whose texts are tokenized together
_THREADS = 2
_HASHED = 1 << 20  # bytes read at a time
_SETTINGS = ("format", "languages", "conversations", "template", "mask", "max_length")
_TABLE, _COUNTS = "examples.arrow", "counts.json"


@dataclass(frozen=True)
class Encoded:
    """An encoded split.

    `table` has a row for each conversation: the columns of `ExampleTable`, without ids where no
    supervised token is left, `tree`, the number of its tree, and `prompt`, a hash of its first
    turn. `counts` are those of `Reading`.
    Without `key` it was not cached.
    """

    table: pa.Table
    counts: dict[str, Any]
    key: str | None

    def usable(self) -> np.ndarray[Any, Any]:
        """Returns which rows have a supervised token."""
        import pyarrow.compute as pc

        lengths = pc.list_value_length(self.table["input_ids"]).to_numpy()
        usable: np.ndarray[Any, Any] = lengths > 0
        return usable

    def trees(self) -> np.ndarray[Any, Any]:
        """Returns the number of each row's tree, from 0 in the order of the file."""
        trees: np.ndarray[Any, Any] = self.table["tree"].to_numpy()
        return trees

    def prompts(self) -> np.ndarray[Any, Any]:
        """Returns a hash of each row's first turn, [N] int64, whatever the data set and form."""
        prompts: np.ndarray[Any, Any] = self.table["prompt"].to_numpy()
        return prompts


def encode_split(
    split: Split, settings: DataSettings, encoder: ChatEncoder, source: str
) -> Encoded:
    """Encodes a split, or opens it in the cache; raises DataError for a row of no use."""
    key = _key(split, settings, encoder)
    if key is None:
        return _encode_alone(split, settings, encoder, source)
    folder = _cache_folder() / key
    if not (folder / _COUNTS).exists():  # what is there already needs no lock, nor to be written
        if reason := why_not_writable(folder.parent):
            logger.warning("%s: every process encodes the data for itself", reason)
            return _encode_alone(split, settings, encoder, source)
        _encode_once(folder, split, settings, encoder, source)
    return _open(folder, key)


def _encode_alone(
    split: Split, settings: DataSettings, encoder: ChatEncoder, source: str
) -> Encoded:
    # The mapped file outlives its name.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        _write(Path(temporary), read_conversations(split, settings, source), encoder)
        return _open(Path(temporary), None)


def _encode_once(
    folder: Path, split: Split, settings: DataSettings, encoder: ChatEncoder, source: str
) -> None:
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / _COUNTS).exists():
            folder.mkdir(exist_ok=True)
            _write(folder, read_conversations(split, settings, source), encoder)


def remembered(
    keys: Sequence[str | None], rows: np.ndarray[Any, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Returns `compute()`, from the cache if it was computed before.

    It depends on nothing but these encoded splits and the chosen `rows`.
    """
    if None in keys:
        return compute()
    chosen = hashlib.sha256(rows.tobytes()).hexdigest()
    path = _cache_folder() / f"{_hash([_code_hash(), list(keys), chosen])}.json"
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        value = compute()
        with suppress(OSError):  # a cache that can't be written
            _replace(path, json.dumps(value))
    return value


def _open(folder: Path, key: str | None) -> Encoded:
    import pyarrow as pa

    with pa.memory_map(str(folder / _TABLE)) as file:
        table = pa.ipc.open_stream(file).read_all()
    counts = json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
    return Encoded(table, counts, key)


def _write(folder: Path, reading: Reading, encoder: ChatEncoder) -> None:
    """Writes the table of a split and its counts; the counts last, which make it complete."""
    import pyarrow as pa

    lists, numbers = pa.list_(pa.int32()), pa.int32()
    schema = pa.schema(
        {
            "input_ids": lists,
            "spans": lists,
            "truncated": pa.bool_(),
            "turns": numbers,
            "tree": numbers,
            "prompt": pa.int64(),
        }
    )
    trees: dict[str, int] = {}
    path = str(folder / _TABLE)
    with _rare_gc(), pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch, encoded in _encoded_batches(reading.conversations, encoder):
            examples = [example or _NOTHING for example in encoded]
            columns = (
                _lists([example.input_ids for example in examples]),
                _lists([example.spans for example in examples]),
                [example.truncated for example in examples],
                [example.turns for example in examples],
                [trees.setdefault(c.tree, len(trees)) for c in batch],
                list(map(_prompt_hash, batch)),
            )
            writer.write_batch(pa.record_batch(list(columns), schema=schema))
    corpus = reading.corpus
    counts = {
        "form": reading.form.name,
        # A row of a tree is a message.
        "rows" if reading.form.read else "messages": corpus.messages,
        "trees": corpus.trees,
        "dropped": dict(sorted(corpus.dropped.items())),
        "resolved": dict(sorted(corpus.resolved.items())),
        "first": reading.first,
    }
    _replace(folder / _COUNTS, json.dumps(counts))


def _lists(values: Sequence[Sequence[int]]) -> pa.Array:
    """Returns lists of int32; pa.array takes eight times as long."""
    import numpy as np
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(values), np.int32, offsets[-1])
    return pa.ListArray.from_arrays(offsets, flat)


@contextmanager
def _rare_gc() -> Iterator[None]:
    """Lets Python look for cycles rarely: among a batch's many objects it takes half the time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _prompt_hash(conversation: Conversation) -> int:
    first = conversation.turns[0]
    text = f"{first.text.strip()}\0{first.context.strip()}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


_NOTHING = SpannedIds([], [])


def _encoded_batches(
    conversations: Iterator[Conversation], encoder: ChatEncoder
) -> Iterator[tuple[list[Conversation], list[SpannedIds | None]]]:
    """Yields batches with what they are encoded to; reads the next ones meanwhile.

    With two threads, the tokenizer's own always have texts: it runs without Python's lock.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        begun: deque[tuple[list[Conversation], Future[list[SpannedIds | None]]]] = deque()
        while batch := list(islice(conversations, _BATCH)):
            begun.append((batch, pool.submit(encoder.encode_all, batch)))
            if len(begun) > _THREADS:
                first, future = begun.popleft()
                yield first, future.result()
        for first, future in begun:
            yield first, future.result()


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _cache_folder() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "qlora_harness"


def _key(split: Split, settings: DataSettings, encoder: ChatEncoder) -> str | None:
    """Returns the key of an encoded split, or None if it can't be told apart by one."""
    if not split.files or encoder.identity is None:
        return None
    chosen = {name: getattr(settings, name) for name in _SETTINGS}
    files = [_content_hash(file) for file in split.files]
    return _hash([_code_hash(), encoder.identity, chosen, files])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code_hash() -> str:
    """Returns a hash of the code that turns files into examples."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _content_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_HASHED):
            digest.update(chunk)
    return f"{path.suffix}:{digest.hexdigest()}"

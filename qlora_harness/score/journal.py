"""Scored texts on disk as they come, so that a killed run loses none of them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from qlora_harness.score.evaluation_record import unwritable

logger = logging.getLogger("qlora_harness")


def question_key(context: str, continuation: str) -> str:
    """Returns the key of a scored text, a hash: equal texts are the same question."""
    return hashlib.sha256(f"{context}\0{continuation}".encode()).hexdigest()[:32]


class Journal:
    """JSON Lines files: a first line that names the model, then one line a scored text.

    Each process writes a file of its own and reads those of all. A file of another model or other
    settings is never read; it is replaced. A line that was cut off, whose checksum fails or whose
    number is no log-probability is skipped: its text is scored again.

    Args:
        path: The file of the first process; others add their rank.
        identity: What the scores depend on: base, revision, adapter content, quantisation, dtypes.
        rank: This process.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        self._first = path
        self._path = path.with_name(f"{path.name}.{rank}") if rank else path
        self._identity = json.dumps(identity, sort_keys=True)
        self._seed = hashlib.blake2b(self._identity.encode(), digest_size=8)
        self._file: IO[str] | None = None
        self._continued = bool(self._read(self._path)[0])
        self.known: dict[str, tuple[float, bool]] = {}
        for file in self._files():
            known, damaged = self._read(file)
            self.known |= known
            if damaged:
                logger.warning("%s: %d damaged lines, which are scored again", file, damaged)

    def _files(self) -> list[Path]:
        return [self._first, *sorted(self._first.parent.glob(f"{self._first.name}.*"))]

    def _read(self, path: Path) -> tuple[dict[str, tuple[float, bool]], int]:
        """The scores of a file, and how many of its lines are damaged."""
        try:
            lines = path.read_bytes().split(b"\n") if path.is_file() else []
        except OSError:
            return {}, 0
        if not lines or lines[0].decode(errors="replace") != self._identity:
            return {}, 0
        scores = [self._score_in(line) for line in lines[1:] if line]
        valid = [score for score in scores if score is not None]
        return {key: (logprob, greedy) for key, logprob, greedy in valid}, len(scores) - len(valid)

    def _score_in(self, line: bytes) -> tuple[str, float, bool] | None:
        try:
            value = json.loads(line)
            key, logprob, greedy = value["key"], value["logprob"], value["greedy"]
            has_types = [type(key), type(logprob), type(greedy)] == [str, float, bool]
            is_whole = has_types and value["check"] == self._checksum(key, logprob, greedy)
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        is_score = is_whole and math.isfinite(logprob) and logprob <= 0
        return (key, logprob, greedy) if is_score else None

    def _checksum(self, key: str, logprob: float, greedy: bool) -> str:
        digest = self._seed.copy()
        digest.update(f"{key}\0{logprob!r}\0{greedy!r}".encode())
        return digest.hexdigest()

    def append(self, scored: Iterable[tuple[str, float, bool]]) -> None:
        """Adds (key, log-probability in nats, greedy) and waits until they are on the disk.

        Raises ResultsError where the file can't be written.
        """
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a" if self._continued else "w", encoding="utf-8")
                # After a cut-off last line, or as the first line of a new file.
                self._file.write("\n" if self._continued else self._identity + "\n")
            for key, logprob, greedy in scored:
                if math.isfinite(logprob):  # a fault of this run must not become one of the next
                    check = self._checksum(key, logprob, greedy)
                    line = {"key": key, "logprob": logprob, "greedy": greedy, "check": check}
                    self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self._path, error) from None

    def close(self, remove: bool) -> None:
        """Closes the file; `remove` removes those of all processes, once records hold it all."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if remove:
            for file in self._files():
                file.unlink(missing_ok=True)

"""Saves each scored text at once, so that a killed run can continue."""

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
    """Returns the hash by which the journal identifies a scored text."""
    return hashlib.sha256(f"{context}\0{continuation}".encode()).hexdigest()[:32]


class Journal:
    """JSON Lines files whose first line identifies the model, with one line per scored text.

    Each process writes its own file (`path`, with the rank appended after the first) and reads all.
    A file with another `identity`, all that scores depend on, is replaced. A damaged line is
    skipped, and its text scored again.
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
                logger.warning("%s: %d damaged lines; their texts are scored again", file, damaged)

    def _files(self) -> list[Path]:
        return [self._first, *sorted(self._first.parent.glob(f"{self._first.name}.*"))]

    def _read(self, path: Path) -> tuple[dict[str, tuple[float, bool]], int]:
        """Returns the scores of a file, and its number of damaged lines."""
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
        """Adds (key, log-probability in nats, greedy) and waits until the disk has them.

        Raises ResultsError if the file can't be written.
        """
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a" if self._continued else "w", encoding="utf-8")
                # The newline ends a last line that may have been cut off.
                self._file.write("\n" if self._continued else self._identity + "\n")
            for key, logprob, greedy in scored:
                if math.isfinite(logprob):  # the next run must not inherit a fault of this one
                    check = self._checksum(key, logprob, greedy)
                    line = {"key": key, "logprob": logprob, "greedy": greedy, "check": check}
                    self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self._path, error) from None

    def close(self, remove: bool) -> None:
        """Closes the file; `remove` deletes the files of all processes."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if remove:
            for file in self._files():
                file.unlink(missing_ok=True)

"""Scored questions on disk as they come, so that a killed run loses none of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from qlora_harness.errors import ResultsError


def question_keys(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Returns the keys of scored texts: hashes, so that equal prompts are equal questions.

    Args:
        pairs: Text before a continuation, and the continuation whose log-probability was asked.
    """
    begun: dict[str, Any] = {}
    keys = {}
    for context, continuation in pairs:
        # Choices of one question have the long part in common.
        if context not in begun:
            begun[context] = hashlib.sha256(f"{context}\0".encode())
        digest = begun[context].copy()
        digest.update(continuation.encode())
        keys[context, continuation] = digest.hexdigest()[:32]
    return keys


class Journal:
    """JSON Lines files: a first line that says of which model, then one line a scored text.

    Each process writes a file of its own and reads those of all. A file of another model (or of
    other settings) is never read; it is replaced. A line that was cut off is passed over.

    Args:
        path: The file of the first process; others add their number.
        identity: What the scores depend on: base, revision, adapter content, quantisation, dtypes.
        rank: This process.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        self._first = path
        self._path = path.with_name(f"{path.name}.{rank}") if rank else path
        self._identity = json.dumps(identity, sort_keys=True)
        self._file: IO[str] | None = None
        self._own = self._read(self._path)
        self.known: dict[str, tuple[float, bool]] = {}
        for file in self._files():
            self.known |= self._read(file)

    def _files(self) -> list[Path]:
        return [self._first, *sorted(self._first.parent.glob(f"{self._first.name}.*"))]

    def _read(self, path: Path) -> dict[str, tuple[float, bool]]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        known = {}
        for number, line in enumerate(lines):
            try:
                value = json.loads(line)
                if number == 0:
                    if json.dumps(value, sort_keys=True) != self._identity:
                        return {}
                else:
                    known[value["key"]] = (float(value["logprob"]), bool(value["greedy"]))
            except (ValueError, KeyError, TypeError):
                continue
        return known

    def append(self, scored: Iterable[tuple[str, float, bool]]) -> None:
        """Adds scored texts and waits until they are on the disk.

        Args:
            scored: Key, log-probability in nats, and whether it is the greedy continuation.

        Raises:
            ResultsError: The file can't be written.
        """
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                mode = "a" if self._own else "w"
                self._file = self._path.open(mode, encoding="utf-8")
                # After a cut-off last line, or as the first line of a new file.
                self._file.write("\n" if self._own else self._identity + "\n")
            for key, logprob, greedy in scored:
                if not math.isfinite(logprob):
                    continue  # a fault of this run must not become one of the next
                line = {"key": key, "logprob": logprob, "greedy": greedy}
                self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ResultsError(
                f"{self._path} can't be written ({error})",
                "Give another folder with results_dir= in --model_args",
            ) from None

    def close(self, remove: bool) -> None:
        """Closes the file.

        Args:
            remove: Whether all files are removed, as everything in them is stored elsewhere.
        """
        if self._file is not None:
            self._file.close()
            self._file = None
        if remove:
            for file in self._files():
                file.unlink(missing_ok=True)

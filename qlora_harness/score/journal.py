"""Scored questions on disk as they come, so that a killed run loses none of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from qlora_harness.errors import ResultsError


def question_key(context: str, continuation: str) -> str:
    """Returns the key of a scored text: a hash, so that equal prompts are equal questions.

    Args:
        context: Text before the continuation.
        continuation: Text whose log-probability was asked.
    """
    return hashlib.sha256(f"{context}\0{continuation}".encode()).hexdigest()[:32]


class Journal:
    """A JSON Lines file: a first line that says of which model, then one line a scored text.

    A file of another model (or of other settings) is never read; it is replaced. A last line that
    was cut off is passed over.

    Args:
        path: The file; it is made with the first `append`.
        identity: What the scores depend on: base, revision, adapter content, quantisation, dtypes.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._identity = json.dumps(identity, sort_keys=True)
        self._file: IO[str] | None = None
        self.known: dict[str, tuple[float, bool]] = self._read()

    def _read(self) -> dict[str, tuple[float, bool]]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        known = {}
        for number, line in enumerate(lines):
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if number == 0:
                if json.dumps(value, sort_keys=True) != self._identity:
                    return {}
            else:
                known[value["key"]] = (value["logprob"], value["greedy"])
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
                mode = "a" if self.known else "w"
                self._file = self._path.open(mode, encoding="utf-8")
                # After a cut-off last line, or as the first line of a new file.
                self._file.write("\n" if self.known else self._identity + "\n")
            for key, logprob, greedy in scored:
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
            remove: Whether everything in it has been stored elsewhere.
        """
        if self._file is not None:
            self._file.close()
            self._file = None
        if remove:
            self._path.unlink(missing_ok=True)

"""Fetches, checks and reads the MMLU files of the QLoRA repository.

Source: https://github.com/artidoro/qlora, data/mmlu (MIT). The files are JSON Lines despite their
extension. Each line has subject, input (the prompt with its shots, up to "Answer:") and output (a
letter).
"""

from __future__ import annotations

import hashlib
import lzma
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from qlora_harness.data.files import parse_line
from qlora_harness.errors import DataError
from qlora_harness.locations import cache_dir, demo_dir, expanded
from qlora_harness.schema.mmlu import LETTERS

COMMIT = "7f4e95a68dc076bea9b3a413d2b512eca6d004e5"
BASE_URL = f"https://raw.githubusercontent.com/artidoro/qlora/{COMMIT}/data/mmlu/"
DIR_VARIABLE = "QLORA_MMLU_DIR"
DEMO_FILE = "five_shot_mmlu_demo.json"


class PinnedFile(NamedTuple):
    """A file of the pinned commit and its number of questions."""

    sha256: str
    rows: int


PINNED: dict[str, PinnedFile] = {
    "five_shot_mmlu_test.json": PinnedFile(
        "a3995dab517e1316d9f9706a82d793b8964cf997b1e740d84f45fbabf7c94f12", 14042
    ),
    "five_shot_mmlu_val.json": PinnedFile(
        "38f795b6e1d4b8a7d63b65cb2a9124ba05f26902e3d71c7fb28cf265820f75e3", 1531
    ),
    "zero_shot_mmlu_test.json": PinnedFile(
        "a755f86308464ec7c21db20b846042844ee02492fc60c1c73c511eb07d51c5f9", 14042
    ),
    "zero_shot_mmlu_val.json": PinnedFile(
        "2df2476a8ccde60cda1ddad5958f21f46b61fdb609607c3918f7a812246b1694", 1531
    ),
}


@dataclass(frozen=True)
class Question:
    """One row of an MMLU file."""

    index: int  # line in the file, from 0
    subject: str
    prompt: str  # verbatim, ends in "Answer:"
    answer: str  # A, B, C or D


def known_files() -> tuple[str, ...]:
    """Returns the file names that `load_questions` accepts."""
    return (*PINNED, DEMO_FILE)


def load_questions(
    name: str, folder: str | None = None, *, argument: str = "--metadata mmlu_dir"
) -> tuple[Question, ...]:
    """Returns the questions of one of the `known_files`.

    The file, which may be an .xz, comes from `folder` (given by `argument`), else from
    QLORA_MMLU_DIR, else from the user's cache after one download. Raises DataError if the file is
    unknown, missing, damaged or can't be fetched.
    """
    if name == DEMO_FILE:
        return _read(demo_dir() / DEMO_FILE, None)
    if name not in PINNED:
        raise DataError(f"unknown MMLU file {name!r}", f"Use one of {', '.join(known_files())}")
    # lm_eval parses mmlu_dir=2024 as a number.
    folder = None if folder is None else str(folder)
    chosen = folder or os.environ.get(DIR_VARIABLE)
    if not chosen:
        return _read(_fetch(name), PINNED[name].sha256)
    source = argument if folder else DIR_VARIABLE
    path = expanded(chosen)
    if not path.is_dir():
        raise DataError(
            f"{source}: folder {chosen} does not exist", "Name the folder with the MMLU files"
        )
    for candidate in (path / name, path / f"{name}.xz"):
        if candidate.is_file():
            return _read(candidate, PINNED[name].sha256)
    raise DataError(
        f"{source}: {chosen} holds neither {name} nor {name}.xz",
        f"Add the file, or omit the folder to fetch it from {BASE_URL}",
    )


def rows_in(name: str) -> int:
    """Returns the number of questions in a known file, without reading a pinned one."""
    return len(load_questions(name)) if name == DEMO_FILE else PINNED[name].rows


def _fetch(name: str) -> Path:
    import pooch

    try:
        path = pooch.retrieve(
            url=BASE_URL + name,
            known_hash=f"sha256:{PINNED[name].sha256}",
            fname=name,
            path=cache_dir() / "mmlu",
            progressbar=False,
        )
    except Exception as error:  # noqa: BLE001  # requests, urllib3 and pooch raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name} can't be fetched from {BASE_URL}{name} ({reason[:400]})",
            f"Check the network, or set {DIR_VARIABLE} to a folder with the file",
        ) from None
    return Path(path)


@lru_cache(maxsize=4)
def _read(path: Path, sha256: str | None) -> tuple[Question, ...]:
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path} can't be read ({error})", "Fetch the file again") from None
    if sha256 is not None and (actual := hashlib.sha256(data).hexdigest()) != sha256:
        raise DataError(
            f"{path}: SHA-256 of the content is {actual}, expected {sha256}",
            "The file is damaged or another version; fetch it again",
        )
    return parse_questions(data, str(path))


def parse_questions(data: bytes, file: str) -> tuple[Question, ...]:
    """Parses JSON Lines; the DataError for a bad row names its line in `file`."""
    questions: list[Question] = []
    lines = data.decode("utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = parse_line(line, where, "Fetch the file again")
        if not isinstance(row, Mapping):
            raise DataError(
                f"{where}: not valid JSON (expected an object, found {type(row).__name__})",
                "Fetch the file again",
            )
        questions.append(_question(len(questions), row, where))
    if not questions:
        raise DataError(f"{file} holds no questions", "Fetch the file again")
    return tuple(questions)


def _question(index: int, row: Mapping[str, object], where: str) -> Question:
    texts = []
    for name in ("subject", "input", "output"):
        value = row.get(name)
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}: field '{name}' is {value!r}", "It must be a text")
        texts.append(value)
    subject, prompt, answer = texts
    if not prompt.endswith("Answer:"):
        raise DataError(
            f"{where}: field 'input' ends in {prompt[-12:]!r}", "It must end in 'Answer:'"
        )
    if answer not in LETTERS:
        raise DataError(f"{where}: field 'output' is {answer!r}", "It must be A, B, C or D")
    return Question(index, subject, prompt, answer)

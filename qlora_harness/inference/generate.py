"""`qlora-harness generate`: answers to a file of prompts, in the form that alpaca_eval reads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from qlora_harness.data.files import read_rows
from qlora_harness.data.rows import Row
from qlora_harness.errors import DataError, RunError, shown
from qlora_harness.inference.chat_model import ChatModel, Sampling, choose_adapter
from qlora_harness.record import write_json

_REMEDY = 'Give rows with "instruction", such as JSON Lines, or a .txt with a prompt a line'


@dataclass(frozen=True)
class Prompt:
    """An instruction, and the data set that it comes from, if the file has it."""

    instruction: str
    dataset: str | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Reads rows in AlpacaEval's form, or a .txt with a prompt a line; raises DataError."""
    if not path.is_file():
        raise DataError(f"--prompts {path} is not a file", _REMEDY)
    rows = _lines(path) if path.suffix == ".txt" else read_rows(path)
    prompts = [_prompt(row) for row in rows]
    if not prompts:
        raise DataError(f"--prompts {path} holds no prompt", _REMEDY)
    return prompts


def _lines(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path} can't be read ({error})", "Give UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Row(f"{path}, line {number}", {"instruction": line.strip()})


def _prompt(row: Row) -> Prompt:
    instruction = row.text("instruction")
    if not instruction.strip():
        raise DataError(f"{row.place}: 'instruction' is missing or empty", _REMEDY)
    if row.values.get("input"):
        raise DataError(
            f"{row.place}: 'input' is {shown(row.values['input'])}",
            "Put its text into 'instruction'",
        )
    dataset = row.values.get("dataset")
    return Prompt(instruction, dataset if isinstance(dataset, str) else None)


class AnswerJournal:
    """A JSON Lines file beside the output with a line per batch, so that a killed run continues.

    The first line holds `identity`, all that the answers depend on; RunError if another is there,
    or if another process writes the file. `sizes` are those of the batches: from the first line
    that is no whole batch on, they are answered again.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], sizes: Sequence[int]) -> None:
        self.path = output.with_name(f".{output.name}.journal")
        self.batches: list[list[str]] = []
        self._head = json.dumps(identity, sort_keys=True).encode() + b"\n"
        self._lock = FileLock(f"{self.path}.lock", timeout=0)
        try:
            with suppress(NotImplementedError):  # this file system has no locks
                self._lock.acquire()
        except Timeout:
            raise RunError(
                f"another process answers prompts into {output}", "Wait, or name another --output"
            ) from None
        if self.path.is_file():
            self._read(sizes)

    def _read(self, sizes: Sequence[int]) -> None:
        """Reads the whole batches, and cuts off the rest."""
        head, *lines = self.path.read_bytes().splitlines(keepends=True) or [b""]
        if head.endswith(b"\n") and head != self._head:
            self.close(remove=False)
            raise RunError(
                f"{self.path} holds answers to other prompts or with other settings",
                "Give those again, remove the file, or name another --output",
            )
        batches = [_batch(line, size) for line, size in zip(lines, sizes, strict=False)]
        self.batches = [each for each in takewhile(bool, batches) if each]
        whole = sum(map(len, [head, *lines[: len(self.batches)]]))
        os.truncate(self.path, whole if self.batches else 0)

    def append(self, replies: list[str]) -> None:
        """Adds the replies of the next batch, and waits until the disk has them."""
        self.batches.append(replies)
        with self.path.open("ab") as file:
            file.write((b"" if file.tell() else self._head) + json.dumps(replies).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self, *, remove: bool) -> None:
        """Lets other processes write the file, or removes it once the output is written."""
        if remove:
            self.path.unlink()
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def _batch(line: bytes, size: int) -> list[str] | None:
    """Returns the replies of a line, or None if it is damaged or was cut off by a kill."""
    try:
        replies = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(replies, list) or len(replies) != size:
        return None
    return replies if all(isinstance(reply, str) for reply in replies) else None


def generate(
    run: Path,
    prompts_file: Path,
    output: Path,
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    base_alone: bool,
) -> int:
    """Writes the answers of a run to a JSON file, and returns their number.

    Batches go from the longest prompt to the shortest, so memory runs out at once or not at all. A
    batch's random choices depend on `seed` and its number only, so a run that was killed gives the
    same answers. Raises HarnessError.
    """
    prompts = read_prompts(prompts_file)
    if output.exists():
        raise RunError(f"--output {output} exists", "Name another file, or remove it")
    model = ChatModel(choose_adapter(run), base_alone=base_alone)
    ids = [model.encode([{"role": "user", "content": p.instruction}]) for p in prompts]
    for number, prompt_ids in enumerate(ids, start=1):
        model.check_length(prompt_ids, sampling, f"{prompts_file}, prompt {number}")
    order = sorted(range(len(prompts)), key=lambda n: -len(ids[n]))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    identity = {
        "model": model.identity(),
        "prompts": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "sampling": asdict(sampling),
        "seed": seed,
        "batch_size": batch_size,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    journal = AnswerJournal(output, identity, [len(batch) for batch in batches])
    complete = False
    try:
        model.load()
        done, count = len(journal.batches), len(batches)
        for number in tqdm(range(done, count), initial=done, total=count, unit="batch"):
            torch.manual_seed(seed + number)
            journal.append(model.reply([ids[n] for n in batches[number]], sampling))
        replies = [reply for batch in journal.batches for reply in batch]
        texts = dict(zip(order, replies, strict=True))
        write_json(output, [_row(p, texts[n], model.name) for n, p in enumerate(prompts)])
        complete = True
    finally:
        journal.close(remove=complete)
    return len(prompts)


def _row(prompt: Prompt, output: str, generator: str) -> dict[str, str]:
    row = {"instruction": prompt.instruction, "output": output, "generator": generator}
    return row if prompt.dataset is None else row | {"dataset": prompt.dataset}

"""`qlora-harness generate`: answers to a file of prompts, in the form that alpaca_eval reads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from qlora_harness.data.files import parse_line
from qlora_harness.errors import DataError, RunError, shown
from qlora_harness.inference.chat_model import ChatModel, Sampling, choose_adapter
from qlora_harness.record import write_json

_REMEDY = 'Give JSON or JSON Lines of objects with "instruction", or a .txt with a prompt a line'


@dataclass(frozen=True)
class Prompt:
    """An instruction, and the data set that it comes from if the file says so."""

    instruction: str
    dataset: str | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Reads a JSON list or JSON Lines in AlpacaEval's form, or plain lines.

    Raises DataError with the place of the first prompt that can't be used.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path} can't be read ({error})", "Name a text file") from None
    rows = list(_rows(text, path))
    if not rows:
        raise DataError(f"--prompts {path} holds no prompt", _REMEDY)
    return [_prompt(row, place) for place, row in rows]


def _rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    start = "" if path.suffix == ".txt" else text.lstrip()[:1]
    if start == "[":
        rows = cast(list[Any], parse_line(text, str(path), _REMEDY))
        yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        place = f"{path}, line {number}"
        if line.strip():
            is_json = start == "{"
            yield (
                place,
                parse_line(line, place, _REMEDY) if is_json else {"instruction": line.strip()},
            )


def _prompt(row: Any, place: str) -> Prompt:
    instruction = row.get("instruction") if isinstance(row, Mapping) else None
    if not isinstance(instruction, str) or not instruction.strip():
        raise DataError(f"{place}: 'instruction' is {shown(instruction)}", _REMEDY)
    if row.get("input"):
        raise DataError(
            f"{place}: 'input' is {shown(row['input'])}", "Put its text into 'instruction'"
        )
    dataset = row.get("dataset")
    return Prompt(instruction, dataset if isinstance(dataset, str) else None)


class AnswerJournal:
    """A JSON Lines file beside the output with a line per batch, so that a killed run continues.

    The first line holds `identity`, all that the answers depend on; RunError if another is there.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.path = output.with_name(f".{output.name}.journal")
        self._head = json.dumps(identity, sort_keys=True)
        data = self.path.read_bytes() if self.path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]  # a killed run may have cut off the last line
        head, *lines = whole.decode().splitlines() or [self._head]
        if head != self._head:
            raise RunError(
                f"{self.path} holds answers to other prompts or with other settings",
                "Give those again, remove the file, or name another --output",
            )
        if whole != data:
            os.truncate(self.path, len(whole))
        self.batches: list[list[str]] = [json.loads(line) for line in lines]

    def append(self, replies: list[str]) -> None:
        """Adds the replies of the next batch, and waits until the disk has them."""
        self.batches.append(replies)
        with self.path.open("a", encoding="utf-8") as file:
            head = "" if file.tell() else f"{self._head}\n"
            file.write(f"{head}{json.dumps(replies)}\n")
            file.flush()
            os.fsync(file.fileno())


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
    journal = AnswerJournal(output, identity)
    output.parent.mkdir(parents=True, exist_ok=True)
    model.load()
    done = len(journal.batches)
    for number in tqdm(range(done, len(batches)), initial=done, total=len(batches), unit="batch"):
        torch.manual_seed(seed + number)
        journal.append(model.reply([ids[n] for n in batches[number]], sampling))
    replies = [reply for batch in journal.batches for reply in batch]
    texts = dict(zip(order, replies, strict=True))
    write_json(output, [_row(p, texts[n], model.name) for n, p in enumerate(prompts)])
    journal.path.unlink()
    return len(prompts)


def _row(prompt: Prompt, output: str, generator: str) -> dict[str, str]:
    row = {"instruction": prompt.instruction, "output": output, "generator": generator}
    return row if prompt.dataset is None else row | {"dataset": prompt.dataset}

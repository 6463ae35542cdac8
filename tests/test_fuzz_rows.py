"""Damaged files of rows: each gives conversations, or is refused in one line, in bounded time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from mutations import Reader, damaged_bytes, damaged_value
from test_sources import FORMS, write_form

from qlora_harness.data.oasst1 import build_conversations
from qlora_harness.data.sources import load_splits


def rows(rng: random.Random) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for number in range(rng.randint(1, 6)):
        parent = rng.choice(made)["message_id"] if made and rng.random() < 0.8 else None
        made.append(
            {
                "message_id": f"m{number}",
                "parent_id": parent,
                "text": rng.choice(["Hi", "What?", "é\u2028", "x" * 300]),
                "role": rng.choice(["prompter", "assistant"]),
                "lang": rng.choice(["en", "de"]),
                "rank": rng.choice([None, 0, 1, 2.0]),
                "created_date": rng.choice([None, "2023-02-05T14:23:50+00:00", 1675607030983]),
                "deleted": rng.choice([None, False, True]),
                "review_result": rng.choice([None, True]),
            }
        )
    return made


def fuzz(folder: Path, seed: int, count: int) -> dict[str, int]:
    rng = random.Random(seed)
    reader = Reader()
    for number in range(count):
        form = rng.choice(FORMS)
        made = rows(rng)
        if rng.random() < 0.6 and form != "parquet":  # whose columns have one type
            made[rng.randrange(len(made))][rng.choice(list(made[0]))] = damaged_value(rng)
        try:
            path = write_form(folder / f"rows.{form}", made)
        except (ValueError, TypeError):
            continue  # no program can write such a file
        if rng.random() < 0.5:
            path.write_bytes(damaged_bytes(rng, path.read_bytes()))
        languages = rng.choice([None, ("en",)])
        reader.read(
            lambda path=path, languages=languages: build_conversations(
                load_splits(str(path)).train, languages
            ),
            (seed, number, form),
        )
        path.unlink()
    return reader.outcomes


def test_some_damaged_files(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path, seed=0, count=400)
    assert outcomes["read"] > 50 and outcomes["refused"] > 50


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_files(tmp_path: Path, seed: int) -> None:
    fuzz(tmp_path, seed=seed, count=10_000)

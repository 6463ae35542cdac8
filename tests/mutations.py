"""Damage for the fuzz tests: values that no reader expects, bytes that changed on the way."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import psutil

from qlora_harness.errors import HarnessError

HUGE = "HUGE NUMBER"  # `dumps` writes so many digits that Python refuses to read them
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 3, 1.5, 10**9, 10**30, 10**400, HUGE, float("nan"), float("inf"),
    1e308, 5e-324, -1e-9, "", "A", "nan", "1e400", "x" * 5000, "\ud800\x1b[2J\u202e\x00", "=1+1",
    "../../etc/passwd", [], [[]], ["q_proj"], [None] * 300, {}, {"a": {"b": {}}}, {"A": 10**9},
)  # fmt: skip


class Reader:
    """Reads damaged inputs: each succeeds or is refused in one line, in 5 s and 1 GB."""

    def __init__(self) -> None:
        self.outcomes = {"read": 0, "refused": 0}
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss

    def read(self, read: Callable[[], object], source: object) -> None:
        """Reads one input; `source` identifies it in a failure."""
        started = time.perf_counter()
        try:
            read()
            self.outcomes["read"] += 1
        except HarnessError as error:
            line = str(error)
            assert line.isprintable(), (source, line)
            assert len(line) <= 480, (source, line)
            self.outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(source) from error
        assert time.perf_counter() - started < 5, source
        assert self._process.memory_info().rss - self._before < 2**30, source


def damaged_value(rng: random.Random) -> Any:
    return rng.choice(VALUES)


def dumps(value: Any) -> str:
    """Returns JSON, with `HUGE` as a number."""
    return json.dumps(value).replace(f'"{HUGE}"', "9" * 5000)


def damaged_json(rng: random.Random, value: Any) -> str:
    """Changes, removes or adds one to three values anywhere in a JSON value; returns the text."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        at, key = _random_key(rng, value)
        if at is None:
            return dumps(rng.choice(VALUES))
        if rng.random() < 0.2 and key in range(len(at)) if isinstance(at, list) else key in at:
            del at[key]
        elif isinstance(at, dict) and rng.random() < 0.1:
            at["new_field"] = rng.choice(VALUES)
        else:
            at[key] = rng.choice(VALUES)
    text = dumps(value)
    if rng.random() < 0.05:
        text = "[" * 3000 + text + "]" * 3000
    return text


def _random_key(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A random container within a value, and one of its keys."""
    at: Any = None
    key: Any = None
    while isinstance(value, dict | list) and value and (at is None or rng.random() < 0.75):
        at = value
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = at[key]
    return at, key


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """Cuts, drops, inserts or changes bytes; more often near the beginning, which decides most."""
    if not content:
        return rng.randbytes(8)
    at = rng.randrange(len(content))
    kind = rng.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[at + rng.randint(1, 64) :]
    if kind == 2:
        return content[:at] + rng.randbytes(rng.randint(1, 16)) + content[at:]
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        reach = min(len(content), 2000) if kind == 3 else len(content)
        changed[rng.randrange(reach)] = rng.randrange(256)
    return bytes(changed)

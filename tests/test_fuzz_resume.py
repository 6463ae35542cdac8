"""Resuming from a damaged run folder: a run starts, or one line says why not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import change_summary, write_checkpoint, write_summary

from qlora_harness.errors import HarnessError
from qlora_harness.settings_checks import build_settings
from qlora_harness.train.checkpoints import checkpoint_step
from qlora_harness.train.run_folder import earlier_steps, find_start

ZIPPED = (".pt", ".pth")
VALUES = {"max_steps": 8, "lora_r": 2}
VALUES_OF_JSON: list[Any] = [
    None, True, 0, -1, 2**70, 1e300, "", "x" * 5000, "\ud800", "running", [], {}, [[]], {"a": {}},
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    write_summary(folder, "interrupted", build_settings(VALUES).flat())
    change_summary(
        folder,
        started="2026-11-28T05:00:00+00:00",
        process={"id": 2, "host": "0" * 16, "started": 1.0},
        model={"weights_fingerprint": "sha256:0"},
        quantization={"compute_dtype": "float32"},
        computation={"padding": "none"},
        data={"train": {"fingerprint": "x"}},
        runtime={"train_seconds": 1.5},
    )
    step = {"step": 1, "loss": 1.0, "seconds": 0.5, "tokens": 5, "supervised_tokens": 2}
    log = {"schema_version": 1, "kind": "training_logs", "steps": [step, step | {"step": 2}]}
    (folder / "training_logs.json").write_text(json.dumps(log))
    for number in (2, 4):
        write_checkpoint(folder, number)
    return folder


def json_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from json_paths(item, (*path, key))


def other_json(content: bytes, numbers: random.Random) -> bytes:
    value = json.loads(content)
    path = numbers.choice(list(json_paths(value)))
    if not path:
        return json.dumps(numbers.choice(VALUES_OF_JSON)).encode()
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if numbers.random() < 0.2:
        del inner[path[-1]]
    else:
        inner[path[-1]] = numbers.choice(VALUES_OF_JSON)
    return json.dumps(value).encode()


def other_bytes(content: bytes, numbers: random.Random) -> bytes:
    at = numbers.randrange(len(content))
    kind = numbers.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        flipped = content[at] ^ 1 << numbers.randrange(8)
        return content[:at] + bytes([flipped]) + content[at + 1 :]
    if kind == 2:
        return content + numbers.randbytes(20)
    if kind == 3:
        return b"[" * 100_000 if numbers.random() < 0.1 else numbers.randbytes(50)
    return content[:at] + numbers.randbytes(8) + content[at + 8 :]


def loads(path: Path) -> bool:
    """Whether torch can load a file that was judged intact; if so, it holds what was saved."""
    try:
        state = torch.load(path)["state"]
    except Exception:  # torch raises many kinds  # the test reports whatever came  # noqa: BLE001  # the test reports whatever came
        return False
    assert state.equal(torch.arange(50))
    return True


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("inputs", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_run_folder_is_resumed_or_refused_in_one_line(run_dir: Path, inputs: int) -> None:
    numbers = random.Random(3)
    paths = sorted(path for path in run_dir.rglob("*") if path.is_file())
    settings = build_settings(VALUES)
    outcomes = {"resumed": 0, "stepped back": 0, "refused": 0, "not loaded": 0}
    for _ in range(inputs):
        path = numbers.choice(paths)
        content = path.read_bytes()
        change = other_json if path.suffix == ".json" and numbers.random() < 0.6 else other_bytes
        damaged = change(content, numbers)
        path.write_bytes(damaged)
        try:
            start = find_start(run_dir, settings, resume_given=False)
            assert start.checkpoint is not None
            step = checkpoint_step(start.checkpoint)
            earlier_steps(start.checkpoint)
            outcomes["resumed" if step == 4 else "stepped back"] += 1
            if step == 4 and path.parent.name == "checkpoint-4" and path.suffix in ZIPPED:
                outcomes["not loaded"] += not loads(path)
        except HarnessError as error:
            text = str(error)
            assert len(text) <= 500, (path, damaged[:200])
            assert "\n" not in text, (path, damaged[:200])
            outcomes["refused"] += 1
        finally:
            path.write_bytes(content)
    print(outcomes)
    assert outcomes.pop("not loaded") < inputs / 100  # then training refuses it in one line
    assert all(outcomes.values())


def test_undamaged_folder_is_resumed(run_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    start = find_start(copy, build_settings(VALUES), resume_given=False)
    assert start.checkpoint == copy / "checkpoints" / "checkpoint-4"
    assert [row["step"] for row in earlier_steps(start.checkpoint)[0]] == [1, 2]

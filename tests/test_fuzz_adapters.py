"""Damaged adapter folders load, or are refused in one line, in bounded time and memory."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
from mutations import Reader, damaged_bytes, damaged_value, dumps
from training_runs import base

from qlora_harness.model import adapter_folder
from qlora_harness.model.lora import load_adapter
from qlora_harness.score.run_choice import choose_scored_run


def damaged_config(rng: random.Random, path: Path) -> str:
    value = json.loads(path.read_text())
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*value, "new_field", *EXTRA])
        if rng.random() < 0.2:
            value.pop(key, None)
        else:
            value[key] = rng.choice([damaged_value(rng), *PATTERNS])
    return dumps(value)


PATTERNS = ("(a+)+$", "(.*)*(.*)*(.*)*!", {"(.*)*x": 2}, {"q_proj": 10**9}, [[0, 10**6]])
EXTRA = [*sorted(adapter_folder._KNOWN_FIELDS), "alora_invocation_tokens"]
WEIGHTS = "adapter_model.safetensors"
ARGUMENTS = (
    "pretrained", "peft", "quant", "double_quant", "revision", "peft_revision", "results_dir",
)  # fmt: skip


def fuzz(folder: Path, tiny_llama: Path, adapter: Path, seed: int, count: int) -> dict[str, int]:
    rng = random.Random(seed)
    model = base(tiny_llama)
    files = {p.name: p.read_bytes() for p in adapter.iterdir() if p.is_file()}
    reader = Reader()

    def load() -> None:
        choose_scored_run(**dict.fromkeys(ARGUMENTS) | {"peft": str(folder)})
        load_adapter(copy.deepcopy(model), folder)

    for number in range(count):
        for name, content in files.items():
            (folder / name).write_bytes(content)
        name = rng.choice(["adapter_config.json"] * 3 + ["qlora_harness.json", WEIGHTS])
        if name.endswith(".json") and rng.random() < 0.8:
            text = damaged_config(rng, folder / name)
            (folder / name).write_text(text, errors="surrogatepass")
        else:
            (folder / name).write_bytes(damaged_bytes(rng, files[name]))
        reader.read(load, (seed, number, name))
    return reader.outcomes


def test_some_damaged_adapters(
    tmp_path: Path, tiny_llama: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_folder, "_PATTERN_SECONDS", 0.2)
    outcomes = fuzz(tmp_path, tiny_llama, adapter, seed=0, count=60)
    assert min(outcomes.values()) > 0  # some read, some refused


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_damaged_adapters(tmp_path: Path, tiny_llama: Path, adapter: Path, seed: int) -> None:
    fuzz(tmp_path, tiny_llama, adapter, seed=seed, count=1000)

"""Every quantisation and variant of LoRA: trained, resumed, and scored as it was in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scoring_runs import MakeLm, demo_prompts, score
from tiny_models import adapted, assert_alike, fused_step, plain_step, texts, tiny
from training_runs import Train, as_if_killed, base, losses, read, summary

from qlora_harness.errors import SettingsError
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.adapter_starts import START_FILE, start_loftq
from qlora_harness.model.base import expand_4bit, load_tokenizer, find_base
from qlora_harness.model.lora import attach_lora
from qlora_harness.settings import build_settings, check_can_run
from qlora_harness.train import run as train_run

needs_hqq = pytest.mark.skipif(find_spec("hqq") is None, reason="the package hqq is not installed")
PROMPTS = demo_prompts(3)

# Flags, and whether training takes fused layers and scoring packs.
ARMS = [
    pytest.param({"quant": "nf4", "double_quant": False}, True, True, id="nf4"),
    pytest.param({"quant": "int8"}, False, False, id="int8"),
    pytest.param({"quant": "hqq"}, False, True, id="hqq", marks=needs_hqq),
    pytest.param({"quant": "nf4", "use_rslora": True}, True, True, id="rslora"),
    pytest.param({"quant": "nf4", "use_dora": True}, False, True, id="dora"),
    pytest.param({"quant": "hqq", "use_dora": True}, False, True, id="dora-hqq", marks=needs_hqq),
    pytest.param({"quant": "nf4", "init_lora_weights": "gaussian"}, True, True, id="gaussian"),
    pytest.param({"quant": "nf4", "init_lora_weights": "loftq"}, True, True, id="loftq"),
    pytest.param({"quant": "bf16", "init_lora_weights": "pissa"}, True, True, id="pissa"),
    pytest.param(
        {"quant": "bf16", "init_lora_weights": "pissa", "use_rslora": True}, True, True,
        id="pissa-rslora",
    ),
    pytest.param({"quant": "nf4", "init_lora_weights": "eva"}, True, True, id="eva"),
]  # fmt: skip


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The log-probabilities of " A" to " D" after each prompt, of the model that is saved."""
    noted: list[float] = []
    save = train_run.save_adapter

    def save_and_note(model: Any, tokenizer: Any, *args: Any, **options: Any) -> None:
        model.eval()
        letters = [tokenizer.encode(f"Answer: {letter}")[-1] for letter in "ABCD"]
        for prompt in PROMPTS:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokenizer.encode(prompt)])).logits[0, -1]
            noted.extend(torch.log_softmax(logits.float(), dim=-1)[letters].tolist())
        save(model, tokenizer, *args, **options)

    monkeypatch.setattr(train_run, "save_adapter", save_and_note)
    return noted


@pytest.mark.parametrize(("flags", "fused", "packed"), ARMS)
def test_arm_is_scored_as_it_was_in_memory(
    train: Train,
    make_lm: MakeLm,
    in_memory: list[float],
    flags: dict[str, Any],
    fused: bool,
    packed: bool,
) -> None:
    assert train(output_dir="run", **flags) == 0
    assert losses("run")[-1] < losses("run")[0]
    assert summary("run")["computation"]["fused_layers"] is fused
    assert {name: summary("run")["settings"][name] for name in flags} == flags
    lm = make_lm(peft="run/adapter", batch_size=1)
    assert lm.session.path.packed is packed
    assert lm.session.path.fused is (fused and packed)
    assert score(lm, PROMPTS) == pytest.approx(in_memory, abs=2e-5)


@pytest.mark.parametrize(("flags", "fused", "packed"), ARMS)
def test_arm_resumes_exactly(
    train: Train, flags: dict[str, Any], fused: bool, packed: bool
) -> None:
    assert train(output_dir="run", save_steps=2, **flags) == 0
    whole, results = losses("run"), summary("run")["results"]
    config = read("run/adapter/adapter_config.json")
    adapter = load_file("run/adapter/adapter_model.safetensors")
    as_if_killed("run", 4)
    assert train(output_dir="run", save_steps=2, **flags) == 0
    assert losses("run") == whole
    assert summary("run")["results"] == results
    again = load_file("run/adapter/adapter_model.safetensors")
    assert again.keys() == adapter.keys()
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)
    assert read("run/adapter/adapter_config.json") == config

"""The predicted memory peak, against measured ones and a real model's bytes; and --memory."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qlora_harness.benchmark.training import WAYS
from qlora_harness.cli import main as cli
from qlora_harness.errors import SettingsError
from qlora_harness.model.base import load_base
from qlora_harness.model.lora import attach_lora
from qlora_harness.model.shape import Shape
from qlora_harness.model.source import find_base
from qlora_harness.settings import CHECKPOINTING, Quant
from qlora_harness.settings_checks import build_settings
from qlora_harness.train.command import main, parse_settings
from qlora_harness.train.memory_plan import (
    GIB,
    LADDER,
    Ranks,
    choose_memory_plan,
    largest_pass,
    measure_shape,
    predict_memory,
    with_rung,
)
from qlora_harness.train.plan_text import describe, host_shortage


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of LLaMA-2-7B, without weights."""
    folder = tmp_path_factory.mktemp("llama-2-7b")
    transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def shape(llama: Path) -> Shape:
    return measure_shape(str(llama), None, "all-linear")


# Peaks on an H100, LLaMA-2-7B's shape, rank 64 on all linear layers, `qlora-harness
# benchmark-training` with batch 16 (28 and 31 for the larger passes) and at most 512 tokens:
# 6,870 in the largest pass, 8,192 with padding. Paged optimizer states (0.30 and 1.19 GiB) are
# added to the measurement.
MEASURED: list[tuple[dict[str, Any], int, float]] = [
    ({"checkpointing": "none"}, 6870, 25.50),
    ({"checkpointing": "none"}, 10146, 34.95),
    ({"checkpointing": "none"}, 10994, 37.35),
    ({"checkpointing": "none"}, 8192, 29.35),  # with dropout
    ({"checkpointing": "selective"}, 8192, 19.25),  # with dropout
    ({"checkpointing": "selective"}, 6870, 17.02),
    ({"checkpointing": "full"}, 6870, 8.20),
    ({"checkpointing": "offload"}, 6870, 7.09),
    (dict(LADDER[-1]), 6870, 5.32 + 0.30),
    ({**LADDER[-1], "checkpointing": "full"}, 512, 4.49 + 0.30),
    ({"checkpointing": "none", "quant": "bf16"}, 6870, 34.75),
    ({"checkpointing": "none", "quant": "bf16"}, 10146, 44.21),
    ({"checkpointing": "selective", "quant": "bf16"}, 6870, 26.28),
    ({"checkpointing": "full", "quant": "bf16"}, 6870, 17.45),
    ({"checkpointing": "offload", "quant": "bf16"}, 6870, 16.34),
    ({"kernels": "none"}, 8192, 10.51),
    ({"kernels": "none", "quant": "bf16"}, 8192, 19.46),
    ({"kernels": "none", "checkpointing": "none"}, 8192, 50.70),
    ({"kernels": "none", "optimizer": "paged_adamw_32bit"}, 512, 5.44 + 1.19),
]


@pytest.mark.parametrize(("changes", "tokens", "gib"), MEASURED)
def test_prediction_is_within_a_tenth_of_the_measurement(
    shape: Shape, changes: dict[str, Any], tokens: int, gib: float
) -> None:
    settings = build_settings({"optimizer": "adamw_torch"} | changes)
    assert predict_memory(shape, settings, tokens).peak / GIB == pytest.approx(gib, rel=0.1)


def test_graphs_hold_activations_gradients_and_the_work_of_two_layers(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = build_settings({"checkpointing": "none", "optimizer": "adamw_torch"})
    plan = predict_memory(shape, settings, 500)
    assert plan.graphs
    assert plan.activations == predict_memory(shape, settings, 512).activations
    held = plan.weights + plan.adapter + plan.states
    assert plan.peak == held + plan.activations + plan.gradients + plan.work
    monkeypatch.setattr("qlora_harness.fused.graphs._DEVICE_BOUND", 0)
    launched = predict_memory(shape, settings, 512)
    assert not launched.graphs
    assert plan.work > launched.work
    assert plan.gradients == launched.gradients
    assert not predict_memory(shape, settings, 10_000).graphs


def test_ddp_holds_its_buckets_beside_the_activations(shape: Shape) -> None:
    for passes in (1, 2):
        settings = build_settings({"checkpointing": "selective", "grad_accum": passes})
        one, each = (predict_memory(shape, settings, 4000, Ranks(gpus)) for gpus in (1, 2))
        assert one.activations > one.gradients
        assert each.peak == one.peak + passes * one.gradients
    assert not predict_memory(shape, settings, 500, Ranks(2)).graphs


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_a_sharded_base_takes_its_part_and_two_layers(shape: Shape, quant: str) -> None:
    settings = build_settings({"quant": quant, "checkpointing": "selective"})
    whole, part = (
        predict_memory(shape, settings, 4000, Ranks(4, sharded)) for sharded in (False, True)
    )
    layers = whole.weights - shape.others * 2
    saved = layers - layers // 4 - 2 * layers // shape.layers
    assert whole.weights - part.weights == saved
    # The groups of a base in 16 bits lose their own matrices, and share one.
    assert (whole.work == part.work) == (quant == "nf4")
    assert (part.adapter, part.states, part.gradients) == (
        whole.adapter, whole.states, whole.gradients,
    )  # fmt: skip


def test_long_rows_take_memory_by_the_token(shape: Shape) -> None:
    """Attention holds no scores, and fused layers compute logits in parts."""
    moving = []
    for count in (1, 2, 4):
        settings = build_settings({"lora_r": 16, "rope_scaling": "yarn:16"})
        plan = predict_memory(shape, settings, count * 8192)
        moving.append(plan.activations + plan.work)
    assert moving[2] - moving[1] == 2 * (moving[1] - moving[0])
    plan = predict_memory(shape, build_settings({"rope_scaling": "dynamic:16"}), 32768)
    assert plan.work >= 32768 * shape.vocabulary * 4  # PEFT's modules have them as a whole


@pytest.mark.parametrize(
    ("quant", "double_quant", "use_dora"),
    [
        ("nf4", True, False), ("nf4", False, True), ("int8", True, False), ("bf16", True, True),
        pytest.param(
            "hqq", True, False,
            marks=pytest.mark.skipif(find_spec("hqq") is None, reason="hqq is not installed"),
        ),
    ],
)  # fmt: skip
def test_weights_and_adapter_are_counted_to_the_byte(
    tiny_llama: Path, quant: str, double_quant: bool, use_dora: bool
) -> None:
    model = load_base(
        find_base(str(tiny_llama)), quant=Quant(quant), double_quant=double_quant,
        compute_dtype="bfloat16", device=torch.device("cpu"),
    )  # fmt: skip
    held = 0
    for parameter in model.parameters():
        held += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            scales = [state.absmax, state.state2.absmax] if state.nested else [state.absmax]
            held += sum(s.numel() * s.element_size() for s in scales)
    layer: Any
    for layer in model.modules():
        scales = [layer.weight.SCB] if quant == "int8" and hasattr(layer, "state") else []
        if quant == "hqq" and hasattr(layer, "W_q"):
            scales = [layer.meta["scale"], layer.meta["zero"]]
        held += sum(s.numel() * s.element_size() for s in scales)
    adapted = attach_lora(model, r=4, alpha=8, dropout=0.0, targets="all-linear", use_dora=use_dora)
    adapter = sum(p.numel() * p.element_size() for p in adapted.parameters() if p.requires_grad)
    settings = build_settings(
        {"quant": quant, "double_quant": double_quant, "lora_r": 4, "use_dora": use_dora}
    )
    plan = predict_memory(measure_shape(str(tiny_llama), None, "all-linear"), settings, 100)
    # Scales of scales are rounded up to whole blocks, one a layer.
    assert plan.weights == pytest.approx(held, abs=4 * 14)
    assert plan.adapter == plan.gradients == adapter


def test_presets_and_amounts_choose_from_the_ladder(shape: Shape) -> None:
    def chosen(memory: str, **changes: Any) -> tuple[str, str, str, int]:
        settings = build_settings({"memory": memory, **changes})
        settings, plan, _ = choose_memory_plan(shape, settings, [400] * 100)
        way = plan.checkpointing, plan.optimizer, plan.adapter_dtype
        optimization = settings.optimization
        assert way[:2] == (optimization.checkpointing, optimization.optimizer)
        assert way[2] == settings.lora.adapter_dtype
        assert optimization.batch_size * optimization.grad_accum == 16
        return (*way, optimization.batch_size)

    assert chosen("fast") == ("none", "adamw_torch", "float32", 16)
    assert chosen("balanced") == ("selective", "adamw_torch", "float32", 16)
    assert chosen("lean") == ("offload", "paged_adamw_8bit", "bfloat16", 1)
    assert chosen("24") == ("none", "adamw_torch", "float32", 16)

    assert chosen("16")[::3] == ("selective", 16)
    assert chosen("8.2")[::3] == ("full", 16)
    assert chosen("7")[::3] == ("offload", 16)
    assert chosen("5.7") == ("offload", "paged_adamw_8bit", "bfloat16", 16)
    assert chosen("5") == ("offload", "paged_adamw_8bit", "bfloat16", 4)
    # Padding would change with the batch: PEFT's own modules keep it.
    assert chosen("fast", kernels="none")[::3] == ("none", 1)
    assert chosen("lean", kernels="none") == ("full", "paged_adamw_8bit", "bfloat16", 1)
    with pytest.raises(SettingsError, match=r"--memory 3: the leanest way takes 4\.[0-9] GiB"):
        chosen("3")


@pytest.mark.parametrize("by_length", [True, False])
def test_steps_learn_from_the_same_examples_in_one_pass_or_several(
    tiny_llama: Path, tmp_path: Path, by_length: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for memory in (None, "fast"):
        folder = tmp_path / str(memory)
        words = ["--model", str(tiny_llama), "--dataset", "demo", "--compute-dtype", "float32"]
        words += ["--epochs", "4", "--max-length", "64", "--lora-r", "4", "--lora-dropout", "0"]
        words += ["--batch-size", "2", "--grad-accum", "4", "--output-dir", str(folder)]
        words += ["--group-by-length" if by_length else "--no-group-by-length"]
        assert main(words + (["--memory", memory] if memory else [])) == 0
        runs.append(json.loads((folder / "training_logs.json").read_text())["steps"])
        summary = json.loads((folder / "training_summary.json").read_text())
        assert summary["computation"]["grad_accum"] == (1 if memory else 4)
    # What --memory chose is recorded beside the flags.
    assert summary["settings"]["checkpointing"] == "full"
    assert summary["settings"]["memory"] == "fast"
    assert summary["computation"]["checkpointing"] == summary["plan"]["checkpointing"] == "none"
    assert summary["plan"]["peak"] > summary["plan"]["weights"] > 0
    assert "planned peak" in capsys.readouterr().out
    assert len(runs[0]) == len(runs[1]) > 4
    for one, other in zip(*runs, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("value", ["huge", "0", "-2", "nan", "inf"])
def test_other_values_of_memory_are_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=f"--memory.*{value}"):
        build_settings({"memory": value})


def test_memory_and_what_it_chooses_exclude_each_other() -> None:
    with pytest.raises(SettingsError, match="--memory and --checkpointing exclude each other"):
        parse_settings(["--memory", "lean", "--checkpointing", "none"])
    # --memory overrides a recipe.
    settings, _ = parse_settings(["--recipe", "qlora-llama2-7b", "--memory", "lean"])
    assert settings.optimization.memory == "lean"


def test_largest_pass() -> None:
    lengths = [10] * 50 + [100] * 2
    by_length = build_settings({"batch_size": 3})
    assert largest_pass(lengths, by_length, fused=True) == 210
    padded = build_settings({"batch_size": 3, "kernels": "none"})
    assert largest_pass(lengths, padded, fused=False) == 300
    random = build_settings({"batch_size": 3, "group_by_length": False})
    assert 3 * 13 < largest_pass(lengths, random, fused=True) <= 210


@pytest.mark.parametrize(
    ("changes", "optimizer"),
    [
        ({}, "adamw_torch"),
        # torch's AdamW has its states in the adapter's dtype.
        ({"adapter_dtype": "bfloat16"}, "paged_adamw_32bit"),
        ({"optimizer": "adamw_8bit"}, "adamw_8bit"),
    ],
)
def test_rung_replaces_the_paged_optimizer(changes: dict[str, str], optimizer: str) -> None:
    settings = with_rung(build_settings(changes), {"checkpointing": "none"})
    assert settings.optimization.optimizer == optimizer
    assert settings.lora.adapter_dtype == changes.get("adapter_dtype", "float32")


@pytest.mark.parametrize("word", ["fast", "balanced"])
def test_benchmark_of_a_preset_computes_as_the_preset(shape: Shape, word: str) -> None:
    chosen, _, _ = choose_memory_plan(shape, build_settings({"memory": word}), [400] * 100)
    way = build_settings(WAYS[f"published-{word}"])
    assert dataclasses.replace(chosen.optimization, memory=None) == way.optimization
    assert (chosen.lora, chosen.data) == (way.lora, way.data)


def test_plan_is_printed_without_a_gpu(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["plan", "--model", str(llama), "--batch-size", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "nf4, bfloat16, rank 64, 8,192 tokens a pass; fused layers; GiB" in lines[0]
    rows = {line.split()[0]: line.split() for line in lines[2:7]}
    assert list(rows) == ["full", "none", "selective", "offload"]  # offload twice: the last wins
    assert rows["selective"][3] == "3.60"
    assert lines[2].endswith("12 GiB and more")


@pytest.mark.parametrize(
    ("memory", "marked", "tokens", "passes"),
    [
        ("fast", ["none", "*", "adamw_torch", "float32"], "8,192", "1 pass"),
        ("balanced", ["selective", "*", "adamw_torch", "float32"], "8,192", "1 pass"),
        ("lean", ["offload", "*", "paged_adamw_8bit", "bfloat16"], "512", "16 passes"),
        ("5", ["offload", "*", "paged_adamw_8bit", "bfloat16"], "2,048", "4 passes"),
    ],
)
def test_plan_marks_what_memory_chooses(
    llama: Path, capsys: pytest.CaptureFixture[str], memory: str, marked: list[str], tokens: str,
    passes: str,
) -> None:  # fmt: skip
    assert cli(["plan", "--model", str(llama), "--memory", memory]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"rank 64, {tokens} tokens a pass;" in lines[0]
    assert [line.split()[:4] for line in lines[1:-1] if " * " in line] == [marked]
    assert not lines[2].endswith("  none listed")
    # The other rows are the ladder's, whatever was chosen.
    assert sum("paged_adamw_8bit" in line for line in lines) == 1
    assert len(lines) == 8
    assert f"--memory {memory} " in lines[-1]
    assert f" {passes} a step" in lines[-1]


def test_plan_states_the_host_memory(shape: Shape) -> None:
    """In bfloat16: the gates of 21 of 32 layers, in blocks of 16 MiB, plus a quarter."""
    pinned = {}
    for checkpointing in CHECKPOINTING:
        plan = predict_memory(shape, build_settings({"checkpointing": checkpointing}), 1000)
        pinned[checkpointing] = plan.host
        host = f"{plan.host / GIB:.1f} GiB of the host's memory"
        assert (host in describe(plan, 1000)) is (plan.host > 0)
    # Gates of a layer take 42 MiB, an input 8.
    block = 2**24
    assert pinned == {
        "none": 0,
        "selective": 21 * 3 * block * 5 // 4,
        "full": 0,
        "offload": 32 * 1 * block * 5 // 4,
    }
    peft = build_settings({"checkpointing": "full", "kernels": "none"})
    assert predict_memory(shape, peft, 1000).host == 0


def test_shortage_of_host_memory_is_reported(shape: Shape) -> None:
    plans = {
        checkpointing: predict_memory(shape, build_settings({"checkpointing": checkpointing}), 8192)
        for checkpointing in CHECKPOINTING
    }
    for name in ("none", "full"):
        assert host_shortage(plans[name], 0) is None
    selective, offload = plans["selective"], plans["offload"]
    assert host_shortage(selective, 4 * selective.host) is None
    assert "recomputed" in (host_shortage(selective, 4 * selective.host - 4) or "")
    assert host_shortage(offload, offload.host) is None
    assert "1.0 GiB" in (host_shortage(offload, GIB) or "")

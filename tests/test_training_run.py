"""A training run of each arm: records, adapter, and what the arms have in common."""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from scoring_runs import demo_prompts, score
from training_runs import Train, base, data_of, loss_of, losses, read, steps, summary
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from qlora_harness.data.templates import chat_template
from qlora_harness.model.fingerprint import checkpoint_fingerprint
from qlora_harness.model.lora import load_adapter
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.train.process import host_id

STEP_KEYS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens",
    "seconds", "tokens_per_second", "cpu_peak_rss_bytes",
}  # fmt: skip


@pytest.mark.parametrize(("quant", "folder"), [("nf4", "results/4bit"), ("bf16", "results/16bit")])
def test_files_and_numbers_of_a_run(
    train: Train, tiny_llama: Path, rows: Path, capsys: pytest.CaptureFixture[str], quant: str,
    folder: str,
) -> None:  # fmt: skip
    assert train(quant=quant) == 0
    out = capsys.readouterr().out
    run_dir = Path(folder)
    assert {path.name for path in run_dir.iterdir()} == {
        ".qlora_harness.lock", "adapter", "checkpoints", "trainer_state.json",
        "training_logs.json", "training_summary.json",
    }  # fmt: skip
    data = data_of(tiny_llama, rows)
    record = summary(run_dir)
    is_4bit = quant == "nf4"

    assert (record["schema_version"], record["kind"]) == (1, "training_summary")
    assert (record["status"], record["failure"]) == ("completed", None)
    assert (record["arm"], record["quant"]) == (run_dir.name, quant)
    assert record["started"] <= record["finished"]
    assert record["model"] == {
        "name": str(tiny_llama), "revision": None, "commit": None, "random_weights": True,
        "weights_fingerprint": checkpoint_fingerprint(str(tiny_llama), None),
        "trainable_parameters": 8192, "attention": "sdpa",
    }  # fmt: skip
    linear, other, adapter = 73728, 46144, 8192
    assert record["quantization"] == {
        "quant": quant,
        "double_quant": True if is_4bit else None,
        "compute_dtype": "float32",
        "parameter_dtypes": (
            {"float32": other + adapter, "uint8": linear // 2}
            if is_4bit
            else {"float32": other + adapter + linear}
        ),
        "unquantised_share": 0.0 if is_4bit else None,
    }
    assert record["settings"]["learning_rate"] == 0.01
    assert record["settings"]["output_dir"] == folder
    assert record["data"] == data.report
    assert record["environment"]["device"]["type"] == "cpu"
    assert record["environment"]["device"]["id"] == host_id() == record["process"]["host"]
    assert record["environment"]["cpu_threads"] == torch.get_num_threads()
    assert record["process"]["started"] == psutil.Process().create_time()
    assert record["environment"]["world_size"] == 1
    assert {"versions", "git", "platform", "command"} <= set(record["environment"])

    # 4 steps of 4 examples, all counted by hand from the 12 examples that are learned.
    rows_logged = steps(run_dir)
    assert [row["step"] for row in rows_logged] == [1, 2, 3, 4]
    assert all(set(row) == STEP_KEYS for row in rows_logged)
    assert sum(row["tokens"] for row in rows_logged[:3]) == data.report["train"]["tokens"]
    learned = data.report["train"]["supervised_tokens"]
    assert sum(row["supervised_tokens"] for row in rows_logged[:3]) == learned
    assert all(row["learning_rate"] == 0.01 and row["grad_norm"] > 0 for row in rows_logged)
    for row in rows_logged:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])

    results = record["results"]
    assert results == {
        "steps": 4,
        "final_train_loss": rows_logged[-1]["loss"],
        "eval_loss": results["eval_loss"],
        "perplexity": pytest.approx(math.exp(results["eval_loss"])),
        "eval_tokens": data.report["eval"]["supervised_tokens"],
        "eval_loss_before": results["eval_loss_before"],
    }
    logged = json.loads((run_dir / "training_logs.json").read_text())["evaluation"]
    for key, name in (("nll", "eval_loss"), ("nll_before", "eval_loss_before")):
        assert results[name] == pytest.approx(sum(logged[key]) / sum(logged["tokens"]), abs=1e-9)
    assert results["eval_loss_before"] > results["eval_loss"]
    assert losses(run_dir)[-1] < losses(run_dir)[0]

    memory = record["memory"]
    assert memory["device_type"] == "cpu"
    assert [(p["phase"], p["rank"]) for p in memory["phases"]] == [
        ("load", 0),
        ("evaluate_before", 0),
        ("train", 0),
        ("evaluate", 0),
    ]
    assert memory["cpu_peak_rss_bytes"] == memory["phases"][2]["cpu_peak_rss_bytes"] > 0
    assert memory["peak_allocated_bytes"] is memory["peak_reserved_bytes"] is None

    runtime = record["runtime"]
    assert runtime["resumed"] is False
    parts = ("train_seconds", "load_seconds", "data_seconds", "eval_seconds")
    assert all(0 < runtime[name] < runtime["total_seconds"] for name in parts)
    assert sum(row["seconds"] for row in rows_logged) < runtime["train_seconds"]
    seconds = sum(row["seconds"] for row in rows_logged)
    assert record["throughput"] == {
        "tokens_per_second": pytest.approx(sum(r["tokens"] for r in rows_logged) / seconds),
    }

    state = read(run_dir / "trainer_state.json")
    assert (state["global_step"], state["max_steps"]) == (4, 4)
    assert [row["loss"] for row in state["log_history"] if "loss" in row] == losses(run_dir)

    # Printed: the amount of data, and the first example with its masked part.
    assert f"{rows}: 16 trees, 32 messages" in out
    assert "<s> ### Human: What is 1 plus 1?### Assistant:⟦It is 2. ok</s>⟧" in out


def test_control_characters_of_the_first_example_are_escaped(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qlora_harness.train.run.show", lambda *_: "a\x1b[2J\u202e\n⟦b⟧")
    assert train(quant="bf16", output_dir="run", max_steps=1) == 0
    assert "⟦ ⟧:\na\\x1b[2J\\u202e\n⟦b⟧\n" in capsys.readouterr().out


def test_no_file_of_a_run_names_the_machine_or_the_home_folder(
    train: Train, tiny_llama: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users upload adapters and commit records."""
    monkeypatch.setenv("HOME", str(tiny_llama.parent))
    monkeypatch.setattr(socket, "gethostname", lambda: "machine-of-somebody")
    assert train(quant="bf16", output_dir="run", save_steps=2, max_steps=2) == 0
    paths = [path for path in Path("run").rglob("*") if path.is_file()]
    assert len(paths) > 10
    for path in paths:
        for secret in (str(tiny_llama.parent), "machine-of-somebody"):
            assert secret.encode() not in path.read_bytes(), path
    for folder in ("adapter", "checkpoints/checkpoint-2"):
        config = read(f"run/{folder}/adapter_config.json")
        assert config["base_model_name_or_path"] == "tiny-llama"


@pytest.mark.parametrize(("slowdown", "dtype"), [(0.5, "bfloat16"), (1.5, "float32")])
def test_compute_dtype_is_measured_and_a_resumed_run_keeps_it(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    slowdown: float, dtype: str,
) -> None:  # fmt: skip
    options = {"quant": "bf16", "output_dir": "run", "compute_dtype": "auto", "max_steps": 2}
    monkeypatch.setattr("qlora_harness.train.cpu.bfloat16_slowdown", lambda: slowdown)
    assert train(save_steps=1, **options) == 0
    assert f"on the CPU: {dtype} (" in capsys.readouterr().out
    shutil.rmtree("run/checkpoints/checkpoint-2")
    record = summary("run")
    Path("run/training_summary.json").write_text(json.dumps(record | {"status": "interrupted"}))
    monkeypatch.setattr("qlora_harness.train.cpu.bfloat16_slowdown", lambda: 1 / slowdown)
    assert train(**options) == 0
    for run in (record, summary("run")):
        assert run["quantization"]["compute_dtype"] == dtype
        assert run["settings"]["compute_dtype"] == dtype
    assert read("run/adapter/qlora_harness.json")["compute_dtype"] == dtype


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_adapter_of_a_run_is_trained_and_scores_as_the_record_says(
    train: Train, tiny_llama: Path, rows: Path, quant: str
) -> None:
    assert train(quant=quant, output_dir="run") == 0
    weights = load_file("run/adapter/adapter_model.safetensors")
    lora_b = [value for name, value in weights.items() if "lora_B" in name]
    assert len(lora_b) == 14
    assert all(value.any() for value in lora_b)
    # The whole folder is a fraction of the 240 KB that the tiny base has.
    size = sum(path.stat().st_size for path in Path("run/adapter").iterdir())
    assert size < 60_000 < (tiny_llama / "model.safetensors").stat().st_size

    model = load_adapter(base(tiny_llama, quant), Path("run/adapter"))
    data = data_of(tiny_llama, rows)
    assert loss_of(model, data.evaluation) == pytest.approx(
        summary("run")["results"]["eval_loss"], abs=1e-5
    )
    tokenizer = AutoTokenizer.from_pretrained("run/adapter")
    assert tokenizer.chat_template == chat_template("guanaco", leading_bos=True)
    record = read("run/adapter/qlora_harness.json")
    fingerprint = record["base"].pop("weights_fingerprint")
    assert fingerprint.startswith("sha256:")
    assert record == {
        "schema_version": 1, "kind": "adapter",
        "base": {"name": str(tiny_llama), "revision": None, "commit": None, "random_weights": True},
        "quant": quant, "double_quant": True, "init_lora_weights": "default",
        "compute_dtype": "float32", "data_fingerprint": data.report["train"]["fingerprint"],
        "template": "guanaco", "run": "run",
    }  # fmt: skip


def test_both_arms_learn_the_same_tokens_in_the_same_order(train: Train) -> None:
    assert train(quant="nf4") == train(quant="bf16") == 0
    nf4, bf16 = summary("results/4bit"), summary("results/16bit")
    assert nf4["data"] == bf16["data"]
    differing = {n for n in nf4["settings"] if nf4["settings"][n] != bf16["settings"][n]}
    assert differing == {"quant", "output_dir"}
    for first, second in zip(steps("results/4bit"), steps("results/16bit"), strict=True):
        assert first["tokens"] == second["tokens"]
        assert first["loss"] == pytest.approx(second["loss"], rel=0.02)
        assert first["loss"] != second["loss"]


def test_published_optimizer_and_dtype_run_on_the_cpu(train: Train) -> None:
    way = {"optimizer": "paged_adamw_32bit", "checkpointing": "full", "compute_dtype": "bfloat16"}
    assert train(quant="nf4", output_dir="run", max_steps=2, **way) == 0
    assert summary("run")["quantization"]["parameter_dtypes"] == {
        "bfloat16": 46144,
        "float32": 8192,
        "uint8": 36864,
    }


def test_fp4_arm(train: Train) -> None:
    assert train(quant="fp4", max_steps=1) == 0
    assert summary("results/4bit_fp4")["quantization"]["quant"] == "fp4"


def test_epochs_without_evaluation(train: Train) -> None:
    assert train(quant="bf16", output_dir="run", max_steps=None, epochs=1.5, eval_fraction=0) == 0
    assert summary("run")["data"]["train"]["conversations"] == 16
    assert len(losses("run")) == 6  # 1.5 x 16 examples in batches of 4
    results = summary("run")["results"]
    assert results["eval_loss"] is results["perplexity"] is results["eval_tokens"] is None


# Models that 4 bits hold only in part


SIZES: dict[str, Any] = {
    "vocab_size": 358, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0,
}  # fmt: skip
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}


def save_random(folder: Path, make: type, config: PreTrainedConfig, tokenizer: Path) -> Path:
    torch.manual_seed(0)
    make(config).to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_mixture_of_experts_trains_and_is_scored(
    train: Train, tiny_tokenizer: Path, tmp_path: Path, make_lm: Callable[..., QloraAdapterLM],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    model = save_random(tmp_path / "mixtral", MixtralForCausalLM, config, tiny_tokenizer)
    assert train(model=model, output_dir="run", lora_dropout=0.1) == 2
    assert "Use --lora-dropout 0" in capsys.readouterr().err
    assert train(model=model, output_dir="run", lora_dropout=0) == 0
    share = summary("run")["quantization"]["unquantised_share"]
    assert share == pytest.approx(37120 / 43264)
    lm = make_lm(peft="run/adapter")
    assert lm.loaded.record()["unquantised_share"] == share
    assert lm.session.path.reason == "model type 'mixtral' is not among those checked"
    adapted = score(lm, demo_prompts(1))
    for module in lm.model.modules():
        if hasattr(module, "lora_B"):
            module.lora_B["default"].weight.data.zero_()
    assert score(lm, demo_prompts(1)) != adapted


def test_base_without_sdpa_trains_with_eager_attention(
    train: Train, tiny_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Gemma2Config(**SIZES, head_dim=16)
    model = save_random(tmp_path / "gemma2", Gemma2ForCausalLM, config, tiny_tokenizer)
    assert train(model=model, output_dir="run") == 0
    attention = summary("run")["model"]["attention"]
    assert attention == ("sdpa" if Gemma2ForCausalLM._supports_sdpa else "eager")
    warnings = [m for m in caplog.messages if m.endswith(f"has {attention} attention only")]
    assert len(warnings) == (attention == "eager")


def test_mixture_of_forms_trains_and_its_record_says_what_of(
    train: Train, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alpaca = [{"instruction": f"q{i}", "input": "", "output": f"r{i}"} for i in range(8)]
    Path("alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alpaca))
    (tmp_path / "trees.jsonl").symlink_to(rows)
    mixture = "trees.jsonl:0.5,alpaca.jsonl:0.5"
    flags = {"output_dir": "run", "template": "vicuna", "max_length": 300, "max_steps": 1}
    assert train(dataset="trees.jsonl:0.5,alpaca.jsonl:0.4", **flags) == 2
    assert train(dataset=mixture, **flags, format="alpaca") == 2  # trees are not
    assert not Path("run").exists()
    assert train(dataset=mixture, **flags) == 0
    data = summary("run")["data"]
    assert (data["dataset"], data["form"]) == (mixture, "oasst, alpaca")
    counts = [(part["weight"], part["form"], part["trees"]) for part in data["mixture"]]
    assert counts == [(0.5, "oasst", 16), (0.5, "alpaca", 8)]
    assert [part["conversations"] for part in data["train"]["mixture"]] == [6, 6]
    tokenizer = AutoTokenizer.from_pretrained("run/adapter")
    assert tokenizer.chat_template == chat_template("vicuna", leading_bos=True)
    assert train(dataset=mixture, **flags, resume="auto") == 0  # nothing is left to do
    assert train(dataset=mixture, **flags | {"template": "llama2"}, resume="auto") == 2
    assert "--template vicuna" in capsys.readouterr().err

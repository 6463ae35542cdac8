"""`qlora_adapter`: which model the arguments name, and which arguments are refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from scoring_runs import MakeLm, evaluate, refused, score, write_summary

from qlora_harness.errors import HarnessError, ModelError, SettingsError
from qlora_harness.model.adapter_folder import adapter_digest


def test_newest_completed_run_is_scored_and_named(
    make_lm: MakeLm, own_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run = Path(shutil.copytree(own_adapter.parent, tmp_path / "work" / "results" / "4bit"))
    write_summary(run, finished="2026-11-24T10:00:00+00:00", status="completed")
    monkeypatch.chdir(tmp_path / "work")
    lm = make_lm(pretrained=None, results_dir=None)
    assert "scoring the newest completed run: results/4bit" in caplog.messages
    assert lm.get_model_info()["peft_sha"] == adapter_digest(own_adapter)


@pytest.mark.parametrize("name", ["/no/such/model", "no-such/model", 2024])
@pytest.mark.parametrize("argument", ["pretrained", "peft"])
def test_missing_model_is_named_with_its_argument(
    make_lm: MakeLm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, name: str | int
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"{argument}={name}" in refused(lambda: make_lm(**{argument: name}), HarnessError)


def test_base_without_readable_weights_is_named(
    make_lm: MakeLm, tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "damaged"))
    (base / "model.safetensors").write_bytes(b"12345678")
    assert str(base) in refused(lambda: make_lm(pretrained=str(base)), ModelError)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("load_in_4bit", True, "quant=nf4"),
        ("load_in_8bit", True, "quant=int8"),
        ("token", "hf_secret", "hf auth login"),
        ("trust_remote_code", True, "transformers"),
        ("delta", "x/y", "peft="),
        ("tokenizer", "x/y", "adapter's"),
        ("mixed_precision_dtype", "float16", "dtype=bfloat16"),
        ("qaunt", "nf4", "batch_size"),
        ("bits", 4, "batch_size"),
        ("adapter", "results/4bit/adapter", "batch_size"),
        ("quant", "int4", "nf4, fp4, int8, hqq, bf16"),
        ("dtype", "float8", "bfloat16, float16, float32"),
        ("softmax_dtype", "float33", "float64"),
        ("scoring", "fast", "packed, hf"),
        ("kernels", "triton", "auto, none"),
        ("dequantize", "always", "auto, never"),
        ("verify", -1, "at least 0"),
        ("verify", -1.0, "at least 0"),
        ("verify", "all", "at least 0"),
        ("verify", True, "at least 0"),
        ("pack_tokens", 0, "at least 1"),
        ("pack_tokens", -8, "at least 1"),
        ("pack_tokens", 1.5, "at least 1"),
    ],
)
def test_unusable_argument_is_refused_before_the_model_is_looked_for(
    make_lm: MakeLm, name: str, value: Any, remedy: str
) -> None:
    text = refused(lambda: make_lm(pretrained="no-such/model", **{name: value}), SettingsError)
    assert text.startswith(f"--model_args {name}=")
    assert remedy in text
    assert "hf_secret" not in text


def test_harmless_arguments_of_hflm_are_taken(make_lm: MakeLm) -> None:
    lm = make_lm(max_length=100, trust_remote_code=False, load_in_4bit=False, max_batch_size=8)
    assert lm.max_length == 100


# What our tasks need


def test_tokenizer_with_several_tokens_for_an_answer_is_refused(
    make_lm: MakeLm, manager: TaskManager, tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "spaced"))
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(content["model"]["merges"]) == 4  # those of " A" … " D"
    content["model"]["merges"] = []
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    lm = make_lm(pretrained=str(base))
    text = refused(lambda: evaluate(lm, manager, limit=1), SettingsError)
    assert f"{base} makes 2 tokens of ' A' after 'Answer:'" in text
    assert math.isfinite(sum(score(lm, ["another task"])))


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_chat_template_is_refused_for_our_tasks(
    make_lm: MakeLm, manager: TaskManager, has_template: bool, tracked: bool
) -> None:
    """LLaMA 2's tokenizer has no template; only the command line has a tracker."""
    lm = make_lm()
    if has_template:
        lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    options: Any = {"evaluation_tracker": EvaluationTracker() if tracked else None}
    text = refused(
        lambda: evaluate(lm, manager, limit=1, apply_chat_template=True, **options), SettingsError
    )
    assert text.startswith("--apply_chat_template")
    assert ("an mmlu_qlora task" if has_template else "no chat template") in text


def test_system_instruction_is_refused_for_our_tasks(make_lm: MakeLm, manager: TaskManager) -> None:
    text = refused(
        lambda: evaluate(make_lm(), manager, limit=1, system_instruction="You are a pirate."),
        SettingsError,
    )
    assert "--system_instruction" in text

"""`qlora_adapter`: which model the arguments name, and which arguments are refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from scoring_runs import evaluate, refused, score

from qlora_harness.errors import HarnessError, ModelError, SettingsError
from qlora_harness.model.adapter_folder import adapter_digest
from qlora_harness.score.adapter_lm import QloraAdapterLM

# Which model is scored


def test_newest_completed_run_is_scored_and_named(
    make_lm: Callable[..., QloraAdapterLM],
    own_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Path(shutil.copytree(own_adapter.parent, tmp_path / "work" / "results" / "4bit"))
    summary = {"status": "completed", "finished": "2026-11-24T10:00:00+00:00"}
    (run / "training_summary.json").write_text(json.dumps(summary))
    monkeypatch.chdir(tmp_path / "work")
    lm = make_lm(pretrained=None, results_dir=None)
    assert "scoring the newest completed run: results/4bit" in caplog.messages
    assert lm.get_model_info()["peft_sha"] == adapter_digest(own_adapter)


def test_without_a_run_it_says_so(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(lambda: make_lm(pretrained=None), SettingsError) == (
        "--model qlora_adapter: no completed run lies under results/. "
        "Train one, or give peft= or pretrained= in --model_args."
    )


@pytest.mark.parametrize("name", ["/no/such/model", "no-such/model"])
def test_missing_base_is_named_by_its_argument(
    make_lm: Callable[..., QloraAdapterLM], name: str
) -> None:
    text = refused(lambda: make_lm(pretrained=name), ModelError)
    assert name in text
    assert "pretrained=" in text  # there is no --model here that names a base


def test_base_without_readable_weights_is_named(
    make_lm: Callable[..., QloraAdapterLM], tiny_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "damaged"
    shutil.copytree(tiny_llama, base)
    (base / "model.safetensors").write_bytes(b"12345678")
    assert str(base) in refused(lambda: make_lm(pretrained=str(base)), ModelError)


# Arguments of the model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"load_in_4bit": True},
            "--model_args load_in_4bit= is not supported by qlora_adapter. Use quant=nf4.",
        ),
        (
            {"load_in_8bit": True},
            "--model_args load_in_8bit= is not supported by qlora_adapter. "
            "Use quant=nf4 or quant=bf16.",
        ),
        (
            {"token": "hf_secret"},
            "--model_args token= is not supported by qlora_adapter. "
            "Log in with `hf auth login`; a token here would land in the results.",
        ),
        (
            {"trust_remote_code": True},
            "--model_args trust_remote_code= is not supported by qlora_adapter. "
            "Use a model that needs no code of its own.",
        ),
        (
            {"delta": "x/y"},
            "--model_args delta= is not supported by qlora_adapter. Use peft=.",
        ),
        (
            {"quant": "int8"},
            "--model_args quant=int8. Use one of nf4, fp4, bf16.",
        ),
        (
            {"dtype": "float16"},
            "--model_args dtype=float16. Use bfloat16 or float32.",
        ),
    ],
)
def test_arguments_that_would_bypass_this_model_are_refused(
    make_lm: Callable[..., QloraAdapterLM], arguments: dict[str, Any], message: str
) -> None:
    assert refused(lambda: make_lm(**arguments), SettingsError) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"verify": -1}, "verify=-1 is out of range. It must be at least 0."),
        ({"verify": -1.0}, "verify=-1 is out of range. It must be at least 0."),
        ({"verify": "all"}, "verify=all is not a whole number. Correct the value."),
        ({"verify": True}, "verify=True is not a whole number. Correct the value."),
        ({"pack_tokens": 0}, "pack_tokens=0 is out of range. It must be at least 1."),
        ({"pack_tokens": -8}, "pack_tokens=-8 is out of range. It must be at least 1."),
        ({"pack_tokens": 1.5}, "pack_tokens=1.5 is not a whole number. Correct the value."),
    ],
)
def test_counts_are_checked_before_the_model_is_looked_for(
    make_lm: Callable[..., QloraAdapterLM], arguments: dict[str, Any], message: str
) -> None:
    text = refused(lambda: make_lm(pretrained="no-such/model", **arguments), SettingsError)
    assert text == f"--model_args {message}"


@pytest.mark.parametrize("name", ["pretrained", "peft"])
def test_missing_folder_of_digits_is_one_line(
    make_lm: Callable[..., QloraAdapterLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"{name}=2024" in refused(lambda: make_lm(**{name: 2024}), HarnessError)


@pytest.mark.parametrize(
    "arguments",
    [
        {"qaunt": "nf4"},
        {"bits": 4},
        {"adapter": "results/4bit/adapter"},
        {"tokenizer": "x/y"},
        {"softmax_dtype": "float33"},
        {"mixed_precision_dtype": "float16"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_unknown_or_unusable_argument_is_named(
    make_lm: Callable[..., QloraAdapterLM], arguments: dict[str, Any]
) -> None:
    (name,) = arguments
    assert f"--model_args {name}=" in refused(lambda: make_lm(**arguments), SettingsError)


def test_harmless_arguments_of_hflm_are_taken(make_lm: Callable[..., QloraAdapterLM]) -> None:
    lm = make_lm(max_length=100, trust_remote_code=False, load_in_4bit=False, max_batch_size=8)
    assert lm.max_length == 100


# What our tasks need


def spaced_letters_tokenizer(folder: Path) -> None:
    """Takes the merges of " A" … " D" from a tokenizer, so that each is two tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert len(content["model"]["merges"]) == 4
    content["model"]["merges"] = []
    path.write_text(json.dumps(content), encoding="utf-8")


def test_tokenizer_with_several_tokens_for_an_answer_is_refused(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager, tiny_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "spaced"
    shutil.copytree(tiny_llama, base)
    spaced_letters_tokenizer(base)
    lm = make_lm(pretrained=str(base))
    assert refused(lambda: evaluate(lm, manager, limit=1), SettingsError) == (
        f"the tokenizer of {base} makes 2 tokens of ' A' after 'Answer:'. "
        "These tasks need a tokenizer for which each answer is one token."
    )
    assert math.isfinite(sum(score(lm, ["another task"])))


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_chat_template_is_refused_for_our_tasks(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    has_template: bool,
    tracked: bool,
) -> None:
    """LLaMA 2's tokenizer has no template; only the command line has a tracker."""
    lm = make_lm()
    if has_template:
        lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    tracker = EvaluationTracker() if tracked else None

    def asked() -> None:
        evaluate(lm, manager, limit=1, apply_chat_template=True, evaluation_tracker=tracker)

    text = refused(asked, SettingsError)
    assert text.startswith("--apply_chat_template with ")
    if has_template:
        assert text == (
            "--apply_chat_template with an mmlu_qlora task. "
            "Leave it out: these prompts are scored verbatim, as QLoRA does."
        )


def test_system_instruction_is_refused_for_our_tasks(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager
) -> None:
    lm = make_lm()
    text = refused(
        lambda: evaluate(lm, manager, limit=1, system_instruction="You are a pirate."),
        SettingsError,
    )
    assert "--system_instruction" in text

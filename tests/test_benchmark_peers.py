"""Peers in the benchmarks: the same batches or prompts, or one line that says why there are none.

A stand-in on transformers' Trainer takes TRL's place in tests that don't need TRL itself, and one
on transformers' model takes vLLM's.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from qlora_harness.benchmark import peer_process
from qlora_harness.benchmark.peers import PEER_WAYS, run_peer
from qlora_harness.benchmark.training import WAYS
from qlora_harness.cli import main
from qlora_harness.data.examples import Example
from qlora_harness.model.source import find_base
from qlora_harness.score.mmlu_files import DEMO_FILE
from qlora_harness.settings_checks import build_settings

STAND_IN = """
from dataclasses import dataclass
from functools import partial
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from qlora_harness.train.batches import pad_batch

@dataclass
class SFTConfig(TrainingArguments):
    completion_only_loss: bool = False
    packing: bool = False
    padding_free: bool = False
    max_length: int = 1024

class SFTTrainer(Trainer):
    def __init__(self, model, args, train_dataset, processing_class, peft_config):
        print("stand-in for", args.max_length, "tokens")
        rows = [
            {"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask)]}
            for ids, mask in zip(train_dataset["input_ids"], train_dataset["completion_mask"])
        ]
        from transformers import set_seed
        set_seed(args.seed)
        super().__init__(
            model=get_peft_model(model, peft_config),
            args=args,
            train_dataset=rows,
            data_collator=partial(pad_batch, pad_id=0),
        )
"""

VLLM = """
from types import SimpleNamespace
import torch
from transformers import AutoModelForCausalLM

SamplingParams = SimpleNamespace

class LLM:
    def __init__(self, model, dtype, max_model_len, skip_tokenizer_init, **options):
        print("stand-in for", max_model_len, "tokens")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling, use_tqdm):
        return [self.score(prompt["prompt_token_ids"], sampling) for prompt in prompts]

    @torch.no_grad()
    def score(self, ids, sampling):
        logprobs = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        row = {
            token: SimpleNamespace(logprob=float(logprobs[token]) - 0.25)
            for token in sampling.logprob_token_ids
        }
        answer = SimpleNamespace(logprobs=[row], token_ids=[int(logprobs.argmax())])
        return SimpleNamespace(prompt_token_ids=ids, num_cached_tokens=3, outputs=[answer])
"""


def stand_in(folder: Path, name: str, text: str, version: str = "0.0") -> Path:
    """Writes a package of one module, as pip would install it into a folder."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    return folder


def command(model: Path, output: Path, *words: str) -> list[str]:
    return [
        *["benchmark-training", "--model", str(model), "--compute-dtype", "float32"],
        *["--quant", "bf16", "--dataset", "demo", "--max-length", "64", "--batch-size", "3"],
        *["--lora-r", "4", "--steps", "2", "--warm-up", "1", "--json", str(output), *words],
    ]


def test_a_peer_trains_on_the_same_batches_in_its_own_process(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trl = stand_in(tmp_path / "trl_site", "trl", STAND_IN, "9.9")
    unsloth = stand_in(tmp_path / "unsloth_site", "unsloth", "raise ImportError('no | GPU')")
    output = tmp_path / "benchmark.json"
    words = ["--ways", "peft-none,trl-pad,unsloth-pad,peft-none"]
    words += ["--peer-path", f"trl={trl}", "--peer-path", f"unsloth={unsloth}"]
    assert main(command(tiny_llama, output, *words)) == 0
    first, padded, broken, last = json.loads(output.read_text())["measurements"]
    assert padded["losses"] == pytest.approx(first["losses"], abs=1e-4)
    assert padded["tokens"] == first["tokens"] == last["tokens"]
    assert padded["steps"] == 2
    assert padded["ratio"] == pytest.approx(
        padded["tokens_per_second"] / first["tokens_per_second"]
    )
    assert padded["versions"]["trl"] == "9.9"
    assert broken["failure"] == "failed: ImportError: no / GPU"
    printed = capsys.readouterr()
    assert "\ntrl: trl 9.9, transformers " in printed.out
    assert "| unsloth-pad | bf16 | failed: ImportError: no / GPU |" in printed.out
    assert "Traceback" in printed.err  # what the peer printed, to find out why
    assert "stand-in for" not in printed.err


def test_a_peer_that_takes_too_long_is_stopped(tiny_llama: Path, tmp_path: Path) -> None:
    folder = stand_in(tmp_path, "trl", "import time; print('waiting', flush=True); time.sleep(60)")
    failed = run_peer(
        PEER_WAYS["trl-pad"], build_settings(WAYS["trl-pad"]), find_base(str(tiny_llama)),
        [Example([1, 5, 6], [-100, 5, 6])], steps=1, path=folder, timeout=4,
    )  # fmt: skip
    assert failed == {"failure": "timed out after 4 s"}


def test_a_missing_peer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_process, "find_spec", lambda name: None)
    for peer in ("trl", "unsloth", "vllm"):
        assert peer_process.measure({"peer": peer}) == {
            "failure": f"{peer} is not installed: pip install {peer}"
        }


def test_a_layout_that_a_peer_did_not_keep_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    left = SimpleNamespace(args=SimpleNamespace(packing=False, padding_free=False))
    monkeypatch.setattr(peer_process, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "trl", ModuleType("trl"))
    monkeypatch.setattr(peer_process, "_trl_trainer", lambda *_: left)
    request = {"peer": "trl", "layout": "pack", "settings": build_settings({}).flat()}
    assert peer_process.measure(request) == {"failure": "trl would run as trl-pad here"}


def scoring_command(model: Path, folder: Path, *words: str) -> list[str]:
    return [
        *["benchmark-scoring", "--model", str(model), "--file", DEMO_FILE, "--rows", "2"],
        *["--dtype", "float32", "--batch-size", "4", "--peer-path", str(folder), *words],
    ]


def test_vllm_scores_the_same_prompts_in_its_own_process(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stand_in(tmp_path / "site", "vllm", VLLM, "9.9")
    output = tmp_path / "benchmark.json"
    words = ["--json", str(output), "--baseline-questions", "5", "--float32-reference"]
    assert main(scoring_command(tiny_llama, folder, *words)) == 0
    hf, vllm, exact, packed = json.loads(output.read_text())["measurements"]
    assert [m["name"] for m in (vllm, exact, packed)] == [
        "vLLM 9.9",
        "packed, weights in float32",
        "packed",
    ]
    # The stand-in says 0.25 less for every answer, and that it had three tokens of each prompt.
    for difference in ("largest_difference", "float32_difference", "packed_difference"):
        assert vllm[difference] == pytest.approx(0.25, abs=1e-4)
    for share in ("same_predictions", "float32_predictions", "packed_predictions"):
        assert vllm[share] == 1.0
    assert (vllm["questions"], vllm["prompt_tokens"]) == (
        packed["questions"],
        packed["prompt_tokens"],
    )
    assert vllm["computed_tokens"] == vllm["prompt_tokens"] - 3 * vllm["questions"]
    assert vllm["peak_allocated_bytes"] is None
    assert packed["loading_seconds"] is packed["packed_difference"] is None
    scale = vllm["prompt_tokens"] / hf["prompt_tokens"]
    assert vllm["scoring_ratio"] == pytest.approx(
        scale * hf["scoring_seconds"] / vllm["scoring_seconds"]
    )
    printed = capsys.readouterr()
    loaded = f"vLLM 9.9: loaded in {vllm['loading_seconds']:.1f} s; 0.25 nats from packed"
    assert printed.out.splitlines()[-1].startswith(loaded)
    assert "stand-in for" not in printed.err


def test_vllm_that_fails_is_one_line(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stand_in(tmp_path / "site", "vllm", "raise ImportError('no GPU')")
    assert main(scoring_command(tiny_llama, folder)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"--peer-path {folder}: vllm failed: ImportError: no GPU" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quant", "nf4"], "--peer-path with --quant nf4"),
        (["--generate", "1"], "--peer-path with --generate"),
        (["--peer-path", "/not/there"], "--peer-path: folder /not/there does not exist"),
    ],
)
def test_vllm_is_refused_before_the_model_is_read(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(scoring_command(tmp_path / "none", tmp_path, *words)) == 2
    assert message in capsys.readouterr().err


def test_vllm_is_refused_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(scoring_command(tmp_path / "none", tmp_path)) == 2
    assert "--peer-path: vLLM runs beside one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("axolotl=.", "--peer-path: 'axolotl=.' is not PEER=FOLDER. Peers are trl, unsloth"),
        ("trl", "--peer-path: 'trl' is not PEER=FOLDER"),
        ("trl=/not/there", "--peer-path: folder /not/there does not exist. `pip install --target"),
    ],
)
def test_wrong_peer_path_is_named(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark-training", "--model", "m", "--peer-path", word]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_trl_learns_as_peft_does(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "benchmark.json"
    words = ["--ways", "peft-none,trl-pad,trl-free,trl-pack,trl-pad-full"]
    assert main(command(tiny_llama, output, *words)) == 0
    first, *others = json.loads(output.read_text())["measurements"]
    for measured in others:
        # Two conversations cut at 64 tokens don't fit into one row, so packing changes nothing.
        assert measured["failure"] is None
        assert measured["losses"] == pytest.approx(first["losses"], abs=1e-4)
        assert measured["tokens"] == first["tokens"]

"""`qlora-harness export`: an adapter merged into its base, and how far its answers moved."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qlora_harness.errors import ModelError, RunError, SettingsError
from qlora_harness.inference.chat_model import choose_adapter, compute_device, run_name
from qlora_harness.locations import expanded
from qlora_harness.model.base import load_base
from qlora_harness.model.lora import load_adapter
from qlora_harness.model.rope import finish_scaling
from qlora_harness.model.source import BaseSource, find_base, load_tokenizer, read_config
from qlora_harness.record import environment, new_folder, now, scrub_all, write_json
from qlora_harness.schema.merge_record import MergeRecord
from qlora_harness.schema.mmlu import LETTERS
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.mmlu import predict
from qlora_harness.score.mmlu_files import DEMO_FILE, DIR_VARIABLE, Question, load_questions
from qlora_harness.score.run_choice import ScoringChoice
from qlora_harness.settings import Quant

_CONVERTER = "convert_hf_to_gguf.py"
_LLAMA_CPP_VARIABLE = "LLAMA_CPP_DIR"
_QUESTIONS = 200
_SEED = 0
_MMLU_FILE = "five_shot_mmlu_test.json"


def export(run: Path, output: Path, *, original_dtype: bool, gguf: bool) -> MergeRecord:
    """Writes the merged model, its tokenizer and `merge.json` to a new folder; raises HarnessError.

    The weights are added in float32 and rounded once.
    """
    choice = choose_adapter(run)
    if output.exists():
        raise RunError(f"--output {output} exists", "Name another folder, or remove it")
    converter = _find_converter() if gguf else None
    source = find_base(choice.base, choice.revision, argument="the adapter's base")
    questions_file, questions = _questions()
    lm = QloraAdapterLM(
        peft=str(choice.adapter),
        device=str(compute_device()),
        dequantize="never",
        kernels="none",  # as for the merged model, so that only the merge differs
        batch_size=8,
    )
    before = _letter_logprobs(lm, questions)
    model = _merged(choice, source, original_dtype=original_dtype)
    with new_folder(output) as work:
        model.save_pretrained(str(work))
        load_tokenizer(source, choice.adapter).save_pretrained(str(work))
        lm.take(model, kernels="none")  # frees the unmerged model first
        model.to(lm.device)
        shift = {"questions_file": questions_file}
        shift |= _shift(before, _letter_logprobs(lm, questions))
        record = _record(choice, lm, str(model.dtype), shift)
        write_json(work / "merge.json", record.content())
    if converter is not None:
        _convert(converter, output, output / f"{output.resolve().name}.gguf")
    return record


def _questions() -> tuple[str, list[Question]]:
    """A seeded sample of the MMLU test set, or all demo questions if there is no folder of it."""
    name = _MMLU_FILE if os.environ.get(DIR_VARIABLE) else DEMO_FILE
    questions = list(load_questions(name))
    return name, random.Random(_SEED).sample(questions, min(_QUESTIONS, len(questions)))


def _letter_logprobs(lm: QloraAdapterLM, questions: list[Question]) -> list[list[float]]:
    """Returns the log-probabilities of the four letters of each question, nats."""
    pairs = [(q.prompt, f" {letter}") for q in questions for letter in LETTERS]
    encoded = lm.session.encode(pairs)
    scores = [logprob for logprob, _ in lm.session.score_tokens(encoded).scores]
    lm.session.close()
    return [scores[at : at + len(LETTERS)] for at in range(0, len(scores), len(LETTERS))]


def _shift(before: list[list[float]], after: list[list[float]]) -> dict[str, Any]:
    pairs = list(zip(before, after, strict=True))
    differences = [abs(a - b) for old, new in pairs for a, b in zip(old, new, strict=True)]
    return {
        "questions": len(before),
        "seed": _SEED,
        "mean_logprob_difference": sum(differences) / len(differences),
        "largest_logprob_difference": max(differences),
        "changed_letters": sum(predict(old) != predict(new) for old, new in pairs),
    }


def _merged(choice: ScoringChoice, source: BaseSource, *, original_dtype: bool) -> Any:
    """Merges on the CPU: its memory holds the whole base, and the adapter stays in float32."""
    assert choice.adapter is not None  # of `choose_adapter`
    if original_dtype:
        base: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=read_config(source, choice.rope_scaling),
            revision=source.revision or "main",
            dtype="auto",
            trust_remote_code=False,
        )
        finish_scaling(base, choice.rope_scaling, source.shown)
    else:
        base = load_base(
            source,
            quant=Quant.BF16,
            double_quant=False,
            compute_dtype="bfloat16",
            device=torch.device("cpu"),
            rope_scaling=choice.rope_scaling,
        )
    model: Any = load_adapter(base, choice.adapter)
    model = model.merge_and_unload()
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"merging overflows {parameter.dtype} in {name}", "Use --merge bf16")
    model.config.use_cache = True  # `load_base` turns it off for training
    return model.eval()


def _record(
    choice: ScoringChoice, lm: QloraAdapterLM, dtype: str, shift: dict[str, Any]
) -> MergeRecord:
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else "cpu"
    content = scrub_all(
        {
            "created": now(),
            "run": run_name(choice),
            "base": choice.recorded or {},
            "dtype": dtype.removeprefix("torch."),
            "trained_quant": choice.quant.value,
            "adapter_sha256": lm.loaded.adapter_sha256,
            "shift": shift,
            "environment": environment() | {"device": {"name": device}},
        }
    )
    return MergeRecord.model_validate(content)


def _find_converter() -> Path:
    """Returns llama.cpp's converter; raises SettingsError if it is not installed."""
    folder = os.environ.get(_LLAMA_CPP_VARIABLE)
    path = shutil.which(_CONVERTER)
    candidate = expanded(folder) / _CONVERTER if folder else Path(path) if path else None
    if candidate is None or not candidate.is_file():
        where = f"{_LLAMA_CPP_VARIABLE}={folder}" if folder else "PATH"
        raise SettingsError(
            f"--gguf: {_CONVERTER} is not in {where}",
            f"Clone https://github.com/ggml-org/llama.cpp, install its requirements.txt, and set "
            f"{_LLAMA_CPP_VARIABLE} to the folder",
        )
    return candidate


def _convert(converter: Path, folder: Path, file: Path) -> None:
    command = [sys.executable, str(converter), str(folder), "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not file.is_file():
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ModelError(
            f"--gguf: {converter} failed with status {done.returncode}: {lines[-1]}",
            f"The merged model is in {folder}; run the converter on it to see all of its output",
        )

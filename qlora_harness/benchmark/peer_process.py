"""Runs a peer: `python -m qlora_harness.benchmark.peer_process REQUEST RESULT`.

Unsloth must be imported before torch and transformers, so this module imports neither at the top.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_harness.errors import HarnessError, print_error
from qlora_harness.record import installed_versions, read_json, write_json
from qlora_harness.settings import Settings
from qlora_harness.settings_checks import build_settings

_SHOWN_PACKAGES = ("trl", "transformers", "peft", "torch", "datasets", "bitsandbytes")
_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Does what `peers.run_peer` or `vllm_peer.run_vllm` requests, and returns its result."""
    peer: str = request["peer"]
    if find_spec(peer) is None:
        return {"failure": f"{peer} is not installed: pip install {peer}"}
    if peer == "vllm":
        from qlora_harness.benchmark.vllm_peer import score_prompts

        return score_prompts(request)
    settings = build_settings(request["settings"])
    if peer == "unsloth" and settings.model.quant not in ("nf4", "bf16"):
        return {"failure": f"unsloth has no {settings.model.quant} here"}
    importlib.import_module(peer)
    import torch

    from qlora_harness.model.facts import is_out_of_memory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build = _unsloth_trainer if peer == "unsloth" else _trl_trainer
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = build(request, settings, Path(folder), device)
            layout = _layout_of(trainer.args)
            if layout != request["layout"]:
                return {"failure": f"{peer} would run as {peer}-{layout} here"}
            result = _time_steps(trainer, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"failure": "out of memory"}
    own = ("unsloth", "unsloth_zoo") if peer == "unsloth" else (peer,)
    return result | {"versions": installed_versions([*own, *_SHOWN_PACKAGES])}


def _trl_trainer(request: dict[str, Any], settings: Settings, folder: Path, device: Any) -> Any:
    """Returns TRL's trainer on the common base, with Liger's kernels if they are installed."""
    from trl import SFTTrainer

    from qlora_harness.model.base import load_base
    from qlora_harness.model.lora import lora_config
    from qlora_harness.model.source import BaseSource, load_tokenizer

    source = BaseSource(**request["source"])
    lora = settings.lora
    liger = device.type == "cuda" and find_spec("liger_kernel") is not None
    return SFTTrainer(
        model=load_base(
            source,
            quant=settings.quant,
            double_quant=settings.model.double_quant,
            compute_dtype=settings.model.compute_dtype,
            device=device,
        ),
        args=_config(request, settings, folder, device, liger=liger),
        train_dataset=_dataset(request),
        processing_class=load_tokenizer(source),
        peft_config=lora_config(
            r=lora.lora_r,
            alpha=lora.lora_alpha,
            dropout=lora.lora_dropout,
            targets=lora.lora_targets,
        ),
    )


def _unsloth_trainer(request: dict[str, Any], settings: Settings, folder: Path, device: Any) -> Any:
    """Returns TRL's trainer as patched by Unsloth, on a base that Unsloth loads."""
    import torch
    from unsloth import FastLanguageModel  # isort: skip
    from trl import SFTTrainer

    checkpointing = "unsloth" if request["checkpointing"] == "full" else False
    seed = settings.optimization.seed
    base, tokenizer = FastLanguageModel.from_pretrained(
        model_name=request["source"]["path"],
        revision=request["source"]["revision"],
        max_seq_length=settings.data.max_length,
        dtype=getattr(torch, settings.model.compute_dtype),
        load_in_4bit=settings.quant.is_4bit,
        use_gradient_checkpointing=checkpointing,
        # Else Unsloth loads another repository, with the model already in 4 bits.
        use_exact_model_name=True,
        random_state=seed,
        trust_remote_code=False,
    )
    model = FastLanguageModel.get_peft_model(
        base,
        r=settings.lora.lora_r,
        lora_alpha=settings.lora.lora_alpha,
        lora_dropout=settings.lora.lora_dropout,
        target_modules=_LAYERS,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=seed,
    )
    return SFTTrainer(
        model=model,
        args=_config(request, settings, folder, device, liger=False),
        train_dataset=_dataset(request),
        processing_class=tokenizer,
    )


def _config(
    request: dict[str, Any], settings: Settings, folder: Path, device: Any, *, liger: bool
) -> Any:
    """Returns the common training arguments, with the peer's for layout and checkpointing."""
    from trl import SFTConfig

    from qlora_harness.train.arguments import training_arguments

    return training_arguments(
        settings.optimization,
        checkpoint_dir=folder,
        steps=request["steps"],
        save_steps=10**9,
        report_to="none",
        compute_dtype=settings.model.compute_dtype,
        use_cpu=device.type == "cpu",
        fused=False,
        kind=SFTConfig,
        changes={
            "save_strategy": "no",
            # Logging would wait for the GPU at each loss.
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_liger_kernel": liger,
            "completion_only_loss": True,
            "packing": request["layout"] == "pack",
            "padding_free": request["layout"] == "free",
            # No example is longer, and TRL refuses max_length with padding_free.
            "max_length": None if request["layout"] == "free" else settings.data.max_length,
        },
    )


def _dataset(request: dict[str, Any]) -> Any:
    """Returns examples with a mask instead of labels, because Unsloth doesn't pack labels."""
    from datasets import Dataset

    from qlora_harness.data.examples import IGNORE

    masks = [[int(label != IGNORE) for label in labels] for labels in request["labels"]]
    return Dataset.from_dict({"input_ids": request["input_ids"], "completion_mask": masks})


def _layout_of(arguments: Any) -> str:
    """Returns the layout that the trainer really uses; Unsloth switches some off."""
    if arguments.packing:
        return "pack"
    return "free" if arguments.padding_free else "pad"


class _CountingCollator:
    """Counts real tokens before they are padded or joined."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate
        self.tokens: list[int] = []

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self._collate(rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collate, name)


def _time_steps(trainer: Any, device: Any) -> dict[str, Any]:
    """Trains, and times each step on the device, without waiting for it, as for our own ways."""
    from transformers import TrainerCallback

    from qlora_harness.train.measured_step import Clock
    from qlora_harness.train.memory_meter import MemoryMeter

    clocks: list[Clock] = []
    losses: list[Any] = []
    training_step = trainer.training_step

    class StepClock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clocks.append(Clock(device))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clocks.append(Clock(device))

    def step_with_loss(*args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        losses.append(loss.detach().clone())
        return loss

    collator = trainer.data_collator = _CountingCollator(trainer.data_collator)
    trainer.add_callback(StepClock())
    trainer.training_step = step_with_loss
    meter = MemoryMeter(device, 0)
    with meter.phase("train"):
        trainer.train()
    clocks[-1].wait()
    seconds = [later.seconds_since(earlier) for earlier, later in pairwise(clocks)]
    # The loader prefetches, so it may have collated more batches than there were steps.
    tokens = collator.tokens[: len(seconds)]
    phase = meter.phases[-1]
    return {
        "steps": [
            {"tokens": count, "seconds": time, "loss": float(loss)}
            for count, time, loss in zip(tokens, seconds, losses, strict=True)
        ],
        "peak_allocated_bytes": phase.peak_allocated_bytes,
        "peak_reserved_bytes": phase.peak_reserved_bytes,
    }


if __name__ == "__main__":
    try:
        write_json(Path(sys.argv[2]), measure(read_json(Path(sys.argv[1]))))
    except HarnessError as error:
        print_error(error)
        sys.exit(error.exit_status)

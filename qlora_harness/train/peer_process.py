"""The process of one peer: `python -m qlora_harness.train.peer_process ORDER.json RESULT.json`.

Unsloth must be imported before torch and transformers, so nothing here imports them at the top.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora_harness.errors import HarnessError, print_error
from qlora_harness.record import installed_versions, read_json, write_json
from qlora_harness.settings import Settings, build_settings

_SHOWN_PACKAGES = ("trl", "transformers", "peft", "torch", "datasets", "bitsandbytes")
_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """Trains as an order says.

    Args:
        order: What `peers.run_peer` writes.

    Returns:
        What `peers.run_peer` returns.
    """
    peer: str = order["peer"]
    if find_spec(peer) is None:
        return {"failure": f"{peer} is not installed: pip install {peer}"}
    settings = build_settings(order["settings"])
    if peer == "unsloth" and settings.model.quant == "fp4":
        return {"failure": "unsloth has no fp4"}
    importlib.import_module(peer)
    import torch

    from qlora_harness.model.base import is_out_of_memory
    from qlora_harness.train.peer_steps import measure_steps

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build = _unsloth_trainer if peer == "unsloth" else _trl_trainer
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = build(order, settings, Path(folder), device)
            layout = _layout(trainer.args)
            if layout != order["layout"]:
                return {"failure": f"{peer} would run as {peer}-{layout} here"}
            found = measure_steps(trainer, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"failure": "out of memory"}
    own = ("unsloth", "unsloth_zoo") if peer == "unsloth" else (peer,)
    return found | {"versions": installed_versions([*own, *_SHOWN_PACKAGES])}


def _trl_trainer(order: dict[str, Any], settings: Settings, folder: Path, device: Any) -> Any:
    """TRL's trainer, on the base that all ways get; with Liger's kernels where they are."""
    from trl import SFTTrainer

    from qlora_harness.model.base import BaseSource, load_base, load_tokenizer
    from qlora_harness.model.lora import lora_config

    source = BaseSource(**order["source"])
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
        args=_config(order, settings, folder, device, liger=liger),
        train_dataset=_dataset(order),
        processing_class=load_tokenizer(source),
        peft_config=lora_config(
            r=lora.lora_r,
            alpha=lora.lora_alpha,
            dropout=lora.lora_dropout,
            targets=lora.lora_targets,
        ),
    )


def _unsloth_trainer(order: dict[str, Any], settings: Settings, folder: Path, device: Any) -> Any:
    """TRL's trainer as Unsloth leaves it, on a base that Unsloth loads."""
    import torch
    from unsloth import FastLanguageModel  # isort: skip
    from trl import SFTTrainer

    full = "unsloth" if order["checkpointing"] == "full" else False
    seed = settings.optimization.seed
    base, tokenizer = FastLanguageModel.from_pretrained(
        model_name=order["source"]["path"],
        revision=order["source"]["revision"],
        max_seq_length=settings.data.max_length,
        dtype=getattr(torch, settings.model.compute_dtype),
        load_in_4bit=settings.quant.is_4bit,
        use_gradient_checkpointing=full,
        # Not another repository that holds the same model in 4 bits.
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
        use_gradient_checkpointing=full,
        random_state=seed,
    )
    return SFTTrainer(
        model=model,
        args=_config(order, settings, folder, device, liger=False),
        train_dataset=_dataset(order),
        processing_class=tokenizer,
    )


def _config(
    order: dict[str, Any], settings: Settings, folder: Path, device: Any, *, liger: bool
) -> Any:
    """The arguments of the other ways, and the peer's own ones for layout and checkpointing."""
    from trl import SFTConfig

    from qlora_harness.train.arguments import training_arguments

    return training_arguments(
        settings.optimization,
        checkpoint_dir=folder,
        steps=order["steps"],
        save_steps=10**9,
        report_to="none",
        compute_dtype=settings.model.compute_dtype,
        use_cpu=device.type == "cpu",
        fused=False,
        kind=SFTConfig,
        changes={
            "save_strategy": "no",
            # Nothing waits for a loss; each step's is read at the end.
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_liger_kernel": liger,
            "completion_only_loss": True,
            "packing": order["layout"] == "pack",
            "padding_free": order["layout"] == "free",
            # Examples are no longer than this; TRL refuses a length beside padding_free.
            "max_length": None if order["layout"] == "free" else settings.data.max_length,
        },
    )


def _dataset(order: dict[str, Any]) -> Any:
    """The examples; TRL and Unsloth make labels of a mask, Unsloth would not pack given labels."""
    from datasets import Dataset

    from qlora_harness.data.chat import IGNORE

    masks = [[int(label != IGNORE) for label in labels] for labels in order["labels"]]
    return Dataset.from_dict({"input_ids": order["input_ids"], "completion_mask": masks})


def _layout(arguments: Any) -> str:
    """The layout that a trainer was left with; Unsloth turns some off where it can't keep them."""
    if arguments.packing:
        return "pack"
    return "free" if arguments.padding_free else "pad"


def main(order: Path, result: Path) -> int:
    """Measures, and writes what was found.

    Args:
        order: File of the order.
        result: File to write.

    Returns:
        The exit status.
    """
    try:
        write_json(result, measure(read_json(order)))
    except HarnessError as error:
        print_error(error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

"""Attaches the adapter of a run, initialises it as its settings say, and describes it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_harness.data.corpus import TrainingData
from qlora_harness.data.examples import IGNORE, Example
from qlora_harness.errors import RunError, SettingsError
from qlora_harness.model.adapter_starts import (
    START_FILE,
    check_layers,
    restart_pissa,
    start_eva,
    start_loftq,
)
from qlora_harness.model.base import load_base
from qlora_harness.model.lora import attach_lora
from qlora_harness.model.source import BaseSource
from qlora_harness.record import SCHEMA_VERSION, scrub_all
from qlora_harness.settings import Quant, Settings
from qlora_harness.train.batches import ExampleSet, pad_batch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# EVA repeats these batches until its components converge.
_EVA_BATCHES = 16
_EVA_TOKENS_PER_RANK = 4


def attach_adapter(
    base: PreTrainedModel, settings: Settings, *, resumed: bool = False
) -> PeftModel:
    """Attaches the adapter that the settings describe, initialised with their seed.

    A resumed run reads its weights from a checkpoint, so it skips the decomposition.
    """
    torch.manual_seed(settings.optimization.seed)
    lora, init = settings.lora, settings.lora.init_lora_weights
    return attach_lora(
        base,
        r=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        targets=lora.lora_targets,
        dtype=lora.adapter_dtype,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init="default" if resumed and init in ("eva", "pissa") else init,
    )


def start_adapter(
    model: PeftModel,
    settings: Settings,
    source: BaseSource,
    batches: Sequence[dict[str, torch.Tensor]],
) -> None:
    """Initialises the adapter of a new run, where that needs data or the original base.

    `batches` are those of `eva_batches`. Raises SettingsError if the rank is too high.
    """
    init = settings.lora.init_lora_weights
    check_layers(model, init)
    if init == "eva":
        start_eva(model, batches)
    if init == "loftq":
        original = load_base(
            source,
            quant=Quant.BF16,
            double_quant=False,
            compute_dtype="bfloat16",
            device=torch.device("cpu"),
        )
        start_loftq(model, original)


def pissa_start(checkpoint: Path) -> Path:
    """Returns the file with the initial adapter of a checkpoint's run, or raises RunError."""
    path = checkpoint.parent / START_FILE
    if not path.is_file():
        raise RunError(
            f"{checkpoint} belongs to a run with --init-lora-weights pissa, and {path} is missing",
            "Restore it, use --overwrite to start again, or another --output-dir",
        )
    return path


def restart_adapter(model: PeftModel, settings: Settings, checkpoint: Path) -> None:
    """Restores the residual base on which the adapter of a resumed run was trained."""
    if settings.lora.init_lora_weights == "pissa":
        restart_pissa(model, pissa_start(checkpoint))


def eva_batches(examples: Sequence[Example], settings: Settings) -> list[dict[str, torch.Tensor]]:
    """Returns padded batches of training examples for EVA, drawn by the seed; [] without EVA.

    Raises SettingsError if the examples have fewer learned tokens than the rank needs.
    """
    if settings.lora.init_lora_weights != "eva":
        return []
    rows = ExampleSet(examples)
    order = random.Random(settings.optimization.seed).sample(range(len(rows)), len(rows))
    needed = _EVA_TOKENS_PER_RANK * settings.lora.lora_r
    batches, batch, learned = [], [], 0
    for number in order:
        batch.append(rows[number])
        learned += sum(label != IGNORE for label in batch[-1]["labels"])
        if learned >= needed:
            batches.append(pad_batch(batch, pad_id=0))
            batch, learned = [], 0
        if len(batches) == _EVA_BATCHES:
            break
    if not batches:
        raise SettingsError(
            f"--init-lora-weights eva: the data have {learned} learned tokens, and --lora-r "
            f"{settings.lora.lora_r} needs {needed}",
            "Lower --lora-r, or use another initialisation",
        )
    return batches


def adapter_record(
    source: BaseSource, fingerprint: str | None, settings: Settings, data: TrainingData
) -> dict[str, Any]:
    """Returns what scoring must know of an adapter; `fingerprint` is that of the base's weights."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "kind": "adapter",
        # Scoring finds the base by this name.
        "base": source.record() | {"name": source.name, "weights_fingerprint": fingerprint},
        "quant": settings.quant.value,
        "double_quant": settings.model.double_quant,
        "init_lora_weights": settings.lora.init_lora_weights,
        "compute_dtype": settings.model.compute_dtype,
        "data_fingerprint": data.report["train"]["fingerprint"],
        "template": settings.data.template,
        "run": settings.run_dir.name,
    }
    if settings.model.rope_scaling is not None:
        record["rope_scaling"] = settings.model.rope_scaling
    scrubbed: dict[str, Any] = scrub_all(record)
    return scrubbed

"""The fresh adapter of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qlora_harness.model.lora import attach_lora
from qlora_harness.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach_adapter(base: PreTrainedModel, settings: Settings) -> PeftModel:
    """Attaches the adapter that settings describe; its first weights follow their seed."""
    torch.manual_seed(settings.optimization.seed)
    lora = settings.lora
    return attach_lora(
        base,
        r=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        targets=lora.lora_targets,
        dtype=lora.adapter_dtype,
    )

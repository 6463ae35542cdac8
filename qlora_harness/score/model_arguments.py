"""Checks `--model_args` for `qlora_adapter` and resolves their defaults."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from qlora_harness.errors import SettingsError
from qlora_harness.fused import fp8
from qlora_harness.model.compute_dtype import check_dtype, own_dtype
from qlora_harness.settings import COMPUTE, COMPUTE_DTYPES, Quant

logger = logging.getLogger("qlora_harness")

# Arguments that HFLM gets. Others would bypass our loading of the model.
_PASSED_ON = {
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "device",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "think_end_token",
    "truncation",
}
_REMEDIES = {
    "load_in_4bit": "Use quant=nf4",
    "load_in_8bit": "Use quant=int8",
    "delta": "Use peft=",
    "parallelize": "Use `accelerate launch -m lm_eval` for several GPUs",
    "tp_plan": "Use `accelerate launch -m lm_eval` for several GPUs",
    "autogptq": "Use --model hf",
    "gptqmodel": "Use --model hf",
    "gguf_file": "Give the path of the file as pretrained=",
    "token": "Log in with `hf auth login`; a token here would land in the results",
    "trust_remote_code": "Use a model that transformers supports without extra code",
    "tokenizer": "The tokenizer is the adapter's, or the base model's",
    "mixed_precision_dtype": "Use dtype=bfloat16, float16 or float32",
}
_SOFTMAX_DTYPES = (None, "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class ScoringOptions:
    """The options that `QloraAdapterLM` explains; raises SettingsError for a wrong value."""

    scoring: str = "packed"
    kernels: str = "auto"
    dequantize: str = "auto"
    pack_tokens: int | None = None
    verify: int = 0
    compute: str = "bf16"

    def __post_init__(self) -> None:
        _check_choice("scoring", self.scoring, ("packed", "hf"))
        _check_choice("kernels", self.kernels, ("auto", "none"))
        _check_choice("compute", self.compute, COMPUTE)
        if self.compute == "fp8" and (self.scoring, self.kernels) != ("packed", "auto"):
            other = "scoring=hf" if self.scoring == "hf" else "kernels=none"
            raise SettingsError(
                f"--model_args compute=fp8 with {other}: it is a part of fused layers",
                "Leave one of the two out",
            )
        _check_choice("dequantize", self.dequantize, ("auto", "never"))
        _check_count("pack_tokens", self.pack_tokens, 1)
        _check_count("verify", self.verify, 0)

    @property
    def exact_logits(self) -> bool:
        """Whether the output head computes in float32."""
        return self.scoring != "hf"


def check_arguments(options: dict[str, Any], softmax_dtype: str | None) -> None:
    """Removes unsupported arguments that are off; raises SettingsError for those that are on."""
    _check_choice("softmax_dtype", softmax_dtype, _SOFTMAX_DTYPES)
    for name in [name for name in options if name not in _PASSED_ON]:
        if options.pop(name) not in (None, False):
            remedy = _REMEDIES.get(name, f"Known are {', '.join(sorted(_PASSED_ON))} and others")
            raise SettingsError(f"--model_args {name}= is not supported by qlora_adapter", remedy)


def resolve_dtype(requested: str, recorded: str | None) -> str:
    """Returns the compute dtype; `recorded` is the one of training, None for a base alone.

    Raises SettingsError if the GPU can't compute in the requested one.
    """
    _check_choice("dtype", requested, ("auto", *COMPUTE_DTYPES))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    check_dtype(requested, device)
    if requested != "auto":
        return requested
    own, note = own_dtype(device)
    dtype = recorded or (own if on_gpu else "float32")
    if note is not None and dtype != "float32":
        logger.warning(note)
        return own
    return dtype


def check_fp8(quant: Quant, compute_dtype: str) -> None:
    """Raises SettingsError if FP8 products are impossible, as far as known without the model."""
    reason = fp8.why_unavailable(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if quant in (Quant.INT8, Quant.HQQ):
        reason = f"quant={quant.value} has no fused layers"
    elif compute_dtype != "bfloat16":
        reason = f"the compute dtype is {compute_dtype}, not bfloat16"
    refuse_fp8(reason)


def refuse_fp8(reason: str | None) -> None:
    """Raises SettingsError if there is a reason against FP8 products."""
    if reason is not None:
        raise SettingsError(f"--model_args compute=fp8: {reason}", "Use compute=bf16")


def _check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise SettingsError(f"--model_args {name}={value}", f"Use one of {known}")


def _check_count(name: str, value: Any, low: int) -> None:
    """Checks a count, for which lm_eval passes any type (-1.0 for -1)."""
    if value is None or (type(value) is int and value >= low):
        return
    shown = f"{value:g}" if isinstance(value, float) else value
    raise SettingsError(f"--model_args {name}={shown}", f"Use a whole number of at least {low}")

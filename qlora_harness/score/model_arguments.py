"""Arguments of `--model_args` for `qlora_adapter`: which are taken, refused, or resolved."""

from __future__ import annotations

from typing import Any

import torch

from qlora_harness.errors import SettingsError

# Arguments of HFLM that are passed on. Others would bypass the loading that this model is about.
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
    "load_in_8bit": "Use quant=nf4 or quant=bf16",
    "delta": "Use peft=",
    "parallelize": "Use `accelerate launch -m lm_eval` for several GPUs",
    "tp_plan": "Use `accelerate launch -m lm_eval` for several GPUs",
    "autogptq": "Use --model hf",
    "gptqmodel": "Use --model hf",
    "gguf_file": "Use pretrained=smollm2 or a converted folder",
    "token": "Log in with `hf auth login`; a token here would land in the results",
    "trust_remote_code": "Use a model that needs no code of its own",
    "tokenizer": "The tokenizer is the adapter's, or the base model's",
    "mixed_precision_dtype": "Use dtype=bfloat16 or dtype=float32",
}
_SOFTMAX_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_arguments(
    options: dict[str, Any],
    softmax_dtype: str | None,
    scoring: str,
    dequantize: str,
    kernels: str,
) -> None:
    """Refuses what this model can't honour, and drops what is switched off anyway.

    Args:
        options: Arguments for HFLM; those that are None or False and not known are removed.
        softmax_dtype: dtype of the log-softmax.
        scoring: "packed" or "hf".
        dequantize: "auto" or "never".
        kernels: "auto" or "none".

    Raises:
        SettingsError: An argument is not supported, or a value is not known.
    """
    for name in list(options):
        if name in _PASSED_ON:
            continue
        if options[name] not in (None, False):
            remedy = _REMEDIES.get(name, f"Known are {', '.join(sorted(_PASSED_ON))} and others")
            raise SettingsError(
                f"--model_args {name}= is not supported by qlora_adapter", remedy
            ) from None
        del options[name]
    for name, value, known in (
        ("softmax_dtype", softmax_dtype, (None, *_SOFTMAX_DTYPES)),
        ("scoring", scoring, ("packed", "hf")),
        ("dequantize", dequantize, ("auto", "never")),
        ("kernels", kernels, ("auto", "none")),
    ):
        if value not in known:
            raise SettingsError(
                f"--model_args {name}={value}", f"Use one of {', '.join(map(str, known))}"
            )


def check_counts(pack_tokens: Any, verify: Any) -> None:
    """Refuses counts that are none: lm-eval passes whatever it parses.

    Args:
        pack_tokens: Most tokens in a forward pass; None for what fits the device.
        verify: How many texts to score again; None for none.

    Raises:
        SettingsError: One is not a whole number, or too small.
    """
    for name, value, low in (("pack_tokens", pack_tokens, 1), ("verify", verify, 0)):
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and value < low:  # lm-eval parses -1 as -1.0
            raise SettingsError(
                f"--model_args {name}={value:g} is out of range", f"It must be at least {low}"
            )
        if not number or not isinstance(value, int):
            raise SettingsError(
                f"--model_args {name}={value} is not a whole number", "Correct the value"
            )


def resolve_dtype(asked: str, recorded: str | None) -> str:
    """Returns the compute dtype.

    Args:
        asked: "auto", "bfloat16" or "float32".
        recorded: What the adapter was trained with, or None for a base alone.

    Raises:
        SettingsError: Another dtype was asked for.
    """
    if asked in ("bfloat16", "float32"):
        return asked
    if asked != "auto":
        raise SettingsError(f"--model_args dtype={asked}", "Use bfloat16 or float32")
    return recorded or ("bfloat16" if torch.cuda.is_available() else "float32")

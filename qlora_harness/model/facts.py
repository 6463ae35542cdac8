"""Facts about a loaded model."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def base_of(model: Any) -> Any:
    """Returns the model under a PEFT adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attention_of(model: Any) -> str:
    """Returns the attention implementation that transformers chose, such as "sdpa" or "eager"."""
    return str(model.config._attn_implementation)  # noqa: SLF001  # has no public name


def head_size(config: Any) -> int:
    """Returns the size of one attention head."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


def count_parameters(model: torch.nn.Module) -> int:
    """Returns the number of parameters."""
    return sum(map(elements, model.parameters()))


def elements(parameter: torch.nn.Parameter) -> int:
    """Returns the number of elements; a uint8 holds two 4-bit ones."""
    import torch

    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def parameter_dtypes(model: torch.nn.Module) -> dict[str, int]:
    """Counts stored elements by dtype (a uint8 holds two 4-bit weights)."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return dict(sorted(counts.items()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device ran out of memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )

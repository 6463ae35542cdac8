"""Liger's fused kernels in a model's own modules, without touching those of other models.

liger-kernel's own `apply_liger_kernel_to_*` replaces classes and functions of transformers for the
whole process; a model on the CPU beside one on the GPU would then run Triton kernels. Here only the
modules of one model are changed, and the rotary embedding only while that model runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch

# Norms that multiply after casting back, gated products with SiLU, rotary halves: LLaMA's rules.
_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_MARK = "_qlora_harness_fused"
_ROTARY = "apply_rotary_pos_emb"


@lru_cache(maxsize=1)
def has_liger() -> bool:
    """Whether liger-kernel is installed."""
    return find_spec("liger_kernel") is not None


def use_fused_kernels(model: torch.nn.Module) -> bool:
    """Replaces norms, gated products and rotary embeddings by Liger's fused kernels, on CUDA.

    Args:
        model: A causal language model, with or without a PEFT adapter.

    Returns:
        Whether it was done: liger-kernel is installed and the architecture follows LLaMA's rules.
    """
    base = _base(model)
    if base.device.type != "cuda" or not has_liger():
        return False
    if base.config.model_type not in _MODEL_TYPES or base.config.hidden_act not in (
        "silu",
        "swish",
    ):
        return False
    for module in base.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)
        elif kind.endswith("MLP"):
            module.forward = partial(_gated, module)
    setattr(base, _MARK, True)
    return True


@contextmanager
def fused_rotary(model: torch.nn.Module) -> Iterator[None]:
    """Lets a model's attention layers use Liger's rotary embedding inside the `with` block.

    Args:
        model: Any; nothing changes unless `use_fused_kernels` was successful on it.
    """
    base = _base(model)
    if not getattr(base, _MARK, False):
        yield
        return
    modeling: Any = sys.modules[type(base).__module__]
    before: Callable[..., Any] = getattr(modeling, _ROTARY)
    setattr(modeling, _ROTARY, _rotary)
    try:
        yield
    finally:
        setattr(modeling, _ROTARY, before)


def _base(model: torch.nn.Module) -> Any:
    whole: Any = model
    return whole.get_base_model() if hasattr(whole, "get_base_model") else whole


def _rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *args: Any,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Not liger_rotary_pos_emb, which looks for other back ends and prints what it does not find.
    from liger_kernel.ops import LigerRopeFunction

    turned: tuple[torch.Tensor, torch.Tensor] = LigerRopeFunction.apply(q, k, cos, sin)
    return turned


def _rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    normed: torch.Tensor = LigerRMSNormFunction.apply(
        hidden, module.weight, module.variance_epsilon, 0.0, "llama", False, None
    )
    return normed


def _gated(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    product = LigerSiLUMulFunction.apply(module.gate_proj(hidden), module.up_proj(hidden), 1.0, 1.0)
    down: torch.Tensor = module.down_proj(product)
    return down

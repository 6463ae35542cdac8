"""Recognises plain LoRA layers, and computes them faster without gradients.

All other layers run PEFT's own forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_harness.model.base import is_4bit, is_plain_linear

if TYPE_CHECKING:
    import torch

_ADAPTER = "default"


def is_plain(module: Any) -> bool:
    """Whether a PEFT LoraLayer computes exactly base(x) + scale · (dropout(x) Aᵀ) Bᵀ."""
    import torch
    from peft.tuners import lora

    kinds = [lora.Linear]
    if hasattr(lora, "Linear4bit"):  # only with bitsandbytes installed
        kinds.append(lora.Linear4bit)
    if type(module) not in kinds:
        return False
    if list(module.lora_A) != [_ADAPTER] or list(module.active_adapters) != [_ADAPTER]:
        return False
    first, second = module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]
    dropout = module.lora_dropout[_ADAPTER]
    return (
        not module.merged_adapters
        and not module.disable_adapters
        and not module.lora_variant
        and not any(module.lora_bias.values())
        and not len(module.lora_magnitude_vector)
        and not getattr(module, "fan_in_fan_out", False)
        and type(dropout) in (torch.nn.Identity, torch.nn.Dropout)
        and all(type(part) is torch.nn.Linear and part.bias is None for part in (first, second))
        and is_plain_linear(module.base_layer)
        and not any(map(_is_changed, (module, first, second, dropout, module.base_layer)))
    )


def _is_changed(module: torch.nn.Module) -> bool:
    """Whether hooks or a replaced forward change a module's output."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)  # noqa: SLF001  # no public names
    return any(hooks) or "forward" in vars(module)


class FastLora:
    """A context in which a model's plain LoRA layers run faster, without gradients.

    PEFT computes x·A·B in the adapter's float32 and adds it in three passes over the output. Here A
    and B have the compute dtype (as with autocast in training), and the second product accumulates
    into the base layer's output. Nothing is merged. The adapter's weights are copied at creation.
    """

    def __init__(self, model: Any, compute_dtype: torch.dtype) -> None:
        from peft.tuners.lora import LoraLayer

        self._forwards: list[tuple[Any, Any]] = [
            (module, _fast_forward(module, compute_dtype))
            for module in model.modules()
            if isinstance(module, LoraLayer)
            and is_plain(module)
            and (is_4bit(module.base_layer) or module.base_layer.weight.dtype == compute_dtype)
        ]

    def __len__(self) -> int:
        return len(self._forwards)

    def __enter__(self) -> None:
        for module, forward in self._forwards:
            module.forward = forward

    def __exit__(self, *error: object) -> None:
        for module, _ in self._forwards:
            del module.forward


def _fast_forward(module: Any, dtype: torch.dtype) -> Any:
    import torch

    down = module.lora_A[_ADAPTER].weight.to(dtype).t()
    up = module.lora_B[_ADAPTER].weight.to(dtype).t()
    scale = float(module.scaling[_ADAPTER])
    base = module.base_layer

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = base(x, *args, **kwargs)
        rows = x.reshape(-1, x.shape[-1]).to(dtype) @ down
        flat = out.reshape(-1, out.shape[-1])
        return torch.addmm(flat, rows, up, alpha=scale).view(out.shape)

    return forward

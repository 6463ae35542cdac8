"""Which LoRA layers are plain, and a faster way to compute those without gradients.

A forward is only ever replaced where the replacement is known to be exact: a plain LoRA on a plain
linear layer. Everything else goes through PEFT's own forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_harness.model.base import is_4bit, is_plain_linear

if TYPE_CHECKING:
    import torch

_ADAPTER = "default"


def is_plain(module: Any) -> bool:
    """Whether a LoraLayer of PEFT is one plain LoRA on a plain linear layer.

    Then its output is base(x) + scale · (dropout(x) Aᵀ) Bᵀ, and nothing else.
    """
    import torch
    from peft.tuners import lora

    kinds = [lora.Linear]
    if hasattr(lora, "Linear4bit"):  # where bitsandbytes is installed
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
    """Whether hooks or a forward of its own change what a module computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)  # noqa: SLF001  # torch has no others
    return any(hooks) or "forward" in vars(module)


class FastLora:
    """Inside its `with` block, a model's plain LoRA layers take two products without gradients.

    PEFT computes x·A·B in the adapter's float32 and adds it in three passes over the output. Here
    both matrices are held in the compute dtype (as autocast does in training) and the second
    product accumulates into the output of the base layer. Nothing is merged, and outside the
    block every module is PEFT's own. The adapter's weights are only read at first.
    """

    def __init__(self, model: Any, compute_dtype: torch.dtype) -> None:
        from peft.tuners.lora import LoraLayer

        self._forwards = [
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

"""One loaded base for several runs of a process, each with its own modules.

A run wraps the modules of its base: PEFT replaces linear layers, fused layers replace `forward`,
scoring replaces 4-bit layers with expanded ones. None of them changes the frozen tensors. So each
run gets new modules that hold the same tensors, and the base is read and quantised once.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from qlora_harness.model.base import load_base
from qlora_harness.model.source import BaseSource
from qlora_harness.settings import Quant

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class _Held:
    """The shared base: one at a time, since two may not fit."""

    key: tuple[Any, ...] | None = None
    model: PreTrainedModel | None = None


_HELD: ContextVar[_Held | None] = ContextVar("shared base", default=None)


@contextmanager
def sharing_base() -> Iterator[None]:
    """Inside the `with` block, `take_base` reuses the last base if the next one is the same."""
    token = _HELD.set(_Held())
    try:
        yield
    finally:
        _HELD.reset(token)
        free_memory()


def take_base(
    source: BaseSource,
    *,
    quant: Quant,
    double_quant: bool,
    compute_dtype: str,
    device: torch.device,
    rope_scaling: str | None = None,
    shared: bool = True,
    sharded: bool = False,
) -> PreTrainedModel:
    """Returns what `load_base` returns; inside `sharing_base` its tensors may be shared.

    Pass `shared=False` for a run that changes the weights of its base. Bases in LLM.int8 and HQQ
    are never shared, because a run changes state that they keep beside their weights.
    """
    held = _HELD.get()
    shared = shared and (quant is Quant.BF16 or quant.is_4bit)
    key = (source.path, source.revision, quant, double_quant, compute_dtype, device, rope_scaling)
    if held is not None and held.key == key and held.model is not None and shared:
        return with_own_modules(held.model)
    if held is not None:
        held.key = held.model = None
        free_memory()
    model = load_base(
        source,
        quant=quant,
        double_quant=double_quant,
        compute_dtype=compute_dtype,
        device=device,
        rope_scaling=rope_scaling,
        sharded=sharded,
    )
    if held is None or not shared:
        return model
    held.key, held.model = key, model
    return with_own_modules(model)


def with_own_modules(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of a model's modules and configuration that holds the same tensors."""
    import torch

    same: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for value in vars(module).values():
            # bitsandbytes keeps scales and int8 weights in objects beside the parameters.
            inside = vars(value).values() if hasattr(value, "__dict__") else ()
            if not isinstance(value, torch.nn.Module) and any(
                isinstance(item, torch.Tensor) for item in (value, *inside)
            ):
                same.append(value)
    return copy.deepcopy(model, {id(item): item for item in same})


def free_memory() -> None:
    """Frees the memory of finished runs, on the host and on GPUs."""
    import torch

    gc.collect()  # models and trainers refer to each other in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

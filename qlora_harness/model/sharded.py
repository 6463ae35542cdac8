"""Decoder layers whose frozen tensors are spread over processes as bytes.

Nothing here has a gradient, so nothing needs an engine's parameters: a layer is one row of bytes,
4-bit weights with their scales as they are, of which each process holds an equal part. All parts
are gathered into a buffer before the layer computes. There are two buffers: the even layers use
one, the odd ones the other. So the tensors of a layer have one address for good, and a layer
computes while the next one arrives. As bytes, no value is ever interpreted: bfloat16 storage of
packed weights is changed by whatever canonicalises NaN.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, distributed

from qlora_harness.model.facts import base_of

# Newer releases of torch rename it.
_gather_single: Any = getattr(distributed, "all_gather_single", None)
_all_gather = _gather_single or distributed.all_gather_into_tensor
_ALIGN = 256  # bytes; tensors of every dtype, and kernels' wide loads, may start there


class ShardedLayers:
    """The layers of a model; every process must call the same methods in the same order.

    The tensors of layer n are valid after `fetch(n)`, until layer n + 2 or n - 2 is fetched.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []  # of each layer, this process's, uint8
        self._buffers: list[Tensor] = []
        self._held: list[int | None] = [None, None]  # the layer in each buffer, or on its way
        self._work: list[Any] = [None, None]  # the gathers under way

    def add(self, layer: torch.nn.Module) -> None:
        """Takes the next layer, as large as those before; its tensors become views of a buffer."""
        owners = _frozen_tensors(layer)
        tensors = [getattr(owner, name) for owner, name in owners]
        ends = list(accumulate(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors))
        rank, processes = distributed.get_rank(), distributed.get_world_size()
        part = -(-ends[-1] // (processes * _ALIGN)) * _ALIGN
        whole = torch.zeros(part * processes, dtype=torch.uint8, device=tensors[0].device)
        while len(self._buffers) < 2:
            self._buffers.append(torch.empty_like(whole))
        buffer = self._buffers[len(self._parts) % 2]
        for (owner, name), tensor, start in zip(owners, tensors, [0, *ends], strict=False):
            place = slice(start, start + tensor.nbytes)
            whole[place] = tensor.contiguous().view(-1).view(torch.uint8)
            setattr(owner, name, buffer[place].view(tensor.dtype).view(tensor.shape))
        self._parts.append(whole[rank * part : (rank + 1) * part].clone())

    def fetch(self, number: int, following: int | None = None) -> None:
        """Makes a layer's tensors valid, and begins to gather the layer that follows, if any."""
        self._gather(number)
        self._wait(number % 2)
        if following is not None and 0 <= following < len(self._parts):
            self._gather(following)

    def begin_pass(self) -> None:
        """Announces a pass without gradients, of which processes may compute different numbers."""
        self._any_pass(1)

    def join_passes(self) -> None:
        """Gathers layers for the passes of other processes, until none has any left."""
        while self._any_pass(0).item():
            for number in range(len(self._parts)):
                self.fetch(number, number + 1)

    def _any_pass(self, own: int) -> Tensor:
        passes = torch.tensor([own], device=self._buffers[0].device)
        distributed.all_reduce(passes, distributed.ReduceOp.MAX)
        return passes

    def _gather(self, number: int) -> None:
        slot = number % 2
        if self._held[slot] == number:
            return
        self._wait(slot)
        # On a GPU the collective waits for the kernels launched so far, the last to read this
        # buffer, and runs beside those launched from now on.
        part = self._parts[number]
        self._work[slot] = _all_gather(self._buffers[slot], part, async_op=True)
        self._held[slot] = number

    def _wait(self, slot: int) -> None:
        if self._work[slot] is not None:
            self._work[slot].wait()
            self._work[slot] = None


def sharded_layers(model: torch.nn.Module) -> ShardedLayers | None:
    """Returns the layers that `load_base` spread over processes, if the model's base has such."""
    layers: ShardedLayers | None = getattr(base_of(model), "qlora_harness_sharded", None)
    return layers


def _frozen_tensors(layer: torch.nn.Module) -> list[tuple[Any, str]]:
    """Returns owner and attribute of every parameter, and of the scales of 4-bit ones."""
    owners: list[tuple[Any, str]] = []
    for parameter in layer.parameters():
        owners.append((parameter, "data"))
        state: Any = getattr(parameter, "quant_state", None)
        while state is not None:
            owners.append((state, "absmax"))
            state = state.state2
    return owners

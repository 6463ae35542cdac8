"""The layers below the last as two CUDA graphs, one forward and one backward.

With short rows and small models, Python takes longer to launch the kernels than the GPU to run
them. A graph launches those of all layers at once. Its shapes and addresses are fixed, so a row is
copied into buffers of the next of a few lengths, each with its pair of graphs. The last layer and
the head run without a graph: their shapes also depend on the learned tokens.

The tokens that fill up a row form a text of their own, which the last layer doesn't get. So no
token of the row depends on them, and they add zero to the adapters' gradients.

All graphs share their memory, so the backward pass of a row must precede the next row's forward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_harness.fused import attention
from qlora_harness.fused.layer import FusedLayer
from qlora_harness.fused.packed_row import PackedRow, RowBuffer
from qlora_harness.model.shape import Shape

# Tokens times weights of a layer; above this, an H100 takes longer to compute the layer than Python
# to launch it.
_DEVICE_BOUND = 2**39
_CHECKPOINTING = "none", "full"  # the others wait for copies to and from the host
_LENGTHS = 64  # with graphs at a time; the least recently used makes room
_SHORTEST = 32  # tokens


def padded(tokens: int) -> int:
    """Returns the length, in tokens, of the graphs for a row: at most a 16th longer, or 31."""
    step = max(_SHORTEST, 1 << max(0, (tokens - 1).bit_length() - 5))
    return -(-tokens // step) * step


def worthwhile(tokens: int, weights: int) -> bool:
    """Whether a row takes longer to launch than to compute, in layers of `weights` weights each."""
    return tokens * weights <= _DEVICE_BOUND


def planned(shape: Shape, checkpointing: str, tokens: int, size: int) -> bool:
    """Whether a run with rows of up to `tokens` uses graphs; an element takes `size` bytes."""
    short = worthwhile(tokens, shape.linear // shape.layers)
    return short and checkpointing in _CHECKPOINTING and size == 2 and shape.layers > 1


def buffer_bytes(shape: Shape, tokens: int, size: int) -> int:
    """Returns the bytes of the buffers of a length; an element takes `size` bytes."""
    return 4 * shape.hidden * tokens * size


class LayerGraphs:
    """The graphs of consecutive layers, the first of which needs no gradient of its input.

    `longest` is the tokens of the run's longest row, if known. If that is too long, no row uses
    graphs, as nothing else can use their memory. `passes` counts the rows computed.
    """

    def __init__(self, layers: Sequence[FusedLayer], longest: int | None) -> None:
        self.layers, self.passes = list(layers), 0
        projections = [p.layer for g in layers[0].groups() for p in g.projections] if layers else []
        self._weights = sum(p.out_features * p.in_features for p in projections)  # of a layer
        self._longest = 0 if longest is None else longest
        self._length = 0  # of the longest buffer so far
        self._rows: OrderedDict[tuple[int, int, bool], _Row] = OrderedDict()
        self._gradients: _Gradients | None = None
        self._capture: _Capture | None = None

    def serve(self, hidden: Tensor) -> bool:
        """Whether graphs compute a row, [T, H], exactly as the layers do, and faster."""
        if not self.layers or not torch.is_grad_enabled():
            return False
        layer, distributed = self.layers[0], torch.distributed
        return (
            worthwhile(max(len(hidden), self._longest), self._weights)
            and layer.checkpointing in _CHECKPOINTING
            and attention.uses_triton(hidden, layer.head_size)
            and (not layer.dropout or layer.packs_masks(hidden))
            and all(p is None or p.requires_grad for p in layer.parameters())
            # Several processes reduce gradients in hooks, which a graph doesn't run.
            and not (distributed.is_available() and distributed.is_initialized())
        )

    def __call__(
        self, hidden: Tensor, row: PackedRow, seeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Runs the layers on a row, and returns what `FusedLayer` does.

        The backward pass adds to the adapters' `grad` directly.
        """
        if self._gradients is None:
            self._gradients = _Gradients(self.layers)
            self._start = torch.zeros((), device=hidden.device, requires_grad=True)
        length = padded(len(hidden))
        if length > self._length:
            # The longest first: shorter graphs fit into its memory, but not the reverse.
            self._rows.clear()
            self._capture = _Capture() if hidden.is_cuda else None
            self._length = max(length, padded(self._longest))
            self._row(self._length, hidden, row, seeds)
        buffer = self._row(length, hidden, row, seeds)
        buffer.load(hidden, row, seeds)
        self.passes += 1
        output: tuple[Tensor, Tensor] = _Pass.apply(  # type: ignore[no-untyped-call]
            self._start, self, buffer, len(hidden)
        )
        return output

    def _row(self, length: int, hidden: Tensor, row: PackedRow, seeds: Tensor | None) -> _Row:
        """Returns the buffers of a length, with graphs, for rows like this one."""
        assert self._gradients is not None
        texts = 1 << (len(row.starts) - 2).bit_length()  # rounded up to a power of two
        key = length, texts, seeds is None
        buffer = self._rows.pop(key, None)
        if buffer is None:
            if len(self._rows) == _LENGTHS:
                self._rows.popitem(last=False)
            room = RowBuffer(length, texts, row)
            buffer = _Row(self.layers, self._gradients, room, hidden, seeds)
            if self._capture is not None:
                self._capture.record(buffer)
        self._rows[key] = buffer
        return buffer

    def release(self) -> None:
        """Frees the memory of all graphs."""
        self._rows.clear()
        self._gradients, self._capture, self._length = None, None, 0


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, start: Tensor, graphs: LayerGraphs, row: _Row, tokens: int
    ) -> tuple[Tensor, Tensor]:
        ctx.graphs, ctx.row, ctx.tokens, ctx.number = graphs, row, tokens, graphs.passes
        row.forward()
        return row.h[:tokens].detach(), row.y[:tokens].detach()

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dy: Tensor) -> Any:
        """Both gradients are equal, as those of a layer."""
        del dh
        if ctx.number != ctx.graphs.passes:
            raise RuntimeError("a later row has overwritten what this backward pass needs")
        ctx.number = None  # it runs once
        ctx.row.dy[: ctx.tokens] = dy
        ctx.row.dy[ctx.tokens :] = 0
        ctx.row.gradients.attach()
        ctx.row.backward()
        return None, None, None, None


class _Gradients:
    """Fixed memory for the gradients of the layers' parameters."""

    def __init__(self, layers: Sequence[FusedLayer]) -> None:
        parameters = [[p for p in layer.parameters() if p is not None] for layer in layers]
        self.by_layer = [[torch.zeros_like(p) for p in each] for each in parameters]
        self._pairs = [
            pair
            for each, own in zip(parameters, self.by_layer, strict=True)
            for pair in zip(each, own, strict=True)
        ]
        torch._foreach_add_(self.by_layer[0], self.by_layer[0])  # loads the kernel, for captures

    def attach(self) -> None:
        """Makes this memory the parameters' `grad`, with their values; zeros for None."""
        fresh = []
        for parameter, own in self._pairs:
            if parameter.grad is own:
                continue
            if parameter.grad is None:
                fresh.append(own)
            else:
                own.copy_(parameter.grad)
            parameter.grad = own
        if fresh:
            torch._foreach_zero_(fresh)


class _Row:
    """Buffers of one length, and both passes: kernel by kernel until graphs replace them."""

    def __init__(
        self,
        layers: Sequence[FusedLayer],
        gradients: _Gradients,
        row: RowBuffer,
        hidden: Tensor,
        seeds: Tensor | None,
    ) -> None:
        """Allocates the buffers; `hidden` and `seeds` show dtype, width and device."""
        self.layers, self.gradients, self.row = layers, gradients, row
        shape = len(row.cos), hidden.shape[1]
        self.hidden, self.dy = hidden.new_zeros(shape), hidden.new_zeros(shape)
        self.seeds = None if seeds is None else torch.zeros_like(seeds)
        self.h = self.y = self.hidden  # the outputs, once there are any
        self._saved: list[Any] = []
        self.forward: Callable[[], None] = self.run_forward
        self.backward: Callable[[], None] = self.run_backward

    def load(self, hidden: Tensor, row: PackedRow, seeds: Tensor | None) -> None:
        """Copies a row into the buffers."""
        self.hidden[: len(hidden)] = hidden.detach()
        self.row.fill(row)
        if self.seeds is not None and seeds is not None:
            self.seeds.copy_(seeds)

    def run_forward(self, count: int | None = None) -> None:
        """Runs the layers, or the first `count`."""
        added: Tensor | None = None
        hidden, self._saved = self.hidden, []
        with torch.no_grad():
            for number, layer in enumerate(self.layers[:count]):
                seed = self._seed(number)
                hidden, added = layer.forward(hidden, added, self.row, None, seed, self._saved)
        assert added is not None
        self.h, self.y = hidden, added

    def run_backward(self, *, discard: bool = False) -> None:
        """Runs the same layers backward, and adds their gradients unless `discard`."""
        dy: Tensor | None = self.dy
        for number in reversed(range(len(self._saved))):
            assert dy is not None
            layer, seed = self.layers[number], self._seed(number)
            dy, gradients = layer.backward(
                dy, self._saved, self.row, None, seed, needs_dx=number > 0
            )
            if not discard:
                new = [gradient for gradient in gradients if gradient is not None]
                torch._foreach_add_(self.gradients.by_layer[number], new)

    def _seed(self, number: int) -> Tensor | None:
        return None if self.seeds is None else self.seeds[number]


class _Capture:
    """Records rows as graphs, all in one pool of memory."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._first = True

    def record(self, row: _Row) -> None:
        """Replaces a row's passes by replays of graphs."""
        # Compiles and loads kernels, which a capture can't, in memory beside the pool. Once there
        # is a pool, two layers must do: the first, and one that needs the gradient of its input.
        row.run_forward(None if self._first else 2)
        row.run_backward(discard=True)
        self._first = False
        graphs = []
        for run in (row.run_forward, row.run_backward):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                run()
            graphs.append(graph)
        row.forward, row.backward = (graph.replay for graph in graphs)

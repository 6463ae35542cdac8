"""Log-probabilities from hidden states, with the output head's product in float32.

A logit of a bfloat16 model has steps of 0.125 nats from 16 on, so two answers often tie in it. The
hidden state tells more: its product with the head's weights is computed in float32 here, only where
it is read.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from qlora_harness.model.base import is_4bit

_ROWS = 1024  # hidden states at a time, which bounds the memory of their logits
_COLUMNS = 8192  # of the vocabulary at a time, which bounds that of the weights in float32


class OutputHead:
    """The output head of a model in float32.

    A plain linear layer is expanded to float32 piece by piece. Any other module, such as one with
    an adapter, is copied in float32 and runs its own forward; with 4-bit weights it stays as it is.
    """

    def __init__(self, head: torch.nn.Module) -> None:
        has_hooks = bool(head._forward_hooks)  # noqa: SLF001  # has no public form
        plain = type(head) is torch.nn.Linear and not is_4bit(head) and not has_hooks
        self._weight: Any = head.weight if plain else None
        self._bias: Any = head.bias if plain else None
        self._module = head
        if not plain and not any(map(is_4bit, head.modules())):
            dtypes = {p.dtype for p in head.parameters()}
            self._module = head if dtypes == {torch.float32} else copy.deepcopy(head).float()

    def is_module(self, head: torch.nn.Module) -> bool:
        """Whether the module itself computes the logits."""
        return self._weight is None and self._module is head

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits [..., V] float32 of normalised hidden states [..., H]."""
        if self._weight is None:
            parameter = next(self._module.parameters())
            dtype = hidden.dtype if any(map(is_4bit, self._module.modules())) else parameter.dtype
            out: torch.Tensor = self._module(hidden.to(dtype)).float()
            return out
        rows = hidden.reshape(-1, hidden.shape[-1]).float()
        if self._weight.dtype == torch.float32:
            out = rows @ self._weight.t()
        else:
            out = rows.new_empty(len(rows), len(self._weight))
            for start in range(0, len(self._weight), _COLUMNS):
                part = slice(start, start + _COLUMNS)
                torch.mm(rows, self._weight[part].float().t(), out=out[:, part])
        if self._bias is not None:
            out += self._bias.float()
        return out.view(*hidden.shape[:-1], -1)

    def read(
        self,
        hidden: torch.Tensor,
        which: torch.Tensor,
        tokens: torch.Tensor,
        *,
        scaling: float,
        softmax_dtype: torch.dtype | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the log-probabilities [R] of token ids, and whether each is the most probable.

        `hidden` are normalised hidden states [P, H], and `which` [R] int64 says which of them each
        of the `tokens` [R] int64 follows. The model divides its logits by `scaling`.
        """
        logprobs = torch.empty(len(which), dtype=softmax_dtype, device=hidden.device)
        greedy = torch.empty(len(which), dtype=torch.bool, device=hidden.device)
        for start in range(0, len(hidden), _ROWS):
            logits = self.logits(hidden[start : start + _ROWS]) / scaling
            every = torch.log_softmax(logits, dim=-1, dtype=softmax_dtype)
            # One piece is the usual case; a mask would make the host wait for a GPU.
            mine: Any = ...
            if len(hidden) > _ROWS:
                mine = (which >= start) & (which < start + _ROWS)
            row, token = which[mine] - start, tokens[mine]
            logprobs[mine] = every[row, token]
            greedy[mine] = every.argmax(dim=-1)[row] == token
        return logprobs, greedy


@contextlib.contextmanager
def float32_logits(head: torch.nn.Module) -> Iterator[None]:
    """Lets a model's output head return logits computed in float32, inside the `with` block.

    What the model does with its logits after the head, such as capping them, stays its own.
    """
    own = OutputHead(head)
    if own.is_module(head):
        yield  # it computes in float32 already, or can't
        return
    handle = head.register_forward_hook(lambda module, args, out: own.logits(args[0]))
    try:
        yield
    finally:
        handle.remove()

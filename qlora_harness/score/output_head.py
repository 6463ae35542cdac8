"""Log-probabilities from hidden states, with an output head in float32.

Above 16, bfloat16 logits are 0.125 nats apart, so answers often tie. A float32 product of hidden
states and weights avoids that; it is computed only where a log-probability is read.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from qlora_harness.model.base import is_4bit

_ROWS = 1024  # hidden states at a time, to bound the memory of logits
_COLUMNS = 8192  # vocabulary entries at a time, to bound the memory of float32 weights


class OutputHead:
    """The output head of a model in float32.

    A plain linear layer is converted piece by piece. Any other module, such as one with an adapter,
    is copied in float32; one with 4-bit weights stays as it is.
    """

    def __init__(self, head: torch.nn.Module) -> None:
        has_hooks = bool(head._forward_hooks)  # noqa: SLF001  # no public form
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

    @torch.no_grad()
    def likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the token with the largest logit, [R] int64, for each of [R, H]."""
        weight = self._weight
        plain = hidden.is_cuda and weight is not None and self._bias is None
        if plain and hidden.dtype == weight.dtype == torch.bfloat16:
            # As exact: products of bfloat16 numbers have no more digits than a float32.
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32).argmax(-1)
        return self.logits(hidden).argmax(-1)

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

        `hidden` are normalised hidden states [P, H]; token i of `tokens` [R] int64 follows the
        hidden state `which[i]` [R] int64. The model divides its logits by `scaling`.
        """
        logprobs = torch.empty(len(which), dtype=softmax_dtype, device=hidden.device)
        greedy = torch.empty(len(which), dtype=torch.bool, device=hidden.device)
        for start in range(0, len(hidden), _ROWS):
            logits = self.logits(hidden[start : start + _ROWS]) / scaling
            every = torch.log_softmax(logits, dim=-1, dtype=softmax_dtype)
            # One piece is the usual case, and needs no mask, which would make the host wait.
            mine: Any = ...
            if len(hidden) > _ROWS:
                mine = (which >= start) & (which < start + _ROWS)
            row, token = which[mine] - start, tokens[mine]
            logprobs[mine] = every[row, token]
            greedy[mine] = every.argmax(dim=-1)[row] == token
        return logprobs, greedy


@contextlib.contextmanager
def float32_logits(head: torch.nn.Module) -> Iterator[None]:
    """Makes a model's output head compute in float32; the model may still cap its logits."""
    own = OutputHead(head)
    if own.is_module(head):
        yield  # already float32, or 4-bit
        return
    handle = head.register_forward_hook(lambda module, args, out: own.logits(args[0]))
    try:
        yield
    finally:
        handle.remove()

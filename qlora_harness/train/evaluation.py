"""The evaluation loss per token, and its perplexity."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device

from qlora_harness.data.examples import IGNORE, Example, lengths_of
from qlora_harness.model.sharded import sharded_layers
from qlora_harness.train.batches import ExampleSet, pack_batch, pad_batch

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class ConversationLosses:
    """The losses of a set of examples, one value each, in order."""

    nll: list[float]  # summed over the supervised tokens, in nats
    tokens: list[int]  # supervised

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return math.fsum(self.nll) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        try:
            return math.exp(self.loss)
        except OverflowError:  # above 709 nats
            return math.inf


def evaluate_loss(
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    accelerator: Accelerator,
    autocast_dtype: torch.dtype | None,
    fused: bool = False,
) -> ConversationLosses:
    """Computes the losses of examples, which are the same on every process that shares them.

    Batch size and processes matter only to rounding. A `fused` model takes unpadded rows.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    order = sorted(range(len(examples)), key=lengths_of(examples).__getitem__)[rank::world]
    rows = ExampleSet(examples)
    device = accelerator.device
    losses: dict[int, tuple[float, int]] = {}  # by example
    was_training = model.training
    model.eval()
    context: Any = (
        torch.autocast(device.type, dtype=autocast_dtype)
        if autocast_dtype
        else contextlib.nullcontext()
    )
    with torch.no_grad(), context:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [rows[i] for i in chosen]
            if fused:
                nll, tokens = _packed_losses(model, batch, device)
            else:
                nll, tokens = _padded_losses(model, batch, pad_id, device)
            values = zip(nll.double().tolist(), tokens.tolist(), strict=True)
            losses.update(zip(chosen, values, strict=True))
        if (sharded := sharded_layers(model)) is not None:
            sharded.join_passes()
    model.train(was_training)
    if world > 1:
        parts: list[dict[int, tuple[float, int]]] = [{} for _ in range(world)]
        torch.distributed.all_gather_object(parts, losses)
        losses = {i: value for part in parts for i, value in part.items()}
    ordered = [losses[i] for i in range(len(examples))]
    return ConversationLosses([nll for nll, _ in ordered], [tokens for _, tokens in ordered])


def _padded_losses(
    model: torch.nn.Module, rows: Sequence[dict[str, list[int]]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the summed loss and the supervised tokens of each row, each [B]."""
    batch = {k: v.to(device) for k, v in pad_batch(rows, pad_id).items()}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    keep = labels != IGNORE
    losses = torch.zeros(labels.shape, dtype=torch.float64, device=device)
    losses[keep] = torch.nn.functional.cross_entropy(
        logits[keep].float(), labels[keep], reduction="none"
    ).double()
    return losses.sum(dim=1), keep.sum(dim=1)


def _packed_losses(
    model: torch.nn.Module, rows: Sequence[dict[str, list[int]]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    packed = send_to_device(pack_batch(rows), device)
    losses = model(**packed, per_token=True).loss.double()
    owner = torch.searchsorted(packed["borders"], packed["read_at"], right=True) - 1
    sums = torch.zeros(len(rows), dtype=torch.float64, device=device).index_add_(0, owner, losses)
    return sums, torch.bincount(owner, minlength=len(rows))

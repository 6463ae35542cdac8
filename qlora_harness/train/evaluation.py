"""Evaluation loss weighted by token, and its perplexity."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device

from qlora_harness.data.chat import IGNORE, Example
from qlora_harness.train.batches import ExampleSet, pack_batch, pad_batch

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class EvaluationLoss:
    """The loss over a set of examples.

    Attributes:
        loss: Sum of the negative log-likelihoods over the number of supervised tokens, in nats.
        tokens: Supervised tokens.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exp of the token-weighted loss."""
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
) -> EvaluationLoss:
    """Computes the loss over examples, divided among the processes.

    The sum runs over tokens, not over batches, so the result does not depend on batch size or
    number of processes (beyond rounding).

    Args:
        model: A causal language model.
        examples: The same list on every process.
        batch_size: Rows per forward pass.
        pad_id: See `pad_batch`.
        accelerator: Knows the device and the other processes.
        autocast_dtype: Compute dtype, or None for that of the weights.
        fused: Whether the model takes rows without padding.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    mine = ExampleSet([examples[i] for i in order[rank::world]])
    device = accelerator.device
    total = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    context: Any = (
        torch.autocast(device.type, dtype=autocast_dtype)
        if autocast_dtype
        else contextlib.nullcontext()
    )
    with torch.no_grad(), context:
        for start in range(0, len(mine), batch_size):
            rows = [mine[i] for i in range(start, min(start + batch_size, len(mine)))]
            if fused:
                packed = send_to_device(pack_batch(rows), device)
                nll = model(**packed, num_items_in_batch=1).loss
                total += torch.tensor([nll.item(), len(packed["read_token"])], dtype=torch.float64)
                continue
            batch = {k: v.to(device) for k, v in pad_batch(rows, pad_id).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
            keep = labels != IGNORE
            nll = torch.nn.functional.cross_entropy(
                logits[keep].float(), labels[keep], reduction="sum"
            )
            total += torch.tensor([nll.item(), keep.sum().item()], dtype=torch.float64)
    model.train(was_training)
    if world > 1:
        total = accelerator.gather(total.to(device)).view(world, 2).sum(dim=0).cpu()
    return EvaluationLoss(float(total[0] / total[1]), int(total[1]))

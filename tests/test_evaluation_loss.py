"""The evaluation loss, against a plain reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from training_runs import base

from qlora_harness.data.examples import Example
from qlora_harness.train.evaluation import ConversationLosses, evaluate_loss

PAD = 2

# Different lengths and different numbers of learned tokens, the pad id among them.
EXAMPLES = [
    Example([1, 300, 301, 2], [-100, -100, 301, 2]),
    Example([1, 310, 311, 312, 313, 314, 2, 2], [-100, -100, -100, 312, 313, 314, 2, 2]),
    Example([1, 320, 2], [-100, -100, 2]),
    Example([2, 330, 331, 332, 333], [2, 330, 331, 332, 333]),
    Example([1, *range(280, 320)], [-100] * 39 + [318, 319]),
]
LEARNED_BY_EXAMPLE = [2, 5, 1, 4, 2]
LEARNED = sum(LEARNED_BY_EXAMPLE)


@pytest.fixture(scope="module", params=["nf4", "bf16"])
def model(request: pytest.FixtureRequest, tiny_llama: Path) -> Any:
    return base(tiny_llama, request.param)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def evaluate(
    model: Any, accelerator: Accelerator, batch_size: int, **options: Any
) -> ConversationLosses:
    chosen: dict[str, Any] = {"pad_id": PAD, "autocast_dtype": None} | options
    return evaluate_loss(model, EXAMPLES, batch_size=batch_size, accelerator=accelerator, **chosen)


def by_hand(model: Any, example: Example) -> list[float]:
    """Negative log-likelihoods of the learned tokens of one unpadded row, in double precision."""
    with torch.no_grad():
        logits = model(torch.tensor([example.input_ids])).logits[0].double()
    return [
        math.log(sum(math.exp(v - float(row.max())) for v in row.tolist()))
        + float(row.max())
        - float(row[label])
        for row, label in zip(logits[:-1], example.labels[1:], strict=True)
        if label != -100
    ]


def test_unpadded_rows_give_the_same_losses(tiny_llama: Path, accelerator: Accelerator) -> None:
    from qlora_harness.fused.model import FusedDecoder
    from qlora_harness.model.lora import attach_lora

    model = attach_lora(base(tiny_llama, "nf4"), r=2, alpha=2, dropout=0.0, targets="all-linear")
    padded = evaluate(model, accelerator, batch_size=3)
    FusedDecoder.attach(model, "none")
    packed = evaluate(model, accelerator, batch_size=3, fused=True)
    assert packed.tokens == padded.tokens
    assert packed.nll == pytest.approx(padded.nll, abs=1e-4)


def test_loss_is_the_mean_over_learned_tokens(model: Any, accelerator: Accelerator) -> None:
    losses = [loss for example in EXAMPLES for loss in by_hand(model, example)]
    assert len(losses) == LEARNED
    evaluation = evaluate(model, accelerator, batch_size=2)
    assert evaluation.tokens == LEARNED_BY_EXAMPLE
    assert evaluation.loss == pytest.approx(sum(losses) / LEARNED, abs=1e-5)
    nll = [sum(by_hand(model, example)) for example in EXAMPLES]
    assert evaluation.nll == pytest.approx(nll, abs=1e-4)
    # The mean of the rows' means differs, so the test sees the weighting.
    per_row = [by_hand(model, example) for example in EXAMPLES]
    unweighted = sum(sum(row) / len(row) for row in per_row) / len(per_row)
    assert abs(evaluation.loss - unweighted) > 1e-3


def test_loss_does_not_depend_on_batch_size_or_padding(
    model: Any, accelerator: Accelerator
) -> None:
    alone = evaluate(model, accelerator, batch_size=1)
    for batch_size in (2, 3, 100):
        for pad_id in (0, PAD, 331):
            evaluation = evaluate(model, accelerator, batch_size, pad_id=pad_id)
            assert evaluation.tokens == alone.tokens
            assert evaluation.loss == pytest.approx(alone.loss, abs=1e-5)


def test_autocast_is_close_but_not_the_same(model: Any, accelerator: Accelerator) -> None:
    exact = evaluate(model, accelerator, batch_size=2)
    rough = evaluate(model, accelerator, batch_size=2, autocast_dtype=torch.bfloat16)
    assert rough.loss == pytest.approx(exact.loss, rel=0.01)
    assert rough.loss != exact.loss


def test_evaluation_restores_the_mode_of_the_model(
    tiny_llama: Path, accelerator: Accelerator
) -> None:
    model = base(tiny_llama, "bf16")
    for training in (True, False):
        model.train(training)
        evaluate(model, accelerator, batch_size=2)
        assert model.training is training


def test_perplexity_is_exp_of_the_loss() -> None:
    assert ConversationLosses([0.0], [1]).perplexity == 1.0
    assert ConversationLosses([2 * math.log(7.5)], [2]).perplexity == pytest.approx(7.5, rel=1e-12)

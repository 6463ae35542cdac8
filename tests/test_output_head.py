"""Log-probabilities that are read come from a head product in float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scoring_runs import MakeLm, demo_prompts, score

from qlora_harness.score import output_head
from qlora_harness.score.output_head import OutputHead, float32_logits

HIDDEN, WORDS = 16, 50


def head(dtype: torch.dtype, *, bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(HIDDEN, WORDS, bias=bias).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_the_float32_product_of_what_is_there(
    dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "_COLUMNS", 7)
    layer, hidden = head(dtype, bias=bias), torch.randn(5, HIDDEN).to(dtype)
    expected = hidden.double() @ layer.weight.double().t()
    expected = expected + (layer.bias.double() if bias else 0.0)
    logits = OutputHead(layer).logits(hidden)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), expected, atol=1e-5)


def test_many_hidden_states_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, hidden = head(torch.bfloat16), torch.randn(11, HIDDEN).to(torch.bfloat16)
    which, tokens = torch.tensor([10, 0, 3, 3, 7, 10]), torch.tensor([1, 2, 3, 4, 5, 6])
    options: Any = {"scaling": 2.0, "softmax_dtype": torch.float32}
    whole = OutputHead(layer).read(hidden, which, tokens, **options)
    monkeypatch.setattr(output_head, "_ROWS", 4)
    pieces = OutputHead(layer).read(hidden, which, tokens, **options)
    expected = (hidden.float() @ layer.weight.float().t() / 2.0).log_softmax(-1)[which, tokens]
    assert torch.allclose(whole[0], expected, atol=1e-6)
    assert torch.allclose(pieces[0], expected, atol=1e-6)
    assert torch.equal(pieces[1], whole[1])


def test_a_head_of_another_kind_runs_its_own_forward_in_float32() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    layer = Doubled(HIDDEN, WORDS, bias=False).to(torch.bfloat16)
    hidden = torch.randn(3, HIDDEN).to(torch.bfloat16)
    expected = 2 * hidden.float() @ layer.weight.float().t()
    assert torch.allclose(OutputHead(layer).logits(hidden), expected, atol=1e-6)
    assert layer.weight.dtype == torch.bfloat16
    with float32_logits(layer):
        assert torch.allclose(layer(hidden), expected, atol=1e-6)
    assert layer(hidden).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "in_steps"),
    [({}, False), ({"kernels": "none"}, False), ({"scoring": "hf"}, True)],
    ids=str,
)
def test_scores_of_a_bfloat16_model_do_not_come_in_steps(
    make_lm: MakeLm, options: dict[str, str], in_steps: bool
) -> None:
    """A logit of bfloat16 from 1 on is a multiple of 1/128; `scoring=hf` is lm-eval's own."""
    lm = make_lm(dtype="bfloat16", **options)
    with torch.no_grad():
        letters = lm.model.lm_head.weight[354:358]
        letters.copy_(0.5 * lm.model.model.norm.weight + torch.randn(4, 64) * 0.01)
    values = score(lm, demo_prompts(6))
    of_a_prompt = [values[i + 1] - values[i] for i in range(len(values) - 1) if (i + 1) % 4]
    on_a_step = [math.isclose(d * 1024, round(d * 1024), abs_tol=5e-3) for d in of_a_prompt]
    assert sum(on_a_step) == 18 if in_steps else sum(on_a_step) <= 2

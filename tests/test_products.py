"""The product of a layer on the CPU without gradients, where oneDNN may compute it."""

from __future__ import annotations

import pytest
import torch

from qlora_harness.fused.products import linear


@pytest.mark.parametrize("rows", [1, 7, 700])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("border", [0, 24])
def test_float32_product_is_exact_to_rounding(rows: int, biased: bool, border: int) -> None:
    """Rows and weights lie in wider memory, as those with an adapter do."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 128)[:, : 96 + border], torch.randn(70, 128)[:, : 96 + border]
    bias = torch.randn(70) if biased else None
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    with torch.inference_mode():
        product = linear(x, weight, bias)
    assert product.dtype == torch.float32
    assert torch.allclose(product.double(), exact, rtol=0, atol=2e-5)
    plain = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(linear(x, weight, bias), plain)  # with gradients, torch's own

"""Dropout of fused layers: the masks, and the products that they enter, against autograd."""

from __future__ import annotations

import pytest
import torch

from qlora_harness.fused import dropout

CPU = torch.device("cpu")


def test_masks_keep_a_share_and_follow_the_seed() -> None:
    shapes = [(3, 200, 300), (1, 50, 700)]
    first, second = dropout.draw(shapes, 0.25, torch.tensor([5]), CPU, packed=False)
    assert [m.keep.shape for m in (first, second)] == shapes
    assert first.keep.dtype == torch.bool
    assert first.factor == second.factor == 4 / 3
    assert not first.packed
    assert first.keep.float().mean(dim=(1, 2)).tolist() == [pytest.approx(0.75, abs=0.01)] * 3
    assert second.keep.float().mean().item() == pytest.approx(0.75, abs=0.01)
    again = dropout.draw(shapes, 0.25, torch.tensor([5]), CPU, packed=False)
    assert torch.equal(first.keep, again[0].keep)
    assert torch.equal(second.keep, again[1].keep)
    (other,) = dropout.draw(shapes[:1], 0.25, torch.tensor([9]), CPU, packed=False)
    for mask in (*first.keep[1:], *other.keep):  # as far from the first as independent masks are
        differing = (mask != first.keep[0]).float().mean().item()
        assert differing == pytest.approx(2 * 0.25 * 0.75, abs=0.01)


@pytest.mark.parametrize("adapters", [1, 3])
def test_products_are_those_of_autograd(adapters: int) -> None:
    torch.manual_seed(adapters)
    rows, columns, rank, scale = 6, 10, 2, 0.3
    x = torch.randn(rows, columns, dtype=torch.float64, requires_grad=True)
    down = torch.randn(adapters * rank, columns, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([1])
    (masks,) = dropout.draw([(adapters, rows, columns)], 0.4, seed, CPU, packed=False)
    keep = masks.keep / 0.6
    parts = down.chunk(adapters)
    expected = torch.cat([scale * (x * k) @ a.t() for k, a in zip(keep, parts, strict=True)], dim=1)
    d_inner = torch.randn_like(expected)
    dx, d_down = torch.autograd.grad(expected, (x, down), d_inner)
    with torch.no_grad():
        beside = torch.full((rows, adapters * rank + 3), 9.0, dtype=torch.float64)
        scaled = scale * down
        inner = dropout.products(x, scaled, masks, beside[:, :-3])
        torch.testing.assert_close(inner, expected)
        assert torch.equal(beside[:, :-3], inner)
        assert (beside[:, -3:] == 9).all()
        before = torch.randn(rows, columns, dtype=torch.float64)
        after = before.clone()
        dropout.add_products(after, d_inner, scaled, masks)
        torch.testing.assert_close(after, before + dx)
        d_scaled = dropout.gradients(d_inner, x, masks, scale, torch.float64)
        torch.testing.assert_close(d_scaled, d_down)

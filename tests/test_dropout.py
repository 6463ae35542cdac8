"""Dropout of fused layers: the masks, and the products that they enter, against autograd."""

from __future__ import annotations

import pytest
import torch

from qlora_harness.fused import dropout
from qlora_harness.fused.dropout import Masks


def test_masks_keep_a_share_and_follow_the_seed() -> None:
    like = torch.empty(200, 1)
    masks = dropout.draw(3, like, 300, 0.25, 5)
    assert (masks.kept.shape, masks.kept.dtype) == ((3, 200, 300), torch.bool)
    assert masks.factor == 4 / 3
    assert masks.kept.float().mean(dim=(1, 2)).tolist() == [pytest.approx(0.75, abs=0.01)] * 3
    assert torch.equal(masks.kept, dropout.draw(3, like, 300, 0.25, 5).kept)
    others = [*masks.kept[1:], dropout.draw(1, like, 300, 0.25, 9).kept[0]]
    for other in others:  # as far from the first as two independent masks are
        differing = (other != masks.kept[0]).float().mean().item()
        assert differing == pytest.approx(2 * 0.25 * 0.75, abs=0.01)


@pytest.mark.parametrize("adapters", [1, 3])
def test_products_are_those_of_autograd(adapters: int) -> None:
    torch.manual_seed(adapters)
    rows, columns, rank, scale = 6, 10, 2, 0.3
    x = torch.randn(rows, columns, dtype=torch.float64, requires_grad=True)
    down = torch.randn(adapters * rank, columns, dtype=torch.float64, requires_grad=True)
    masks = dropout.draw(adapters, x, columns, 0.4, 1)
    keep = masks.kept / 0.6
    parts = down.chunk(adapters)
    wanted = torch.cat([scale * (x * k) @ a.t() for k, a in zip(keep, parts, strict=True)], dim=1)
    d_inner = torch.randn_like(wanted)
    dx, d_down = torch.autograd.grad(wanted, (x, down), d_inner)
    with torch.no_grad():
        beside = torch.full((rows, adapters * rank + 3), 9.0, dtype=torch.float64)
        scaled = scale * down
        inner = dropout.products(x, scaled, masks, beside[:, :-3])
        torch.testing.assert_close(inner, wanted)
        assert torch.equal(beside[:, :-3], inner) and (beside[:, -3:] == 9).all()
        before = torch.randn(rows, columns, dtype=torch.float64)
        after = before.clone()
        dropout.add_products(after, d_inner, scaled, masks)
        torch.testing.assert_close(after, before + dx)
        found = dropout.gradients(d_inner, x, masks, scale, torch.float64)
        torch.testing.assert_close(found, d_down)


def test_only_bytes_are_taken_for_packed() -> None:
    assert Masks(torch.zeros(1, 1, 1, dtype=torch.uint8), 1.0).packed
    assert not Masks(torch.zeros(1, 1, 1, dtype=torch.bool), 1.0).packed

"""FP8 products of fused layers on the CPU, against products of rounded matrices."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scoring_runs import MakeLm, demo_prompts, refused, score
from tiny_models import WINDOW, adapted, fused_step, texts, tiny
from torch import Tensor
from training_runs import Train, as_if_killed, losses, summary

from qlora_harness.errors import SettingsError
from qlora_harness.fused import dropout, fp8, graphs
from qlora_harness.fused.bordered import Projection, Scratch, matrix_bytes
from qlora_harness.fused.fp8_group import Fp8Group
from qlora_harness.fused.fp8_weights import Fp8Weights, working_bytes
from qlora_harness.fused.lora_group import LoraGroup
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.base import expand_4bit
from qlora_harness.score.packed_forward import PackedModel
from qlora_harness.score.prefix_tree import Query, plan
from qlora_harness.settings import CHECKPOINTING
from qlora_harness.settings_checks import build_settings
from qlora_harness.train.memory_plan import measure_shape, predict_memory

SCALE = 0.5
RANK = 3
WIDTH = 128


def rounded(x: Tensor, top: Tensor) -> Tensor:
    """Rounds to e4m3 times the power of two that brings `top` into [128, 256)."""
    scale = torch.ldexp(torch.ones_like(top), 8 - torch.frexp(top).exponent)
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


def rows_rounded(x: Tensor) -> Tensor:
    return rounded(x, x.abs().amax(dim=1, keepdim=True))


def projection(height: int, *, quantised: bool, is_adapted: bool, bias: bool) -> Projection:
    weight: Any = torch.nn.Parameter(torch.randn(height, WIDTH), requires_grad=False)
    if quantised:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True)
        weight = torch.nn.Parameter(packed, requires_grad=False)
        weight.quant_state = state
    layer = SimpleNamespace(
        weight=weight,
        in_features=WIDTH,
        out_features=height,
        bias=torch.nn.Parameter(torch.randn(height)) if bias else None,
    )
    down, up = (torch.nn.Parameter(torch.randn(s)) for s in ((RANK, WIDTH), (height, RANK)))
    return Projection(
        layer, down if is_adapted else None, up if is_adapted else None, SCALE, dropout=0.2
    )


def expanded(projection: Projection) -> Tensor:
    weight = projection.layer.weight
    state = getattr(weight, "quant_state", None)
    return weight.data if state is None else expand_4bit(weight.data, state, torch.float32)


def close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("quantised", [False, True], ids=["full", "nf4"])
@pytest.mark.parametrize("adapters", [(True,), (False,), (True, True), (True, False, True)])
def test_group_multiplies_rounded_matrices(
    adapters: tuple[bool, ...], quantised: bool, masked: bool
) -> None:
    torch.manual_seed(0)
    heights = (48, 16, 32)[: len(adapters)]
    parts = [
        projection(n, quantised=quantised, is_adapted=is_adapted, bias=n == 16)
        for n, is_adapted in zip(heights, adapters, strict=True)
    ]
    group = Fp8Group(parts, Scratch())
    x = torch.randn(7, WIDTH) * torch.exp(3 * torch.randn(7, 1))
    dy = torch.randn(7, sum(heights)) * torch.exp(3 * torch.randn(7, 1))
    x[3] = 0
    count = sum(adapters)
    masks = None
    keep = torch.ones(count, 7, WIDTH)
    if masked and count:
        (masks,) = dropout.draw([(count, 7, WIDTH)], 0.2, torch.tensor([5]), x.device, packed=False)
        keep = masks.keep * masks.factor
    y, inner = group.forward(x, masks)
    dx, d_inner = group.backward(dy, masks)
    gradients = group.gradients(dy, d_inner, x, inner, masks)

    weight = torch.cat([expanded(part) for part in parts])
    weight = rounded(weight, weight.abs().max())
    expected_y, expected_dx = rows_rounded(x) @ weight.t(), rows_rounded(dy) @ weight
    slots = iter(range(count))
    outputs = zip(parts, expected_y.split(heights, 1), dy.split(heights, 1), strict=True)
    for number, (part, own, own_dy) in enumerate(outputs):
        if part.layer.bias is not None:
            own += part.layer.bias.data
        if part.down is None or part.up is None:
            assert gradients[2 * number : 2 * number + 2] == [None, None]
            continue
        mask = keep[next(slots)]
        h, dh = SCALE * (x * mask) @ part.down.data.t(), own_dy @ part.up.data
        own += h @ part.up.data.t()
        expected_dx += SCALE * dh @ part.down.data * mask
        close(gradients[2 * number], SCALE * dh.t() @ (x * mask))
        close(gradients[2 * number + 1], own_dy.t() @ h)
    close(y, expected_y)
    close(dx, expected_dx)
    if count:
        close(group.backward_inner(dy), d_inner if d_inner is not None else dy)
        again = group.gradients(dy, d_inner, x, None, masks)  # with h recomputed
        for gradient, expected in zip(again, gradients, strict=True):
            assert (gradient is None) == (expected is None)
            if expected is not None:
                close(gradient, expected)


@pytest.mark.parametrize("quantised", [False, True], ids=["full", "nf4"])
def test_both_layouts_hold_the_same_values(quantised: bool) -> None:
    torch.manual_seed(0)
    parts = [projection(n, quantised=quantised, is_adapted=True, bias=False) for n in (48, 16)]
    weights = Fp8Weights(parts, Scratch())
    like = torch.empty(0)
    rows = weights.load(like, transposed=False).values.clone()
    turned = weights.load(like, transposed=True).values
    assert rows.shape == (64, WIDTH)
    assert torch.equal(turned.float(), rows.float().t())
    assert 128 <= float(rows.float().abs().max()) < 256
    whole = torch.cat([expanded(part) for part in parts])
    assert torch.equal(rows.float() * weights.weight_scale, rounded(whole, whole.abs().max()))


@pytest.mark.parametrize("top", [1e-30, 0.75, 1.0, 1.75, 3.99, 1e4, 3e38])
def test_largest_magnitude_of_a_row_is_far_from_overflow(top: float) -> None:
    x = torch.tensor([[top, -top / 3, 0.0], [0.0, 0.0, 0.0]])
    values, scales = fp8.quantise(x)
    assert 128 <= float(values[0].float().abs().max()) <= 256 or top == 1e-30
    torch.testing.assert_close(values[0].float() * scales[0], x[0], rtol=2**-4, atol=0)
    assert torch.equal(values[1].float(), x[1])
    assert fp8.weight_scale(top) == scales[0]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["gaussian", "outliers"])
def test_error_of_a_group_is_that_of_two_roundings(kind: str) -> None:
    """Weights and inputs are off by 2.6% each on average, so a product of both is by 3.8%."""
    torch.manual_seed(0)
    parts = [projection(256, quantised=False, is_adapted=True, bias=False)]
    x, dy = torch.randn(64, WIDTH), torch.randn(64, 256)
    if kind == "outliers":
        x[:, :2] *= 100
        dy *= torch.exp(2 * torch.randn(64, 1))
    group, exact = Fp8Group(parts, Scratch()), LoraGroup(parts, Scratch())
    y, _ = group.forward(x, None)
    dx, _ = group.backward(dy, None)
    expected, _ = exact.forward(exact.as_input(x), None)
    expected_dx, _ = exact.backward(exact.with_room(dy), None)
    assert 0.01 < relative(y, expected) < 0.045
    assert 0.01 < relative(dx, expected_dx) < 0.045


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_step_is_near_one_without_rounding(kind: str, checkpointing: str) -> None:
    model = adapted(tiny(kind, quantised=kind == "llama"))
    other = copy.deepcopy(model)
    rows = texts([9, 3, 20, 1, 14])
    FusedDecoder.attach(model, checkpointing)
    FusedDecoder.attach(other, checkpointing, compute="fp8")
    loss, gradients = fused_step(model, rows)
    near, others = fused_step(other, rows)
    assert near == pytest.approx(loss, rel=0.003)
    assert near != loss
    total = relative(
        torch.cat([others[name].flatten() for name in gradients]),
        torch.cat([g.flatten() for g in gradients.values()]),
    )
    assert 0.01 < total < 0.12
    assert fused_step(other, rows)[0] == near


def test_packs_are_scored_near_those_without_rounding() -> None:
    model = adapted(tiny("llama", quantised=True)).eval()
    queries = [Query([5, 9, 2], [7]), Query([5, 9, 2], [8]), Query([5, 11], [3])]
    (pack,) = plan(queries, pack_tokens=64, window=WINDOW)
    exact = PackedModel(model, None).start(pack).reads()
    rounded = PackedModel(model, None, compute="fp8").start(pack).reads()
    difference = np.abs(exact.logprobs - rounded.logprobs)
    assert 0 < difference.max() < 1


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU pass for a device with FP8 products."""
    monkeypatch.setattr(fp8, "why_unavailable", lambda device: None)


@pytest.mark.usefixtures("on_hopper")
def test_run_records_how_it_computed_and_resumes(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"compute_dtype": "bfloat16", "save_steps": 2, "lora_dropout": 0.1}
    assert train(compute="fp8", output_dir="fp8", **options) == 0
    assert train(output_dir="bf16", **options) == 0
    record = summary("fp8")
    assert record["settings"]["compute"] == "fp8"
    assert record["computation"]["fused_layers"] is True
    rounded, exact = losses("fp8"), losses("bf16")
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact
    as_if_killed("fp8", 4)
    assert train(output_dir="fp8", **options) == 2
    assert "--compute fp8, not bf16" in capsys.readouterr().err
    assert train(compute="fp8", output_dir="fp8", **options) == 0
    assert losses("fp8") == pytest.approx(rounded, rel=1e-6)


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_training_without_a_gpu_is_refused_before_anything_is_loaded(
    train: Train, capsys: pytest.CaptureFixture[str], quant: str
) -> None:
    assert train(compute="fp8", quant=quant, compute_dtype="bfloat16", model="absent") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "--compute fp8: there is no CUDA device" in lines[0]


@pytest.mark.usefixtures("on_hopper")
def test_scoring_is_recorded(make_lm: MakeLm, adapter: Path) -> None:
    lm = make_lm(peft=str(adapter), dtype="bfloat16", compute="fp8")
    other = make_lm(peft=str(adapter), dtype="bfloat16")
    assert lm.session.path == (True, True, False, None)
    assert lm.session.settings_record()["compute"] == "fp8"
    assert other.session.settings_record()["compute"] == "bf16"
    assert lm.session.identity()["compute"] == "fp8"
    assert "compute" not in other.session.identity()  # as in journals of earlier versions
    prompts = demo_prompts(3)
    difference = np.abs(np.array(score(lm, prompts)) - np.array(score(other, prompts)))
    assert 0 < difference.max() < 1


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": "float32"}, "the compute dtype is float32"),
        ({"quant": "int8"}, "quant=int8 has no fused layers"),
        ({"scoring": "hf"}, "scoring=hf"),
        ({"kernels": "none"}, "kernels=none"),
    ],
)
def test_scoring_that_is_impossible_is_refused(
    make_lm: MakeLm, arguments: dict[str, Any], reason: str
) -> None:
    options = {"dtype": "bfloat16", "quant": "nf4", "pretrained": "absent"} | arguments
    text = refused(lambda: make_lm(compute="fp8", **options), SettingsError)
    assert "compute=fp8" in text
    assert reason in text


def test_scoring_without_a_gpu_is_refused(make_lm: MakeLm) -> None:
    text = refused(lambda: make_lm(compute="fp8", dtype="bfloat16"), SettingsError)
    assert "compute=fp8: there is no CUDA device" in text


@pytest.mark.usefixtures("on_hopper")
def test_model_with_odd_sizes_or_another_dtype_is_refused() -> None:
    assert "float32" in str(FusedDecoder.reason_against_fp8(tiny("llama")))
    half = tiny("llama").to(torch.bfloat16)
    assert FusedDecoder.reason_against_fp8(half) is None
    half.model.layers[1].mlp.down_proj.in_features = 120
    assert "size 120" in str(FusedDecoder.reason_against_fp8(half))


def test_plan_counts_e4m3_matrices_instead_of_those_in_bf16(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_DEVICE_BOUND", 0)
    shape = measure_shape(str(tiny_llama), None, "all-linear")
    tokens = 1000
    plans = [
        predict_memory(shape, build_settings({"compute": c, "quant": q}), tokens)
        for q in ("nf4", "bf16")
        for c in ("bf16", "fp8")
    ]
    matrices = [matrix_bytes(shape, 64, 2, shared=four) for four in (True, False)]
    rounded = working_bytes(shape, 64, tokens)
    assert plans[1].work - plans[0].work == rounded - matrices[0]
    assert plans[3].work - plans[2].work == rounded - matrices[1]
    # Two projections of the MLP in a byte each, their adapters, and their quantised gradient.
    inner, hidden = shape.inner, shape.hidden
    assert rounded == 2 * inner * hidden + 2 * (2 * inner * 128 + 128 * hidden) + 2 * inner * tokens

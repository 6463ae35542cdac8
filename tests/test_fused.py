"""Fused layers against PEFT's own modules: loss and every gradient, in float32."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    VOCABULARY,
    adapted,
    assert_alike,
    fused_step,
    gradients,
    plain_step,
    texts,
    tiny,
)

from qlora_harness.data.examples import IGNORE
from qlora_harness.fused import dropout
from qlora_harness.fused import layer as fused_layer
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.lora import attach_lora
from qlora_harness.settings import CHECKPOINTING
from qlora_harness.train.batches import pack_batch

every_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTING)


@pytest.mark.parametrize("quantised", [False, True], ids=["full", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@every_checkpointing
def test_step_equals_peft_and_padding(kind: str, quantised: bool, checkpointing: str) -> None:
    model = adapted(tiny(kind, quantised=quantised))
    rows = texts([9, 3, 20, 1, 14])
    expected = plain_step(model, rows)
    FusedDecoder.attach(model, checkpointing)
    assert FusedDecoder.reason_against(model) is None
    assert_alike(fused_step(model, rows), expected)
    assert_alike(fused_step(model, rows), expected)  # a second pass is like the first
    # Any other batch runs the model's own forward.
    assert plain_step(model, rows)[0] == expected[0]


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "o_proj", "gate_proj", "down_proj"])
def test_adapters_on_some_layers_only(targets: str) -> None:
    model = adapted(tiny("llama"), targets=targets)
    rows = texts([9, 20])
    expected = plain_step(model, rows)
    FusedDecoder.attach(model, "none")
    assert_alike(fused_step(model, rows), expected)


def test_one_key_head_with_head_norms() -> None:
    model = adapted(tiny("qwen3", num_key_value_heads=1))
    rows = texts([9, 3, 20])
    expected = plain_step(model, rows)
    FusedDecoder.attach(model, "selective")
    assert_alike(fused_step(model, rows), expected)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    plain = adapted(tiny("llama"))
    fused = copy.deepcopy(plain)
    FusedDecoder.attach(fused, "none")
    return plain, fused


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_no_text_sees_another(pair: tuple[Any, Any], lengths: list[int], seed: int) -> None:
    rows = texts(lengths, seed)
    assert_alike(fused_step(pair[1], rows), plain_step(pair[0], rows))


class Drop(torch.nn.Module):
    """Dropout with the mask that the fused layer draws for the same projection."""

    def __init__(self, probability: float, seed: int, read_at: torch.Tensor | None) -> None:
        super().__init__()
        self.p, self.seed, self.read_at = probability, torch.tensor([seed]), read_at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        read = x[0] if self.read_at is None else x[0, self.read_at]
        (masks,) = dropout.draw([(1, *read.shape)], self.p, self.seed, read.device, packed=False)
        dropped = (read * masks.keep[0] / (1 - self.p))[None]
        return dropped if self.read_at is None else x.index_copy(1, self.read_at, dropped)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj,down_proj"])
@every_checkpointing
def test_dropout_is_the_same_in_both_passes(checkpointing: str, targets: str) -> None:
    plain = adapted(tiny("llama"), dropout=0.3, targets=targets)
    fused = copy.deepcopy(plain)
    torch.manual_seed(7)
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    order = order if targets == "all-linear" else tuple(targets.split(","))  # type: ignore[assignment]
    rows = texts([20])
    layers = plain.get_base_model().model.layers
    for layer in layers:
        seed = int(torch.randint(0, 2**62, ()))
        for number, name in enumerate(order):
            late = layer is layers[-1] and name not in ("q_proj", "k_proj", "v_proj")
            read_at = pack_batch(rows)["read_at"] if late else None
            projection = getattr(layer.self_attn, name, None) or getattr(layer.mlp, name)
            projection.lora_dropout["default"] = Drop(0.3, seed + number, read_at)
    expected = plain_step(plain, rows)
    FusedDecoder.attach(fused, checkpointing)
    torch.manual_seed(7)
    assert_alike(fused_step(fused, rows), expected)
    assert plain_step(plain.eval(), rows)[0] != pytest.approx(expected[0], abs=1e-3)
    assert_alike(fused_step(fused.eval(), rows), plain_step(plain.eval(), rows))


def test_first_steps_count_in_bfloat16() -> None:
    """A first update changes the loss as in float32, within 4%.

    PEFT's modules round a layer's output before adding the adapter's, and lose a sixth of it here.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(  # type: ignore[call-arg]
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8, attn_implementation="sdpa",
    )  # fmt: skip
    half = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    exact = copy.deepcopy(half).float()
    rows = texts([60, 33, 90, 20])
    models = []
    for base in (exact, half):
        torch.manual_seed(1)
        models.append(attach_lora(base, r=16, alpha=16, dropout=0.0, targets="all-linear").train())
    _, gradients_of = plain_step(models[0], rows)
    before = _three_losses(models, rows)
    with torch.no_grad():
        for model in models:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # AdamW's first step at a learning rate of 2e-4
                    parameter.copy_(-2e-4 * gradients_of[name].sign())
    after = _three_losses(models, rows)
    expected, plain, fused = (x - y for x, y in zip(after, before, strict=True))
    assert expected < -0.01
    assert fused == pytest.approx(expected, rel=0.04)
    assert abs(plain - expected) > 5 * abs(fused - expected)


def _three_losses(models: list[Any], rows: list[dict[str, list[int]]]) -> list[float]:
    """In float32, by PEFT in bfloat16, by fused layers in bfloat16."""
    exact, half = models
    losses = [plain_step(exact, rows)[0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses.append(plain_step(half, rows)[0])
        decoder = FusedDecoder.attach(half, "none")
        losses.append(fused_step(half, rows)[0])
        decoder.detach()
    return losses


@every_checkpointing
def test_memory_that_was_never_written_is_never_read(checkpointing: str) -> None:
    """It holds NaN here, which survives a product with zero."""
    model = adapted(tiny("llama").to(torch.bfloat16)).to(torch.bfloat16)
    rows = texts([60, 33, 90, 20])
    FusedDecoder.attach(model, checkpointing)
    expected = fused_step(model, rows)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        step = fused_step(model, rows)
    finally:
        torch.use_deterministic_algorithms(False)
    assert step[0] == expected[0]
    assert step[1].keys() == expected[1].keys()
    for name, gradient in step[1].items():
        assert torch.equal(gradient, expected[1][name]), name


@every_checkpointing
def test_graph_without_a_backward_pass_is_freed_at_once(checkpointing: str) -> None:
    """Without the garbage collector, so that a pass that ran out of memory leaves nothing."""
    model = adapted(tiny("llama", layers=6))
    FusedDecoder.attach(model, checkpointing)
    nodes = []
    own = fused_layer._Layer.apply

    def apply(*arguments: Any) -> Any:
        outputs = own(*arguments)
        nodes.append(weakref.ref(outputs[0].grad_fn))
        return outputs

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused_layer._Layer, "apply", apply)
            output = model(**pack_batch(texts([9, 20])))
        assert [x() is not None for x in nodes] == [True] * 6
        del output
        assert [x() for x in nodes] == [None] * 6
    finally:
        gc.enable()


def test_replaced_adapter_parameters_are_noticed() -> None:
    model = adapted(tiny("llama").to(torch.bfloat16)).to(torch.bfloat16)
    FusedDecoder.attach(model, "none")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = torch.nn.Parameter(layer.lora_A["default"].weight.float())
    with pytest.raises(RuntimeError, match="parameters were replaced"):
        fused_step(model, texts([9, 20]))


@pytest.mark.parametrize("quantised", [False, True], ids=["full", "nf4"])
def test_detach_gives_the_weights_their_own_memory_back(quantised: bool) -> None:
    model = adapted(tiny("llama", quantised=quantised))
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    before = weight.data.clone()
    expected = plain_step(model, texts([9, 20]))
    decoder = FusedDecoder.attach(model, "none")
    assert weight.is_contiguous() is quantised
    fused_step(model, texts([9, 20]))
    decoder.detach()
    assert weight.is_contiguous()
    assert torch.equal(weight.data, before)
    assert_alike(plain_step(model, texts([9, 20])), expected)


@every_checkpointing
def test_evaluation_keeps_nothing_for_a_backward_pass(
    checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny("llama"))
    FusedDecoder.attach(model, checkpointing)
    inputs: list[weakref.ref[torch.Tensor]] = []
    normalise = fused_layer.ops.rms_norm

    def noted(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        total = normalise(x, *arguments)
        inputs.append(weakref.ref(total))
        return total

    monkeypatch.setattr(fused_layer.ops, "rms_norm", noted)
    batch = pack_batch(texts([9, 20]))
    with torch.no_grad():
        loss = model(**batch).loss
    assert loss.grad_fn is None
    assert len(inputs) == 4
    assert not any(x() is not None for x in inputs)
    loss = model(**batch).loss
    assert sum(x() is not None for x in inputs) == 2  # the inputs of both layers


@every_checkpointing
def test_row_without_a_learned_token_gives_no_gradient(checkpointing: str) -> None:
    model = adapted(tiny("llama"))
    FusedDecoder.attach(model, checkpointing)
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORE] * 3}]
    loss = model(**pack_batch(rows), num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY),
            "'gpt2' is not one of llama, mistral, qwen2, qwen3",
        ),
        (
            transformers.MistralConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, sliding_window=16,
            ),
            "sliding-window",
        ),
    ],
)  # fmt: skip
def test_models_without_fused_layers_say_why(config: Any, reason: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = attach_lora(model, r=2, alpha=2, dropout=0.0, targets="all-linear")
    assert reason in FusedDecoder.reason_against(model)  # type: ignore[operator]

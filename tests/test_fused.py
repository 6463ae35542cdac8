"""Fused layers against PEFT's own modules: loss and every gradient, in float32."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_harness.data.chat import IGNORE
from qlora_harness.fused import dropout
from qlora_harness.fused import layer as fused_layer
from qlora_harness.fused.model import install, uninstall, why_not_fused
from qlora_harness.model.lora import attach_lora
from qlora_harness.settings import CHECKPOINTING
from qlora_harness.train.batches import pack_batch, pad_batch

VOCABULARY = 61


def tiny(
    kind: str, *, quantised: bool = False, num_key_value_heads: int = 2, layers: int = 2
) -> Any:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": num_key_value_heads,
        "max_position_embeddings": 64,
        "attn_implementation": "sdpa",
    }
    kinds = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    config = kinds[kind](**shape, **({"head_dim": 16} if kind == "qwen3" else {}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if quantised:
        quantise(model)
    return model.requires_grad_(False)


def quantise(model: Any) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    packed = Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=linear.bias is not None,
                        compute_dtype=torch.float32,
                        quant_type="nf4",
                    )
                    packed.weight = Params4bit(linear.weight.data, quant_type="nf4")
                    packed.bias = linear.bias
                    packed.support_avx512bf16_for_cpu = False
                    setattr(parent, name, packed.to("cpu"))


def adapted(model: Any, *, dropout: float = 0.0, targets: str = "all-linear") -> Any:
    torch.manual_seed(1)
    peft = attach_lora(model, r=4, alpha=16, dropout=dropout, targets=targets)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft.train()


def texts(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        learned = torch.rand(length, generator=generator) < 0.6
        labels = [i if k else IGNORE for i, k in zip(ids, learned.tolist(), strict=True)]
        labels[-1] = ids[-1]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain_step(model: Any, rows: list[dict[str, list[int]]]) -> tuple[float, dict[str, Any]]:
    batch = pad_batch(rows, 0)
    count = (batch["labels"][:, 1:] != IGNORE).sum()
    loss = model(**batch, num_items_in_batch=count).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def fused_step(model: Any, rows: list[dict[str, list[int]]]) -> tuple[float, dict[str, Any]]:
    batch = pack_batch(rows)
    loss = model(**batch, num_items_in_batch=(batch["shift_labels"] != IGNORE).sum()).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def assert_alike(found: tuple[float, dict[str, Any]], wanted: tuple[float, dict[str, Any]]) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        # Queries have no gradient in a text of two tokens: only rounding is left there.
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("quantised", [False, True], ids=["full", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_step_equals_peft_and_padding(kind: str, quantised: bool, checkpointing: str) -> None:
    model = adapted(tiny(kind, quantised=quantised))
    rows = texts([9, 3, 20, 1, 14])
    wanted = plain_step(model, rows)
    install(model, checkpointing)
    assert why_not_fused(model) is None
    assert_alike(fused_step(model, rows), wanted)
    # Gradients accumulate over passes, and a second pass is like the first.
    assert_alike(fused_step(model, rows), wanted)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Any, Any]]:
    plain = adapted(tiny("llama"))
    fused = copy.deepcopy(plain)
    install(fused, "none")
    yield plain, fused


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_no_text_sees_another(pair: tuple[Any, Any], lengths: list[int], seed: int) -> None:
    rows = texts(lengths, seed)
    assert_alike(fused_step(pair[1], rows), plain_step(pair[0], rows))


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "o_proj", "gate_proj", "down_proj"])
def test_adapters_on_some_layers_only(targets: str) -> None:
    model = adapted(tiny("llama"), targets=targets)
    rows = texts([9, 20])
    wanted = plain_step(model, rows)
    install(model, "none")
    assert_alike(fused_step(model, rows), wanted)


class Drop(torch.nn.Module):
    """Dropout with the seed that the fused layer gives to the same projection.

    In the last layer only what attention gives to the places that are read goes on.
    """

    def __init__(self, probability: float, seed: int, places: torch.Tensor | None) -> None:
        super().__init__()
        self.p, self.seed, self.places = probability, seed, places

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        read = x[0] if self.places is None else x[0, self.places]
        (masks,) = dropout.draw([(1, *read.shape)], self.p, self.seed, read.device, packed=False)
        dropped = read * masks.kept[0] / (1 - self.p)
        return dropped[None] if self.places is None else x.index_copy(1, self.places, dropped[None])


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj,down_proj"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_dropout_is_the_same_in_both_passes(checkpointing: str, targets: str) -> None:
    plain = adapted(tiny("llama"), dropout=0.3, targets=targets)
    fused = copy.deepcopy(plain)
    torch.manual_seed(7)
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    order = order if targets == "all-linear" else tuple(targets.split(","))
    rows = texts([20])
    layers = plain.get_base_model().model.layers
    for layer in layers:
        seed = int(torch.randint(0, 2**62, ()))
        for number, name in enumerate(order):
            attends = name in ("q_proj", "k_proj", "v_proj", "o_proj")
            late = layer is layers[-1] and name not in ("q_proj", "k_proj", "v_proj")
            places = pack_batch(rows)["read_at"] if late else None
            parent = layer.self_attn if attends else layer.mlp
            getattr(parent, name).lora_dropout["default"] = Drop(0.3, seed + number, places)
    wanted = plain_step(plain, rows)
    install(fused, checkpointing)
    torch.manual_seed(7)
    assert_alike(fused_step(fused, rows), wanted)
    assert plain_step(plain.eval(), rows)[0] != pytest.approx(wanted[0], abs=1e-3)
    assert_alike(fused_step(fused.eval(), rows), plain_step(plain.eval(), rows))


def test_first_steps_count_in_bfloat16() -> None:
    """What a first update changes in the loss is what it changes in float32, within 4%.

    PEFT's own modules round a layer's output before they add the adapter's: here they lose a sixth.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
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
    wanted, plain, fused = (x - y for x, y in zip(after, before, strict=True))
    assert wanted < -0.01
    assert fused == pytest.approx(wanted, rel=0.04)
    assert abs(plain - wanted) > 5 * abs(fused - wanted)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_memory_that_was_never_written_is_never_read(checkpointing: str) -> None:
    """It holds NaN here, which a product with zero would show."""
    model = adapted(tiny("llama").to(torch.bfloat16)).to(torch.bfloat16)
    rows = texts([60, 33, 90, 20])
    install(model, checkpointing)
    wanted = fused_step(model, rows)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        found = fused_step(model, rows)
    finally:
        torch.use_deterministic_algorithms(False)
        uninstall(model)
    assert found[0] == wanted[0] and found[1].keys() == wanted[1].keys()
    for name, gradient in found[1].items():
        assert torch.equal(gradient, wanted[1][name]), name


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_graph_without_a_backward_pass_is_freed_at_once(checkpointing: str) -> None:
    """Not by the garbage collector: a pass that ran out of memory leaves nothing behind."""
    model = adapted(tiny("llama", layers=6))
    install(model, checkpointing)
    kept = []
    own = fused_layer._Layer.apply

    def apply(*arguments: Any) -> Any:
        found = own(*arguments)
        kept.append(weakref.ref(found[0].grad_fn))
        return found

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused_layer._Layer, "apply", apply)
            output = model(**pack_batch(texts([9, 20])))
        assert [x() is not None for x in kept] == [True] * 6
        del output
        assert [x() for x in kept] == [None] * 6
    finally:
        gc.enable()


def _three_losses(models: list[Any], rows: list[dict[str, list[int]]]) -> list[float]:
    """In float32, by PEFT in bfloat16, by fused layers in bfloat16."""
    exact, half = models
    found = [plain_step(exact, rows)[0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.append(plain_step(half, rows)[0])
        install(half, "none")
        found.append(fused_step(half, rows)[0])
        uninstall(half)
    return found


def test_replaced_adapter_parameters_are_noticed() -> None:
    model = adapted(tiny("llama").to(torch.bfloat16)).to(torch.bfloat16)
    install(model, "none")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = torch.nn.Parameter(layer.lora_A["default"].weight.float())
    with pytest.raises(RuntimeError, match="were replaced after `install`"):
        fused_step(model, texts([9, 20]))


@pytest.mark.parametrize("quantised", [False, True], ids=["full", "nf4"])
def test_uninstall_gives_the_weights_their_own_memory_back(quantised: bool) -> None:
    model = adapted(tiny("llama", quantised=quantised))
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    before = weight.data.clone()
    wanted = plain_step(model, texts([9, 20]))
    install(model, "none")
    assert weight.is_contiguous() is quantised
    fused_step(model, texts([9, 20]))
    uninstall(model)
    assert weight.is_contiguous()
    assert torch.equal(weight.data, before)
    assert_alike(plain_step(model, texts([9, 20])), wanted)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_evaluation_keeps_nothing_for_a_backward_pass(
    checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny("llama"))
    install(model, checkpointing)
    inputs: list[weakref.ref[torch.Tensor]] = []
    normalise = fused_layer.ops.rms_norm

    def noted(x: torch.Tensor, *arguments: Any, add: torch.Tensor | None = None) -> torch.Tensor:
        total = normalise(x, *arguments, add=add)
        inputs.append(weakref.ref(total))
        return total

    monkeypatch.setattr(fused_layer.ops, "rms_norm", noted)
    batch = pack_batch(texts([9, 20]))
    with torch.no_grad():
        found = model(**batch).loss
    assert found.grad_fn is None
    assert len(inputs) == 4
    assert not any(x() is not None for x in inputs)
    found = model(**batch).loss
    assert sum(x() is not None for x in inputs) == 2  # the inputs of both layers


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_row_without_a_learned_token_gives_no_gradient(checkpointing: str) -> None:
    model = adapted(tiny("llama"))
    install(model, checkpointing)
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORE] * 3}]
    loss = model(**pack_batch(rows), num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_one_key_head_with_head_norms() -> None:
    model = adapted(tiny("qwen3", num_key_value_heads=1))
    rows = texts([9, 3, 20])
    wanted = plain_step(model, rows)
    install(model, "selective")
    assert_alike(fused_step(model, rows), wanted)


def test_other_input_goes_the_models_own_way() -> None:
    model = adapted(tiny("llama"))
    rows = texts([9, 20])
    wanted = plain_step(model, rows)
    install(model, "none")
    assert plain_step(model, rows)[0] == wanted[0]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY),
            "model type 'gpt2' is not one of llama, mistral, qwen2, qwen3",
        ),
        (
            transformers.MistralConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                sliding_window=16,
            ),
            "it has sliding-window attention",
        ),
    ],
)
def test_models_without_fused_layers_say_why(config: Any, reason: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert (
        why_not_fused(attach_lora(model, r=2, alpha=2, dropout=0.0, targets="all-linear")) == reason
    )

"""Packs through fused layers against the model's own modules, in float32."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, logprobs, model_of, one_pack, queries, tiny

from qlora_harness.fused import layer, ops
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.facts import count_parameters
from qlora_harness.score.packed_forward import PackedModel
from qlora_harness.score.prefix_tree import Pack, Query

TARGETS = [None, "all-linear", "q_proj,v_proj", "o_proj,down_proj"]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("quantised", [False, True], ids=["full", "nf4"])
@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_packs_equal_the_models_own_modules(
    kind: str, keys: int, quantised: bool, targets: str | None
) -> None:
    model = model_of(kind, quantised, keys, targets)
    pack = one_pack(queries(9))
    expected = logprobs(model, pack, fused=False)
    assert FusedDecoder.reason_against(model) is None
    assert logprobs(model, pack) == pytest.approx(expected, abs=1e-5)


def test_an_mlp_computes_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pack = model_of("qwen2", False, 2, "all-linear"), one_pack(queries(9))
    expected = logprobs(model, pack)
    monkeypatch.setattr(layer, "_CPU_ROWS", 5)
    assert logprobs(model, pack) == pytest.approx(expected, abs=1e-6)


def test_an_adapter_is_seen() -> None:
    """The tolerance above tells the models apart."""
    pack = one_pack(queries(9))
    scores = [logprobs(model_of("llama", False, 2, targets), pack) for targets in TARGETS]
    for one, other in combinations(scores, 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-2


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("quantised", [False, True], ids=["full", "nf4"])
def test_the_models_own_way_gives_the_same_numbers_afterwards(
    quantised: bool, targets: str | None
) -> None:
    model = model_of("llama", quantised, 2, targets)
    ids = torch.arange(1, 31).view(2, 15)
    count = count_parameters(model)
    with torch.no_grad():
        before = model(ids).logits
        packed = PackedModel(model, torch.float32)
        assert torch.allclose(model(ids).logits, before, rtol=0, atol=1e-6)
        packed.start(one_pack(queries(3))).reads()
        assert torch.allclose(model(ids).logits, before, rtol=0, atol=1e-6)
    assert count_parameters(model) == count


def test_moved_weights_take_no_more_memory() -> None:
    model = model_of("llama", False, 2, None)

    def stored() -> int:
        storages = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
        }
        return sum(storages.values())

    before = stored()
    first = PackedModel(model, torch.float32)
    attention = model.model.layers[0].self_attn
    q, k = (m.weight.untyped_storage().data_ptr() for m in (attention.q_proj, attention.k_proj))
    assert q == k
    assert stored() == before
    # A second one moves them on; what the first computes stays the same.
    pack = one_pack(queries(3))
    expected = list(first.start(pack).reads().logprobs)
    assert logprobs(model, pack) == pytest.approx(expected, abs=1e-6)
    assert list(first.start(pack).reads().logprobs) == pytest.approx(expected, abs=1e-6)
    assert stored() == before


def reading(pack: Pack, tokens_read: list[int]) -> Pack:
    at = np.array(tokens_read, dtype=np.int32)
    tokens = (at * 7 + 3) % VOCABULARY
    return Pack(
        *(pack.tokens, pack.positions, pack.end, pack.segments),
        *(at, tokens.astype(np.int32), np.arange(len(at), dtype=np.int32)),
    )


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_behind_the_last_attention_only_what_is_read_is_computed(
    targets: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama", False, 2, targets)
    pack = one_pack(queries(9))
    size = len(pack.tokens)
    gated: list[int] = []
    swiglu = ops.swiglu

    def noted(gates: torch.Tensor, out: torch.Tensor, rounded: Any) -> None:
        gated.append(len(gates))
        swiglu(gates, out, rounded)

    monkeypatch.setattr(ops, "swiglu", noted)
    last, every = [size - 1], list(range(size))
    for tokens_read in (last, [0], every, every[::-1], [5, 2, 5, 5, size - 1, 2]):
        changed = reading(pack, tokens_read)
        expected = logprobs(model, changed, fused=False)
        assert not gated
        assert logprobs(model, changed) == pytest.approx(expected, abs=1e-5)
        assert gated == [size, len(set(tokens_read))]
        gated.clear()


def with_adapter(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    common: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    torch.manual_seed(1)
    model = get_peft_model(tiny("llama"), LoraConfig(**common | options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False).eval()


def with_two_adapters() -> Any:
    from peft import LoraConfig

    model = with_adapter()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    return model.eval()


def merged() -> Any:
    model = with_adapter()
    model.merge_adapter()
    return model


def partly_in_float16() -> Any:
    model = tiny("llama")
    model.model.layers[1].mlp.half()
    return model


def with_two_dropouts() -> Any:
    model = with_adapter(lora_dropout=0.1)
    layer = model.get_base_model().model.layers[1]
    layer.self_attn.q_proj.lora_dropout["default"].p = 0.2
    return model


REFUSED = {
    "dora": (lambda: with_adapter(use_dora=True), "its adapter is not one plain LoRA"),
    "bias": (
        lambda: with_adapter(target_modules=["q_proj"], lora_bias=True),
        "its adapter is not one plain LoRA",
    ),
    "two": (with_two_adapters, "its adapter is not one plain LoRA"),
    "merged": (merged, "its adapter is not one plain LoRA"),
    "ranks": (
        lambda: with_adapter(rank_pattern={"v_proj": 2}),
        "the ranks or scales of its adapter differ within a layer",
    ),
    "scales": (
        lambda: with_adapter(alpha_pattern={"v_proj": 2}),
        "the ranks or scales of its adapter differ within a layer",
    ),
    "dropout": (with_two_dropouts, "the dropout of its adapter differs within a layer"),
    "embedding": (
        lambda: with_adapter(target_modules=["q_proj", "embed_tokens"]),
        "it has an adapter outside its layers (embed_tokens)",
    ),
    "saved": (
        lambda: with_adapter(modules_to_save=["lm_head"]),
        "its adapter replaces a module (lm_head)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_adapters_that_are_not_fused_go_the_models_own_way(name: str) -> None:
    make, reason = REFUSED[name]
    model = make()
    assert FusedDecoder.reason_against(model) == reason
    query = Query([1, 2, 3], [4])
    (logprob,) = logprobs(model, one_pack([query]))
    with torch.no_grad():
        row = torch.log_softmax(model(torch.tensor([[1, 2, 3]])).logits[0, -1], dim=-1)
    assert logprob == pytest.approx(float(row[4]), abs=1e-4)


def test_weights_of_other_dtypes_are_not_fused() -> None:
    assert FusedDecoder.reason_against(partly_in_float16()) == (
        "its weights are neither 4-bit nor of its own dtype"
    )

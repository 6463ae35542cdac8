"""`qlora_adapter`: how the model is held, where its weights lie, and kernels built ahead."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOS, write_tokenizer
from peft.tuners.lora import LoraLayer
from scoring_runs import demo_prompts, score

from qlora_harness.model.adapter_folder import adapter_digest
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.packed_forward import PackedModel


def test_adapter_stays_unmerged_on_a_quantised_base(
    make_lm: Callable[..., QloraAdapterLM], adapter: Path
) -> None:
    import bitsandbytes

    lm = make_lm(peft=str(adapter), dequantize="never")
    layers = [m for m in lm.model.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 14
    for layer in layers:
        assert not layer.merged
        assert isinstance(layer.get_base_layer(), bitsandbytes.nn.Linear4bit)
        assert layer.get_base_layer().weight.quant_type == "nf4"
        assert layer.lora_A["default"].weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert not lm.model.training


def test_what_was_trained_is_what_is_scored(
    make_lm: Callable[..., QloraAdapterLM], tiny_llama: Path, adapter: Path
) -> None:
    info = make_lm(peft=str(adapter), dtype="auto", results_dir=None).get_model_info()
    assert info["base"] == str(tiny_llama)
    assert (info["quant"], info["double_quant"]) == ("nf4", True)
    assert info["model_dtype"] == "float32"
    assert info["peft_sha"] == adapter_digest(adapter)
    assert info["leading_bos"] == [BOS]


def test_softmax_is_float32_unless_asked_otherwise(
    make_lm: Callable[..., QloraAdapterLM],
) -> None:
    lm = make_lm(dtype="bfloat16")
    assert lm.softmax_dtype == torch.float32
    assert lm.get_model_info()["softmax_dtype"] == "float32"
    coarse = make_lm(dtype="bfloat16", softmax_dtype="bfloat16")
    assert coarse.softmax_dtype == torch.bfloat16
    prompts = demo_prompts(3)
    steps = torch.tensor(score(coarse, prompts))
    assert torch.equal(steps, steps.bfloat16().float())  # this is what makes ties
    fine = torch.tensor(score(lm, prompts))
    assert not torch.equal(fine, fine.bfloat16().float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stay_as_they_were_quantised_on_every_cpu(
    make_lm: Callable[..., QloraAdapterLM], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """With AVX512-BF16, bitsandbytes would repack the weights and round activations to bfloat16."""
    import bitsandbytes

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    lm = make_lm(quant="nf4", dtype=dtype, dequantize="never")
    layers = [m for m in lm.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_dtype_of_a_base_alone_on_a_cpu_is_float32(
    make_lm: Callable[..., QloraAdapterLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm = make_lm(dtype="auto")
    assert lm.get_model_info()["model_dtype"] == "float32"
    assert lm.get_model_info()["quant"] == "bf16"
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}


def test_parameters_are_counted_as_if_unpacked(make_lm: Callable[..., QloraAdapterLM]) -> None:
    packed = make_lm(quant="nf4").get_model_info()["model_num_parameters"]
    assert packed == make_lm(quant="bf16").get_model_info()["model_num_parameters"]


def test_tokenizer_that_adds_no_bos_is_scored_without(
    make_lm: Callable[..., QloraAdapterLM], tiny_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "no-bos"
    shutil.copytree(tiny_llama, base)
    write_tokenizer(base, adds_bos=False)
    lm = make_lm(pretrained=str(base))
    assert lm.tok_encode("Answer:")[0] != BOS
    assert lm.get_model_info()["leading_bos"] == []


def test_bos_that_was_asked_for_is_recorded(make_lm: Callable[..., QloraAdapterLM]) -> None:
    lm = make_lm(add_bos_token=False)
    assert lm.tok_encode("Answer:")[0] != BOS
    assert lm.get_model_info()["leading_bos"] == []


# Weights laid out for fused layers


def test_weights_are_moved_once(make_lm: Callable[..., QloraAdapterLM], adapter: Path) -> None:
    lm = make_lm(peft=str(adapter), quant="bf16")
    prompts = demo_prompts(2)
    weight = lm.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    before = weight.data_ptr()
    first = score(lm, prompts)
    moved = weight.data_ptr()
    assert moved != before
    assert score(lm, prompts) == first
    assert weight.data_ptr() == moved


@pytest.mark.parametrize("options", [{"kernels": "none"}, {"scoring": "hf"}])
def test_weights_stay_where_nothing_is_fused(
    make_lm: Callable[..., QloraAdapterLM], options: dict[str, str]
) -> None:
    lm = make_lm(**options)
    before = [p.data_ptr() for p in lm.model.parameters()]
    score(lm, demo_prompts(1))
    assert [p.data_ptr() for p in lm.model.parameters()] == before
    assert lm.session.settings_record()["fused_kernels"] is False


# Kernels that are built while texts are encoded


@pytest.mark.parametrize(
    ("device", "contexts", "processes", "expected"),
    [
        ("cuda", 32, 1, [512]),
        ("cuda", 31, 1, []),  # may be one short pack
        ("cuda", 0, 1, []),
        ("cuda", 32, 2, []),  # the length is agreed on later
        ("cpu", 32, 1, []),  # nothing is built
    ],
)
def test_kernels_are_built_ahead_for_many_texts_on_a_gpu(
    make_lm: Callable[..., QloraAdapterLM],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    contexts: int,
    processes: int,
    expected: list[int],
) -> None:
    lm = make_lm(pack_tokens=512)
    built: list[int] = []
    monkeypatch.setattr(PackedModel, "build_ahead", lambda self, size: built.append(size))
    monkeypatch.setattr(lm, "_device", torch.device(device))
    monkeypatch.setattr(lm, "_world_size", processes)
    lm._build_kernels_ahead([(f"text {n}", k) for n in range(contexts) for k in (" A", " B")])
    assert built == expected
    assert (lm._ahead is not None) is bool(expected)


def test_scoring_waits_for_kernels_also_after_an_error(
    make_lm: Callable[..., QloraAdapterLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    ahead = PackedModel(lm.model, torch.float32)
    waited: list[bool] = []
    monkeypatch.setattr(ahead, "wait", lambda: waited.append(True))
    monkeypatch.setattr(
        lm, "_build_kernels_ahead", lambda wanted: setattr(lm, "_ahead", (ahead, 8))
    )

    def fail(lm: Any, pairs: Any) -> None:
        raise KeyError("encoding")

    monkeypatch.setattr("qlora_harness.score.adapter_lm.encode_pairs", fail)
    with pytest.raises(KeyError, match="encoding"):
        lm._score_pairs([("a", " b")], None, True)
    assert waited == [True]
    assert lm._ahead is None


def test_model_that_was_begun_ahead_is_the_one_that_scores(
    make_lm: Callable[..., QloraAdapterLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    pairs = [("The sky is", " blue"), ("The sky is", " green"), ("Grass", " grows")]
    expected = lm._score_pairs(pairs, None, True)
    sizes: list[int] = []
    ahead = PackedModel(lm.model, torch.float32)

    def begin(wanted: Any) -> None:
        lm._ahead = ahead, 300
        ahead.build_ahead(300)

    start = PackedModel._start

    def noted(self: PackedModel, pack: Any, pad_to: int | None) -> Any:
        assert self is ahead
        sizes.append(max(len(pack.tokens), pad_to or 0))
        return start(self, pack, pad_to)

    monkeypatch.setattr(lm, "_build_kernels_ahead", begin)
    monkeypatch.setattr(PackedModel, "_start", noted)
    assert lm._score_pairs(pairs, None, True) == expected
    assert sizes[0] == 300
    assert len(sizes) == 2
    assert lm._ahead is None

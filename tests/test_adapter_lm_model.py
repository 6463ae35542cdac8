"""`qlora_adapter`: how the model is held, where its weights lie, and kernels built ahead."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOS, write_tokenizer
from peft.tuners.lora import LoraLayer
from scoring_runs import MakeLm, demo_prompts, score

from qlora_harness.model.adapter_folder import adapter_digest
from qlora_harness.score import session
from qlora_harness.score.packed_forward import PackedModel


def test_adapter_stays_unmerged_on_a_quantised_base(make_lm: MakeLm, adapter: Path) -> None:
    import bitsandbytes

    lm = make_lm(peft=str(adapter), dequantize="never")
    layers = [m for m in lm.model.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 14
    for layer in layers:
        assert not layer.merged
        assert isinstance(layer.get_base_layer(), bitsandbytes.nn.Linear4bit)
        assert layer.get_base_layer().weight.quant_type == "nf4"  # type: ignore[union-attr]
        assert layer.lora_A["default"].weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert not lm.model.training


def test_what_was_trained_is_what_is_scored(
    make_lm: MakeLm, tiny_llama: Path, adapter: Path
) -> None:
    info = make_lm(peft=str(adapter), dtype="auto", results_dir=None).get_model_info()
    assert info["base"] == str(tiny_llama)
    assert (info["quant"], info["double_quant"]) == ("nf4", True)
    assert (info["model_dtype"], info["softmax_dtype"]) == ("float32", "float32")
    assert info["peft_sha"] == adapter_digest(adapter)
    assert info["leading_bos"] == [BOS]
    # Parameters are counted as if unpacked.
    bases = [make_lm(quant=quant).get_model_info() for quant in ("nf4", "bf16")]
    assert bases[0]["model_num_parameters"] == bases[1]["model_num_parameters"]


def test_softmax_is_float32_by_default(make_lm: MakeLm) -> None:
    prompts = demo_prompts(3)
    for options, dtype in (({}, torch.float32), ({"softmax_dtype": "bfloat16"}, torch.bfloat16)):
        lm = make_lm(dtype="bfloat16", **options)
        assert lm.softmax_dtype == dtype
        values = torch.tensor(score(lm, prompts))
        in_steps = torch.equal(values, values.bfloat16().float())  # this is what makes ties
        assert in_steps is (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stay_as_they_were_quantised_on_every_cpu(
    make_lm: MakeLm, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """With AVX512-BF16, bitsandbytes would repack the weights and round activations to bfloat16."""
    import bitsandbytes

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    lm = make_lm(quant="nf4", dtype=dtype, dequantize="never")
    layers = [m for m in lm.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_dtype_of_a_base_alone_on_a_cpu_is_float32(
    make_lm: MakeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm = make_lm(dtype="auto")
    assert lm.get_model_info()["model_dtype"] == "float32"
    assert lm.get_model_info()["quant"] == "bf16"
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}


def test_bos_is_recorded_as_it_is_scored(make_lm: MakeLm, tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "no-bos"))
    write_tokenizer(base, adds_bos=False)
    for lm in (make_lm(pretrained=str(base)), make_lm(add_bos_token=False)):
        assert lm.tok_encode("Answer:")[0] != BOS
        assert lm.get_model_info()["leading_bos"] == []


# Weights laid out for fused layers


def test_weights_are_moved_once(make_lm: MakeLm, adapter: Path) -> None:
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
def test_weights_stay_where_nothing_is_fused(make_lm: MakeLm, options: dict[str, str]) -> None:
    lm = make_lm(**options)
    before = [p.data_ptr() for p in lm.model.parameters()]
    score(lm, demo_prompts(1))
    assert [p.data_ptr() for p in lm.model.parameters()] == before
    assert lm.session.settings_record()["fused_kernels"] is False


# Kernels that are built while texts are encoded

PAIRS = [(f"text {n}", letter) for n in range(32) for letter in (" A", " B")]


def score_pairs(lm: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS]
    return lm.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize(
    ("overlaps", "processes", "expected"),
    [
        (True, 1, 1),
        (True, 2, 0),  # all processes encode at once
        (False, 1, 0),  # a CPU has no kernels to build
    ],
)
def test_kernels_are_built_ahead_on_a_gpu(
    make_lm: MakeLm, monkeypatch: pytest.MonkeyPatch, overlaps: bool, processes: int, expected: int
) -> None:
    class Begun(Exception):
        """Raised where texts are encoded, by when kernels are being built."""

    def encode(lm: Any, pairs: Any) -> None:
        raise Begun

    lm = make_lm(pack_tokens=512)
    begun: list[PackedModel] = []
    waited: list[bool] = []
    monkeypatch.setattr(PackedModel, "overlaps", overlaps)
    monkeypatch.setattr(PackedModel, "build_ahead", lambda self: begun.append(self))
    monkeypatch.setattr(PackedModel, "wait", lambda self: waited.append(True))
    monkeypatch.setattr(type(lm), "world_size", processes)
    monkeypatch.setattr(lm.session, "_gather", lambda value: [value] * processes)
    monkeypatch.setattr(session, "encode_pairs", encode)
    with pytest.raises(Begun):
        score_pairs(lm)
    assert len(begun) == expected
    assert waited == [True]  # also after an error


def test_model_that_was_begun_ahead_is_the_one_that_scores(
    make_lm: MakeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm(pack_tokens=512)
    expected = score_pairs(lm)
    starts: list[tuple[PackedModel, int]] = []
    start = PackedModel._start

    def noted(self: PackedModel, pack: Any) -> Any:
        starts.append((self, len(pack.tokens)))
        return start(self, pack)

    monkeypatch.setattr(PackedModel, "overlaps", True)
    monkeypatch.setattr(PackedModel, "_start", noted)
    monkeypatch.setattr(session, "_PART", 30)  # texts that a GPU would compute meanwhile
    logprobs = [logprob for logprob, _ in score_pairs(lm)]
    assert logprobs == pytest.approx([logprob for logprob, _ in expected], abs=1e-5)
    assert {model for model, _ in starts} == {lm.session._packed}
    first, *others = [size for _, size in starts]
    assert first == 1 < min(others)  # built ahead, and the packs
    assert len(others) == 3

"""`qlora_adapter`: exact log-probabilities, by hand, as HFLM has them, and through fused layers."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOS, LETTER_IDS, token_ids
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from scoring_runs import (
    ALPHA,
    RANK,
    WEIGHTS,
    MakeLm,
    demo_prompts,
    evaluate,
    loglikelihood_requests,
    refused,
    score,
)
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from qlora_harness.errors import DataError, ResultsError
from qlora_harness.fused import model as fused_model
from qlora_harness.fused.bordered import Projection
from qlora_harness.model import plain_lora
from qlora_harness.model.source import find_base

# A hand-written reference: weights by hand, ids by hand, one plain forward pass in float32


def quantised_and_back(weight: torch.Tensor, quant: str) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, quant_type=quant, compress_statistics=True)
    state.dtype = torch.float32  # the values as they are, not rounded to bfloat16
    return dequantize_4bit(packed, state)


def reference_model(folder: Path, quant: str, adapter: Path | None) -> LlamaForCausalLM:
    """The base in float32 with quantisation and adapter worked into its weights."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    lora = load_file(adapter / WEIGHTS) if adapter else {}
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    assert len(layers) == 2 * 7
    assert len(lora) == (2 * len(layers) if adapter else 0)
    weights = {
        name: layer.weight.data.float()
        if quant == "bf16"
        else quantised_and_back(layer.weight.data, quant)
        for name, layer in layers.items()
    }
    model.float()
    for name, layer in layers.items():
        if lora:
            prefix = f"base_model.model.{name}"
            update = lora[f"{prefix}.lora_B.weight"] @ lora[f"{prefix}.lora_A.weight"]
            weights[name] = weights[name] + ALPHA / RANK * update
        layer.weight.data = weights[name]
    return model.eval()


def reference_logprobs(model: LlamaForCausalLM, prompt: str) -> list[float]:
    ids = [BOS, *token_ids(f" {prompt}")]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return [logprobs[LETTER_IDS[f" {letter}"]].item() for letter in "ABCD"]


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("quant", ["bf16", "nf4", "fp4"])
def test_logprobs_of_a_prompt_are_those_worked_out_by_hand(
    make_lm: MakeLm, tiny_llama: Path, adapter: Path, quant: str, with_adapter: bool
) -> None:
    (prompt,) = demo_prompts(1)
    model = reference_model(tiny_llama, quant, adapter if with_adapter else None)
    expected = reference_logprobs(model, prompt)
    lm = make_lm(quant=quant, **({"peft": str(adapter)} if with_adapter else {}))
    assert lm.tok_encode(prompt) == [BOS, *token_ids(f" {prompt}")]
    assert score(lm, [prompt]) == pytest.approx(expected, abs=1e-5)


def test_quantisation_and_adapter_each_change_the_numbers(tiny_llama: Path, adapter: Path) -> None:
    """The tolerance above tells the six models apart."""
    (prompt,) = demo_prompts(1)
    logprobs = [
        reference_logprobs(reference_model(tiny_llama, quant, peft), prompt)
        for quant in ("bf16", "nf4", "fp4")
        for peft in (None, adapter)
    ]
    for one, other in combinations(logprobs, 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-4


@pytest.mark.parametrize("batch_size", [1, 3])
def test_packs_equal_batches_of_any_size(make_lm: MakeLm, adapter: Path, batch_size: int) -> None:
    prompts = demo_prompts(4)
    packed = score(make_lm(peft=str(adapter)), prompts)
    batches = score(make_lm(peft=str(adapter), batch_size=batch_size, scoring="hf"), prompts)
    assert batches == pytest.approx(packed, abs=1e-5)


@pytest.mark.parametrize("scoring", ["packed", "hf"])
@pytest.mark.parametrize(("continuation", "count"), [("", 0), ("x" * 17, 17)])
def test_continuations_must_have_tokens_and_fit_the_window(
    make_lm: MakeLm, scoring: str, continuation: str, count: int
) -> None:
    lm = make_lm(max_length=16, scoring=scoring)
    request = Instance("loglikelihood", {}, ("Q:", continuation), 0)
    message = refused(lambda: lm.loglikelihood([request]), DataError)
    assert f"{count} tokens" in message
    assert "1 to 16" in message


def test_logprobs_of_a_real_model_are_those_worked_out_by_hand(
    make_lm: MakeLm, smollm2: str
) -> None:
    """SmolLM2 ties its head to its embedding, and its tokenizer adds no BOS."""
    (prompt,) = demo_prompts(1)
    folder = find_base(smollm2).path
    ids = AutoTokenizer.from_pretrained(folder).encode(prompt)
    letters = [AutoTokenizer.from_pretrained(folder).encode(f" {x}") for x in "ABCD"]
    assert [len(letter) for letter in letters] == [1, 1, 1, 1]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], dim=-1)
    expected = [logprobs[letter].item() for (letter,) in letters]
    lm = make_lm(pretrained=smollm2)
    assert score(lm, [prompt]) == pytest.approx(expected, abs=1e-4)
    assert lm.get_model_info()["leading_bos"] == []


# Equal to HFLM


def hf_lm(tiny_llama: Path, quant: str, adapter: Path | None) -> HFLM:
    if quant == "bf16":
        peft = str(adapter) if adapter else None
        return HFLM(
            str(tiny_llama), peft=peft, dtype="float32", softmax_dtype="float32", device="cpu",
            batch_size=4,
        )  # fmt: skip
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = LlamaForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes multiplies in bfloat16 on CPUs that can.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))  # type: ignore[assignment]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return HFLM(model, tokenizer=tokenizer, softmax_dtype="float32", batch_size=4)


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("quant", ["bf16", "nf4"])
def test_all_three_kinds_of_request_are_answered_as_hflm_does(
    make_lm: MakeLm, tiny_llama: Path, adapter: Path, quant: str, with_adapter: bool
) -> None:
    ours = make_lm(quant=quant, **({"peft": str(adapter)} if with_adapter else {}))
    theirs = hf_lm(tiny_llama, quant, adapter if with_adapter else None)
    requests = loglikelihood_requests(demo_prompts(2))
    requests += [
        Instance("loglikelihood", {}, pair, 0)
        for pair in [("", "Earth"), ("Which planet?", " Mars or Venus"), ("2 + 2 =", " 4")]
    ]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    scores = ours.loglikelihood(requests, disable_tqdm=True)
    assert [x for x, _ in scores] == pytest.approx([x for x, _ in expected], abs=1e-5)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    settings = {"until": ["x"], "max_gen_toks": 6, "do_sample": False}
    generation = [
        Instance("generate_until", {}, (text, settings), 0) for text in ("Answer:", "The planet")
    ]
    assert ours.generate_until(generation, disable_tqdm=True) == theirs.generate_until(
        generation, disable_tqdm=True
    )
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("Hello", "x" * 3000)]
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-4
    )


def test_sample_is_verified_through_the_plain_path(
    make_lm: MakeLm, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    lm = make_lm(verify=5)
    evaluate(lm, manager, limit=1)
    assert lm.session.verification.largest < 1e-4  # type: ignore[union-attr]
    assert any(m.startswith("verified 5 texts") for m in caplog.messages)


@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_broken_path_is_not_verified_and_leaves_nothing_behind(
    make_lm: MakeLm, manager: TaskManager, adapter: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, kernels: str,
) -> None:  # fmt: skip
    # Both paths lose the adapter, as one that replaces too much would.
    def without_adapter(module: Any) -> Projection:
        return Projection(getattr(module, "base_layer", module), None, None, 0.0, 0.0)

    monkeypatch.setattr(fused_model, "_projection", without_adapter)
    monkeypatch.setattr(
        plain_lora, "_fast_forward", lambda module, dtype: module.base_layer.forward
    )
    lm = make_lm(peft=str(adapter), verify=8, kernels=kernels)
    with pytest.raises(ResultsError):
        evaluate(lm, manager, limit=2)
    assert lm.session.verification.mean > 1e-2  # type: ignore[union-attr]
    assert not list((tmp_path / "records").glob("*mmlu_progress*"))


def test_architecture_that_cannot_be_packed_goes_the_plain_way(
    make_lm: MakeLm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qlora_harness.score import scoring_path

    prompts = demo_prompts(2)
    expected = score(make_lm(), prompts)
    monkeypatch.setattr(scoring_path, "why_unsupported", lambda config: "it is odd")
    assert score(make_lm(), prompts) == pytest.approx(expected, abs=1e-5)
    assert "scoring with HFLM's batches: it is odd" in caplog.messages


# Through fused layers, and through transformers' own modules


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize(
    ("quant", "dequantize"), [("bf16", "auto"), ("nf4", "auto"), ("nf4", "never")]
)
def test_fused_layers_give_the_numbers_of_the_models_own_modules(
    make_lm: MakeLm, adapter: Path, quant: str, dequantize: str, with_adapter: bool
) -> None:
    prompts = demo_prompts(3)
    options = {"quant": quant, "dequantize": dequantize}
    options |= {"peft": str(adapter)} if with_adapter else {}
    own, fused = make_lm(**options, kernels="none"), make_lm(**options)
    assert [lm.session.settings_record()["fused_kernels"] for lm in (own, fused)] == [False, True]
    expected = score(own, prompts)
    info, identity = fused.get_model_info(), fused.session.identity()
    assert score(fused, prompts) == pytest.approx(expected, abs=1e-5)
    assert fused.get_model_info() == info
    assert fused.session.identity() == identity
    # HFLM's own path over the same weights, which packs have moved.
    pairs = [request.args for request in loglikelihood_requests(prompts)]
    encoded = [(pair, *fused._encode_pair(*pair)) for pair in pairs]
    plain = [logprob for logprob, _ in fused.score_plainly(encoded, show_progress=False)]
    assert plain == pytest.approx(expected, abs=1e-5)

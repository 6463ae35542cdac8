"""`qlora_adapter`: an adapter that is damaged or does not fit the base is refused in one line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scoring_runs import RANK, WEIGHTS, another_base, demo_prompts, refused, score
from transformers import AutoTokenizer

from qlora_harness.errors import AdapterError, HarnessError, SettingsError
from qlora_harness.score.adapter_lm import QloraAdapterLM

# The adapter alone


def test_untrained_adapter_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    weights = load_file(own_adapter / WEIGHTS)
    zero = {n: torch.zeros_like(v) if "lora_B" in n else v for n, v in weights.items()}
    save_file(zero, own_adapter / WEIGHTS)
    assert refused(lambda: make_lm(peft=str(own_adapter)), AdapterError) == (
        f"{own_adapter / WEIGHTS}: every trained tensor equals its start, so the adapter was never "
        "trained. Name the adapter of a completed run."
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_adapter_with_a_non_finite_weight_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path, value: float
) -> None:
    weights = load_file(own_adapter / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    weights[name][0, 0] = value
    save_file(weights, own_adapter / WEIGHTS)
    assert refused(lambda: make_lm(peft=str(own_adapter)), AdapterError) == (
        f"{own_adapter / WEIGHTS}, tensor {name}: non-finite values. Train the adapter anew."
    )


def test_damaged_adapter_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    content = (own_adapter / WEIGHTS).read_bytes()
    (own_adapter / WEIGHTS).write_bytes(content[: len(content) // 2])
    text = refused(lambda: make_lm(peft=str(own_adapter)), AdapterError)
    assert text.startswith(f"{own_adapter / WEIGHTS} is damaged (")
    assert text.endswith("). Save the adapter anew.")


def test_pickled_adapter_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    (own_adapter / WEIGHTS).rename(own_adapter / "adapter_model.bin")
    assert refused(lambda: make_lm(peft=str(own_adapter)), AdapterError) == (
        f"{own_adapter / 'adapter_model.bin'} is pickled, and unpickling runs code. "
        f"Convert it to {WEIGHTS}."
    )


def test_adapter_with_a_broken_tokenizer_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    (own_adapter / "tokenizer.json").write_text("{")
    text = refused(lambda: make_lm(peft=str(own_adapter)), HarnessError)
    assert str(own_adapter) in text


# The adapter and its base


def test_adapter_with_a_missing_weight_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    weights = load_file(own_adapter / WEIGHTS)
    del weights["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(weights, own_adapter / WEIGHTS)
    assert refused(lambda: make_lm(peft=str(own_adapter)), AdapterError) == (
        f"peft={own_adapter} does not fit this base model: 1 adapter weights missing, 0 unexpected "
        "(first: base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight). "
        "It was trained on tiny-llama; give that as pretrained=."
    )


def test_adapter_with_an_unexpected_weight_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    weights = load_file(own_adapter / WEIGHTS)
    weights["base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"] = torch.ones(RANK, 64)
    save_file(weights, own_adapter / WEIGHTS)
    text = refused(lambda: make_lm(peft=str(own_adapter)), AdapterError)
    assert "0 adapter weights missing, 1 unexpected (first: " in text
    assert "layers.2.mlp.up_proj.lora_A" in text


def test_adapter_of_another_shape_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    config = json.loads((own_adapter / "adapter_config.json").read_text())
    (own_adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 2 * RANK}))
    text = refused(lambda: make_lm(peft=str(own_adapter)), AdapterError)
    assert text.startswith(f"peft={own_adapter} does not fit this base model (")
    assert "size mismatch" in text


def test_adapter_for_other_layers_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    config = json.loads((own_adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["c_attn"]
    (own_adapter / "adapter_config.json").write_text(json.dumps(config))
    text = refused(lambda: make_lm(peft=str(own_adapter)), AdapterError)
    assert text.startswith(f"peft={own_adapter} does not fit this base model (")


@pytest.mark.parametrize(
    "layer", ["model.embed_tokens", "model.norm", "model.layers.1.self_attn.q_proj", "lm_head"]
)
def test_base_with_other_weights_is_refused(
    make_lm: Callable[..., QloraAdapterLM],
    adapter: Path,
    tiny_llama: Path,
    tmp_path: Path,
    layer: str,
) -> None:
    """Of a base with a merged adapter, for example, only linear layers differ."""
    base = another_base(
        tiny_llama, tmp_path / "other", lambda model: model.get_submodule(layer).weight.mul_(2)
    )
    assert refused(lambda: make_lm(peft=str(adapter), pretrained=base), AdapterError) == (
        f"pretrained={base} is not the base model that peft={adapter} was trained on "
        f"({tiny_llama}, revision None): its weights differ. "
        "Give the recorded base, or leave pretrained= out."
    )


def test_copy_of_the_base_elsewhere_is_accepted_in_every_quantisation(
    make_lm: Callable[..., QloraAdapterLM], adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    base = str(shutil.copytree(tiny_llama, tmp_path / "copy"))
    for quant in ("nf4", "fp4", "bf16"):
        for dtype in ("float32", "bfloat16"):
            make_lm(peft=str(adapter), pretrained=base, quant=quant, dtype=dtype)


def test_base_beside_other_weight_files_is_accepted(
    make_lm: Callable[..., QloraAdapterLM], adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """A whole download of a Hub repository may hold weights that transformers never reads."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "download"))
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, base / "consolidated.safetensors")
    make_lm(peft=str(adapter), pretrained=str(base))


def test_tokenizer_with_more_tokens_than_the_base_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(own_adapter)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(own_adapter)
    text = refused(lambda: make_lm(peft=str(own_adapter)), AdapterError)
    assert text == (
        f"the tokenizer beside peft={own_adapter} has 359 tokens, the base model 358. "
        "This adapter was trained with added tokens, which are not supported."
    )
    base = tmp_path / "padded"
    shutil.copytree(tiny_llama, base)
    tokenizer.save_pretrained(base)
    text = refused(lambda: make_lm(pretrained=str(base)), HarnessError)
    assert str(base) in text
    assert "adapter" not in text


def test_foreign_adapter_is_scored_once_base_and_quantisation_are_given(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path, tiny_llama: Path
) -> None:
    expected = score(make_lm(peft=str(own_adapter)), demo_prompts(1))
    (own_adapter / "qlora_harness.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own_adapter / name).unlink()
    text = refused(lambda: make_lm(peft=str(own_adapter)), SettingsError)
    assert text.endswith("Give pretrained= and quant= in --model_args.")
    lm = make_lm(peft=str(own_adapter), pretrained=str(tiny_llama), quant="nf4")
    assert score(lm, demo_prompts(1)) == pytest.approx(expected, abs=1e-6)

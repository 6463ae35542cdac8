"""Base models: read or refused in one line, and held as `quant` says."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY_SIZE
from safetensors.torch import load_file, save_file

from qlora_harness.benchmark.random_model import SHAPES, write_random_model
from qlora_harness.errors import ModelError
from qlora_harness.model.base import (
    dequantise,
    load_base,
    mixes_tokens,
    unquantised_share,
    weights_fingerprint,
)
from qlora_harness.model.facts import count_parameters, is_out_of_memory, parameter_dtypes
from qlora_harness.model.source import find_base, load_tokenizer
from qlora_harness.settings import Quant

WEIGHTS = "model.safetensors"
# One linear layer of each kind in each of the two layers, by the shapes of "tiny".
QUANTISED = 2 * (64 * 64 + 32 * 64 + 32 * 64 + 64 * 64 + 3 * 128 * 64)
# Embedding, output head, two norms a layer and the last one.
NOT_QUANTISED = 2 * VOCABULARY_SIZE * 64 + 5 * 64


def load(
    folder: Path | str, quant: str, compute_dtype: str = "float32", double_quant: bool = True
) -> Any:
    return load_base(
        find_base(str(folder)), quant=Quant(quant), double_quant=double_quant,
        compute_dtype=compute_dtype, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str = "model") -> Path:
        return Path(shutil.copytree(tiny_llama, tmp_path / name))

    return make


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- named and refused ----------------------------------------------------------------------------


def test_record_of_a_folder(tiny_llama: Path) -> None:
    assert find_base(str(tiny_llama)).record() == {
        "name": str(tiny_llama), "revision": None, "commit": None, "random_weights": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["folder", "smollm2"])
def test_revision_of_what_is_not_on_the_hub_is_refused(tiny_llama: Path, name: str) -> None:
    name = str(tiny_llama) if name == "folder" else name
    line = refusal(lambda: find_base(name, "v2"))
    assert line.startswith(f"--model: {name!r} is not on the Hub and has no revision 'v2'")


def test_smollm2_is_made_once_and_is_not_random(smollm2: str) -> None:
    source = find_base(smollm2)
    assert (source.name, source.random_weights) == ("smollm2", False)
    config = json.loads((Path(source.path) / "config.json").read_text())
    assert "quantization_config" not in config
    written = (Path(source.path) / WEIGHTS).stat().st_mtime_ns
    assert find_base(smollm2) == source
    assert (Path(source.path) / WEIGHTS).stat().st_mtime_ns == written


def test_missing_folder_and_folder_without_config(tmp_path: Path) -> None:
    line = refusal(lambda: find_base(str(tmp_path / "nope")))
    assert line.startswith(f"--model: {tmp_path / 'nope'} does not exist")
    assert f"{tmp_path} holds no config.json" in refusal(lambda: find_base(str(tmp_path)))


def test_hub_that_cannot_be_reached() -> None:
    line = refusal(lambda: find_base("someone/llama"))
    assert line.startswith("--model: 'someone/llama' can't be loaded (")
    assert "--revision" in line


def test_gated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    def gated(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\n401 Client Error.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", gated)
    line = refusal(lambda: find_base("meta-llama/Llama-2-7b-hf"))
    assert line.startswith("--model: 'meta-llama/Llama-2-7b-hf' is gated on the Hub")
    assert "hf auth login" in line


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "nope"}'])
def test_unreadable_config_is_not_called_gated(copy: Callable[[str], Path], config: str) -> None:
    folder = copy("run-401")
    (folder / "config.json").write_text(config)
    line = refusal(lambda: find_base(str(folder)))
    assert line.startswith(f"--model: '{folder}' can't be loaded (")
    assert "gated" not in line


def test_missing_tokenizer(copy: Callable[[str], Path]) -> None:
    folder = copy("model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    line = refusal(lambda: load_tokenizer(find_base(str(folder))))
    assert line.startswith(f"the tokenizer of --model: '{folder}' can't be loaded (")


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_missing_or_damaged_weights_are_refused_not_filled_with_noise(
    copy: Callable[[str], Path], quant: str
) -> None:
    folder, name = copy("model"), "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {name: torch.zeros(3, 3)}, folder / WEIGHTS, {"format": "pt"})
    assert f"'{folder}' can't be loaded (" in refusal(lambda: load(folder, "bf16"))
    del weights[name]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    assert name in refusal(lambda: load(folder, quant))
    (folder / WEIGHTS).write_bytes(b"x" * 100)
    assert f"'{folder}' can't be loaded (" in refusal(lambda: load(folder, quant))
    (folder / WEIGHTS).unlink()
    assert f"'{folder}' can't be loaded (" in refusal(lambda: load(folder, quant))


# --- held as named --------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_4_bit_arms_hold_every_linear_layer_but_the_head_in_4_bits(
    tiny_llama: Path, quant: str
) -> None:
    import bitsandbytes

    model = load(tiny_llama, quant)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    in_4_bits = {n for n, m in linear.items() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert set(linear) - in_4_bits == {"lm_head"}
    assert len(in_4_bits) == 14
    for name in in_4_bits:
        weight = linear[name].weight
        assert weight.dtype == torch.uint8
        state = weight.quant_state  # type: ignore[attr-defined]
        assert (state.quant_type, state.nested, state.blocksize) == (quant, True, 64)
        assert linear[name].compute_dtype == torch.float32
    assert parameter_dtypes(model) == {"float32": NOT_QUANTISED, "uint8": QUANTISED // 2}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.training, model.config.use_cache) == (False, False)


def test_int8_holds_every_linear_layer_but_the_head_in_8_bits(tiny_llama: Path) -> None:
    saved = load_file(tiny_llama / WEIGHTS)
    model = load(tiny_llama, "int8")
    assert parameter_dtypes(model) == {"float32": NOT_QUANTISED, "int8": QUANTISED}
    assert count_parameters(model) == NOT_QUANTISED + QUANTISED
    assert unquantised_share(model) == 0.0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    weight = model.model.layers[1].mlp.up_proj.weight
    original = saved["model.layers.1.mlp.up_proj.weight"].float()
    scale = original.abs().amax(dim=1, keepdim=True)
    held = weight.data.float() * weight.SCB[:, None] / 127
    assert ((held - original).abs() <= scale * (0.5 / 127 + 2**-10)).all()  # scaled in float16
    assert not torch.equal(held, original)


def test_int8_result_of_a_token_depends_on_the_others(tiny_llama: Path) -> None:
    """Why there are no packs: each column with an outlier of any token is computed in 16 bits."""
    model = load(tiny_llama, "int8")
    layer = model.model.layers[1].mlp.up_proj
    torch.manual_seed(0)
    tokens = torch.randn(2, 64)
    alone = layer(tokens[:1])
    assert torch.equal(layer(tokens)[:1], alone)
    tokens[1, 5] = 60.0
    assert not torch.allclose(layer(tokens)[:1], alone, rtol=0, atol=1e-5)
    assert mixes_tokens(model)
    assert not mixes_tokens(load(tiny_llama, "nf4"))


@pytest.mark.skipif(find_spec("hqq") is None, reason="the package hqq is not installed")
def test_hqq_holds_every_linear_layer_but_the_head_in_4_bits(tiny_llama: Path) -> None:
    saved = load_file(tiny_llama / WEIGHTS)
    model = load(tiny_llama, "hqq")
    assert parameter_dtypes(model) == {"float32": NOT_QUANTISED, "uint8": QUANTISED // 2}
    assert count_parameters(model) == NOT_QUANTISED + QUANTISED
    assert unquantised_share(model) == 0.0
    layer = model.model.layers[1].mlp.up_proj
    original = saved["model.layers.1.mlp.up_proj.weight"].float()
    assert all(len(group.unique()) <= 16 for group in layer.dequantize().reshape(-1, 64))
    assert (layer.dequantize() - original).norm() < 0.15 * original.norm()
    tokens = torch.randn(3, 64)
    # A token does not depend on others, so packs are exact.
    assert torch.allclose(layer(tokens)[:1], layer(tokens[:1]), atol=1e-6)


def test_nf4_values_are_near_the_checkpoint_and_on_the_nf4_grid(tiny_llama: Path) -> None:
    import bitsandbytes.functional as functional

    saved = load_file(tiny_llama / WEIGHTS)["model.layers.1.mlp.up_proj.weight"].float()
    weight = load(tiny_llama, "nf4", double_quant=False).model.layers[1].mlp.up_proj.weight
    assert weight.quant_state.nested is False
    held = functional.dequantize_4bit(weight.data, weight.quant_state).float()
    assert held.shape == saved.shape
    # Per block of 64: at most 16 values, and none further off than half of NF4's widest gap.
    blocks, originals = held.reshape(-1, 64), saved.reshape(-1, 64)
    assert max(len(block.unique()) for block in blocks) <= 16
    scale = originals.abs().amax(dim=1, keepdim=True)
    assert ((blocks - originals).abs() <= 0.16 * scale).all()
    assert not torch.equal(held, saved)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_bf16_arm_has_the_values_of_the_checkpoint(tiny_llama: Path, compute_dtype: str) -> None:
    saved = load_file(tiny_llama / WEIGHTS)
    model = load(tiny_llama, "bf16", compute_dtype)
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(saved)
    for name, value in parameters.items():
        assert value.dtype == getattr(torch, compute_dtype)
        assert torch.equal(value.to(torch.bfloat16), saved[name])
    assert parameter_dtypes(model) == {compute_dtype: NOT_QUANTISED + QUANTISED}
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert (model.training, model.config.use_cache) == (False, False)


def test_base_without_4_bit_layers_needs_no_bitsandbytes(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing it takes seconds."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    model = load(tiny_llama, "bf16", "float32")
    assert parameter_dtypes(model) == {"float32": QUANTISED + NOT_QUANTISED}


def test_float32_checkpoint_is_rounded_to_bf16_first(
    copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy("model")
    name = "model.layers.0.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(0)
    fine = torch.randn(128, 64, generator=generator)
    weights = {n: w.float() for n, w in load_file(folder / WEIGHTS).items()} | {name: fine}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))
    held = dict(load(folder, "bf16", "float32").named_parameters())[name]
    assert f"float32 weights of {folder}" in caplog.text
    assert held.dtype == torch.float32
    assert torch.equal(held, fine.to(torch.bfloat16).float())
    assert not torch.equal(held, fine)


def test_tied_weights_stay_tied(smollm2: str) -> None:
    model = load(smollm2, "nf4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_dequantised_layers_compute_the_same_numbers(tiny_llama: Path, compute_dtype: str) -> None:
    import bitsandbytes

    ids = torch.tensor([[1, 300, 301, 302, 303, 304]])
    model = load(tiny_llama, "nf4", compute_dtype)
    head = model.lm_head.weight
    with torch.no_grad():
        before = model(ids).logits
        assert dequantise(model, compute_dtype) == 14
        after = model(ids).logits
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules())
    assert torch.allclose(after, before, atol=1e-5 if compute_dtype == "float32" else 2e-2)
    assert parameter_dtypes(model) == {compute_dtype: NOT_QUANTISED + QUANTISED}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is head
    assert dequantise(model, compute_dtype) == 0


# --- the fingerprint ------------------------------------------------------------------------------


def test_fingerprint_is_that_of_the_model_not_of_its_quantisation(
    tiny_llama: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    prints = {
        weights_fingerprint(load(tiny_llama, quant, dtype))
        for quant in ("nf4", "fp4", "bf16")
        for dtype in ("float32", "bfloat16")
    }
    assert len(prints) == 1
    (one,) = prints
    assert re.fullmatch("sha256:[0-9a-f]{64}", one)  # type: ignore[arg-type]

    other = tmp_path / "other"
    write_random_model(
        other, shape="tiny", tokenizer=str(tiny_tokenizer), vocab_size=VOCABULARY_SIZE, seed=1
    )
    assert weights_fingerprint(load(other, "nf4")) != one
    assert weights_fingerprint(load(other, "bf16")) == weights_fingerprint(load(other, "nf4"))


def test_fingerprint_is_that_of_the_values_not_of_the_file(
    tiny_llama: Path, copy: Callable[[str], Path]
) -> None:
    folder = copy("float32")
    weights = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    own = weights_fingerprint(load(tiny_llama, "nf4"))
    assert weights_fingerprint(load(folder, "nf4")) == own
    # Merging an adapter changes linear layers only, which 4-bit arms hold in another form.
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(32, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    weights["model.layers.1.self_attn.v_proj.weight"] += 0.01 * update
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    assert weights_fingerprint(load(folder, "nf4")) != own


# --- random models and memory errors --------------------------------------------------------------


def test_random_model_is_seeded_and_says_so(
    tiny_llama: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    write_random_model(
        again, shape="tiny", tokenizer=str(tiny_tokenizer), vocab_size=VOCABULARY_SIZE
    )
    first, second = load_file(tiny_llama / WEIGHTS), load_file(again / WEIGHTS)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.dtype == torch.bfloat16 for value in first.values())
    assert json.loads((again / "config.json").read_text())["qlora_harness_random_weights"] is True
    assert torch.get_default_dtype() == torch.float32


def test_a_random_model_has_room_for_every_token(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "tiny", (8, *SHAPES["tiny"][1:]))
    write_random_model(tmp_path / "new", shape="tiny", tokenizer=str(tiny_tokenizer))
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["vocab_size"] == VOCABULARY_SIZE


def test_random_model_never_replaces_a_folder(tiny_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = str(tiny_tokenizer)
    line = refusal(lambda: write_random_model(tmp_path, shape="tiny", tokenizer=tokenizer))
    assert line.startswith(f"{tmp_path} exists")
    new = tmp_path / "new"
    line = refusal(lambda: write_random_model(new, shape="tiny", tokenizer=str(tmp_path)))
    assert line.startswith(f"--tokenizer: '{tmp_path}' can't be loaded (")
    assert list(tmp_path.iterdir()) == []


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(MemoryError())

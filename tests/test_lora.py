"""Adapters: the same on both arms, saved without the base, and checked when loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import base

from qlora_harness.errors import AdapterError, SettingsError
from qlora_harness.model.adapter_folder import (
    CONFIG_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    adapter_digest,
    read_adapter_config,
    read_adapter_record,
)
from qlora_harness.model.lora import attach_lora, load_adapter, save_adapter
from qlora_harness.model.plain_lora import FastLora
from qlora_harness.model.source import find_base, load_tokenizer

RANK, ALPHA = 4, 8
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FIRST_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
IDS = torch.tensor([[1, 300, 301, 302, 303]])


def attach(folder: Path, quant: str = "bf16", targets: str = "all-linear") -> Any:
    torch.manual_seed(0)
    return attach_lora(base(folder, quant), r=RANK, alpha=ALPHA, dropout=0.0, targets=targets)


def learned(folder: Path, quant: str = "bf16") -> Any:
    """A model whose adapter is not zero any more."""
    model = attach(folder, quant).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(IDS).logits
    return output


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(AdapterError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def saved(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder; never written to."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    tokenizer = load_tokenizer(find_base(str(tiny_llama)))
    save_adapter(learned(tiny_llama), tokenizer, folder, {"quant": "bf16"})
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def rewrite(
    adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    save_file(change(load_file(adapter / WEIGHTS_FILE)), adapter / WEIGHTS_FILE)


# --- attached -------------------------------------------------------------------------------------


def test_layers_by_name(tiny_llama: Path) -> None:
    model = attach(tiny_llama, targets="q_proj, v_proj")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".lora_")[0].split(".")[-1] for name in trainable} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_all_linear_layers_but_the_head_get_a_float32_adapter(tiny_llama: Path, quant: str) -> None:
    model = attach(tiny_llama, quant)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].split(".")[-1] for name in trainable} == LINEAR
    assert len(trainable) == 2 * 7 * 2
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert not any(p.any() for name, p in trainable.items() if "lora_B" in name)
    assert torch.equal(logits(model.eval()), logits(base(tiny_llama, quant)))
    # r x (inputs + outputs) of each layer.
    per_layer = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3
    assert sum(p.numel() for p in trainable.values()) == RANK * 2 * per_layer


def test_both_arms_start_from_the_same_adapter(tiny_llama: Path) -> None:
    nf4, bf16 = (
        {n: p for n, p in attach(tiny_llama, quant).named_parameters() if "lora_" in n}
        for quant in ("nf4", "bf16")
    )
    assert set(nf4) == set(bf16)
    assert all(torch.equal(nf4[name], bf16[name]) for name in nf4)


@pytest.mark.parametrize("targets", ["typo", "q_proj,typo"])
def test_unknown_layer_names_are_refused(tiny_llama: Path, targets: str) -> None:
    with pytest.raises(SettingsError, match="--lora-targets: the model has no layers named typo"):
        attach(tiny_llama, targets=targets)


# --- saved and loaded -----------------------------------------------------------------------------


def test_folder_holds_the_adapter_the_tokenizer_and_the_record_but_no_base(
    saved: Path, tiny_llama: Path
) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]  # nothing half written
    assert {path.name for path in saved.iterdir()} == {
        WEIGHTS_FILE, CONFIG_FILE, RECORD_FILE, "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    weights = load_file(saved / WEIGHTS_FILE)
    assert len(weights) == 28
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    numbers = sum(value.numel() for value in weights.values())
    assert (saved / WEIGHTS_FILE).stat().st_size < 4 * numbers + 8192
    assert read_adapter_record(saved) == {"quant": "bf16"}
    source = find_base(str(tiny_llama))
    own, beside = load_tokenizer(source), load_tokenizer(source, saved)
    assert beside.encode("Answer: A") == own.encode("Answer: A")


def test_saving_replaces_an_older_adapter_whole(tiny_llama: Path, adapter: Path) -> None:
    (adapter / "stale.txt").write_text("old")
    before = adapter_digest(adapter)
    model = learned(tiny_llama)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(1.0)
    save_adapter(model, load_tokenizer(find_base(str(tiny_llama))), adapter, {})
    assert not (adapter / "stale.txt").exists()
    assert adapter_digest(adapter) != before


def test_non_finite_adapter_is_not_saved_and_the_old_one_stays(
    tiny_llama: Path, adapter: Path
) -> None:
    before = adapter_digest(adapter)
    model = learned(tiny_llama)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = float("inf")
    tokenizer = load_tokenizer(find_base(str(tiny_llama)))
    assert "lora_B" in refusal(lambda: save_adapter(model, tokenizer, adapter, {}))
    assert adapter_digest(adapter) == before
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_digest_is_that_of_weights_and_configuration(adapter: Path) -> None:
    before = adapter_digest(adapter)
    assert len(before) == 64
    (adapter / RECORD_FILE).unlink()
    assert read_adapter_record(adapter) is None  # as of an adapter from elsewhere
    assert adapter_digest(adapter) == before
    (adapter / CONFIG_FILE).write_text((adapter / CONFIG_FILE).read_text() + "\n")
    assert adapter_digest(adapter) != before


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_fused_adapter_gives_the_same_logits_unmerged(
    tiny_llama: Path, saved: Path, quant: str
) -> None:
    model = load_adapter(base(tiny_llama, quant), saved)
    weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight  # type: ignore[index, union-attr]
    held = weight.detach().clone()
    before = logits(model)
    fast = FastLora(model, torch.float32)
    assert len(fast) == 14
    with fast:
        assert torch.allclose(logits(model), before, atol=1e-5)
    assert torch.equal(logits(model), before)
    assert torch.equal(weight, held)


# --- refused --------------------------------------------------------------------------------------


def loading(tiny_llama: Path, adapter: Path) -> str:
    return refusal(lambda: load_adapter(base(tiny_llama), adapter))


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
OTHER = FIRST_A.replace("layers.0", "layers.9")
MISFITS: dict[str, tuple[Change, str]] = {
    "missing": (
        lambda w: {name: v for name, v in w.items() if name != FIRST_A},
        "1 adapter weights missing, 0 unexpected (first: "
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.",
    ),
    "unexpected": (
        lambda w: w | {OTHER: w[FIRST_A].clone()},
        f"0 adapter weights missing, 1 unexpected (first: {OTHER})",
    ),
    "renamed": (
        lambda w: {n.replace("base_model.model.", "m."): v for n, v in w.items()},
        "28 adapter weights missing, 28 unexpected",
    ),
    "shape": (lambda w: w | {FIRST_A: torch.ones(RANK, 65)}, "[4, 65]"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_do_not_fit_the_base(tiny_llama: Path, adapter: Path, kind: str) -> None:
    change, problem = MISFITS[kind]
    rewrite(adapter, change)
    line = loading(tiny_llama, adapter)
    assert line.startswith(f"peft={adapter} does not fit this base model")
    assert problem in line
    assert line.endswith("It was trained on tiny-llama; give that as pretrained=.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(tiny_llama: Path, adapter: Path, value: float) -> None:
    rewrite(adapter, lambda w: w | {FIRST_A: torch.full_like(w[FIRST_A], value)})
    line = loading(tiny_llama, adapter)
    assert line.startswith(f"{adapter / WEIGHTS_FILE}, tensor {FIRST_A}: non-finite")


def test_damaged_and_cut_off_weights(tiny_llama: Path, adapter: Path) -> None:
    whole = (adapter / WEIGHTS_FILE).read_bytes()
    for content in (b"x" * 50, whole[:-100]):
        (adapter / WEIGHTS_FILE).write_bytes(content)
        assert loading(tiny_llama, adapter).startswith(f"{adapter / WEIGHTS_FILE} is damaged (")


def test_pickled_weights_no_weights_no_configuration_no_folder(
    tiny_llama: Path, adapter: Path
) -> None:
    torch.save(load_file(adapter / WEIGHTS_FILE), adapter / "adapter_model.bin")
    (adapter / WEIGHTS_FILE).unlink()
    assert f"{adapter / 'adapter_model.bin'} is pickled" in loading(tiny_llama, adapter)
    (adapter / "adapter_model.bin").unlink()
    assert loading(tiny_llama, adapter).startswith(f"{adapter} holds no {WEIGHTS_FILE}")
    (adapter / CONFIG_FILE).unlink()
    assert loading(tiny_llama, adapter).startswith(f"peft={adapter} holds no {CONFIG_FILE}")
    line = loading(tiny_llama, adapter.parent)
    assert line.startswith(f"peft={adapter.parent} holds no {CONFIG_FILE}")
    assert line.endswith(f"peft={adapter}.")  # what may be meant
    shutil.rmtree(adapter)
    assert loading(tiny_llama, adapter).startswith(f"peft={adapter} does not exist")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "{path}, line 1: "),
        ("[]", "{path}: "),
        ("{}", "{path}, key 'peft_type': None"),
        ('{"peft_type": "IA3"}', "{path}, key 'peft_type': 'IA3'"),
    ],
)
def test_broken_configuration(adapter: Path, content: str, problem: str) -> None:
    path = adapter / CONFIG_FILE
    path.write_text(content)
    assert refusal(lambda: read_adapter_config(adapter)).startswith(problem.format(path=path))

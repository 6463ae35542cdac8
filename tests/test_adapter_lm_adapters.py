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
from scoring_runs import RANK, WEIGHTS, MakeLm, another_base, demo_prompts, refused, score
from transformers import AutoTokenizer

from qlora_harness.errors import AdapterError, HarnessError, SettingsError

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
UP_PROJ = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
UNKNOWN = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return damage


def change_config(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | values))

    return damage


def cut_in_half(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "untrained": (
        change_weights(lambda w: [w[n].zero_() for n in w if "lora_B" in n]),
        [WEIGHTS, "equals its start"],
    ),
    "nan": (
        change_weights(lambda w: w[Q_PROJ].view(-1)[0].fill_(math.nan)),
        [f"{WEIGHTS}, tensor {Q_PROJ}: non-finite values"],
    ),
    "infinite": (
        change_weights(lambda w: w[Q_PROJ].view(-1)[0].fill_(math.inf)),
        [f"{WEIGHTS}, tensor {Q_PROJ}: non-finite values"],
    ),
    "half": (cut_in_half, [f"{WEIGHTS} is damaged ("]),
    "pickled": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        ["adapter_model.bin is pickled", WEIGHTS],
    ),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), []),
    "missing": (
        change_weights(lambda w: w.pop(UP_PROJ)),
        ["1 adapter weights missing, 0 unexpected", "layers.1.mlp.up_proj.lora_B", "tiny-llama"],
    ),
    "unexpected": (
        change_weights(lambda w: w.update({UNKNOWN: torch.ones(RANK, 64)})),
        ["0 adapter weights missing, 1 unexpected", "layers.2.mlp.up_proj.lora_A"],
    ),
    "shape": (change_config(r=2 * RANK), ["does not fit this base model (", "size mismatch"]),
    "layers": (change_config(target_modules=["c_attn"]), ["does not fit this base model ("]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_adapter_is_refused(make_lm: MakeLm, own_adapter: Path, name: str) -> None:
    damage, parts = DAMAGES[name]
    damage(own_adapter)
    text = refused(lambda: make_lm(peft=str(own_adapter)), HarnessError)
    for part in [str(own_adapter), *parts]:
        assert part in text


@pytest.mark.parametrize(
    "layer", ["model.embed_tokens", "model.norm", "model.layers.1.self_attn.q_proj", "lm_head"]
)
def test_base_with_other_weights_is_refused(
    make_lm: MakeLm, adapter: Path, tiny_llama: Path, tmp_path: Path, layer: str
) -> None:
    """Of a base with a merged adapter, for example, only linear layers differ."""
    base = another_base(
        tiny_llama,
        tmp_path / "other",
        lambda model: model.get_submodule(layer).weight.mul_(2),  # type: ignore[arg-type, operator]
    )
    text = refused(lambda: make_lm(peft=str(adapter), pretrained=base), AdapterError)
    for part in (f"pretrained={base}", f"peft={adapter}", str(tiny_llama), "weights differ"):
        assert part in text


def test_copy_of_the_base_elsewhere_is_accepted_in_every_quantisation(
    make_lm: MakeLm, adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    # A whole download of a Hub repository may hold weights that transformers never reads.
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, base / "consolidated.safetensors")
    for quant in ("nf4", "fp4", "bf16"):
        for dtype in ("float32", "bfloat16"):
            make_lm(peft=str(adapter), pretrained=str(base), quant=quant, dtype=dtype)


def test_tokenizer_with_more_tokens_than_the_base_is_refused(
    make_lm: MakeLm, own_adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(own_adapter)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(own_adapter)
    text = refused(lambda: make_lm(peft=str(own_adapter)), AdapterError)
    assert f"peft={own_adapter} has 359 tokens, the base model 358" in text
    base = Path(shutil.copytree(tiny_llama, tmp_path / "padded"))
    tokenizer.save_pretrained(base)
    text = refused(lambda: make_lm(pretrained=str(base)), HarnessError)
    assert str(base) in text
    assert "adapter" not in text


def test_foreign_adapter_is_scored_once_base_and_quantisation_are_given(
    make_lm: MakeLm, own_adapter: Path, tiny_llama: Path
) -> None:
    expected = score(make_lm(peft=str(own_adapter)), demo_prompts(1))
    for name in ("qlora_harness.json", "tokenizer.json", "tokenizer_config.json"):
        (own_adapter / name).unlink()
    text = refused(lambda: make_lm(peft=str(own_adapter)), SettingsError)
    assert text.endswith("Give pretrained= and quant= in --model_args.")
    lm = make_lm(peft=str(own_adapter), pretrained=str(tiny_llama), quant="nf4")
    assert score(lm, demo_prompts(1)) == pytest.approx(expected, abs=1e-6)

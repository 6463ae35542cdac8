"""Adapters of other tools score as PEFT's and transformers' own modules do, or are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY_SIZE
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from scoring_runs import WEIGHTS, demo_prompts, loglikelihood_requests, refused, score
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from qlora_harness.errors import AdapterError, ModelError
from qlora_harness.model import adapter_folder
from qlora_harness.model.base import unquantised_share
from qlora_harness.score.adapter_lm import QloraAdapterLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biased": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=2048
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "key_value" not in k}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Callable[[str], Path]:
    """Model folders by kind, made on first use."""
    root = tmp_path_factory.mktemp("bases")

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.is_dir():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(6)  # less flat logits
            model.to(torch.bfloat16).save_pretrained(folder)
            PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer).save_pretrained(folder)
        return folder

    return make


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def write_adapter(base: Path, folder: Path, **options: Any) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[arg-type]
    return folder


def expected(lm: QloraAdapterLM, base: Path, adapter: Path | None, prompts: list[str]) -> Any:
    """Log-probabilities from the libraries' own modules."""
    model = load(base).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    values = []
    for request in loglikelihood_requests(prompts):
        context, continuation = lm._encode_pair(*request.args)
        ids = torch.tensor([context + continuation])
        with torch.no_grad():
            logprobs = model(input_ids=ids[:, :-1]).logits[0].float().log_softmax(-1)
        answer = range(len(context) - 1, ids.shape[1] - 1)
        values.append(sum(float(logprobs[at, ids[0, at + 1]]) for at in answer))
    return pytest.approx(values, abs=2e-4)


Bases = Callable[[str], Path]
MakeLm = Callable[..., QloraAdapterLM]


def options_of(base: Path, adapter: Path) -> dict[str, str]:
    return {"pretrained": str(base), "peft": str(adapter), "quant": "bf16"}


@pytest.fixture
def plain(bases: Bases, tmp_path: Path) -> Path:
    """A plain adapter of the LLaMA base, to damage."""
    return write_adapter(bases("llama"), tmp_path / "adapter", target_modules=LINEAR)


def change_config(adapter: Path, change: dict[str, Any]) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": LINEAR}),
    "lora_bias": ("llama", {"target_modules": LINEAR, "lora_bias": True}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "alora": ("llama", {"target_modules": LINEAR, "alora_invocation_tokens": [324]}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "regex": ("llama", {"target_modules": r".*\.layers\.1\..*(q|v)_proj"}),
    "bias_all": ("biased", {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "pissa": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "olora": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "olora"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "head": ("llama", {"target_modules": [*LINEAR, "lm_head"]}),
    "head_dora": ("llama", {"target_modules": ["lm_head"], "use_dora": True}),
    "tied_head": ("tied", {"target_modules": [*LINEAR, "lm_head"]}),
    "tied_saved_head": ("tied", {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}),
    "saved_both": (
        "llama",
        {"target_modules": LINEAR, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "saved_norm": ("llama", {"target_modules": LINEAR, "modules_to_save": ["input_layernorm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}),
    "tied_embedding": ("tied", {"target_modules": ["embed_tokens"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 324, 330]}),
    "tied_tokens": ("tied", {"target_modules": LINEAR, "trainable_token_indices": [324, 330, 354]}),
    "replication": ("llama", {"target_modules": LINEAR, "layer_replication": [[0, 2], [1, 2]]}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "capped_logits": ("gemma2", {"target_modules": LINEAR}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scored_as_peft_computes(kind: str, bases: Bases, make_lm: MakeLm, tmp_path: Path) -> None:
    base = bases(KINDS[kind][0])
    adapter = write_adapter(base, tmp_path / "adapter", **KINDS[kind][1])
    prompts = demo_prompts(2)
    options = options_of(base, adapter)
    lm = make_lm(**options, verify=8)
    right = expected(lm, base, adapter, prompts)
    assert score(lm, prompts) == right
    assert lm.session.verification.largest < 2e-4  # type: ignore[union-attr]
    assert score(make_lm(**options, kernels="none"), prompts) == right
    assert score(make_lm(**options, scoring="hf"), prompts) == right
    # And the adapter wasn't just left out.
    assert expected(lm, base, None, prompts) != score(lm, prompts)


def test_what_depends_on_the_text_is_left_to_peft(
    bases: Bases, make_lm: MakeLm, tmp_path: Path
) -> None:
    base = bases("llama")
    paths = {}
    for kind in ("plain", "lora_bias", "dora", "alora"):
        adapter = write_adapter(base, tmp_path / kind, **KINDS[kind][1])
        path = make_lm(**options_of(base, adapter)).session.path
        paths[kind] = (path.packed, path.fused)
    assert paths == {
        "plain": (True, True),
        "lora_bias": (True, False),
        "dora": (True, False),
        "alora": (False, False),
    }


def test_field_of_a_newer_peft_is_left_to_peft(bases: Bases, make_lm: MakeLm, plain: Path) -> None:
    base = bases("llama")
    change_config(plain, {"use_novel_gate": False})
    assert make_lm(**options_of(base, plain)).session.path.packed
    change_config(plain, {"use_novel_gate": True})
    lm = make_lm(**options_of(base, plain))
    assert "'use_novel_gate'" in (lm.session.path.reason or "")
    assert score(lm, demo_prompts(1)) == expected(lm, base, plain, demo_prompts(1))


@pytest.mark.parametrize("kind", ["plain", "lora_bias", "dora", "orthogonal", "head", "tokens"])
def test_scored_on_a_4_bit_base_as_peft_computes(
    kind: str, bases: Bases, make_lm: MakeLm, tmp_path: Path
) -> None:
    base = bases("llama")
    adapter = write_adapter(base, tmp_path / "adapter", **KINDS[kind][1])
    lm = make_lm(**options_of(base, adapter) | {"quant": "nf4"}, verify=8)
    score(lm, demo_prompts(2))
    assert lm.session.verification.largest < 5e-5  # type: ignore[union-attr]
    assert lm.session.path.expanded == (kind in ("plain", "orthogonal", "head"))


# Trained, and not


@pytest.mark.parametrize(
    "kind", ["plain", "dora", "embedding", "saved_norm", "tokens", "bias_all", "experts"]
)
def test_only_an_adapter_at_its_start_was_never_trained(
    kind: str, bases: Bases, make_lm: MakeLm, tmp_path: Path
) -> None:
    base = bases(KINDS[kind][0])
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **KINDS[kind][1])
    model = get_peft_model(load(base), config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)  # type: ignore[arg-type]
    options = options_of(base, tmp_path / "adapter")
    text = refused(lambda: make_lm(**options), AdapterError)
    assert "every trained tensor equals its start" in text
    # One changed number is enough.
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    name = next(n for n in reversed(weights) if "lora_A" not in n and "embedding_B" not in n)
    weights[name].view(-1)[-1] += 0.5
    save_file(weights, tmp_path / "adapter" / WEIGHTS)
    make_lm(**options)


# Refused before anything is allocated


@pytest.mark.parametrize(
    "change",
    [
        {"r": 10**30},
        {"r": True},
        {"r": 4.0},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "16"},
        {"lora_dropout": float("nan")},
        {"rank_pattern": {"q_proj": 10**9}},
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"use_rslora": "false"},
        {"layer_replication": [[0, 2]] * 100_000},
        {"layer_replication": [[0, 10**9]]},
        {"target_modules": ["q_proj"] * 200_000},
        {"target_modules": r"(("},
        {"peft_type": "LOHA"},
    ],
    ids=str,
)
def test_senseless_configuration_is_one_line(
    change: dict[str, Any], bases: Bases, make_lm: MakeLm, plain: Path
) -> None:
    change_config(plain, change)
    text = refused(lambda: make_lm(**options_of(bases("llama"), plain)), AdapterError)
    assert str(plain) in text
    assert len(text) <= 500


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_pattern_that_backtracks_is_given_up(
    key: str, bases: Bases, make_lm: MakeLm, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_folder, "_PATTERN_SECONDS", 0.5)
    pattern = r"(\w|\.|[a-z_])+\1*(.|\w)*(.|\w)*!"
    change_config(plain, {key: {pattern: 4} if key == "rank_pattern" else pattern})
    text = refused(lambda: make_lm(**options_of(bases("llama"), plain)), AdapterError)
    assert f"key '{key}'" in text


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_tensors_that_are_no_floating_point_numbers_are_refused(
    dtype: torch.dtype, bases: Bases, make_lm: MakeLm, plain: Path
) -> None:
    weights = load_file(plain / WEIGHTS)
    name = next(n for n in weights if "lora_B" in n)
    save_file(weights | {name: weights[name].to(dtype)}, plain / WEIGHTS)
    text = refused(lambda: make_lm(**options_of(bases("llama"), plain)), AdapterError)
    assert f"tensor {name}" in text


# Bases


def test_scalar_tensors_in_a_checkpoint_are_read(
    bases: Bases, make_lm: MakeLm, tmp_path: Path
) -> None:
    base = bases("gpt_neox")
    folder = Path(shutil.copytree(base, tmp_path / "old"))
    weights = load_file(base / "model.safetensors")
    weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lm = make_lm(pretrained=str(folder))
    assert score(lm, demo_prompts(1)) == expected(lm, base, None, demo_prompts(1))


@pytest.mark.parametrize("index", ["{}", "{", '{"weight_map": {"a": "../b.safetensors"}}'])
def test_index_beside_a_whole_file_is_not_read(
    index: str, bases: Bases, make_lm: MakeLm, tmp_path: Path
) -> None:
    base = bases("llama")
    folder = Path(shutil.copytree(base, tmp_path / "indexed"))
    (folder / "model.safetensors.index.json").write_text(index)
    lm, other = make_lm(pretrained=str(folder)), make_lm(pretrained=str(base))
    name = "weights_fingerprint"
    assert lm.loaded.record()[name] == other.loaded.record()[name]
    assert score(lm, demo_prompts(1)) == score(other, demo_prompts(1))


def test_experts_count_as_unquantised(
    bases: Bases, make_lm: MakeLm, caplog: pytest.LogCaptureFixture
) -> None:
    lm = make_lm(pretrained=str(bases("mixtral")), quant="nf4")
    attention = 2 * (2 * 32 * 32 + 2 * 32 * 16)
    experts = 2 * 4 * (2 * 48 * 32 + 32 * 48)
    router = 2 * 4 * 32
    share = (experts + router) / (attention + experts + router)
    assert lm.loaded.record()["unquantised_share"] == pytest.approx(share)
    assert any(f"{100 * share:.0f}% of the weights" in m for m in caplog.messages)
    assert unquantised_share(make_lm(pretrained=str(bases("llama")), quant="nf4").model) == 0.0


def test_base_that_is_quantised_already_is_refused(
    bases: Bases, make_lm: MakeLm, tmp_path: Path
) -> None:
    folder = tmp_path / "prequantised"
    quantised = AutoModelForCausalLM.from_pretrained(
        bases("llama"), quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    quantised.save_pretrained(folder)
    text = refused(lambda: make_lm(pretrained=str(folder), quant="bf16"), ModelError)
    assert "quantization_config" in text


def test_tokenizer_of_strangers_is_not_run(
    bases: Bases, make_lm: MakeLm, plain: Path, tmp_path: Path
) -> None:
    (plain / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["strange.T", None]}}
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    text = refused(lambda: make_lm(**options_of(bases("llama"), plain)), ModelError)
    assert "tokenizer" in text
    assert not (tmp_path / "ran").exists()


def test_code_of_strangers_is_not_run(bases: Bases, make_lm: MakeLm, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases("llama"), tmp_path / "strange"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.StrangeConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    text = refused(lambda: make_lm(pretrained=str(folder)), ModelError)
    assert "its own code" in text
    assert not (tmp_path / "ran").exists()

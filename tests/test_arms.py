"""Every quantisation and variant of LoRA: trained, resumed, and scored as it was in memory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scoring_runs import MakeLm, demo_prompts, refused, score
from tiny_models import adapted, assert_alike, fused_step, plain_step, texts, tiny, tiny_of_any_kind
from training_runs import Train, as_if_killed, base, losses, read, summary
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from qlora_harness.errors import AdapterError, SettingsError
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.adapter_starts import (
    START_FILE,
    check_layers,
    restart_pissa,
    save_pissa_start,
    start_loftq,
)
from qlora_harness.model.base import expand_4bit
from qlora_harness.model.lora import attach_lora
from qlora_harness.settings import CHECKPOINTING
from qlora_harness.settings_checks import build_settings, check_can_run
from qlora_harness.train import loading
from qlora_harness.train import run as train_run

needs_hqq = pytest.mark.skipif(find_spec("hqq") is None, reason="the package hqq is not installed")
PROMPTS = demo_prompts(3)

# Flags, and whether training takes fused layers and scoring packs.
ARMS = [
    pytest.param({"quant": "nf4", "double_quant": False}, True, True, id="nf4"),
    pytest.param({"quant": "int8"}, False, False, id="int8"),
    pytest.param({"quant": "hqq"}, False, True, id="hqq", marks=needs_hqq),
    pytest.param({"quant": "nf4", "use_rslora": True}, True, True, id="rslora"),
    pytest.param({"quant": "nf4", "use_dora": True}, False, True, id="dora"),
    pytest.param({"quant": "hqq", "use_dora": True}, False, True, id="dora-hqq", marks=needs_hqq),
    pytest.param({"quant": "nf4", "init_lora_weights": "loftq"}, True, True, id="loftq"),
    pytest.param({"quant": "bf16", "init_lora_weights": "pissa"}, True, True, id="pissa"),
    pytest.param({"quant": "nf4", "init_lora_weights": "eva"}, True, True, id="eva"),
]  # fmt: skip


def logprobs(model: Any, tokenizer: Any) -> list[float]:
    letters = [tokenizer.encode(f"Answer: {letter}")[-1] for letter in "ABCD"]
    values: list[float] = []
    for prompt in PROMPTS:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer.encode(prompt)])).logits[0, -1]
        values += torch.log_softmax(logits.float(), dim=-1)[letters].tolist()
    return values


def adapter_of(run: str) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(f"{run}/adapter/adapter_model.safetensors")
    return weights


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The log-probabilities of " A" to " D" after each prompt, of the model that is saved."""
    noted: list[float] = []
    save = train_run.save_adapter

    def save_and_note(model: Any, tokenizer: Any, *args: Any, **options: Any) -> None:
        noted.extend(logprobs(model.eval(), tokenizer))
        save(model, tokenizer, *args, **options)

    monkeypatch.setattr(train_run, "save_adapter", save_and_note)
    return noted


@pytest.mark.parametrize(("flags", "fused", "packed"), ARMS)
def test_arm_is_scored_as_it_was_in_memory_and_resumes_exactly(
    train: Train, make_lm: MakeLm, in_memory: list[float], flags: dict[str, Any], fused: bool,
    packed: bool,
) -> None:  # fmt: skip
    assert train(output_dir="run", save_steps=2, **flags) == 0
    whole = summary("run")
    assert losses("run")[-1] < losses("run")[0]
    assert whole["computation"]["fused_layers"] is fused
    assert {name: whole["settings"][name] for name in flags} == flags
    lm = make_lm(peft="run/adapter", batch_size=1)
    assert lm.session.path[:2] == (packed, fused and packed)
    assert score(lm, PROMPTS) == pytest.approx(in_memory, abs=2e-5)

    before = losses("run"), read("run/adapter/adapter_config.json"), adapter_of("run")
    as_if_killed("run", 4)
    assert train(output_dir="run", save_steps=2, **flags) == 0
    assert losses("run") == before[0]
    assert summary("run")["results"] == whole["results"]
    assert read("run/adapter/adapter_config.json") == before[1]
    assert_same_tensors(adapter_of("run"), before[2])


def test_start_is_the_same_function_as_the_base(train: Train) -> None:
    """The evaluation before training is that of the base, whatever the adapter starts with."""
    before = {}
    for init in ("default", "gaussian", "pissa", "eva"):
        assert train(output_dir=init, quant="bf16", init_lora_weights=init, max_steps=1) == 0
        before[init] = read(Path(init, "training_logs.json"))["evaluation"]["nll_before"]
    assert before["gaussian"] == before["default"] == before["eva"]
    assert before["pissa"] == pytest.approx(before["default"], abs=1e-4)


# --- PiSSA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_adapter_belongs_to_the_original_base(
    train: Train, in_memory: list[float], tiny_llama: Path, use_rslora: bool
) -> None:
    flags = {"quant": "bf16", "init_lora_weights": "pissa", "use_rslora": use_rslora}
    assert train(output_dir="run", **flags) == 0
    config = read("run/adapter/adapter_config.json")
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    assert config["lora_alpha"] == pytest.approx(16 * 2 ** (0.5 if use_rslora else 1))
    original = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).float()
    model = PeftModel.from_pretrained(original, "run/adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained("run/adapter")
    assert logprobs(model, tokenizer) == pytest.approx(in_memory, abs=1e-5)


def test_pissa_run_without_its_start_is_refused_before_loading(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"quant": "bf16", "init_lora_weights": "pissa", "save_steps": 2}
    assert train(output_dir="run", **flags) == 0
    as_if_killed("run", 4)
    Path("run/checkpoints", START_FILE).unlink()
    monkeypatch.setattr(loading, "take_base", lambda *_, **__: pytest.fail("loaded"))
    capsys.readouterr()
    assert train(output_dir="run", **flags) != 0
    assert f"{START_FILE} is missing. " in capsys.readouterr().err


def test_pissa_checkpoint_resumes_in_another_folder(train: Train) -> None:
    flags = {"quant": "bf16", "init_lora_weights": "pissa", "save_steps": 2}
    assert train(output_dir="run", **flags) == 0
    assert train(output_dir="other", resume="run/checkpoints/checkpoint-2", **flags) == 0
    assert losses("other")[2:] == losses("run")[2:]
    as_if_killed("other")
    assert train(output_dir="other", **flags) == 0
    assert_same_tensors(adapter_of("other"), adapter_of("run"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_restarted_pissa_has_the_same_residual(kind: str, tmp_path: Path) -> None:
    """GPT-2 holds its weights transposed."""
    lora: dict[str, Any] = {"r": 4, "alpha": 6, "dropout": 0.0, "targets": "all-linear"}
    begun = attach_lora(tiny_of_any_kind(kind), init="pissa", **lora)
    save_pissa_start(begun, tmp_path / START_FILE)
    again = attach_lora(tiny_of_any_kind(kind), **lora)
    restart_pissa(again, tmp_path / START_FILE)
    assert_same_tensors(again.state_dict(), begun.state_dict())
    base_weights = tiny_of_any_kind(kind).state_dict()
    changed = begun.get_base_model().state_dict()
    assert any(
        not torch.equal(value, base_weights[name.replace(".base_layer", "")])
        for name, value in changed.items()
        if ".base_layer.weight" in name
    )


@pytest.mark.parametrize(
    ("kind", "init", "targets", "named"),
    [
        ("tied", "pissa", "lm_head", "the residual of lm_head would change the embedding"),
        ("experts", "pissa", "all-linear", "--lora-targets"),
        ("experts", "eva", "all-linear", "--lora-targets"),
    ],
)
def test_layers_that_can_have_no_such_start(kind: str, init: str, targets: str, named: str) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }  # fmt: skip
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    if kind == "experts":
        config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2)
        model = MixtralForCausalLM(config).float()
    with pytest.raises(SettingsError) as caught:
        check_layers(
            attach_lora(model, r=4, alpha=6, dropout=0.0, targets=targets, init=init), init
        )
    assert named in str(caught.value)


# --- LoftQ and EVA --------------------------------------------------------------------------------


def test_loftq_is_the_best_correction_of_its_rank_and_leaves_the_base(tiny_llama: Path) -> None:
    original, plain = base(tiny_llama), base(tiny_llama, "nf4")
    model = attach_lora(
        base(tiny_llama, "nf4"), r=4, alpha=6, dropout=0.0, targets="all-linear", init="loftq"
    )
    start_loftq(model, original)
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        packed, kept = layer.base_layer.weight, plain.get_submodule(name).weight
        assert torch.equal(packed.data, kept.data)
        held = expand_4bit(packed.data, packed.quant_state, torch.float32)
        lost = original.get_submodule(name).weight - held
        update = layer.get_delta_weight("default").detach()
        tail = torch.linalg.svdvals(lost)[4:]
        assert float((lost - update).norm()) == pytest.approx(float(tail.norm()), rel=1e-4)
        assert tail.norm() < 0.97 * lost.norm()


def test_eva_adapter_is_plain_lora_of_equal_ranks(train: Train) -> None:
    flags = {"quant": "nf4", "init_lora_weights": "eva", "learning_rate": 1e-9, "max_steps": 1}
    for seed in (0, 1):
        assert train(output_dir=f"run{seed}", seed=seed, **flags) == 0
    config = read("run0/adapter/adapter_config.json")
    names = ("init_lora_weights", "eva_config", "rank_pattern", "alpha_pattern")
    assert [config[name] for name in names] == [True, None, {}, {}]
    first, second = adapter_of("run0"), adapter_of("run1")
    for name, weight in first.items():
        if "lora_A" in name:  # principal components are orthonormal; the seed draws the batches
            assert torch.allclose(weight @ weight.T, torch.eye(4), atol=1e-4)
            assert not torch.allclose(weight, second[name], atol=1e-3)


def test_eva_without_enough_data_or_convergence_is_refused(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"quant": "nf4", "init_lora_weights": "eva"}
    assert train(output_dir="run", lora_r=60, **flags) != 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    parts = ("--init-lora-weights eva", "209", "--lora-r 60", "240")
    assert all(part in last for part in parts), last
    monkeypatch.setattr("qlora_harness.model.adapter_starts._MOST_EVA_PASSES", 2)
    assert train(output_dir="run", **flags) != 0
    assert " 2 passes" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_rank_above_a_layers_size_is_refused(
    train: Train, capsys: pytest.CaptureFixture[str], init: str
) -> None:
    quant = "bf16" if init == "pissa" else "nf4"
    assert train(output_dir="run", quant=quant, init_lora_weights=init, lora_r=65) != 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--lora-r 65 with --init-lora-weights {init}: " in last


# --- what takes the fast path ---------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("quantised", [False, True], ids=["full", "nf4"])
def test_fused_rslora_equals_peft(checkpointing: str, quantised: bool) -> None:
    model = adapted(tiny("llama", quantised=quantised), use_rslora=True)
    assert model.base_model.model.model.layers[0].mlp.up_proj.scaling == {"default": 16 / 2}
    rows = texts([9, 3, 20, 1, 14])
    expected = plain_step(model, rows)
    FusedDecoder.attach(model, checkpointing)
    assert_alike(fused_step(model, rows), expected)


def test_int8_is_scored_in_batches(make_lm: MakeLm) -> None:
    reason = make_lm(quant="int8").session.path.reason
    assert reason is not None
    assert reason.startswith("LLM.int8 ")


def test_dora_adapter_on_int8_is_refused(train: Train, make_lm: MakeLm) -> None:
    assert train(output_dir="run", quant="nf4", use_dora=True, max_steps=1) == 0
    text = refused(lambda: make_lm(peft="run/adapter", quant="int8"), AdapterError)
    assert text.startswith("peft=run/adapter, quant=int8: ")


# --- a package that is missing --------------------------------------------------------------------


def test_hqq_without_its_package_is_refused_before_loading(
    make_lm: MakeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_harness.settings_checks.find_spec", lambda name: None)
    with pytest.raises(SettingsError) as caught:
        check_can_run(build_settings({"quant": "hqq"}))
    assert str(caught.value) == "--quant hqq needs the package hqq. pip install hqq."
    text = refused(lambda: make_lm(quant="hqq"), SettingsError)
    assert text == "--model_args quant=hqq needs the package hqq. pip install hqq."
    check_can_run(build_settings({}))

"""A base spread over processes: the losses of one process, also resumed in another number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY_SIZE
from safetensors.torch import load_file
from training_runs import Train, as_if_killed, losses, on_ranks, read, steps, summary
from transformers import GPT2Config

from qlora_harness.benchmark.random_model import write_random_model
from qlora_harness.errors import ModelError, SettingsError
from qlora_harness.model.base import load_base
from qlora_harness.model.by_layer import load_by_layer, random_reader
from qlora_harness.model.source import find_base
from qlora_harness.settings import Quant
from qlora_harness.settings_checks import build_settings, check_can_shard


@pytest.fixture(scope="module")
def five_layers(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """More layers than buffers; the folder has no weights."""
    folder = tmp_path_factory.mktemp("models") / "five-layers"
    write_random_model(
        folder,
        shape="tiny",
        tokenizer=str(tiny_tokenizer),
        vocab_size=VOCABULARY_SIZE,
        weights_on_load=True,
    )
    config = read(folder / "config.json") | {"num_hidden_layers": 5}
    (folder / "config.json").write_text(json.dumps(config))
    assert not list(folder.glob("*.safetensors"))
    return folder


@pytest.mark.parametrize(
    ("quant", "checkpointing", "ranks", "then"),
    [("nf4", "selective", 2, 4), ("bf16", "full", 4, 1)],
)
def test_sharded_layers_train_as_one_process_does(
    five_layers: Path, rows: Path, tmp_path: Path, train: Train, quant: str, checkpointing: str,
    ranks: int, then: int,
) -> None:  # fmt: skip
    flags: dict[str, Any] = {
        "model": five_layers, "quant": quant, "dataset": rows, "compute_dtype": "float32",
        "optimizer": "adamw_torch", "max_length": 96, "lora_r": 4, "lora_dropout": 0,
        "eval_fraction": 0.25, "learning_rate": 0.001, "batch_size": 2, "max_steps": 20,
        "checkpointing": checkpointing, "save_steps": 8,
    }  # fmt: skip
    one, sharded = tmp_path / "one", tmp_path / "sharded"
    assert train(**flags, grad_accum=4, output_dir=one) == 0
    flags["output_dir"] = sharded
    on_ranks(ranks, flags | {"grad_accum": 4 // ranks}, tmp_path, fsdp=True)
    assert summary(sharded)["environment"]["sharded_base"]
    assert summary(sharded)["computation"]["fused_layers"]
    assert losses(sharded) == pytest.approx(losses(one), abs=1e-5)

    as_if_killed(str(sharded), 20)
    assert train(**flags, grad_accum=3) == 2  # not the examples of a step so far
    if then == 1:
        assert train(**flags, grad_accum=4) == 0
    else:
        on_ranks(then, flags | {"grad_accum": 4 // then}, tmp_path, fsdp=True)
    assert summary(sharded)["runtime"]["resumed"]
    assert losses(sharded) == pytest.approx(losses(one), abs=1e-5)
    assert [row["tokens"] for row in steps(sharded)] == [row["tokens"] for row in steps(one)]
    evaluated = [read(run / "training_logs.json")["evaluation"]["nll"] for run in (sharded, one)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
    # The adapter is whole, in PEFT's format.
    own, expected = (load_file(run / "adapter/adapter_model.safetensors") for run in (sharded, one))
    assert own.keys() == expected.keys()
    assert all(own[name].shape == tensor.shape for name, tensor in expected.items())


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_weights_read_by_layer_are_those_of_transformers(
    five_layers: Path, tmp_path: Path, quant: str
) -> None:
    options: dict[str, Any] = {
        "quant": Quant(quant), "double_quant": True, "compute_dtype": "float32",
        "device": torch.device("cpu"),
    }  # fmt: skip
    made = load_base(find_base(str(five_layers)), **options)
    original: Any = load_base(
        find_base(str(five_layers)), **options | {"quant": Quant.BF16, "compute_dtype": "bfloat16"}
    )
    assert float(original.model.embed_tokens.weight.float().std()) == pytest.approx(0.02, rel=0.05)
    for key in ("qlora_harness_weights_seed", "qlora_harness_random_weights"):
        delattr(original.config, key)
    original.save_pretrained(tmp_path / "written")
    written = dict(load_base(find_base(str(tmp_path / "written")), **options).named_parameters())
    parameters = dict(made.named_parameters())
    assert parameters.keys() == written.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.data, written[name].data)
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            other: Any = written[name]
            assert torch.equal(state.absmax, other.quant_state.absmax)
            assert torch.equal(state.state2.absmax, other.quant_state.state2.absmax)


@pytest.mark.parametrize(
    "changes",
    [{"kernels": "none"}, {"quant": "int8"}, {"init_lora_weights": "pissa", "quant": "bf16"}],
)
def test_what_needs_the_whole_base_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        check_can_shard(build_settings(changes))


def test_a_base_without_layers_of_known_names_is_refused() -> None:
    with pytest.raises(ModelError, match="'gpt2'"):
        load_by_layer(
            GPT2Config(), random_reader(0, 1.0, torch.device("cpu")), empty_4bit=None,
            dtype=torch.float32, device=torch.device("cpu"), sharded=None,
        )  # fmt: skip

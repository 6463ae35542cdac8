"""Starts of an adapter other than LoRA's own: EVA, LoftQ and PiSSA.

EVA and LoftQ leave the base as it is. PiSSA moves the principal part of each weight W into the
adapter and trains B·A on the residual W - s·B₀·A₀. So its start, A₀ and B₀, must outlive the run's
process: a resumed run needs the same residual, and the adapter for the original base is
s·(B·A - B₀·A₀), plain LoRA of twice the rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import SettingsError, first_line
from qlora_harness.model.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, quiet_peft
from qlora_harness.model.base import expand_4bit, is_4bit
from qlora_harness.record import write_json

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

START_FILE = "pissa_start.safetensors"
_ADAPTER = "default"
_MOST_EVA_PASSES = 500  # SmolLM2 takes 40 at rank 8


def check_layers(model: PeftModel, init: str) -> None:
    """Raises SettingsError if a layer can't be initialised, for example at too high a rank."""
    if init not in ("eva", "loftq", "pissa"):
        return
    base_model: Any = model.get_base_model()
    embedding = base_model.get_input_embeddings()
    for name, layer in _lora_layers(model):
        if type(layer).__name__ == "ParamWrapper":
            raise SettingsError(
                f"--init-lora-weights {init} with --lora-targets: {name} holds tensors of experts, "
                "which it can't initialise",
                "Name linear layers, such as q_proj,v_proj, or use another initialisation",
            )
        base, rank = layer.get_base_layer(), layer.r[_ADAPTER]
        narrow = layer.in_features if init == "eva" else min(layer.in_features, layer.out_features)
        if rank > narrow:
            raise SettingsError(
                f"--lora-r {rank} with --init-lora-weights {init}: {name} is "
                f"{layer.out_features} x {layer.in_features}",
                "Lower --lora-r",
            )
        if init == "pissa" and (base is embedding or base.weight is embedding.weight):
            raise SettingsError(
                f"--init-lora-weights pissa with --lora-targets: the residual of {name} would "
                "change the embedding",
                "Name other layers, or use another initialisation",
            )


def start_eva(model: PeftModel, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """Sets each A to the principal components of its layer's inputs on padded batches.

    Ranks stay equal (rho = 1) and B stays zero. Only learned tokens count. Raises SettingsError if
    the components don't converge, for example if the inputs span fewer dimensions than the rank.
    """
    from peft import initialize_lora_eva_weights

    config: Any = model.peft_config[_ADAPTER]
    targets = config.target_modules
    passes = count()

    def forward(adapted: Any, inputs: dict[str, torch.Tensor]) -> None:
        if next(passes) == _MOST_EVA_PASSES:  # PEFT would never stop
            raise ValueError(f"no convergence in {_MOST_EVA_PASSES} passes")
        adapted(**inputs)

    try:
        # Every process has the same batches.
        initialize_lora_eva_weights(
            model,
            list(batches),
            forward_fn=forward,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    except (ValueError, RuntimeError) as error:
        raise SettingsError(
            f"--init-lora-weights eva: PEFT can't decompose the inputs ({first_line(error)})",
            "Lower --lora-r, or use another initialisation",
        ) from None
    # PEFT lists each layer, to give it its own rank; here all ranks are equal.
    assert not config.rank_pattern
    assert not config.alpha_pattern
    config.target_modules = targets
    # From here on it is an adapter like any other.
    config.init_lora_weights, config.eva_config = True, None


def start_loftq(model: PeftModel, original: PreTrainedModel) -> None:
    """Sets B·A to the principal part of what 4 bits lost of each weight of the original base.

    Like PEFT's `replace_lora_weights_loftq`, but on any device, and divided by the scale of the
    update, which PEFT ignores.
    """
    import torch

    with torch.no_grad():
        for name, layer in _lora_layers(model):
            if not is_4bit(layer.get_base_layer()):  # such as the head
                continue
            packed, linear = layer.get_base_layer().weight, original.get_submodule(name)
            weight = _weight_of(linear).to(packed.device, torch.float32)
            lost = weight - expand_4bit(packed.data, packed.quant_state, torch.float32)
            left, values, right = torch.linalg.svd(lost, full_matrices=False)
            rank = layer.r[_ADAPTER]
            root = values[:rank].sqrt()
            layer.lora_A[_ADAPTER].weight.copy_(root[:, None] * right[:rank])
            layer.lora_B[_ADAPTER].weight.copy_(left[:, :rank] * root / layer.scaling[_ADAPTER])


def save_pissa_start(model: PeftModel, path: Path) -> None:
    """Saves A₀ and B₀ of a model that has not been trained yet, atomically."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, str(temporary))
    temporary.replace(path)


def restart_pissa(model: PeftModel, path: Path) -> None:
    """Gives a fresh adapter the saved start of a run, and its base the residual."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    with quiet_peft():
        set_peft_model_state_dict(model, load_file(str(path)))
    with torch.no_grad():
        for _, layer in _lora_layers(model):
            weight = layer.get_base_layer().weight
            first, second = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            # The same operations in the same order as in PEFT's `pissa_init`.
            start = layer.scaling[_ADAPTER] * second @ first
            start = start.T if layer.fan_in_fan_out else start
            weight.data = (weight.to(torch.float32) - start).to(weight.dtype)
    config: Any = model.peft_config[_ADAPTER]
    config.init_lora_weights = "pissa"


def subtract_pissa_start(folder: Path, start: Path) -> None:
    """Turns a saved PiSSA adapter into plain LoRA of twice the rank for the original base."""
    import torch
    from safetensors.torch import load_file, save_file

    trained, begun = load_file(str(folder / WEIGHTS_FILE)), load_file(str(start))
    joined = {
        name: torch.cat([weight, begun[name]], dim=0)
        if ".lora_A." in name
        else torch.cat([weight, -begun[name]], dim=1)
        for name, weight in trained.items()
    }
    save_file(joined, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    # The scale stays the same: alpha / r, or alpha / sqrt(r).
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2
    config["r"] *= 2
    config["init_lora_weights"] = True
    write_json(folder / CONFIG_FILE, config)


def _weight_of(layer: Any) -> torch.Tensor:
    """The weight of a linear layer, [N, K]; GPT-2's Conv1D holds it transposed."""
    weight: torch.Tensor = layer.weight
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """The LoRA layers, by their names in the base."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module

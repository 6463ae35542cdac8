"""Adapters: attached, saved, loaded, and checked before they are believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import AdapterError, SettingsError
from qlora_harness.locations import expanded
from qlora_harness.model.adapter_folder import (
    CONFIG_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    check_fit,
    quiet_peft,
)
from qlora_harness.model.base import first_line
from qlora_harness.model.shape import Shape
from qlora_harness.record import nested, new_folder, write_json

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Ways to start that leave the base as it is, some of which PEFT can't repeat on a 4-bit base.
_STARTS_OF_THEIR_OWN = ("gaussian", "orthogonal", "eva")


def attach_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: str,
    dtype: str = "float32",
) -> PeftModel:
    """Attaches a fresh LoRA adapter to a frozen base model.

    The adapter's weights have the same dtype on every base, "float32" (PEFT's default) or
    "bfloat16", so both arms learn alike; the update is zero until the first step. For the other
    arguments see `lora_config`. Raises SettingsError if no layer has a name of `targets`.
    """
    import torch
    from peft import get_peft_model

    config = lora_config(r=r, alpha=alpha, dropout=dropout, targets=targets)
    if targets != "all-linear":
        known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        names = target_names(targets)
        if unknown := [name for name in names if name.rsplit(".", 1)[-1] not in known]:
            raise _no_layers(", ".join(unknown))
    try:
        with quiet_peft():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        if "not found in the base model" in str(error):
            raise _no_layers(targets) from None
        if "lora_dropout" in str(error):
            raise SettingsError(
                f"--lora-dropout {dropout:g}: this model keeps its experts in tensors that are no "
                "layers, for which PEFT has no dropout",
                "Use --lora-dropout 0",
            ) from None
        raise SettingsError(
            f"--lora-targets {targets}: PEFT refuses them ({first_line(error)})",
            "Name other layers",
        ) from None
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return adapted


def _no_layers(names: str) -> SettingsError:
    return SettingsError(
        f"--lora-targets: the model has no layers named {names}",
        "Name layers such as q_proj,v_proj, or all-linear",
    )


def lora_config(*, r: int, alpha: float, dropout: float, targets: str) -> LoraConfig:
    """Returns PEFT's description of an adapter of rank r, whose update is scaled by alpha / r.

    `dropout` is a probability, on the adapter's input; `targets` is "all-linear" (every linear
    layer but the output head) or a comma list of layer names.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # PEFT's hint says int, its arithmetic is float
        lora_dropout=dropout,
        target_modules=targets if targets == "all-linear" else target_names(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


def target_names(targets: str) -> list[str]:
    """Returns the layer names of a comma list, such as "q_proj, v_proj"."""
    return [name.strip() for name in targets.split(",")]


def public_name(base: str) -> str:
    """Returns how files that people upload call a base model: without this machine's folders."""
    path = expanded(base)
    return path.resolve().name if path.is_dir() else base


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, record: dict[str, Any]
) -> None:
    """Saves adapter, tokenizer and record into a folder that appears whole or not at all.

    The tokenizer is that of scoring, which then encodes as training did; the record names base,
    revision and quantisation. An older folder is replaced. Raises AdapterError if a weight is not
    finite.
    """
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise AdapterError(
                f"the trained adapter has non-finite values in {name}; it was not saved",
                "Lower --learning-rate or look at the step log",
            )
    with new_folder(folder, replace=True) as work:
        # save_embedding_layers=False: nothing is ever added to the vocabulary, and "auto" may ask
        # the Hub for the base model's configuration.
        model.save_pretrained(str(work), safe_serialization=True, save_embedding_layers=False)
        tokenizer.save_pretrained(str(work))
        write_json(work / RECORD_FILE, record)
        # PEFT writes this list in the order of a set, which would change the adapter's digest.
        config = json.loads((work / CONFIG_FILE).read_text(encoding="utf-8"))
        if isinstance(config.get("target_modules"), list):
            config["target_modules"].sort()
        base = nested(record, "base", "name") or config["base_model_name_or_path"]
        config["base_model_name_or_path"] = public_name(str(base))
        write_json(work / CONFIG_FILE, config)
        (work / "README.md").unlink(missing_ok=True)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Loads an adapter folder onto a base, unmerged, as `PeftModel.from_pretrained` does.

    Raises AdapterError if the adapter does not fit the base (see `adapter_folder.check_fit`), a
    weight is not finite, or every trained tensor equals its start.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = check_fit(model, folder)
    path = folder / WEIGHTS_FILE
    weights = load_file(str(path))
    for name, value in weights.items():
        if not bool(value.isfinite().all()):
            raise AdapterError(
                f"{path}, tensor {name:.200}: non-finite values", "Train the adapter anew"
            )
    config.inference_mode = True
    if config.init_lora_weights in _STARTS_OF_THEIR_OWN:
        config.init_lora_weights = True  # the numbers come from the file
    try:
        with quiet_peft():
            adapted = get_peft_model(model, config)
    except Exception as error:  # noqa: BLE001  # what fits by its shapes may not suit a 4-bit base
        raise AdapterError(
            f"peft={folder}: PEFT can't attach it to this base model ({first_line(error)})",
            "Try another quant= in --model_args",
        ) from None
    start = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if not any(_was_trained(name, value, start.get(name)) for name, value in weights.items()):
        raise AdapterError(
            f"{path}: every trained tensor equals its start, so the adapter was never trained",
            "Name the adapter of a completed run",
        )
    set_peft_model_state_dict(adapted, weights)
    return adapted.requires_grad_(False).eval()


def _was_trained(name: str, value: torch.Tensor, start: torch.Tensor | None) -> bool:
    """Whether a tensor differs from what it was before the first step, as far as can be told."""
    if ".lora_A." in name or ".lora_embedding_B" in name:
        return False  # random at the start
    if start is None or ".lora_B." in name or ".lora_embedding_A" in name:
        return bool(value.any())
    return not bool((value.to(start.dtype) == start.to("cpu")).all())


def activation_bytes(
    shape: Shape, rank: int, checkpointing: str, tokens: int, size: int
) -> tuple[int, int]:
    """Estimates what PEFT's modules keep between the passes, and what the layer at work takes.

    The logits are whole, and activations there in several copies; an element has `size` bytes.
    """
    hidden, adapters = shape.hidden, rank * shape.adapted
    layer = 8 * hidden + 4 * shape.inner + shape.queries + 2 * shape.keys + 2 * adapters
    logits = shape.vocabulary * (size + 8)
    if checkpointing == "none":
        return int(layer * size * tokens * shape.layers), int(logits * tokens)
    work = max(layer * size, logits)
    return int(hidden * size * tokens * shape.layers), int(work * tokens)

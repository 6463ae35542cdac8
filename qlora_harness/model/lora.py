"""Attaches, saves and loads adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import AdapterError, SettingsError, first_line
from qlora_harness.locations import expanded
from qlora_harness.model.adapter_folder import (
    CONFIG_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    check_fit,
    quiet_peft,
)
from qlora_harness.model.adapter_starts import subtract_pissa_start
from qlora_harness.model.base import hqq_layers
from qlora_harness.model.shape import Shape
from qlora_harness.record import nested, new_folder, write_json

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Initialisations that leave the base as it is; PEFT can't repeat some of them on a 4-bit base.
_HARMLESS_INITS = ("gaussian", "orthogonal", "eva")


def attach_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: str,
    dtype: str = "float32",
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "default",
) -> PeftModel:
    """Attaches a fresh LoRA adapter to a frozen base model, which computes the same as before.

    `dtype` is that of its weights on every base, so that both arms learn alike. See `lora_config`
    for the other arguments. Raises SettingsError if the model has no layer of one of the names.
    """
    import torch
    from peft import get_peft_model

    config = lora_config(
        r=r,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init=init,
    )
    if targets == "all-linear" and (names := hqq_layers(model)):
        config.target_modules = sorted({name.rsplit(".", 1)[-1] for name in names})
    if targets != "all-linear":
        known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        names = target_names(targets)
        if unknown := [name for name in names if name.rsplit(".", 1)[-1] not in known]:
            raise SettingsError(
                f"--lora-targets: the model has no layers named {', '.join(unknown)}",
                "Name layers such as q_proj,v_proj, or all-linear",
            )
    try:
        with quiet_peft():
            adapted = get_peft_model(model, config)
    except (ValueError, AttributeError) as error:  # the latter for PiSSA of expert tensors
        if "lora_dropout" in str(error):
            raise SettingsError(
                f"--lora-dropout {dropout:g}: PEFT has no dropout for the expert tensors of this "
                "model, which are not layers",
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


def lora_config(
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: str,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "default",
) -> LoraConfig:
    """Returns PEFT's configuration; `dropout` is the probability on the adapter's input.

    `targets` is "all-linear" (all linear layers except the output head) or a comma-separated list
    of layer names. `init` is a value of `--init-lora-weights`; "loftq" and "eva" need their
    function in `model.adapter_starts` as well.
    """
    from peft import EvaConfig, LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # declared int; PEFT computes with floats
        lora_dropout=dropout,
        target_modules=targets if targets == "all-linear" else target_names(targets),
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=True if init in ("default", "loftq") else init,  # type: ignore[arg-type]
        eva_config=EvaConfig(rho=1.0) if init == "eva" else None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def target_names(targets: str) -> list[str]:
    """Splits a comma-separated list of layer names, such as "q_proj, v_proj"."""
    return [name.strip() for name in targets.split(",")]


def public_name(base: str) -> str:
    """Returns a base model's name for files that people upload, without a local path."""
    path = expanded(base)
    if path.is_file():  # a GGUF file, which may be a link
        return path.name
    return path.resolve().name if path.is_dir() else base


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    record: dict[str, Any],
    pissa_start: Path | None = None,
) -> None:
    """Saves adapter, tokenizer and record to a folder, atomically; replaces an older folder.

    Scoring uses the saved tokenizer, so that it encodes as training did. With `pissa_start`, the
    adapter is the plain LoRA that belongs to the original base. Raises AdapterError if a weight
    isn't finite.
    """
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise AdapterError(
                f"the trained adapter has non-finite values in {name}; it was not saved",
                "Lower --learning-rate or look at the step log",
            )
    with new_folder(folder, replace=True) as work:
        # The vocabulary never grows, and save_embedding_layers="auto" may query the Hub.
        model.save_pretrained(str(work), safe_serialization=True, save_embedding_layers=False)
        if pissa_start is not None:
            subtract_pissa_start(work, pissa_start)
        tokenizer.save_pretrained(str(work))
        write_json(work / RECORD_FILE, record)
        # PEFT writes this list in the random order of a set, and the digest depends on it.
        config = json.loads((work / CONFIG_FILE).read_text(encoding="utf-8"))
        if isinstance(config.get("target_modules"), list):
            config["target_modules"].sort()
        base = nested(record, "base", "name") or config["base_model_name_or_path"]
        config["base_model_name_or_path"] = public_name(str(base))
        write_json(work / CONFIG_FILE, config)
        (work / "README.md").unlink(missing_ok=True)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Loads an adapter onto a base, unmerged, as `PeftModel.from_pretrained` does.

    Raises AdapterError if it doesn't fit the base (see `check_fit`), has a non-finite weight, or
    was never trained.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = check_fit(model, folder)
    path = folder / WEIGHTS_FILE
    weights = load_file(str(path))
    for name, value in weights.items():
        if not bool(value.isfinite().all()):
            raise AdapterError(
                f"{path}, tensor {name:.200}: non-finite values", "Train the adapter again"
            )
    config.inference_mode = True
    if config.init_lora_weights in _HARMLESS_INITS:
        config.init_lora_weights = True  # the file overwrites it
    try:
        with quiet_peft():
            adapted = get_peft_model(model, config)
    except Exception as error:  # noqa: BLE001  # the shapes fit, but maybe not with a 4-bit base
        raise AdapterError(
            f"peft={folder}: PEFT can't attach it to this base model ({first_line(error)})",
            "Try another quant= in --model_args",
        ) from None
    start = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if not any(_was_trained(name, value, start.get(name)) for name, value in weights.items()):
        raise AdapterError(
            f"{path}: every trained tensor equals its start, so the adapter was never trained",
            "Use the adapter of a completed run",
        )
    set_peft_model_state_dict(adapted, weights)
    return adapted.requires_grad_(False).eval()


def _was_trained(name: str, value: torch.Tensor, start: torch.Tensor | None) -> bool:
    """Whether a tensor has visibly changed since initialisation."""
    if ".lora_A." in name or ".lora_embedding_B" in name:
        return False  # starts with unknown random numbers
    if start is None or ".lora_B." in name or ".lora_embedding_A" in name:
        return bool(value.any())
    return not bool((value.to(start.dtype) == start.to("cpu")).all())


def peft_activation_bytes(
    shape: Shape, rank: int, checkpointing: str, tokens: int, size: int
) -> tuple[int, int]:
    """Estimates the bytes that PEFT's modules save for backward, and those of the layer at work.

    An element takes `size` bytes; the logits exist as a whole.
    """
    hidden, adapters = shape.hidden, rank * shape.adapted
    layer = 8 * hidden + 4 * shape.inner + shape.queries + 2 * shape.keys + 2 * adapters
    logits = shape.vocabulary * (size + 8)
    if checkpointing == "none":
        return int(layer * size * tokens * shape.layers), int(logits * tokens)
    work = max(layer * size, logits)
    return int(hidden * size * tokens * shape.layers), int(work * tokens)


def dora_activation_bytes(
    shape: Shape, checkpointing: str, tokens: int, size: int, *, expanded: bool
) -> tuple[int, int]:
    """Estimates what PEFT's DoRA adds to `peft_activation_bytes`.

    It saves three more outputs of each linear layer, and works with the update as a whole matrix.
    With dropout on a quantised base, backward also needs the `expanded` weights.
    """
    outputs = shape.queries + 2 * shape.keys + 2 * shape.hidden + 2 * shape.inner
    layer = 3 * outputs * size * tokens + expanded * shape.linear * size // shape.layers
    work = shape.largest * (4 + 3 * size)  # the update in float32, their sum, and copies
    return (layer * shape.layers, work) if checkpointing == "none" else (0, layer + work)

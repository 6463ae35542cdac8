"""Adapters: attached, saved, loaded, and checked before they are believed."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import AdapterError, SettingsError
from qlora_harness.locations import expanded
from qlora_harness.record import new_folder, read_json, write_json

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
RECORD_FILE = "qlora_harness.json"


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

    The adapter's weights have the same dtype on every base, so both arms learn alike; the update
    is zero until the first step.

    Args:
        model: From `load_base`.
        r: Rank.
        alpha: Scale; the update is multiplied by alpha / r.
        dropout: Probability, on the adapter's input.
        targets: "all-linear" (every linear layer but the output head) or a comma list of layer
            names.
        dtype: Of the adapter's weights, "float32" (PEFT's default) or "bfloat16".

    Raises:
        SettingsError: No layer has such a name.
    """
    import torch
    from peft import get_peft_model

    config = lora_config(r=r, alpha=alpha, dropout=dropout, targets=targets)
    if targets != "all-linear":
        names = target_names(targets)
        known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        if unknown := [name for name in names if name.rsplit(".", 1)[-1] not in known]:
            raise SettingsError(
                f"--lora-targets: the model has no layers named {', '.join(unknown)}",
                "Name layers such as q_proj,v_proj, or all-linear",
            )
    try:
        with _quiet():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        if "not found in the base model" in str(error):
            raise SettingsError(
                f"--lora-targets: the model has no layers named {targets}",
                "Name layers such as q_proj,v_proj, or all-linear",
            ) from None
        raise
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return adapted


def lora_config(*, r: int, alpha: float, dropout: float, targets: str) -> LoraConfig:
    """Returns PEFT's description of an adapter.

    Args:
        r: Rank.
        alpha: Scale; the update is multiplied by alpha / r.
        dropout: Probability, on the adapter's input.
        targets: "all-linear" or a comma list of layer names.
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
    """Returns the layer names of a comma list.

    Args:
        targets: Such as "q_proj, v_proj".
    """
    return [name.strip() for name in targets.split(",")]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides a deprecation inside PEFT 0.21 that transformers 5.23 reports at every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def public_name(base: str) -> str:
    """Returns how files that people upload call a base model: without the folders of this machine.

    Args:
        base: A Hub id, or a folder, of which the last name stays.
    """
    path = expanded(base)
    return path.resolve().name if path.is_dir() else base


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, record: dict[str, Any]
) -> None:
    """Saves adapter, tokenizer and record into a folder that appears whole or not at all.

    Args:
        model: The trained model.
        tokenizer: Saved beside it, so that scoring encodes as training did.
        folder: Replaced if it exists.
        record: Base, revision and quantisation, read by `load_adapter`'s callers.

    Raises:
        AdapterError: A weight is not finite.
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
        config["base_model_name_or_path"] = public_name(record["base"]["name"])
        write_json(work / CONFIG_FILE, config)
        (work / "README.md").unlink(missing_ok=True)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Reads and checks what an adapter folder says of itself.

    Args:
        folder: A PEFT adapter folder.

    Returns:
        The content of adapter_config.json.

    Raises:
        AdapterError: The folder is no LoRA adapter, or its weights are pickled.
    """
    if not folder.is_dir():
        raise AdapterError(f"peft={folder} does not exist", "Name an adapter folder")
    if not (folder / CONFIG_FILE).is_file():
        nested = folder / "adapter"
        hint = f"Did you mean peft={nested}" if nested.is_dir() else "Name a PEFT adapter folder"
        raise AdapterError(f"peft={folder} holds no {CONFIG_FILE}", hint)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder / CONFIG_FILE} is broken ({type(error).__name__}: {error})",
            "Save the adapter anew",
        ) from None
    if kind != "LORA":
        raise AdapterError(
            f"{folder / CONFIG_FILE}, key 'peft_type': {kind!r}", "Only LoRA adapters are supported"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = sorted(p.name for p in folder.glob("adapter_model.*"))
        if pickled:
            raise AdapterError(
                f"{folder / pickled[0]} is pickled, and unpickling runs code",
                f"Convert it to {WEIGHTS_FILE}",
            )
        raise AdapterError(f"{folder} holds no {WEIGHTS_FILE}", "Save the adapter anew")
    return dict(config)


def read_adapter_record(folder: Path) -> dict[str, Any] | None:
    """Returns this project's record beside an adapter, or None for an adapter made elsewhere.

    Args:
        folder: The adapter folder.
    """
    path = folder / RECORD_FILE
    return read_json(path) if path.is_file() else None


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Loads an adapter onto a base model, unmerged, and checks that it took.

    Args:
        model: From `load_base`.
        folder: A PEFT adapter folder.

    Raises:
        AdapterError: The file is damaged; keys are missing or unexpected, or shapes differ (another
            base model); a weight is not finite; or every lora_B is zero (never trained).
    """
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    read_adapter_config(folder)
    weights_path = folder / WEIGHTS_FILE
    try:
        weights = load_file(str(weights_path))
    except Exception as error:  # safetensors raises its own kinds
        raise AdapterError(
            f"{weights_path} is damaged ({str(error).splitlines()[0]})", "Save the adapter anew"
        ) from None
    _check_values(weights, weights_path)
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        # Else PEFT warns that it renames the base, which is checked elsewhere.
        recorded, config.base_model_name_or_path = config.base_model_name_or_path, None
        with _quiet():
            adapted = get_peft_model(model, config)
        outcome = set_peft_model_state_dict(adapted, weights)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
        base = read_adapter_config(folder).get("base_model_name_or_path")
        raise AdapterError(
            f"peft={folder} does not fit this base model ({detail})",
            f"It was trained on {base}; give that as pretrained=",
        ) from None
    missing = [key for key in outcome.missing_keys if "lora_" in key]
    unexpected = list(outcome.unexpected_keys)
    if missing or unexpected:
        raise AdapterError(
            f"peft={folder} does not fit this base model: {len(missing)} adapter weights missing, "
            f"{len(unexpected)} unexpected (first: {(missing + unexpected)[0]})",
            f"It was trained on {recorded}; give that as pretrained=",
        )
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        adapted.eval()
    return adapted


def fuse_lora(model: PeftModel, compute_dtype: str) -> int:
    """Makes an unmerged adapter fast in PEFT's own modules: its two products are added in place.

    PEFT computes x·A·B in the adapter's float32 and adds it in three passes over the output. Here
    the adapter is held in the compute dtype (as autocast does in training) and the second product
    accumulates into the output of the base layer. Nothing is merged.

    Args:
        model: From `load_adapter`, only read from now on.
        compute_dtype: "bfloat16" or "float32".

    Returns:
        How many layers were changed.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    dtype = getattr(torch, compute_dtype)
    count = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer) or list(module.lora_A) != ["default"]:
            continue
        if not hasattr(module.lora_A["default"], "weight") or any(module.use_dora.values()):
            continue
        for part in (module.lora_A["default"], module.lora_B["default"]):
            part.to(dtype)
        module.forward = _fused_forward(module)
        count += 1
    return count


def _fused_forward(module: Any) -> Any:
    import torch

    down = module.lora_A["default"].weight.t()
    up = module.lora_B["default"].weight.t()
    scale = float(module.scaling["default"])
    base = module.base_layer

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = base(x, *args, **kwargs)
        rows = x.reshape(-1, x.shape[-1]).to(down.dtype) @ down
        flat = out.reshape(-1, out.shape[-1])
        return torch.addmm(flat, rows, up, alpha=scale).view(out.shape)

    return forward


def _check_values(weights: dict[str, Any], path: Path) -> None:
    import torch

    trained = False
    for name, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            raise AdapterError(
                f"{path}, tensor {name}: non-finite values", "Train the adapter anew"
            )
        trained = trained or ("lora_B" in name and bool(value.any()))
    if not trained:
        raise AdapterError(
            f"{path}: every lora_B weight is zero, so the adapter was never trained",
            "Name the adapter of a completed run",
        )


def adapter_digest(folder: Path) -> str:
    """Returns the SHA-256 of an adapter's weights and configuration, 64 hexadecimal digits.

    Args:
        folder: The adapter folder.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()

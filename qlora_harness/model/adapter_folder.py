"""Reads PEFT adapter folders, and checks them against a base model before allocating anything."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, ValidationError

from qlora_harness.errors import AdapterError, HarnessError, first_line, shown
from qlora_harness.record import read_json

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

logger = logging.getLogger("qlora_harness")

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
RECORD_FILE = "qlora_harness.json"

_DTYPES = ("F64", "F32", "F16", "BF16")
_LARGEST_CONFIG = 1_000_000  # bytes; listing every layer of a 70B model takes 30,000
_PATTERN_SECONDS = 2.0
_SAVE_AGAIN = "Save the adapter again"

_Rank = Annotated[int, Field(strict=True, ge=1, le=2**31)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Names = StrictStr | list[StrictStr] | None


class _CheckedFields(BaseModel):
    """Fields of adapter_config.json that PEFT doesn't check."""

    r: _Rank = 8
    lora_alpha: _Number = 8
    lora_dropout: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Number] | None = None
    target_modules: _Names = None
    exclude_modules: _Names = None
    layers_pattern: _Names = None
    modules_to_save: _Names = None
    target_parameters: _Names = None
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    lora_bias: StrictBool = False
    fan_in_fan_out: StrictBool = False
    use_qalora: StrictBool = False
    layer_replication: (
        list[Annotated[list[StrictInt], Field(min_length=2, max_length=2)]] | None
    ) = None


# Besides the checked fields, these too affect only PEFT's modules, each token by itself. Any other
# field may do more.
_HARMLESS_FIELDS = (
    "auto_mapping base_model_name_or_path bias ensure_weight_tying inference_mode "
    "init_lora_weights layers_to_transform megatron_core peft_type peft_version qalora_group_size "
    "revision task_type trainable_token_indices"
)
_KNOWN_FIELDS = {*_CheckedFields.model_fields, *_HARMLESS_FIELDS.split()} - {"use_qalora"}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Returns the checked adapter_config.json of a PEFT adapter folder.

    Raises AdapterError if it isn't a LoRA adapter, has a wrong field, or has pickled weights.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise AdapterError(f"peft={folder} does not exist", "Name an adapter folder")
    if not path.is_file():
        nested = folder / "adapter"
        hint = f"Did you mean peft={nested}" if nested.is_dir() else "Name a PEFT adapter folder"
        raise AdapterError(f"peft={folder} holds no {CONFIG_FILE}", hint)
    if path.stat().st_size > _LARGEST_CONFIG:
        raise AdapterError(f"{path} has {path.stat().st_size:,} bytes", _SAVE_AGAIN)
    try:
        config = read_json(path)
    except HarnessError as error:
        raise AdapterError(error.problem, _SAVE_AGAIN) from None
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{path}, key 'peft_type': {shown(kind)}", "Only LoRA adapters are supported"
        )
    _check_fields(config, path)
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = sorted(p.name for p in folder.glob("adapter_model.*"))
        if pickled:
            raise AdapterError(
                f"{folder / pickled[0]} is pickled, and unpickling can run any code",
                f"Convert it to {WEIGHTS_FILE}",
            )
        raise AdapterError(f"{folder} holds no {WEIGHTS_FILE}", _SAVE_AGAIN)
    return config


def _check_fields(config: Mapping[str, Any], path: Path) -> None:
    try:
        _CheckedFields.model_validate(config)
    except ValidationError as error:
        first, *others = error.errors()
        key, *inside = first["loc"]
        if str(key).endswith("_pattern") and isinstance(config[str(key)], dict):
            key = f"{key}.{inside[0]!s:.80}"
        kinds = [e["msg"] for e in (first, *others) if e["loc"][0] == first["loc"][0]]
        allowed = " or ".join(dict.fromkeys(k.removeprefix("Input should be ") for k in kinds))
        raise AdapterError(
            f"{path}, key '{key}': {shown(first['input'])}", f"It must be {allowed:.100}"
        ) from None


def unknown_field(config: Mapping[str, Any]) -> str | None:
    """Returns a field that is set but unknown here, such as one of a newer PEFT, or None."""
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    for name, value in config.items():
        if name not in _KNOWN_FIELDS and value and value != defaults.get(name):
            return name
    return None


def read_adapter_record(folder: Path) -> dict[str, Any] | None:
    """Returns this project's record of an adapter, or None if another tool made the adapter."""
    path = folder / RECORD_FILE
    return read_json(path) if path.is_file() else None


def adapter_digest(folder: Path) -> str:
    """Returns the SHA-256 of an adapter's configuration and weights, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_fit(model: PreTrainedModel, folder: Path) -> LoraConfig:
    """Checks that an adapter's configuration and tensors fit a base model; returns the former.

    PEFT attaches the adapter to a copy of the base on the meta device, which has no memory, and
    loads tensors with the names and shapes in the safetensors header. Raises AdapterError if the
    configuration or the file is broken, or a tensor isn't floating point or doesn't fit.
    """
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    raw = read_adapter_config(folder)
    header = _read_header(folder / WEIGHTS_FILE)
    base = raw.get("base_model_name_or_path")
    remedy = f"It was trained on {base!s:.120}; give that as pretrained="
    problem = f"peft={folder} does not fit this base model"
    _check_replication(raw.get("layer_replication") or [], header, folder)
    _check_patterns(raw, [name for name, _ in model.named_modules()], folder)
    plain = copy.deepcopy(model.config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    try:
        config: LoraConfig = LoraConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None  # else PEFT warns about another name of the base
        shapes = copy.deepcopy(config)
        shapes.init_lora_weights = False  # some initialisations decompose the base's weights
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real attachment repeats them
            adapted = get_peft_model(type(model)(plain), shapes, low_cpu_mem_usage=True)
            empty = {name: torch.empty(shape) for name, shape in header.items()}
            outcome: Any = set_peft_model_state_dict(adapted, empty)
    except Exception as error:  # noqa: BLE001  # PEFT raises many kinds for senseless fields
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
        raise AdapterError(f"{problem} ({detail:.300})", remedy) from None
    missing = [key for key in outcome.missing_keys if "lora_" in key]
    unexpected = list(outcome.unexpected_keys)
    if missing or unexpected:
        raise AdapterError(
            f"{problem}: {len(missing)} adapter weights missing, {len(unexpected)} unexpected "
            f"(first: {(missing + unexpected)[0]:.200})",
            remedy,
        )
    return config


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Logs PEFT's warnings, shortened, but not a deprecation inside PEFT 0.21."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        if "is_gradient_checkpointing" not in text:
            logger.warning("PEFT: %.300s", text)


def _read_header(path: Path) -> dict[str, list[int]]:
    """Returns the shape of each tensor in a safetensors file."""
    from safetensors import safe_open

    shapes, dtypes = {}, {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                tensor = file.get_slice(name)
                shapes[name], dtypes[name] = tensor.get_shape(), tensor.get_dtype()
    except Exception as error:  # noqa: BLE001  # kinds of safetensors and of the system
        raise AdapterError(f"{path} is damaged ({first_line(error):.200})", _SAVE_AGAIN) from None
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise AdapterError(
                f"{path}, tensor {name:.200}: its dtype is {dtype}",
                f"Save it as one of {', '.join(_DTYPES)}",
            )
    return shapes


def _check_replication(ranges: list[list[int]], names: Iterable[str], folder: Path) -> None:
    """Rejects layer ranges that are invalid or need more layers than the file has weights for."""
    key = f"{folder / CONFIG_FILE}, key 'layer_replication'"
    if not all(0 <= start < end for start, end in ranges):
        raise AdapterError(f"{key}: {shown(ranges)}", "It must be a list of [start, end]")
    numbers = [int(n) for name in names for n in re.findall(r"\.(\d{1,6})\.", name)]
    layers, known = sum(end - start for start, end in ranges), max(numbers, default=-1) + 1
    if layers > known:
        raise AdapterError(
            f"{key}: {layers} layers, but {WEIGHTS_FILE} has weights of {known}", _SAVE_AGAIN
        )


def _check_patterns(config: Mapping[str, Any], names: list[str], folder: Path) -> None:
    """Rejects invalid patterns, and those that take too long to match the base's module names.

    PEFT matches them with `re`, which can't be interrupted, so a subprocess tries them first.
    """
    patterns: dict[str, list[str]] = {}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            patterns[key] = [config[key]]
    for key in ("rank_pattern", "alpha_pattern"):  # as peft.utils.other.get_pattern_key
        patterns[key] = [rf"(.*\.)?({pattern})$" for pattern in config.get(key) or {}]
    layers = config.get("layers_pattern") or []
    patterns["layers_pattern"] = [
        rf".*\.{pattern}\.(\d+)\." for pattern in ([layers] if isinstance(layers, str) else layers)
    ]
    program = (
        "import json, re, sys\n"
        "patterns, names = json.load(sys.stdin)\n"
        "for pattern in map(re.compile, patterns):\n"
        "    [f(name) for name in names for f in (pattern.match, pattern.fullmatch)]\n"
    )
    for key, each in patterns.items():
        if not each or each == ["all-linear"]:
            continue
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", program],
                input=json.dumps([each, names]),
                capture_output=True,
                text=True,
                timeout=_PATTERN_SECONDS,
                check=True,
            )
            continue
        except subprocess.TimeoutExpired:
            reason = f"it takes more than {_PATTERN_SECONDS:g} s to match the model's modules"
        except subprocess.CalledProcessError:
            reason = "it is not a regular expression"
        raise AdapterError(
            f"{folder / CONFIG_FILE}, key '{key}': {shown(config[key])}: {reason}", _SAVE_AGAIN
        )

"""Reads settings from flags, recipes and records, and refuses what is wrong or impossible."""

from __future__ import annotations

import dataclasses
import difflib
import math
import unicodedata
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import yaml

from qlora_harness.errors import SettingsError, shown
from qlora_harness.settings import (
    ABOVE_ZERO,
    DEFAULT_MAX_STEPS,
    GROUPS,
    ROPE_TYPES,
    Quant,
    Settings,
    field_kind,
    flag_of,
    setting_fields,
)

_LARGEST_FACTOR = 10_000  # of a RoPE scaling


def build_settings(values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> Settings:
    """Checks values by name and fills in the defaults; raises SettingsError.

    `sources` says where each value came from: a flag, or a recipe file and key.
    """
    given = dict(sources or {})
    where = {name: flag_of(name) for name in values} | given
    known = setting_fields()
    grouped: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in values.items():
        if name not in known:
            raise unknown_name(name, given.get(name, f"setting '{name}'"), known)
        group, f = known[name]
        grouped[group][name] = _checked(f, value, where[name])
    model = grouped["model"]
    if model.get("rope_scaling") is not None:
        model["rope_scaling"] = checked_scaling(model["rope_scaling"], where["rope_scaling"])
    optimization = grouped["optimization"]
    _check_exclusions(optimization, where, given)
    if optimization.get("max_steps") is None and optimization.get("epochs") is None:
        optimization["max_steps"] = DEFAULT_MAX_STEPS
    settings = Settings(**{group: GROUPS[group](**grouped[group]) for group in GROUPS})
    check_combination(settings)
    return settings


def _check_exclusions(
    optimization: Mapping[str, Any], where: Mapping[str, str], given: Mapping[str, str]
) -> None:
    steps, epochs = optimization.get("max_steps"), optimization.get("epochs")
    if steps is not None and epochs is not None:
        raise SettingsError(
            f"{where['max_steps']} ({steps}) and {where['epochs']} ({epochs}) exclude each other",
            "Give one of the two",
        )
    memory = optimization.get("memory")
    if memory is None:
        return
    if memory not in ("fast", "balanced", "lean") and not 0 < _as_float(memory) < math.inf:
        raise SettingsError(
            f"{where['memory']}: {shown(memory)} is not fast, balanced, lean or a number of GiB",
            "Choose one of these",
        )
    # Only flags exclude --memory; it replaces the values of a recipe or an earlier record.
    for name in ("checkpointing", "optimizer", "adapter_dtype"):
        if given.get(name, "").startswith("--"):
            raise SettingsError(
                f"{where['memory']} and {where[name]} exclude each other", "Give one of the two"
            )


def check_combination(settings: Settings) -> None:
    """Raises SettingsError for an arm that would be wrong or impossible."""
    quant, lora, optimization = settings.quant, settings.lora, settings.optimization
    init, checkpointing = lora.init_lora_weights, optimization.checkpointing
    flag = f"--init-lora-weights {init}"
    if init == "loftq" and quant is not Quant.NF4:
        raise SettingsError(
            f"{flag} with --quant {quant.value}: LoftQ corrects the error of nf4 only",
            "Use --quant nf4, or another initialisation",
        )
    if init == "pissa" and quant.is_quantised:
        raise SettingsError(
            f"{flag} with --quant {quant.value}: PiSSA replaces the base by a residual, and its "
            "quantisation would be another base",
            "Use --quant bf16, or another initialisation",
        )
    if init == "pissa" and lora.adapter_dtype != "float32":
        raise SettingsError(
            f"{flag} with --adapter-dtype {lora.adapter_dtype}: the residual holds the adapter's "
            "start in float32",
            "Use --adapter-dtype float32 (and not --memory lean)",
        )
    if init in ("pissa", "loftq") and lora.use_dora:
        raise SettingsError(
            f"{flag} with --use-dora: DoRA takes its norms from the base before that start",
            "Leave one of the two out",
        )
    if lora.use_dora and quant is Quant.INT8:
        raise SettingsError(
            "--use-dora with --quant int8: PEFT's DoRA loses the scales of LLM.int8 on a CPU",
            "Use another --quant, or leave --use-dora out",
        )
    if settings.model.compute_dtype == "float16" and lora.adapter_dtype != "float32":
        raise SettingsError(
            f"--adapter-dtype {lora.adapter_dtype} with --compute-dtype float16: the gradients of "
            "a scaled loss need float32",
            "Use --adapter-dtype float32",
        )
    if settings.model.compute == "fp8":
        _check_fp8(settings)
    needs_fused = checkpointing in ("selective", "offload") and optimization.memory is None
    if needs_fused and not settings.allows_fused:
        raise SettingsError(
            f"--checkpointing {checkpointing} needs fused layers, and {settings.without_fused} "
            "has none",
            "Use --checkpointing full or none",
        )


def with_dtype(settings: Settings, dtype: str) -> Settings:
    """Returns settings with another compute dtype; raises SettingsError if others exclude it."""
    model = dataclasses.replace(settings.model, compute_dtype=dtype)
    changed = dataclasses.replace(settings, model=model)
    check_combination(changed)
    return changed


def _check_fp8(settings: Settings) -> None:
    reason = None
    if not settings.allows_fused:
        reason = f"{settings.without_fused}: it has no fused layers", "Use --compute bf16"
    elif settings.optimization.kernels == "none":
        reason = "--kernels none: it is a part of fused layers", "Leave one of the two out"
    elif settings.model.compute_dtype == "float32":
        reason = "--compute-dtype float32: the rest is bfloat16", "Leave one of the two out"
    if reason is not None:
        raise SettingsError(f"--compute fp8 with {reason[0]}", reason[1])


def check_can_shard(settings: Settings) -> None:
    """Raises SettingsError if a base that is spread over processes can't be trained so."""
    reason = settings.without_fused
    if settings.optimization.kernels == "none":
        reason = "--kernels none"
    if settings.lora.init_lora_weights in ("eva", "loftq", "pissa"):  # they read the whole base
        reason = f"--init-lora-weights {settings.lora.init_lora_weights}"
    if reason is not None:
        raise SettingsError(
            f"FSDP spreads the base over the processes, which is impossible with {reason}",
            "Leave it out, or launch without FSDP",
        )


def checked_scaling(text: str, where: str) -> str:
    """Returns a RoPE scaling as records have it: yarn:4 for yarn:4.0. Raises SettingsError."""
    kind, _, factor = text.partition(":")
    if kind not in ROPE_TYPES:
        raise SettingsError(
            f"{where}: {shown(text)} has a type that is not one of {', '.join(ROPE_TYPES)}",
            "Give TYPE:FACTOR, such as yarn:4",
        )
    number = _as_float(factor)
    if not 1 < number <= _LARGEST_FACTOR:
        raise SettingsError(
            f"{where}: the factor of {shown(text)} is not a number above 1, at most "
            f"{_LARGEST_FACTOR}",
            f"Give TYPE:FACTOR, such as {kind}:4",
        )
    return f"{kind}:{number:.12g}"


def check_can_run(settings: Settings) -> None:
    """Raises SettingsError if a package that the settings need is not installed."""
    check_quant_package(settings.quant, f"--quant {settings.quant.value}")
    report_to = settings.run.report_to
    if report_to != "none":
        _check_package(report_to, f"--report-to {report_to}")


def check_quant_package(quant: Quant, shown_argument: str) -> None:
    """Raises SettingsError if a quantisation needs a package that is not installed."""
    if quant is Quant.HQQ:
        _check_package("hqq", shown_argument)


def _check_package(package: str, needing: str) -> None:
    if find_spec(package) is None:
        raise SettingsError(f"{needing} needs the package {package}", f"pip install {package}")


def unknown_name(name: str, source: str, known: Iterable[str]) -> SettingsError:
    """Returns the error for an unknown flag or recipe key; it suggests the nearest known one."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)
    if close and source.startswith("flag "):
        close = [flag_of(close[0])]
    hint = f"did you mean {close[0]!r}? " if close else ""
    return SettingsError(
        f"{source} is not known", f"{hint}`launch/train.py --help` lists every setting"
    )


def _checked(f: dataclasses.Field[Any], value: Any, source: str) -> Any:
    """Returns a value in its field's type, or raises SettingsError."""
    if value is None and f.default is None:
        return None
    kind, rules = field_kind(f), f.metadata
    if kind is bool:
        return _required(_as_bool(value), value, "true or false", source)
    if kind is str:
        text = _required(_as_text(value, rules["listed"]), value, "a text", source)
        _check_text(text, rules["choices"], source)
        return text
    whole = kind is int
    name = "a whole number" if whole else "a number"
    number = _required(_as_number(value, whole=whole), value, name, source)
    _check_range(number, rules["low"], rules["high"], source)
    return number


def _required(typed: Any, value: Any, kind: str, source: str) -> Any:
    if typed is None:
        raise SettingsError(f"{source}: {shown(value)} is not {kind}", "Correct the value")
    return typed


def _as_bool(value: Any) -> bool | None:
    if isinstance(value, str):
        value = yaml.SafeLoader.bool_values.get(value.lower())
    return value if isinstance(value, bool) else None


def _as_number(value: Any, *, whole: bool) -> float | None:
    number = math.nan if isinstance(value, bool) else _as_float(value)
    if not math.isfinite(number) or (whole and number != int(number)):
        return None
    return int(number) if whole else number


def _as_float(value: Any) -> float:
    """Returns a number, or NaN."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _as_text(value: Any, listed: bool) -> str | None:
    if listed and isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100:
        value = repr(value).removesuffix(".0")
    return value if isinstance(value, str) and value and value == value.strip() else None


def _check_text(text: str, choices: tuple[str, ...], source: str) -> None:
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise SettingsError(
            f"{source}: {shown(text)} holds a control character or bytes that are not UTF-8",
            "Correct the value",
        )
    if choices and text not in choices:
        raise SettingsError(
            f"{source}: {shown(text)} is not one of {', '.join(choices)}", "Choose one of these"
        )


def _check_range(value: float, low: float, high: float, source: str) -> None:
    if low <= value <= high:
        return
    rule = "above 0" if low == ABOVE_ZERO else f"at least {low:g}"
    if high < math.inf:
        rule = f"from {low:.10g} to {high:.10g}"
    raise SettingsError(f"{source}: {value} is out of range", f"It must be {rule}")

"""Every setting of a training run, with its default, unit and check.

Flags and recipe keys are generated from these fields: `learning_rate` is `--learning-rate`. The
defaults are the published QLoRA recipe for LLaMA-2-7B on OASST1
(https://github.com/artidoro/qlora, scripts/finetune_llama2_guanaco_7b.sh).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from qlora_harness.errors import SettingsError, shown

DEFAULT_MAX_STEPS = 1875
# We warn if a 4-bit base holds at least this share of its layer weights in 16 bits.
NOTABLE_SHARE = 0.05
CHECKPOINTING = ("none", "selective", "full", "offload")
COMPUTE = ("bf16", "fp8")
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
ROPE_TYPES = ("linear", "dynamic", "yarn")


class Quant(str, Enum):
    """How the frozen base weights are held."""

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"
    HQQ = "hqq"
    BF16 = "bf16"

    @property
    def is_quantised(self) -> bool:
        """Whether the linear layers are held in fewer than 16 bits."""
        return self is not Quant.BF16

    @property
    def is_4bit(self) -> bool:
        """Whether the linear layers are bitsandbytes' 4-bit ones, which fused layers can expand."""
        return self in (Quant.NF4, Quant.FP4)

    @property
    def arm(self) -> str:
        """Name of the results folder: 4bit, 4bit_fp4, 8bit, 4bit_hqq or 16bit."""
        return _ARMS[self]

    @property
    def file_arm(self) -> str:
        """Name of the arm inside file names, such as 4bit_qlora, 8bit_lora or 16bit_lora."""
        return f"{self.arm}_{'qlora' if self.arm.startswith('4bit') else 'lora'}"


_ARMS = {
    Quant.NF4: "4bit",
    Quant.FP4: "4bit_fp4",
    Quant.INT8: "8bit",
    Quant.HQQ: "4bit_hqq",
    Quant.BF16: "16bit",
}
_LARGEST_FACTOR = 10_000  # of a RoPE scaling
_ABOVE_ZERO = math.ulp(0.0)  # the smallest positive float


def _setting(
    default: Any,
    help_text: str,
    unit: str = "",
    *,
    choices: Iterable[str] | None = None,
    listed: bool = False,
    low: float = 0,
    high: float = math.inf,
) -> Any:
    """A field between `low` and `high`; a `listed` one may be a YAML list in a recipe."""
    rules = {"choices": tuple(choices or ()), "listed": listed, "low": low, "high": high}
    return field(default=default, metadata={"help": help_text, "unit": unit, **rules})


@dataclass(frozen=True)
class ModelSettings:
    """Which base model, and how its weights are held."""

    model: str = _setting(
        "meta-llama/Llama-2-7b-hf",
        "base model: a Hub id, a folder, a GGUF file, or 'smollm2' (the embedded SmolLM2-135M)",
    )
    revision: str | None = _setting(
        None, "branch, tag or commit of the base model on the Hub (default: its main branch)"
    )
    quant: str = _setting(
        "nf4",
        "format of the frozen base weights: 4 bits (nf4, fp4, hqq), LLM.int8, or bf16 for 16 bits, "
        "which --compute-dtype float16 holds in float16",
        choices=[q.value for q in Quant],
    )
    double_quant: bool = _setting(True, "quantise the 4-bit scales as well (nf4 and fp4 only)")
    compute_dtype: str = _setting(
        "auto",
        "dtype of matrix products; auto: bfloat16 on a GPU, or float16 if it has no bfloat16, and "
        "on a CPU the faster of bfloat16 and float32",
        choices=["auto", *COMPUTE_DTYPES],
    )
    compute: str = _setting(
        "bf16",
        "products with the frozen layers: in the compute dtype (bf16), or in 8-bit floats (fp8), "
        "which is faster and less exact, and needs a Hopper GPU and fused layers",
        choices=COMPUTE,
    )
    rope_scaling: str | None = _setting(
        None,
        "longer window of the base, as TYPE:FACTOR with TYPE linear, dynamic or yarn: yarn:4 for "
        "four times as many tokens (default: the base's own window)",
    )


@dataclass(frozen=True)
class DataSettings:
    """Which conversations, and which of their tokens are learned."""

    dataset: str = _setting(
        "oasst1",
        "a known data set (oasst1, oasst2, guanaco, alpaca, alpaca-cleaned, dolly-15k, longform, "
        "or 'demo', which is embedded), a Hub id, a file (.jsonl, .json, .csv, .parquet, also .gz "
        "or .zst), a folder of `datasets`, or a mixture such as oasst1:0.7,alpaca:0.3",
        listed=True,
    )
    format: str = _setting(
        "auto",
        "form of the rows; auto: the one that their columns fit",
        choices=[
            "auto",
            *("oasst", "alpaca", "dolly", "sharegpt", "messages"),
            *("prompt-completion", "longform", "guanaco", "text"),
        ],
    )
    dataset_revision: str | None = _setting(
        None, "branch, tag or commit of the data set on the Hub (default: its main branch)"
    )
    languages: str = _setting("en", "comma-separated language codes to keep, or 'all'", listed=True)
    conversations: str = _setting(
        "best-path",
        "which paths of a tree become conversations; all-paths trains on each last reply only",
        choices=["best-path", "all-paths"],
    )
    template: str = _setting(
        "guanaco",
        "text around the turns; guanaco is '### Human: …### Assistant: …'; tokenizer is the chat "
        "template of the model's tokenizer; none is for plain text",
        choices=[
            *("guanaco", "alpaca", "alpaca-preamble", "chatml", "llama2", "vicuna"),
            *("tokenizer", "none"),
        ],
    )
    mask: str = _setting(
        "prompt",
        "prompt: learn assistant tokens only; none: learn every token, as the original QLoRA did",
        choices=["prompt", "none"],
    )
    max_length: int = _setting(512, "longest example, BOS and EOS included", "tokens", low=8)
    eval_fraction: float = _setting(
        0.05,
        "share of trees held out if the data set has no validation split",
        "0 to 0.5",
        high=0.5,
    )
    eval_seed: int = _setting(
        0,
        "seed of the choice of these trees, and of a mixture's conversations; --seed does not "
        "change it",
        high=2**32 - 1,
    )


@dataclass(frozen=True)
class LoraSettings:
    """The adapter."""

    lora_r: int = _setting(64, "rank", "dimensions", low=1)
    lora_alpha: float = _setting(
        16, "scale: the update is multiplied by alpha / r", low=_ABOVE_ZERO
    )
    use_rslora: bool = _setting(False, "scale the update by alpha / sqrt(r) instead (rsLoRA)")
    use_dora: bool = _setting(False, "learn the norm of each weight row separately (DoRA)")
    init_lora_weights: str = _setting(
        "default",
        "initial adapter: default (Kaiming); gaussian; pissa (principal parts of a bf16 "
        "base); loftq (the error of an nf4 base); eva (principal parts of the layers' inputs)",
        choices=["default", "gaussian", "pissa", "loftq", "eva"],
    )
    lora_dropout: float = _setting(0.1, "dropout on the adapter's input", "probability", high=0.99)
    lora_targets: str = _setting(
        "all-linear",
        "layers that get an adapter: all-linear (not the output head) or a comma-separated list",
        listed=True,
    )
    adapter_dtype: str = _setting(
        "float32",
        "dtype of the adapter's weights and gradients; bfloat16 halves their memory",
        choices=["float32", "bfloat16"],
    )


@dataclass(frozen=True)
class OptimizationSettings:
    """Steps, batches and the optimizer."""

    max_steps: int | None = _setting(
        None,
        f"optimizer steps (default {DEFAULT_MAX_STEPS} unless --epochs is given)",
        "steps",
        low=1,
    )
    epochs: float | None = _setting(
        None, "passes over the data, instead of --max-steps", "epochs", low=_ABOVE_ZERO
    )
    batch_size: int = _setting(1, "examples in one forward pass, per process", "examples", low=1)
    grad_accum: int = _setting(16, "forward passes per optimizer step", "passes", low=1)
    eval_batch_size: int = _setting(
        8, "examples in one evaluation pass, per process", "examples", low=1
    )
    learning_rate: float = _setting(2e-4, "peak learning rate", low=_ABOVE_ZERO)
    lr_schedule: str = _setting(
        "constant", "learning rate over time", choices=["constant", "linear", "cosine"]
    )
    warmup_ratio: float = _setting(0.0, "share of steps with a rising rate", "0 to 1", high=1)
    optimizer: str = _setting(
        "paged_adamw_32bit",
        "optimizer",
        choices=["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_torch"],
    )
    adam_beta2: float = _setting(0.999, "decay of the second moment", "0 to 1", high=0.999999)
    weight_decay: float = _setting(0.0, "decoupled weight decay")
    max_grad_norm: float = _setting(0.3, "gradients are clipped to this norm", low=_ABOVE_ZERO)
    group_by_length: bool = _setting(True, "put examples of similar length into one batch")
    checkpointing: str = _setting(
        "full",
        "activations that the backward pass recomputes to save memory: none; selective (the "
        "large ones of the MLP; on a GPU, two layers in three store them in host memory instead); "
        "full (all but each layer's input); offload (full, with the inputs in host memory)",
        choices=CHECKPOINTING,
    )
    memory: str | None = _setting(
        None,
        "fast, balanced, lean, or a number of GiB: chooses checkpointing, optimizer bits, adapter "
        "dtype and how many of a step's examples go into one pass (default: as their own flags "
        "say)",
    )
    kernels: str = _setting(
        "auto",
        "auto: fused layers and unpadded rows for LLaMA-type models; none: PEFT's own modules and "
        "padded batches",
        choices=["auto", "none"],
    )
    seed: int = _setting(0, "seed of adapter weights, dropout and data order", high=2**32 - 1)


@dataclass(frozen=True)
class RunSettings:
    """What is stored of the run and where, and what happens if the folder is not empty."""

    output_dir: str | None = _setting(
        None, "run folder (default results/4bit for nf4, results/16bit for bf16, results/8bit, …)"
    )
    save_steps: int = _setting(250, "steps between checkpoints", "steps", low=1)
    eval_steps: int | None = _setting(
        None,
        "steps between evaluations of the held-out conversations (default: none during training)",
        "steps",
        low=1,
    )
    resume: str = _setting(
        "auto",
        "auto: resume an unfinished run from its newest intact checkpoint; never; or a checkpoint "
        "folder",
    )
    overwrite: bool = _setting(False, "replace the run in the folder")
    report_to: str = _setting("none", "where else to log", choices=["none", "tensorboard", "wandb"])


GROUPS: dict[str, type] = {
    "model": ModelSettings,
    "data": DataSettings,
    "lora": LoraSettings,
    "optimization": OptimizationSettings,
    "run": RunSettings,
}

# Settings that don't change what is learned. Resuming and `compare` require all others to agree.
BOOKKEEPING = frozenset({f.name for f in fields(RunSettings)} | {"eval_batch_size"})


@dataclass(frozen=True)
class Settings:
    """Every setting of one run, checked."""

    model: ModelSettings
    data: DataSettings
    lora: LoraSettings
    optimization: OptimizationSettings
    run: RunSettings

    @property
    def quant(self) -> Quant:
        """How the base weights are held."""
        return Quant(self.model.quant)

    @property
    def without_fused(self) -> str | None:
        """The flag, with its value, for which there are no fused layers, or None."""
        if self.lora.use_dora:
            return "--use-dora"
        if self.quant in (Quant.INT8, Quant.HQQ):
            return f"--quant {self.quant.value}"
        if self.model.compute_dtype == "float16":
            return "--compute-dtype float16"
        # Its frequencies depend on the length of the text, and a row holds several.
        scaling = self.model.rope_scaling or ""
        return f"--rope-scaling {scaling}" if scaling.startswith("dynamic") else None

    @property
    def allows_fused(self) -> bool:
        """Whether fused layers can compute this arm, if they can compute its base model."""
        return self.without_fused is None

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.output_dir or Path("results") / self.quant.arm)

    def flat(self) -> dict[str, Any]:
        """Returns every setting by name, as recipes and records hold them."""
        return {
            name: value
            for group in GROUPS
            for name, value in dataclasses.asdict(getattr(self, group)).items()
        }

    def experiment(self) -> dict[str, Any]:
        """Returns the settings that affect what is learned."""
        return {k: v for k, v in self.flat().items() if k not in BOOKKEEPING}


def setting_fields() -> dict[str, tuple[str, dataclasses.Field[Any]]]:
    """Returns the group and the dataclass field of each setting, by name."""
    return {f.name: (group, f) for group, cls in GROUPS.items() for f in fields(cls)}


def flag_of(name: str) -> str:
    """Returns the flag of a setting: --learning-rate for learning_rate."""
    return f"--{name.replace('_', '-')}"


def field_kind(f: dataclasses.Field[Any]) -> type:
    """Returns the type of a setting, without its None."""
    return {"str": str, "int": int, "float": float, "bool": bool}[str(f.type).split(" ")[0]]


def build_settings(values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> Settings:
    """Checks values by name and fills in the defaults.

    `sources` says where each value came from (a flag, or a recipe file and key). Raises
    SettingsError for an unknown name, a wrong type, a value out of range, or two values that
    exclude each other.
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
    rule = "above 0" if low == _ABOVE_ZERO else f"at least {low:g}"
    if high < math.inf:
        rule = f"from {low:.10g} to {high:.10g}"
    raise SettingsError(f"{source}: {value} is out of range", f"It must be {rule}")

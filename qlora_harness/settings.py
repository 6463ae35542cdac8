"""All settings of a training run: the only place with defaults, units and their checks.

Flags and recipe keys are made from these fields (`learning_rate` is `--learning-rate` on the
command line), so that the two arms of a comparison, the help text and the stored record can't
drift apart.
The defaults are the published QLoRA recipe for LLaMA-2-7B on OASST1
(https://github.com/artidoro/qlora, scripts/finetune_llama2_guanaco_7b.sh).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from qlora_harness.errors import SettingsError, shown
from qlora_harness.locations import recipes_dir

DEFAULT_MAX_STEPS = 1875
# From here on, the share of layer weights that a 4-bit quantisation leaves in 16 bits is told.
NOTABLE_SHARE = 0.05
CHECKPOINTING = ("none", "selective", "full", "offload")


class Quant(str, Enum):
    """How the frozen base weights are held: one word from flag to JSON key."""

    NF4 = "nf4"
    FP4 = "fp4"
    BF16 = "bf16"

    @property
    def is_4bit(self) -> bool:
        """Whether bitsandbytes holds the linear layers in 4 bits."""
        return self is not Quant.BF16

    @property
    def arm(self) -> str:
        """Name of the results folder: 4bit, 16bit or 4bit_fp4."""
        return {Quant.NF4: "4bit", Quant.BF16: "16bit", Quant.FP4: "4bit_fp4"}[self]

    @property
    def file_arm(self) -> str:
        """Name of the arm inside file names: 4bit_qlora, 16bit_lora or 4bit_fp4_qlora."""
        return f"{self.arm}_{'qlora' if self.is_4bit else 'lora'}"


def _setting(
    default: Any,
    help_text: str,
    unit: str = "",
    choices: Iterable[str] | None = None,
    listed: bool = False,
) -> Any:
    """A dataclass field that carries what the help and the checks need."""
    meta = {
        "help": help_text,
        "unit": unit,
        "choices": tuple(choices) if choices else None,
        "listed": listed,  # whether a recipe may give a list
    }
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class ModelSettings:
    """Which base model, and how its weights are held."""

    model: str = _setting(
        "meta-llama/Llama-2-7b-hf",
        "base model: a Hub id, a folder, or 'smollm2' (the embedded SmolLM2-135M)",
    )
    revision: str | None = _setting(
        None, "branch, tag or commit of the base model on the Hub (default: its main branch)"
    )
    quant: str = _setting(
        "nf4", "how the frozen base weights are held", choices=[q.value for q in Quant]
    )
    double_quant: bool = _setting(True, "quantise the 4-bit scales as well (4-bit arms only)")
    compute_dtype: str = _setting(
        "auto",
        "dtype of matrix products; auto: bfloat16 on a GPU, on a CPU what is faster there",
        choices=["auto", "bfloat16", "float32"],
    )


@dataclass(frozen=True)
class DataSettings:
    """Which conversations, and what of them is trained on."""

    dataset: str = _setting(
        "oasst1",
        "conversations in OASST1's row schema: 'oasst1', 'demo' (embedded), a Hub id, a file "
        "(.jsonl, .json, .csv, .parquet, also .gz or .zst), or a folder of `datasets`",
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
        "text around the turns; guanaco is '### Human: …### Assistant: …'",
        choices=["guanaco", "alpaca", "chatml"],
    )
    mask: str = _setting(
        "prompt",
        "prompt: learn assistant tokens only; none: learn every token, as the original QLoRA did",
        choices=["prompt", "none"],
    )
    max_length: int = _setting(512, "longest example, BOS and EOS included", "tokens")
    eval_fraction: float = _setting(
        0.05, "share of trees held out where the data set has no validation split", "0 to 0.5"
    )


@dataclass(frozen=True)
class LoraSettings:
    """The adapter."""

    lora_r: int = _setting(64, "rank", "dimensions")
    lora_alpha: float = _setting(16, "scale: the update is multiplied by alpha / r")
    lora_dropout: float = _setting(0.1, "dropout on the adapter's input", "probability")
    lora_targets: str = _setting(
        "all-linear",
        "layers that get an adapter: all-linear (no output head) or a comma list",
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
        None, f"optimizer steps (default {DEFAULT_MAX_STEPS} unless --epochs is given)", "steps"
    )
    epochs: float | None = _setting(None, "passes over the data, instead of --max-steps", "epochs")
    batch_size: int = _setting(1, "examples in one forward pass, per process", "examples")
    grad_accum: int = _setting(16, "forward passes per optimizer step", "passes")
    eval_batch_size: int = _setting(8, "examples in one evaluation pass, per process", "examples")
    learning_rate: float = _setting(2e-4, "peak learning rate")
    lr_schedule: str = _setting(
        "constant", "learning rate over time", choices=["constant", "linear", "cosine"]
    )
    warmup_ratio: float = _setting(0.0, "share of steps with a rising rate", "0 to 1")
    optimizer: str = _setting(
        "paged_adamw_32bit",
        "optimizer, the same for both arms",
        choices=["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_torch"],
    )
    adam_beta2: float = _setting(0.999, "decay of the second moment", "0 to 1")
    weight_decay: float = _setting(0.0, "decoupled weight decay")
    max_grad_norm: float = _setting(0.3, "gradients are clipped to this norm")
    group_by_length: bool = _setting(True, "put examples of like length into one batch")
    checkpointing: str = _setting(
        "full",
        "activations that the backward pass computes again, to save memory: none, selective (the "
        "large ones of the MLP; on a GPU those of two layers in three wait in host memory), full "
        "(all but each layer's input), offload (full, and the inputs wait in host memory)",
        choices=CHECKPOINTING,
    )
    memory: str | None = _setting(
        None,
        "fast, balanced, lean, or so many GiB: chooses checkpointing, optimizer bits, adapter "
        "dtype and how many of a step's examples go into one pass (default: what their own flags "
        "say)",
    )
    kernels: str = _setting(
        "auto",
        "auto: fused layers and rows without padding, for LLaMA-type models; none: PEFT's own "
        "modules and padded batches",
        choices=["auto", "none"],
    )
    seed: int = _setting(0, "seed of adapter weights, dropout and data order")


@dataclass(frozen=True)
class RunSettings:
    """Where the run is kept, and what happens if something is there already."""

    output_dir: str | None = _setting(
        None, "run folder (default results/4bit for nf4, results/16bit, results/4bit_fp4)"
    )
    save_steps: int = _setting(250, "steps between checkpoints", "steps")
    resume: str = _setting(
        "auto",
        "auto: resume an unfinished run from its newest whole checkpoint; never; or a checkpoint "
        "folder",
    )
    overwrite: bool = _setting(False, "replace what the run folder holds")
    report_to: str = _setting(
        "none", "where Trainer logs as well", choices=["none", "tensorboard", "wandb"]
    )


GROUPS: dict[str, type] = {
    "model": ModelSettings,
    "data": DataSettings,
    "lora": LoraSettings,
    "optimization": OptimizationSettings,
    "run": RunSettings,
}

# Settings that may change without making it another experiment: where and how a run is kept, and
# how it is evaluated. A resumed run keeps the rest, and `compare` looks at the rest.
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
        """Returns the settings that decide what is learned, without house-keeping."""
        return {k: v for k, v in self.flat().items() if k not in BOOKKEEPING}


def setting_fields() -> dict[str, tuple[str, dataclasses.Field[Any]]]:
    """Returns each setting's group and dataclass field by its name."""
    return {f.name: (group, f) for group, cls in GROUPS.items() for f in fields(cls)}


def field_kind(cls: type, name: str) -> tuple[type, bool]:
    """Returns the plain type of a setting and whether it may be None.

    Args:
        cls: The dataclass that holds it.
        name: The setting.
    """
    hint = typing.get_type_hints(cls)[name]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        plain = [t for t in typing.get_args(hint) if t is not type(None)]
        return plain[0], True
    return hint, False


def build_settings(values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> Settings:
    """Checks values by name and fills in the defaults.

    Args:
        values: Settings by name; what is missing gets its default.
        sources: Where each value came from (a flag, or a recipe file and key), for messages.

    Returns:
        The settings.

    Raises:
        SettingsError: An unknown name, a wrong type, a value out of range, or two that exclude
            each other.
    """
    where = dict(sources or {})
    known = setting_fields()
    grouped: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in values.items():
        if name not in known:
            raise unknown_name(name, where.get(name, f"setting '{name}'"), known)
        group, f = known[name]
        place = where.setdefault(name, f"--{name.replace('_', '-')}")
        grouped[group][name] = _typed(f, GROUPS[group], value, place)
    optimization = grouped["optimization"]
    if optimization.get("max_steps") is not None and optimization.get("epochs") is not None:
        raise SettingsError(
            f"{where['max_steps']} ({optimization['max_steps']}) and {where['epochs']} "
            f"({optimization['epochs']}) exclude each other",
            "Give one of the two",
        )
    if optimization.get("memory") is not None:
        _check_memory(optimization["memory"], where)
        chosen = ("checkpointing", "optimizer", "adapter_dtype")
        # A recipe, and a record that is read back, may state what --memory then replaces.
        if clash := [n for n in chosen if (sources or {}).get(n, "").startswith("--")]:
            raise SettingsError(
                f"{where['memory']} and {where[clash[0]]} exclude each other",
                "Give one of the two",
            )
    if optimization.get("max_steps") is None and optimization.get("epochs") is None:
        optimization["max_steps"] = DEFAULT_MAX_STEPS
    settings = Settings(**{group: GROUPS[group](**grouped[group]) for group in GROUPS})
    _check_ranges(settings, where)
    return settings


def _check_memory(value: str, where: Mapping[str, str]) -> None:
    if value in ("fast", "balanced", "lean"):
        return
    try:
        amount = float(value)
    except ValueError:
        amount = 0.0
    if not (math.isfinite(amount) and amount > 0):
        raise SettingsError(
            f"{where['memory']}: {shown(value)} is not fast, balanced, lean or a number of GiB",
            "Choose one of these",
        )


def unknown_name(name: str, place: str, known: Iterable[str]) -> SettingsError:
    """Returns the error for an unknown name, with the nearest known one.

    Args:
        name: What was given.
        place: The flag, or recipe file and key.
        known: The names that exist.
    """
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)
    if close and place.startswith("flag "):
        close = [f"--{close[0].replace('_', '-')}"]
    hint = f"did you mean {close[0]!r}? " if close else ""
    return SettingsError(
        f"{place} is not known", f"{hint}`launch/train.py --help` lists every setting"
    )


def _typed(f: dataclasses.Field[Any], cls: type, value: Any, place: str) -> Any:
    kind, optional = field_kind(cls, f.name)
    if value is None and optional:
        return None
    wrong = SettingsError(f"{place}: {shown(value)} is not {_kind_name(kind)}", "Correct the value")
    if kind is bool:
        if isinstance(value, str):
            value = yaml.SafeLoader.bool_values.get(value.lower())
        if isinstance(value, bool):
            return value
        raise wrong
    if kind is str:
        text = _as_text(value, f.metadata["listed"])
        if not text or text != text.strip():
            raise wrong
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
            raise SettingsError(
                f"{place}: {shown(text)} holds a control character or bytes that are not UTF-8",
                "Correct the value",
            )
        choices = f.metadata["choices"]
        if choices and text not in choices:
            raise SettingsError(
                f"{place}: {shown(text)} is not one of {', '.join(choices)}", "Choose one of these"
            )
        return text
    if isinstance(value, bool):
        raise wrong
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise wrong
    return int(number) if kind is int else number


def _as_text(value: Any, listed: bool) -> str | None:
    """A text, a list of texts where a setting takes one, or a number with all of its digits."""
    if listed and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100:
        return repr(value).removesuffix(".0")
    return value if isinstance(value, str) else None


def _kind_name(kind: type) -> str:
    return {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
    }[kind]


def _check_ranges(settings: Settings, where: Mapping[str, str]) -> None:
    flat = settings.flat()
    at_least: dict[str, float] = {
        "max_length": 8,
        "lora_r": 1,
        "max_steps": 1,
        "batch_size": 1,
        "grad_accum": 1,
        "eval_batch_size": 1,
        "save_steps": 1,
        "weight_decay": 0,
    }
    above_zero = ("epochs", "learning_rate", "lora_alpha", "max_grad_norm")
    spans = {
        "lora_dropout": (0.0, 0.99),
        "warmup_ratio": (0.0, 1.0),
        "eval_fraction": (0.0, 0.5),
        "adam_beta2": (0.0, 0.999999),
        "seed": (0, 2**32 - 1),  # what numpy takes
    }

    def refuse(name: str, rule: str) -> None:
        place = where.get(name, f"--{name.replace('_', '-')}")
        raise SettingsError(f"{place}: {flat[name]} is out of range", f"It must be {rule}")

    for name, low in at_least.items():
        if flat[name] is not None and flat[name] < low:
            refuse(name, f"at least {low:g}")
    for name in above_zero:
        if flat[name] is not None and flat[name] <= 0:
            refuse(name, "above 0")
    for name, (low, high) in spans.items():
        if not low <= flat[name] <= high:
            refuse(name, f"from {low:.10g} to {high:.10g}")


_LARGEST_RECIPE = 100_000  # bytes


class _RecipeLoader(yaml.SafeLoader):
    """Plain YAML: no aliases, which can stand for gigabytes, no key twice, and no guessed types.

    YAML reads the revision 0123456 as 42798, 1.10 as 1.1, and the language no as false. Here only
    null is special: everything else is text, and the setting it is for decides what it means.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: anchors and aliases are not taken"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = Counter(
            key.value.replace("-", "_") for key, _ in node.value if isinstance(key, yaml.ScalarNode)
        )
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.YAMLError(f"key {shown(twice[0])} is repeated")
        return super().construct_mapping(node, deep)


def read_recipe(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a YAML recipe: settings by name, with `extends: NAME` for a recipe it differs from.

    Args:
        path: The YAML file.
        seen: Files that extend this one, to stop at a circle.

    Returns:
        The values, and for each the place it came from.

    Raises:
        SettingsError: The file is missing, not YAML, not a mapping, or has an unknown key.
    """
    path = path.resolve()
    if path in seen:
        raise SettingsError(f"recipe {path} extends itself", "Remove its 'extends' key")
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_RECIPE + 1)
        if len(content) > _LARGEST_RECIPE:
            raise SettingsError(
                f"recipe {path} has more than {_LARGEST_RECIPE:,} bytes", "Name a recipe"
            )
        loaded = yaml.load(content.decode(), Loader=_RecipeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"recipe {path} can't be read: {error}", "Check the file") from None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        reason = "brackets too deep" if isinstance(error, RecursionError) else error
        raise SettingsError(f"recipe {path} is not YAML: {reason}", "Correct the file") from None
    if not isinstance(loaded, dict):
        raise SettingsError(
            f"recipe {path} holds a {type(loaded).__name__}, not 'name: value' lines",
            "Correct the file",
        )
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    base = loaded.pop("extends", None)
    if base is not None:
        place = f"recipe {path}, key 'extends'"
        beside = _recipe_in(path.parent, str(base)) or find_recipe(str(base), place)
        values, sources = read_recipe(beside, (*seen, path))
        # Steps replace inherited epochs, and the other way round.
        for given, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
            if given in loaded and other not in loaded:
                values.pop(other, None)
    known = setting_fields()
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        place = f"recipe {path}, key {shown(str(key))}"
        if name not in known:
            raise unknown_name(name, place, known)
        values[name] = value
        sources[name] = place
    return values, sources


def with_recipe(
    recipe: str | None, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Puts what is given in place of a recipe's values.

    Args:
        recipe: Its name or path, or None.
        given: Settings by name; epochs replace the recipe's max_steps, and the other way round.

    Returns:
        The values, and for each of the recipe the place it came from.

    Raises:
        SettingsError: There is no such recipe, or it is damaged.
    """
    values, sources = ({}, {}) if recipe is None else read_recipe(find_recipe(recipe))
    for name, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
        if name in given and other not in given:
            values.pop(other, None)
    return {**values, **given}, sources


def find_recipe(name: str, place: str = "--recipe") -> Path:
    """Returns the file of a recipe given by path, or by name if it comes along.

    Args:
        name: A path to a YAML file, or the name of a recipe in launch/recipes.
        place: The flag, or recipe file and key, for messages.

    Raises:
        SettingsError: There is no such recipe.
    """
    folder = recipes_dir()
    found = Path(name) if _is_file(Path(name)) else _recipe_in(folder, name)
    if found is None:
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise SettingsError(
            f"{place}: there is no recipe {shown(name)}",
            f"Name a YAML file or one of {', '.join(names)}",
        )
    return found


def _recipe_in(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.yaml") if _is_file(p)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False

"""Every setting of a training run, with its default, unit and check.

Flags and recipe keys are generated from these fields: `learning_rate` is `--learning-rate`. The
defaults are the published QLoRA recipe for LLaMA-2-7B on OASST1
(https://github.com/artidoro/qlora, scripts/finetune_llama2_guanaco_7b.sh).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

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
ABOVE_ZERO = math.ulp(0.0)  # the smallest positive float


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
            *("oasst", "oasst-trees", "alpaca", "dolly", "sharegpt", "messages", "conversation"),
            *("prompt-completion", "prompt-response", "question-answer", "question-response"),
            *("query-response", "inputs-targets", "longform", "guanaco", "text"),
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
    lora_alpha: float = _setting(16, "scale: the update is multiplied by alpha / r", low=ABOVE_ZERO)
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
        None, "passes over the data, instead of --max-steps", "epochs", low=ABOVE_ZERO
    )
    batch_size: int = _setting(1, "examples in one forward pass, per process", "examples", low=1)
    grad_accum: int = _setting(16, "forward passes per optimizer step", "passes", low=1)
    eval_batch_size: int = _setting(
        8, "examples in one evaluation pass, per process", "examples", low=1
    )
    learning_rate: float = _setting(2e-4, "peak learning rate", low=ABOVE_ZERO)
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
    max_grad_norm: float = _setting(0.3, "gradients are clipped to this norm", low=ABOVE_ZERO)
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

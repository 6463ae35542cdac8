"""A paragraph on methods for a paper, from the records of the runs alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_harness.compare.arms import NAMES, Arm, group, matched, pair
from qlora_harness.compare.numbers import listed
from qlora_harness.compare.scores import FEWEST_SUBJECTS
from qlora_harness.record import scrub
from qlora_harness.results.runs import Run
from qlora_harness.results.scored import FAMILIES, Scored
from qlora_harness.schema.section import flatten
from qlora_harness.schema.training_records import DataSplit, TrainingSummary

Fact = Callable[[Run], str | None]
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval", "qlora-harness")
_DIGITS = 12  # of a hash
# The phrase for each setting; settings that are off or zero are left out.
_SOURCE = {"dataset_revision": "revision {}", "languages": "languages {}"}
_ENCODING = {"template": "template {}", "max_length": "at most {} tokens", "mask": "loss on {}"}
_LORA = {
    "lora_r": "rank {}",
    "lora_alpha": "alpha {}",
    "lora_dropout": "dropout {}",
    "lora_targets": "targets {}",
    "use_rslora": "rsLoRA's scale",
    "use_dora": "DoRA's norms",
    "init_lora_weights": "{} initialisation",
    "adapter_dtype": "weights in {}",
}
_OPTIMISATION = {
    "learning_rate": "learning rate {}",
    "lr_schedule": "schedule {}",
    "warmup_ratio": "warm-up {}",
    "optimizer": "optimizer {}",
    "weight_decay": "weight decay {}",
    "max_grad_norm": "gradient norms clipped to {}",
}
_MASKS = {"prompt": "the assistant's tokens only", "none": "every token"}


def methods(runs: Sequence[Run]) -> str:
    """Returns a paragraph on how runs were made and compared; "" without runs.

    Where arms differ, it gives the value of each. What isn't recorded is left out.
    """
    arms = group(runs) if runs else []
    facts: tuple[tuple[str, Fact], ...] = (
        ("The base model is {}.", _trained(_model)),
        ("The training data are {}.", _trained(_data)),
        ("Conversations are encoded with {}.", _trained(_encoding)),
        ("The adapters are LoRA with {}.", _trained(lambda t: _phrased(t.settings, _LORA))),
        ("Training takes {}.", _trained(_optimisation)),
        ("The seeds are {}.", lambda run: None if run.seed is None else str(run.seed)),
        ("Scoring uses {}.", _scoring),
        ("Training ran on {}.", _trained(_device)),
        ("Versions: {}.", _versions),
    )
    sentences = [form.format(text) for form, fact in facts if (text := _by_arm(arms, fact))]
    paragraph = " ".join([*sentences[:1], *_held(arms), *sentences[1:], *_statistics(arms)])
    return scrub(" ".join(paragraph.split()))


def _by_arm(arms: Sequence[Arm], fact: Fact) -> str:
    """The fact once if all arms share it, else for each arm."""
    texts: dict[str, list[str]] = {}
    for arm in arms:
        values = [value for run in arm.runs if (value := fact(run))]
        if values:
            texts.setdefault(listed(_unique(values)), []).append(arm.name)
    if len(texts) < 2:
        return next(iter(texts), "")
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in texts.items())


def _trained(fact: Callable[[TrainingSummary], str | None]) -> Fact:
    return lambda run: None if run.training is None else fact(run.training)


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _hash(name: str, value: object) -> str | None:
    digits = str(value or "").rpartition(":")[2]
    return f"{name} {digits[:_DIGITS]}" if digits else None


def _phrased(settings: Mapping[str, object], forms: Mapping[str, str]) -> str:
    values = {key: settings.get(key) for key in forms}
    return _joined(*(forms[key].format(v) for key, v in values.items() if v and v != "default"))


def _model(training: TrainingSummary) -> str:
    model = training.model
    gguf = dict(flatten(model.model_dump().get("gguf"), "gguf"))
    prefix = "gguf.tensor_types."
    types = [f"{n} {name.removeprefix(prefix)}" for name, n in gguf.items() if prefix in name]
    return _joined(
        model.name,
        f"revision {model.revision}" if model.revision else None,
        _phrased(training.settings, {"rope_scaling": "RoPE scaling {}"}),
        _hash("commit", model.commit),
        _hash("weights", model.weights_fingerprint),
        f"from a GGUF file with {listed(types)} tensors" if types else None,
        "with random weights" if model.random_weights else None,
    )


def _held(arms: Sequence[Arm]) -> list[str]:
    """The quantisation of the base in each arm, and the dtype of matrix products."""
    forms, dtypes = [], []
    for run in (run.training for arm in arms for run in arm.runs if run.training):
        held, quant = run.quantization, str(run.quant)
        scales = ""
        if quant in ("nf4", "fp4") and held.double_quant is not None:
            scales = f" with{'' if held.double_quant else 'out'} double quantisation"
        rounded = ", rounded to FP8 (e4m3) for products" * run.in_fp8
        form = "float16" if held.is_float16 else NAMES.get(quant, quant)
        forms.append(f"{form}{scales}{rounded}")
        dtypes += [held.compute_dtype] if held.compute_dtype else []
    if not forms:
        return []
    products = f", with matrix products in {listed(_unique(dtypes))}" if dtypes else ""
    return [f"The base weights are in {listed(_unique(forms))}{products}."]


def _data(training: TrainingSummary) -> str:
    data = training.data
    settings = dict(training.settings)
    form = None
    if data.form != "oasst":
        form = f"form {data.form}"
        settings.pop("languages", None)  # of trees only
    source = _phrased(settings, _SOURCE)
    text = _joined(data.dataset, form, source, _hash("commit", data.commit), _split(data.train))
    return f"{text}; held out: {_split(data.eval)}" if data.eval else text


def _split(split: DataSplit) -> str:
    counts = (
        ("conversations", split.conversations),
        ("tokens", split.tokens),
        ("learned tokens", split.supervised_tokens),
    )
    texts = [f"{count:,} {name}" for name, count in counts if count is not None]
    return _joined(*texts, _hash("SHA-256", split.fingerprint))


def _encoding(training: TrainingSummary) -> str:
    learned = _MASKS.get(str(training.settings.get("mask")))
    return _phrased(training.settings | {"mask": learned}, _ENCODING)


def _optimisation(training: TrainingSummary) -> str:
    settings = training.settings
    processes = training.environment.world_size or 1
    sizes: list[Any] = [settings.get("batch_size"), settings.get("grad_accum"), processes]
    batch = None
    if all(isinstance(size, int) for size in sizes):
        product = " × ".join(map(str, sizes))
        batch = f"each of {math.prod(sizes)} conversations ({product})"
    steps = training.results.steps
    count = None if steps is None else f"{steps:,} steps"
    return _joined(count, batch, _phrased(settings, _OPTIMISATION))


def _scoring(run: Run) -> str | None:
    return "; ".join(_task(scored) for scored in run.scored.values()) or None


def _task(scored: Scored) -> str:
    shots = re.search(r"_(\d+)shot", scored.task)
    ours = scored.task in FAMILIES
    dtypes = {
        "evaluation.settings.softmax_dtype": "softmax in {}",
        "evaluation.settings.dtype": "matrix products in {}",
    }
    return _joined(
        f"{scored.n:,} questions of {scored.task}",
        f"{shots[1]}-shot" if shots else None,
        _hash("prompts", scored.prompts_sha256),
        "by log-probabilities of A–D with adapters unmerged" if ours else f"by {scored.metric}",
        _phrased(scored.conditions, dtypes),
        "products with the base in FP8 (e4m3)" if scored.in_fp8 else None,
    )


def _device(training: TrainingSummary) -> str | None:
    device = training.environment.device or {}
    name = device.get("name") or device.get("type")
    count = training.environment.world_size or 1
    return None if name is None else f"{count} × {name}" if count > 1 else str(name)


def _versions(run: Run) -> str | None:
    if run.training is None:
        return None
    versions = dict(run.training.environment.versions)
    for scored in run.scored.values():
        used = scored.conditions.get("evaluation.environment.versions.lm_eval")
        versions |= {"lm_eval": str(used)} if used else {}
    return ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)


def _statistics(arms: Sequence[Arm]) -> list[str]:
    """Says how statistics.py and costs.py compute the intervals."""
    pairs = pair(arms)[0] if len(arms) > 1 else []
    runs = [run for both in pairs for arm in both for run in arm.runs]
    scored = [item for run in runs for item in run.scored.values()]
    sentences = []
    if any(len(arm.runs) > 1 for both in pairs for arm in both):
        sentences.append(
            "Arms are compared by their means over seeds; a 95% interval adds the variance over "
            "questions or conversations to that over seeds, and takes its quantile from Student's "
            "t with Satterthwaite's degrees of freedom, or from Cochran's weighted mean."
        )
    elif scored:
        sentences.append(
            "Accuracies of two runs have Tango's 95% score interval for paired proportions, which "
            "covers questions but not seeds."
        )
    blocks = [arm.name for arm, baseline in pairs if _blocks(arm, baseline)]
    if blocks:
        sentences.append(f"Held-out losses are paired by seed for {listed(blocks)}.")
    if any(item.task in FAMILIES and len(item.subjects) >= FEWEST_SUBJECTS for item in scored):
        sentences.append("Errors of NLL are clustered by subject.")
    if len(pairs) > 1:
        sentences.append("Intervals are Bonferroni-corrected for several arms.")
    return sentences


def _blocks(arm: Arm, baseline: Arm) -> bool:
    one, other = matched(arm, baseline)
    losses = [run.training and run.training.results.eval_loss for run in (*one.runs, *other.runs)]
    return None not in losses and len(one.runs) > 1 and one.seeds == other.seeds

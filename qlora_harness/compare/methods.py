"""A paragraph on methods for a paper, from the records of the runs alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlora_harness.compare.arms import NAMES, Arm, group, pair
from qlora_harness.compare.numbers import listed
from qlora_harness.record import scrub
from qlora_harness.results.runs import Run
from qlora_harness.schema.training_records import DataSplit, TrainingSummary

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval", "qlora-harness")
_SETTINGS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "use_rslora", "use_dora"),
    *("init_lora_weights", "batch_size", "grad_accum", "learning_rate", "lr_schedule"),
    *("optimizer", "max_grad_norm", "template", "mask", "max_length", "rope_scaling"),
)
_OFF = (None, False, 0, "default")  # settings with these values are left out
_SEVERAL_SEEDS = (
    "Arms are compared by their means over seeds; a 95% interval adds the variance over questions "
    "or conversations to that over seeds, and takes its quantile from Student's t with "
    "Satterthwaite's degrees of freedom, or from Cochran's weighted mean."
)
_ONE_SEED = (
    "Accuracies of two runs have Tango's 95% score interval for paired proportions, which covers "
    "questions but not seeds."
)


def methods(runs: Sequence[Run]) -> str:
    """Returns a paragraph on how runs were made and compared; "" without runs.

    Where arms differ, it gives the value of each. What isn't recorded is left out.
    """
    arms = group(runs) if runs else []
    facts: dict[str, Callable[[Run], str | None]] = {
        "The base model is {}.": _trained(_model),
        "Its weights are in {}.": _trained(_weights),
        "The training data are {}.": _trained(_data),
        "Settings: {}.": _trained(_settings),
        "The seeds are {}.": lambda run: None if run.seed is None else str(run.seed),
        "Scoring uses {}.": _scoring,
        "Training ran on {}.": _trained(_device),
        "Versions: {}.": _trained(_versions),
    }
    sentences = [form.format(text) for form, fact in facts.items() if (text := _by_arm(arms, fact))]
    pairs = pair(arms)[0] if len(arms) > 1 else []
    if pairs:
        several = any(len(arm.runs) > 1 for both in pairs for arm in both)
        sentences.append(_SEVERAL_SEEDS if several else _ONE_SEED)
    if len(pairs) > 1:
        sentences.append("Intervals are Bonferroni-corrected for several arms.")
    return scrub(" ".join(" ".join(sentences).split()))


def _by_arm(arms: Sequence[Arm], fact: Callable[[Run], str | None]) -> str:
    """The fact once if all arms share it, else for each arm."""
    texts: dict[str, list[str]] = {}
    for arm in arms:
        if values := dict.fromkeys(value for run in arm.runs if (value := fact(run))):
            texts.setdefault(listed(list(values)), []).append(arm.name)
    if len(texts) < 2:
        return next(iter(texts), "")
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in texts.items())


def _trained(fact: Callable[[TrainingSummary], str | None]) -> Callable[[Run], str | None]:
    return lambda run: None if run.training is None else fact(run.training)


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _hash(name: str, value: str | None) -> str | None:
    return None if value is None else f"{name} {value.rpartition(':')[2][:12]}"


def _model(training: TrainingSummary) -> str:
    model = training.model
    commit, weights = _hash("commit", model.commit), _hash("weights", model.weights_fingerprint)
    return _joined(model.name, commit, weights)


def _weights(training: TrainingSummary) -> str:
    held = training.quantization
    return _joined(
        "float16" if held.is_float16 else NAMES.get(str(training.quant), training.quant),
        "double quantisation" if held.double_quant else None,
        f"products in {held.compute_dtype}" if held.compute_dtype else None,
        "those with the base in FP8 (e4m3)" if training.in_fp8 else None,
    )


def _data(training: TrainingSummary) -> str:
    data = training.data
    text = _joined(data.dataset, _hash("commit", data.commit), _split(data.train))
    return f"{text}; held out: {_split(data.eval)}" if data.eval else text


def _split(split: DataSplit) -> str:
    counts = {"conversations": split.conversations, "tokens": split.tokens}
    texts = [f"{count:,} {name}" for name, count in counts.items() if count is not None]
    return _joined(*texts, _hash("SHA-256", split.fingerprint))


def _settings(training: TrainingSummary) -> str:
    values = {name: training.settings.get(name) for name in _SETTINGS}
    values["steps"] = training.results.steps
    return _joined(*(f"{name} {value}" for name, value in values.items() if value not in _OFF))


def _scoring(run: Run) -> str:
    return "; ".join(
        _joined(
            f"{scored.n:,} questions of {scored.task} ({scored.metric})",
            _hash("prompts", scored.prompts_sha256),
            "products with the base in FP8 (e4m3)" if scored.in_fp8 else None,
        )
        for scored in run.scored.values()
    )


def _device(training: TrainingSummary) -> str | None:
    name = (training.environment.device or {}).get("name")
    return f"{training.environment.world_size or 1} × {name}" if name else None


def _versions(training: TrainingSummary) -> str:
    versions = training.environment.versions
    return ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)

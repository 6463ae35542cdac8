"""The model card of an adapter: README.md in its folder, written from the run's records."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import HarnessError
from qlora_harness.model.adapter_folder import RECORD_FILE, adapter_digest
from qlora_harness.model.lora import public_name
from qlora_harness.record import ADAPTER_DIR, EVALUATION_FILE, nested, write_text
from qlora_harness.schema.scoring_records import Evaluation
from qlora_harness.schema.section import read_record
from qlora_harness.schema.training_records import TrainingSummary, read_summary

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

logger = logging.getLogger("qlora_harness")

CARD_FILE = "README.md"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Its hash tells whether someone has edited the text before it.
_LAST_LINE = re.compile(r"\n<!-- written by qlora-harness, sha256 ([0-9a-f]{64}) -->\n\Z")
_Z = 1.96  # of a 95% interval
# Settings that stand elsewhere on the card, or don't affect the adapter.
_LEFT_OUT = {
    *("model", "revision", "quant", "double_quant", "compute_dtype", "memory"),
    *("dataset", "dataset_revision", "eval_batch_size", "eval_steps", "save_steps"),
    *("output_dir", "resume", "overwrite", "report_to"),
}


def refresh_card(run_dir: Path) -> None:
    """Writes the card of a completed run, with its scores if they are of its adapter.

    A card that someone has edited stays. A damaged record is only a warning.
    """
    adapter = run_dir / ADAPTER_DIR
    if not (adapter / RECORD_FILE).is_file():
        return
    try:
        summary = read_summary(run_dir)
        if summary is not None and summary.status == "completed":
            _write_card(adapter / CARD_FILE, _card(summary, _evaluation_of(run_dir, adapter)))
    except (HarnessError, OSError) as error:
        logger.warning("no model card: %s", error)


def _write_card(path: Path, text: str) -> None:
    if path.is_file() and _is_edited(path.read_text(encoding="utf-8", errors="replace")):
        logger.warning("%s was edited, and stays as it is", path)
        return
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(path, f"{text}\n<!-- written by qlora-harness, sha256 {digest} -->\n")


def _is_edited(text: str) -> bool:
    last = _LAST_LINE.search(text)
    return last is None or hashlib.sha256(text[: last.start()].encode()).hexdigest() != last[1]


def _evaluation_of(run_dir: Path, adapter: Path) -> Evaluation | None:
    path = run_dir / EVALUATION_FILE
    if not path.is_file():
        return None
    evaluation = read_record(path, Evaluation)
    return evaluation if evaluation.model.adapter_sha256 == adapter_digest(adapter) else None


def _card(summary: TrainingSummary, evaluation: Evaluation | None) -> str:
    base, arm = _base_name(summary), summary.quant or "unknown"
    lines = [
        f"# LoRA adapter of {base}, trained on {', '.join(_data_names(summary))} ({arm})",
        "",
        *_about(summary),
        "",
        *_tables(summary, evaluation),
        *_loading(summary),
        *_settings(summary),
    ]
    return f"---\n{_front_matter(summary).to_yaml()}\n---\n\n" + "\n".join(lines)


def _front_matter(summary: TrainingSummary) -> ModelCardData:
    from huggingface_hub import ModelCardData

    on_hub = summary.model.commit is not None  # the Hub refuses a card with any other name
    return ModelCardData(
        base_model=summary.model.name if on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        datasets=[name for _, name in _data_parts(summary) if name] or None,
        tags=["lora", "qlora-harness", *([summary.quant] if summary.quant else [])],
    )


def _base_name(summary: TrainingSummary) -> str:
    return public_name(summary.model.name or "an unknown base")


def _data_parts(summary: TrainingSummary) -> Iterator[tuple[str, str | None]]:
    """Yields the name of each data set without a folder, and its id if it is on the Hub."""
    report = summary.data.model_dump()
    for part in report.get("mixture") or [report]:
        dataset = str(part.get("dataset") or "unknown data")
        source = str(part.get("source") or dataset)
        by_name = "/" not in dataset and _HUB_ID.fullmatch(source)
        on_hub = by_name or part.get("commit") or part.get("revision")
        yield (source, source) if on_hub else (Path(dataset).name, None)


def _data_names(summary: TrainingSummary) -> list[str]:
    return [name for name, _ in _data_parts(summary)]


def _about(summary: TrainingSummary) -> list[str]:
    quantization, model = summary.quantization, summary.model
    held = f"in {'float16' if quantization.is_float16 else summary.quant}"
    if quantization.double_quant:
        held += " with double quantisation"
    lines = [
        f"Trained with qlora-harness on a frozen base {held}, computing in "
        f"{quantization.compute_dtype}. The adapter is plain PEFT, not merged.",
    ]
    if model.random_weights:
        lines.append("The base has random weights: this adapter is a test.")
    if model.gguf is not None:
        types = ", ".join(model.gguf.tensor_types)
        lines.append(f"The base came as a GGUF file ({types}), expanded to bf16.")
    return lines


def _tables(summary: TrainingSummary, evaluation: Evaluation | None) -> Iterator[str]:
    model, data, results = summary.model, summary.data, summary.results
    device = summary.environment.device or {}
    losses = {
        "held-out loss before training": _nats(results.eval_loss_before),
        "held-out loss after training": _nats(results.eval_loss),
        "training loss of the last step": _nats(results.final_train_loss),
    }
    yield from _table("Results", losses | dict(_scores(evaluation)))
    yield from _table(
        "Origin",
        {
            "base": _base_name(summary),
            "base revision": model.commit or model.revision,
            "base weights": model.weights_fingerprint,
            "data": ", ".join(_data_names(summary)),
            "data revision": nested(data.model_dump(), "commit"),
            "training conversations": data.train.conversations,
            "training tokens": data.train.tokens,
            "training tokens that are learned": data.train.supervised_tokens,
            "fingerprint of the training data": data.train.fingerprint,
            "steps": results.steps,
            "device": f"{summary.environment.world_size or 1} × {device.get('name') or 'unknown'}",
            "versions": ", ".join(f"{k} {v}" for k, v in summary.environment.versions.items()),
        },
    )


def _nats(loss: float | None) -> str | None:
    return None if loss is None else f"{loss:.4f} nats per learned token"


def _scores(evaluation: Evaluation | None) -> Iterator[tuple[str, str]]:
    for task, score in evaluation.tasks.items() if evaluation is not None else ():
        part = "" if score.n == score.n_total else f" of {score.n_total:,}"
        text = f"{100 * score.acc:.1f}%"
        if score.acc_stderr is not None:
            half = _Z * score.acc_stderr
            low, high = max(0.0, score.acc - half), min(1.0, score.acc + half)
            text += f", 95% interval {100 * low:.1f}% to {100 * high:.1f}%"
        yield f"accuracy on `{task}`", f"{text} ({score.n:,}{part} questions)"


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    body = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return [f"## {title}", "", "| | |", "| --- | --- |", *body, ""] if body else []


def _settings(summary: TrainingSummary) -> list[str]:
    rows = {
        f"`{name}`": Path(value).name if isinstance(value, str) else value  # no local folder
        for name, value in summary.settings.items()
        if name not in _LEFT_OUT
    }
    return _table("Settings", rows)


def _scaled_config(summary: TrainingSummary, pinned: str) -> str:
    """The lines that give the base its RoPE scaling, which an adapter's own files can't."""
    scaling = summary.settings["rope_scaling"]
    if scaling is None:
        return ""
    kind, _, factor = str(scaling).partition(":")
    window = ', "original_max_position_embeddings": config.max_position_embeddings'
    return f"""from transformers import AutoConfig

config = AutoConfig.from_pretrained(base{pinned})
scaling = {{"rope_type": "{kind}", "factor": {float(factor)}{window * (kind == "yarn")}}}
config.rope_parameters = {{**config.rope_parameters, **scaling}}
options["config"] = config
"""


def _loading(summary: TrainingSummary) -> list[str]:
    model = summary.model
    revision = model.commit or model.revision
    pinned = f', revision="{revision}"' if revision else ""
    note = "" if model.commit else "  # not from the Hub: the folder of its weights"
    kind = "fp4" if summary.quant == "fp4" else "nf4"
    double = summary.quantization.double_quant is not False
    dtype = "float16" if summary.quantization.compute_dtype == "float16" else "bfloat16"
    scaled = _scaled_config(summary, pinned)
    return f"""## How to load it

`adapter` is this folder, or its name on the Hub. The tokenizer's chat template is that of training.

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

base = "{_base_name(summary)}"{note}
adapter = "."
tokenizer = AutoTokenizer.from_pretrained(adapter)
options = {{"dtype": torch.{dtype}, "device_map": "auto"}}
{scaled}model = AutoModelForCausalLM.from_pretrained(base{pinned}, **options)
model = PeftModel.from_pretrained(model, adapter)
```

On a base in 4 bits:

```python
options["quantization_config"] = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{kind}",
    bnb_4bit_use_double_quant={double},
    bnb_4bit_compute_dtype=torch.{dtype},
)
model = AutoModelForCausalLM.from_pretrained(base{pinned}, **options)
model = PeftModel.from_pretrained(model, adapter)
```

""".split("\n")[:-1]

"""The model card of an adapter: README.md in its folder, written from the run's records."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import HarnessError
from qlora_harness.model.adapter_folder import RECORD_FILE, adapter_digest
from qlora_harness.model.lora import public_name
from qlora_harness.record import ADAPTER_DIR, EVALUATION_FILE, write_text
from qlora_harness.schema.scoring_records import Evaluation
from qlora_harness.schema.section import read_record
from qlora_harness.schema.training_records import TrainingSummary, read_summary

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

logger = logging.getLogger("qlora_harness")

CARD_FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("model_card.md")
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
    import jinja2

    model, quantization = summary.model, summary.quantization
    held = "float16" if quantization.is_float16 else str(summary.quant)
    held += " with double quantisation" * bool(quantization.double_quant)
    revision = model.commit or model.revision
    kind, _, factor = str(summary.settings["rope_scaling"] or "").partition(":")
    template = jinja2.Template(
        _TEMPLATE.read_text(encoding="utf-8"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text: str = template.render(
        summary=summary,
        model=model,
        quantization=quantization,
        front_matter=_front_matter(summary).to_yaml(),
        base=_base_name(summary),
        data_names=_data_names(summary),
        held=held,
        dtype="float16" if quantization.compute_dtype == "float16" else "bfloat16",
        pinned=f', revision="{revision}"' if revision else "",
        # An adapter's own files can't give the base its RoPE scaling.
        scaling={"kind": kind, "factor": float(factor)} if kind else None,
        tables={
            "Results": _results(summary, evaluation),
            "Origin": _origin(summary),
            "Settings": _settings(summary),
        },
    )
    return text


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


def _results(summary: TrainingSummary, evaluation: Evaluation | None) -> dict[str, str | None]:
    results = summary.results
    losses = {
        "held-out loss before training": _nats(results.eval_loss_before),
        "held-out loss after training": _nats(results.eval_loss),
        "training loss of the last step": _nats(results.final_train_loss),
    }
    return losses | dict(_scores(evaluation))


def _origin(summary: TrainingSummary) -> dict[str, Any]:
    model, data, environment = summary.model, summary.data, summary.environment
    device = environment.device or {}
    return {
        "base": _base_name(summary),
        "base revision": model.commit or model.revision,
        "base weights": model.weights_fingerprint,
        "data": ", ".join(_data_names(summary)),
        "data revision": data.commit,
        "training conversations": data.train.conversations,
        "training tokens": data.train.tokens,
        "training tokens that are learned": data.train.supervised_tokens,
        "fingerprint of the training data": data.train.fingerprint,
        "steps": summary.results.steps,
        "device": f"{environment.world_size or 1} × {device.get('name') or 'unknown'}",
        "versions": ", ".join(f"{name} {text}" for name, text in environment.versions.items()),
    }


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


def _settings(summary: TrainingSummary) -> dict[str, Any]:
    return {
        f"`{name}`": Path(value).name if isinstance(value, str) else value  # no local folder
        for name, value in summary.settings.items()
        if name not in _LEFT_OUT
    }

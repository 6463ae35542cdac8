"""What is scored: from model arguments, an adapter's record, or the newest run in ./results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_harness.errors import AdapterError, SettingsError
from qlora_harness.locations import expanded
from qlora_harness.model.adapter_folder import (
    CONFIG_FILE,
    RECORD_FILE,
    read_adapter_config,
    read_adapter_record,
)
from qlora_harness.record import ADAPTER_DIR, SUMMARY_FILE, nested, read_json
from qlora_harness.score.evaluation_record import model_slug
from qlora_harness.settings import Quant


@dataclass(frozen=True)
class ScoringChoice:
    """What is scored.

    Attributes:
        base: Name of the base model.
        revision: Its branch, tag or commit, or None.
        quant: How its weights are held.
        double_quant: Whether 4-bit scales are quantised too.
        compute_dtype: The record's compute dtype, or None without a record.
        adapter: Adapter folder, or None for the base alone.
        recorded: What the adapter's record says of its base, or None.
        results_dir: Where progress and evaluation records go.
    """

    base: str
    revision: str | None
    quant: Quant
    double_quant: bool
    compute_dtype: str | None
    adapter: Path | None
    recorded: dict[str, Any] | None
    results_dir: Path


def choose(
    *,
    pretrained: str | None,
    peft: str | None,
    quant: str | None,
    double_quant: bool | None,
    revision: str | None,
    peft_revision: str | None,
    results_dir: str | None,
    results_root: Path = Path("results"),
) -> ScoringChoice:
    """Decides what is scored.

    Args:
        pretrained: Base model, or None to take the adapter's.
        peft: Adapter folder or Hub id, or None.
        quant: "nf4", "fp4" or "bf16"; None takes the record's, and bf16 for a base alone.
        double_quant: None takes the record's, else True.
        revision: Of the base; None takes the record's.
        peft_revision: Of the adapter, if it is on the Hub.
        results_dir: Folder of the records; None is the adapter's run folder, or
            results/<model>_base_<arm> for a base alone.
        results_root: Where the newest completed run is looked for when both are None.

    Raises:
        SettingsError: An argument is missing or has an unknown value.
        AdapterError: The adapter can't be found or read.
    """
    known = [q.value for q in Quant]
    if quant is not None and quant not in known:
        raise SettingsError(f"--model_args quant={quant}", f"Use one of {', '.join(known)}")
    if not isinstance(double_quant, bool | None):
        raise SettingsError(f"--model_args double_quant={double_quant}", "Use True or False")
    # lm-eval parses revision=1234567 and peft=2024 as numbers.
    pretrained, peft, revision, peft_revision, results_dir = map(
        _text, (pretrained, peft, revision, peft_revision, results_dir)
    )
    if peft is None and pretrained is None:
        peft = str(_newest_run(results_root) / ADAPTER_DIR)
    if peft is None:
        assert pretrained is not None
        chosen = Quant(quant or "bf16")
        name = f"{model_slug(pretrained)}_base_{chosen.arm}"
        folder = Path(results_dir) if results_dir else results_root / name
        doubled = True if double_quant is None else double_quant
        return ScoringChoice(pretrained, revision, chosen, doubled, None, None, None, folder)
    adapter = _adapter_folder(peft, peft_revision)
    config = read_adapter_config(adapter)
    record = _checked_record(adapter)
    base = pretrained or nested(record, "base", "name")
    if base is None:
        raise SettingsError(
            f"peft={peft} has no record of its base model (its {CONFIG_FILE} names "
            f"{config.get('base_model_name_or_path')!r})",
            "Give pretrained= and quant= in --model_args",
        )
    chosen_quant = quant or record.get("quant")
    if chosen_quant is None:
        raise SettingsError(
            f"peft={peft} has no record of the quantisation it was trained with",
            "Give quant=nf4 or quant=bf16 in --model_args",
        )
    if double_quant is None:
        double_quant = record.get("double_quant", True)
    if revision is None and pretrained is None:
        # A branch may have moved since the training.
        revision = nested(record, "base", "commit") or nested(record, "base", "revision")
    return ScoringChoice(
        base,
        revision,
        Quant(chosen_quant),
        double_quant,
        record.get("compute_dtype"),
        adapter,
        record.get("base"),
        Path(results_dir)
        if results_dir
        else _results_dir(peft, adapter, results_root, chosen_quant, record.get("quant")),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _checked_record(adapter: Path) -> dict[str, Any]:
    """The adapter's record, empty for an adapter made elsewhere."""
    record = read_adapter_record(adapter)
    if record is None:
        return {}
    rules = {
        "quant": record.get("quant") in [q.value for q in Quant],
        "double_quant": isinstance(record.get("double_quant"), bool),
        "compute_dtype": record.get("compute_dtype") in ("bfloat16", "float32"),
        "base": isinstance(nested(record, "base", "name"), str),
    }
    for name, valid in rules.items():
        if not valid:
            raise AdapterError(
                f"{adapter / RECORD_FILE}, key {name!r}: {record.get(name)!r}",
                "Train anew, or remove the file and give pretrained= and quant=",
            )
    return record


def _results_dir(
    peft: str, adapter: Path, root: Path, quant: str, recorded_quant: str | None
) -> Path:
    """The run folder of an adapter of ours, the adapter's own folder, or one in ./results."""
    if not expanded(peft).exists():  # from the Hub: its cache is not ours to write in
        folder = root / peft.replace("/", "__")
    else:
        folder = adapter.parent if adapter.name == ADAPTER_DIR else adapter
    # On another quantisation than it was trained with it is another model, with its own record.
    return folder if recorded_quant in (None, quant) else folder / f"on_{quant}"


def _newest_run(root: Path) -> Path:
    """The completed run with an adapter that finished last."""
    found: list[tuple[str, Path]] = []
    for path in sorted([*root.glob(f"*/{SUMMARY_FILE}"), *root.glob(f"*/*/{SUMMARY_FILE}")]):
        summary = read_json(path)
        has_adapter = (path.parent / ADAPTER_DIR / CONFIG_FILE).is_file()
        if summary.get("status") == "completed" and has_adapter:
            found.append((str(summary.get("finished")), path.parent))
    if not found:
        raise SettingsError(
            f"--model qlora_adapter: no completed run lies under {root}/",
            "Train one, or give peft= or pretrained= in --model_args",
        )
    return max(found)[1]


def _adapter_folder(peft: str, revision: str | None) -> Path:
    path = expanded(peft)
    if path.exists() or peft.startswith((".", "/", "~")) or peft.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(peft, revision=revision))
    except Exception as error:  # the Hub client raises many kinds
        raise AdapterError(
            f"peft={peft} is no folder and can't be loaded from the Hub "
            f"({str(error).strip().splitlines()[0]})",
            "Check the path; adapters of this project lie in results/<arm>/adapter",
        ) from None

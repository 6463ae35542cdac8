"""Chooses the model to score: by arguments, an adapter's record, or the newest run."""

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
from qlora_harness.record import ADAPTER_DIR, nested
from qlora_harness.schema.training_records import read_summary
from qlora_harness.score.evaluation_record import model_slug
from qlora_harness.settings import COMPUTE_DTYPES, Quant
from qlora_harness.settings_checks import check_quant_package, checked_scaling

_QUANTS = [quant.value for quant in Quant]
_RESULTS = Path("results")


@dataclass(frozen=True)
class ScoringChoice:
    """The model to score, and where its records go."""

    base: str
    revision: str | None  # of the base: a branch, tag or commit
    quant: Quant
    double_quant: bool
    compute_dtype: str | None  # as trained; None without a record
    adapter: Path | None  # None scores the base alone
    recorded: dict[str, Any] | None  # the base in the adapter's record
    results_dir: Path
    rope_scaling: str | None = None  # TYPE:FACTOR

    @property
    def progress_name(self) -> str:
        """File name of the progress record."""
        kind = self.quant.file_arm if self.adapter else f"{self.quant.arm}_base"
        return f"mmlu_progress_{model_slug(self.base)}_{kind}.json"


def choose_scored_run(
    *,
    pretrained: str | None,
    peft: str | None,
    quant: str | None,
    double_quant: bool | None,
    revision: str | None,
    peft_revision: str | None,
    results_dir: str | None,
    rope_scaling: str | None = None,
) -> ScoringChoice:
    """Chooses the model from `--model_args`, which `QloraAdapterLM` explains.

    Raises SettingsError for a missing or unknown argument, AdapterError for an unreadable adapter.
    """
    if quant is not None and quant not in _QUANTS:
        raise SettingsError(f"--model_args quant={quant}", f"Use one of {', '.join(_QUANTS)}")
    if not isinstance(double_quant, bool | None):
        raise SettingsError(f"--model_args double_quant={double_quant}", "Use True or False")
    # lm_eval parses revision=1234567 and peft=2024 as numbers.
    pretrained, peft, revision, peft_revision, results_dir = (
        None if value is None else str(value)
        for value in (pretrained, peft, revision, peft_revision, results_dir)
    )
    folder = Path(results_dir) if results_dir else None
    given = _scaling(rope_scaling, "--model_args rope_scaling")
    if peft is None and pretrained is not None:
        chosen = Quant(quant or "bf16")
        check_quant_package(chosen, f"--model_args quant={chosen.value}")
        return ScoringChoice(
            base=pretrained,
            revision=revision,
            quant=chosen,
            double_quant=True if double_quant is None else double_quant,
            compute_dtype=None,
            adapter=None,
            recorded=None,
            results_dir=folder
            or _RESULTS / f"{model_slug(pretrained)}_base_{chosen.arm}{_suffix(given)}",
            rope_scaling=given,
        )
    if peft is None:
        peft = str(_newest_run() / ADAPTER_DIR)
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
    quant = quant or record.get("quant")
    if quant is None:
        raise SettingsError(
            f"peft={peft} has no record of the quantisation it was trained with",
            "Give quant=nf4 or quant=bf16 in --model_args",
        )
    if revision is None and pretrained is None:
        # A branch may have moved since the training.
        revision = nested(record, "base", "commit") or nested(record, "base", "revision")
    check_quant_package(Quant(quant), f"--model_args quant={quant}")
    if quant == "int8" and config.get("use_dora"):
        raise AdapterError(
            f"peft={peft}, quant=int8: PEFT's DoRA loses the scales of LLM.int8 on a CPU",
            "Give another quant= in --model_args",
        )
    recorded = record.get("rope_scaling")
    scaling = recorded if rope_scaling is None else given
    results = _results_dir(peft, adapter, quant, record.get("quant"))
    if scaling != recorded:  # another model, too
        results /= f"with{_suffix(scaling) or '_none'}"
    return ScoringChoice(
        base=base,
        revision=revision,
        quant=Quant(quant),
        double_quant=record.get("double_quant", True) if double_quant is None else double_quant,
        compute_dtype=record.get("compute_dtype"),
        adapter=adapter,
        recorded=record.get("base"),
        results_dir=folder or results,
        rope_scaling=scaling,
    )


def _scaling(value: object, where: str) -> str | None:
    """A checked RoPE scaling; None without one."""
    none = value is None or str(value).lower() == "none"
    return None if none else checked_scaling(str(value), where)


def _suffix(scaling: str | None) -> str:
    return "" if scaling is None else f"_{scaling.replace(':', '_')}"


def _checked_record(adapter: Path) -> dict[str, Any]:
    """The adapter's record; empty for an adapter that another program made."""
    record = read_adapter_record(adapter)
    if record is None:
        return {}
    is_valid = {
        "quant": record.get("quant") in _QUANTS,
        "double_quant": isinstance(record.get("double_quant"), bool),
        "compute_dtype": record.get("compute_dtype") in COMPUTE_DTYPES,
        "base": isinstance(nested(record, "base", "name"), str),
    }
    for name, valid in is_valid.items():
        if not valid:
            raise AdapterError(
                f"{adapter / RECORD_FILE}, key {name!r}: {record.get(name)!r}",
                "Train again, or remove the file and give pretrained= and quant=",
            )
    where = f"{adapter / RECORD_FILE}, key 'rope_scaling'"
    try:
        return record | {"rope_scaling": _scaling(record.get("rope_scaling"), where)}
    except SettingsError as error:
        raise AdapterError(error.problem, "Train again, or correct it") from None


def _results_dir(peft: str, adapter: Path, quant: str, recorded_quant: str | None) -> Path:
    """The folder of the adapter's run, the adapter's own, or one in ./results."""
    if not expanded(peft).exists():  # it is in the Hub's cache, which we must not write to
        folder = _RESULTS / peft.replace("/", "__")
    else:
        folder = adapter.parent if adapter.name == ADAPTER_DIR else adapter
    # On a base quantised differently from training it is another model, with its own record.
    return folder if recorded_quant in (None, quant) else folder / f"on_{quant}"


def _newest_run() -> Path:
    """The last completed run that has an adapter."""
    runs: list[tuple[str, Path]] = []
    for pattern in ("*", "*/*"):
        for folder in _RESULTS.glob(pattern):
            summary = read_summary(folder)
            has_adapter = (folder / ADAPTER_DIR / CONFIG_FILE).is_file()
            if summary is not None and summary.status == "completed" and has_adapter:
                runs.append((str(summary.finished), folder))
    if not runs:
        raise SettingsError(
            f"--model qlora_adapter: no completed run under {_RESULTS}/",
            "Train one, or give peft= or pretrained= in --model_args",
        )
    return max(runs)[1]


def _adapter_folder(peft: str, revision: str | None) -> Path:
    path = expanded(peft)
    if path.exists() or peft.startswith((".", "/", "~")) or peft.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(peft, revision=revision))
    except Exception as error:  # noqa: BLE001  # the Hub client raises many kinds
        raise AdapterError(
            f"peft={peft} is neither a folder nor loadable from the Hub "
            f"({str(error).strip().splitlines()[0]})",
            "Check the path; training saves adapters in results/<arm>/adapter",
        ) from None

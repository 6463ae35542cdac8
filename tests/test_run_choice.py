"""Which model is scored: by the arguments, by the adapter's record, or as the newest run.

Nothing is loaded here: an adapter is its folder.
"""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from scoring_runs import refused, write_summary

from qlora_harness.errors import AdapterError, HarnessError, ResultsError, SettingsError
from qlora_harness.score.run_choice import ScoringChoice, choose_scored_run
from qlora_harness.settings import Quant

BASE = {
    "name": "meta-llama/Llama-2-7b-hf",
    "revision": "main",
    "commit": "01c7f73d771dfac7d292323805ebc428287df4f9",
    "random_weights": False,
    "weights_fingerprint": "sha256:0",
}
RECORD = {
    "kind": "adapter", "base": BASE, "quant": "nf4", "double_quant": False,
    "compute_dtype": "bfloat16",
}  # fmt: skip


def write_adapter(folder: Path, record: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True)
    written = {"peft_type": "LORA", "base_model_name_or_path": "/somewhere/llama"} | config
    (folder / "adapter_config.json").write_text(json.dumps(written))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    if record is not None:
        (folder / "qlora_harness.json").write_text(json.dumps(record))
    return folder


def write_run(folder: Path, *, finished: str | None, status: str = "completed") -> Path:
    write_adapter(folder / "adapter", RECORD)
    write_summary(folder, finished=finished, status=status)
    return folder


def pick(**arguments: Any) -> ScoringChoice:
    return choose_scored_run(**(dict.fromkeys(signature(choose_scored_run).parameters) | arguments))


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_base_alone_is_scored_in_bf16() -> None:
    choice = pick(pretrained="smollm2")
    assert choice == ScoringChoice(
        base="smollm2", revision=None, quant=Quant.BF16, double_quant=True, compute_dtype=None,
        adapter=None, recorded=None, results_dir=Path("results/smollm2_base_16bit"),
    )  # fmt: skip
    assert choice.progress_name == "mmlu_progress_smollm2_16bit_base.json"


@pytest.mark.parametrize(
    ("quant", "folder"),
    [("nf4", "y_base_4bit"), ("fp4", "y_base_4bit_fp4"), ("bf16", "y_base_16bit")],
)
def test_base_alone_in_a_named_quantisation(quant: str, folder: str) -> None:
    choice = pick(pretrained="x/y", quant=quant, revision="abc", double_quant=False)
    assert (choice.quant.value, choice.revision, choice.double_quant) == (quant, "abc", False)
    assert choice.results_dir == Path("results") / folder


def test_adapter_brings_its_base_its_quantisation_and_its_folder() -> None:
    adapter = write_adapter(Path("results/4bit/adapter"), RECORD)
    choice = pick(peft=str(adapter))
    assert choice == ScoringChoice(
        base="meta-llama/Llama-2-7b-hf",
        revision=BASE["commit"],  # type: ignore[arg-type]  # the branch may have moved  # type: ignore[arg-type]
        quant=Quant.NF4,
        double_quant=False,
        compute_dtype="bfloat16",
        adapter=adapter,
        recorded=BASE,
        results_dir=Path("results/4bit"),
    )
    assert choice.progress_name == "mmlu_progress_llama2_7b_4bit_qlora.json"
    assert pick(peft=str(adapter), pretrained="another/base").revision is None


def test_arguments_win_over_the_record() -> None:
    adapter = write_adapter(Path("results/4bit/adapter"), RECORD)
    arguments = {"pretrained": "/models/llama", "quant": "bf16", "double_quant": True}
    choice = pick(peft=str(adapter), **arguments, revision="other", results_dir="elsewhere")
    assert (choice.base, choice.quant, choice.double_quant) == ("/models/llama", Quant.BF16, True)
    assert (choice.revision, choice.results_dir) == ("other", Path("elsewhere"))
    assert choice.recorded == BASE  # the weights are still compared with the recorded ones


def test_foreign_adapter_needs_base_and_quantisation() -> None:
    adapter = write_adapter(Path("mine/guanaco"))
    choice = pick(peft=str(adapter), pretrained="x/y", quant="nf4")
    assert (choice.base, choice.quant, choice.double_quant) == ("x/y", Quant.NF4, True)
    assert (choice.recorded, choice.compute_dtype) == (None, None)
    assert choice.results_dir == Path("mine/guanaco")
    text = refused(lambda: pick(peft=str(adapter)), SettingsError)
    for part in ("peft=mine/guanaco", "'/somewhere/llama'", "pretrained=", "quant="):
        assert part in text
    text = refused(lambda: pick(peft=str(adapter), pretrained="x/y"), SettingsError)
    assert "quant=nf4 or quant=bf16" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("quant", value) for value in ("int4", "NF4", "4bit", "")),
        # lm_eval passes what it can't parse as a text, and every text is true.
        *(("double_quant", value) for value in ("no", "off", 2)),
    ],
)
def test_unknown_value_is_refused(name: str, value: Any) -> None:
    text = refused(lambda: pick(pretrained="smollm2", **{name: value}), SettingsError)
    assert text.startswith(f"--model_args {name}={value}")


def test_names_of_digits_are_texts() -> None:
    # lm_eval parses revision=1234567 as a number.
    choice = pick(pretrained=2024, revision=1234567, results_dir=0)
    assert (choice.base, choice.revision, choice.results_dir) == ("2024", "1234567", Path("0"))
    assert pick(pretrained=2024).results_dir == Path("results/2024_base_16bit")
    adapter = write_adapter(Path("2024"), RECORD)
    assert pick(peft=2024).adapter == adapter
    assert refused(lambda: pick(peft=2025), AdapterError).startswith("peft=2025 does not exist")


def test_newest_completed_run_is_the_one_that_finished_last() -> None:
    write_run(Path("results/4bit"), finished="2026-11-24T10:00:00+00:00", status="interrupted")
    assert "no completed run under results/" in refused(pick, SettingsError)
    write_run(Path("results/demo/4bit"), finished="2026-11-24T10:00:00+00:00")
    assert pick().results_dir == Path("results/demo/4bit")
    write_run(Path("results/16bit"), finished="2026-11-24T12:00:00+00:00")
    write_run(Path("results/again"), finished="2026-11-24T11:00:00+00:00")
    write_run(Path("results/failed"), finished="2026-11-24T13:00:00+00:00", status="failed")
    write_run(Path("results/running"), finished=None, status="running")
    headless = write_run(Path("results/headless"), finished="2026-11-24T14:00:00+00:00")
    (headless / "adapter" / "adapter_config.json").unlink()
    choice = pick()
    assert choice.adapter == Path("results/16bit/adapter")
    assert choice.results_dir == Path("results/16bit")
    (headless / "training_summary.json").write_text('{"status": "comp')
    assert "headless/training_summary.json, line 1" in refused(pick, ResultsError)


def test_run_folder_in_place_of_its_adapter_is_hinted_at() -> None:
    write_run(Path("results/4bit"), finished="2026-11-24T10:00:00+00:00")
    assert "adapter_config.json" in refused(lambda: pick(peft=""), AdapterError)  # peft=$UNSET
    text = refused(lambda: pick(peft="results/4bit"), AdapterError)
    assert "adapter_config.json" in text
    assert "peft=results/4bit/adapter" in text


@pytest.mark.parametrize(
    "peft", ["./nowhere", "~nosuchuser/x", "/nowhere/at/all", "a/b/c", "nowhere"]
)
def test_missing_folder(peft: str) -> None:
    text = refused(lambda: pick(peft=peft), AdapterError)
    assert text.startswith(f"peft={Path(peft)} does not exist")


def test_hub_adapter_is_fetched_at_its_revision_and_leaves_the_cache_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = refused(lambda: pick(peft="someone/guanaco-7b"), AdapterError)  # without network
    assert text.startswith("peft=someone/guanaco-7b ")
    snapshot = write_adapter(Path("cache/models--someone--guanaco-7b/snapshots/0123abc"), RECORD)
    fetched = []

    def download(name: str, revision: str | None = None, **options: Any) -> str:
        fetched.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    choice = pick(peft="someone/guanaco-7b", peft_revision="v2")
    assert fetched == [("someone/guanaco-7b", "v2")]
    assert choice.adapter == snapshot
    # The records belong to the user's results, not into the Hub's cache.
    assert Path("results") in choice.results_dir.parents


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", None])
def test_adapter_without_safetensors_is_refused(name: str | None) -> None:
    adapter = write_adapter(Path("adapter"), RECORD)
    (adapter / "adapter_model.safetensors").unlink()
    if name is not None:
        (adapter / name).write_bytes(b"")
    text = refused(lambda: pick(peft="adapter"), AdapterError)
    assert "adapter_model.safetensors" in text
    assert name is None or text.startswith(f"adapter/{name} is pickled")


def test_adapter_of_another_kind_is_refused() -> None:
    write_adapter(Path("adapter"), RECORD, peft_type="IA3")
    text = refused(lambda: pick(peft="adapter"), AdapterError)
    assert text.startswith("adapter/adapter_config.json, key 'peft_type': 'IA3'")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"{}"])
def test_broken_configuration_is_named(content: bytes) -> None:
    adapter = write_adapter(Path("adapter"), RECORD)
    (adapter / "adapter_config.json").write_bytes(content)
    text = refused(lambda: pick(peft="adapter"), AdapterError)
    assert text.startswith("adapter/adapter_config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"quant": "int4"},
        {"quant": 4},
        {"base": "meta-llama/Llama-2-7b-hf"},
        {"compute_dtype": "float8"},
        {"double_quant": "no"},
    ],
)
def test_broken_record_is_named(change: dict[str, Any]) -> None:
    write_adapter(Path("adapter"), RECORD | change)
    text = refused(lambda: pick(peft="adapter"), HarnessError)
    assert "adapter/qlora_harness.json" in text

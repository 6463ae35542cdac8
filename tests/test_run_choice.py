"""Which model is scored: by the arguments, by the adapter's record, or as the newest run.

Nothing is loaded here: an adapter is its folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
    "kind": "adapter",
    "base": BASE,
    "quant": "nf4",
    "double_quant": False,
    "compute_dtype": "bfloat16",
}


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
    summary = {"status": status, "finished": finished}
    (folder / "training_summary.json").write_text(json.dumps(summary))
    return folder


def pick(**arguments: Any) -> ScoringChoice:
    names = (
        "pretrained",
        "peft",
        "quant",
        "double_quant",
        "revision",
        "peft_revision",
        "results_dir",
    )
    return choose_scored_run(**(dict.fromkeys(names) | arguments))


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_base_alone_is_scored_in_bf16() -> None:
    assert pick(pretrained="smollm2") == ScoringChoice(
        base="smollm2",
        revision=None,
        quant=Quant.BF16,
        double_quant=True,
        compute_dtype=None,
        adapter=None,
        recorded=None,
        results_dir=Path("results/smollm2_base_16bit"),
    )


@pytest.mark.parametrize(
    ("quant", "folder"),
    [("nf4", "y_base_4bit"), ("fp4", "y_base_4bit_fp4"), ("bf16", "y_base_16bit")],
)
def test_base_alone_in_a_named_quantisation(quant: str, folder: str) -> None:
    found = pick(pretrained="x/y", quant=quant, revision="abc", double_quant=False)
    assert (found.quant.value, found.revision, found.double_quant) == (quant, "abc", False)
    assert found.results_dir == Path("results") / folder


def test_adapter_brings_its_base_its_quantisation_and_its_folder() -> None:
    adapter = write_adapter(Path("results/4bit/adapter"), RECORD)
    assert pick(peft=str(adapter)) == ScoringChoice(
        base="meta-llama/Llama-2-7b-hf",
        revision=BASE["commit"],
        quant=Quant.NF4,
        double_quant=False,
        compute_dtype="bfloat16",
        adapter=adapter,
        recorded=BASE,
        results_dir=Path("results/4bit"),
    )


def test_arguments_win_over_the_record() -> None:
    adapter = write_adapter(Path("results/4bit/adapter"), RECORD)
    found = pick(
        peft=str(adapter),
        pretrained="/models/llama",
        quant="bf16",
        double_quant=True,
        revision="other",
        results_dir="elsewhere",
    )
    assert (found.base, found.quant, found.double_quant) == ("/models/llama", Quant.BF16, True)
    assert (found.revision, found.results_dir) == ("other", Path("elsewhere"))
    assert found.recorded == BASE  # the weights are still compared with the recorded ones


def test_recorded_revision_belongs_to_the_recorded_base_only() -> None:
    adapter = write_adapter(Path("adapter"), RECORD)
    assert pick(peft=str(adapter)).revision == BASE["commit"]  # the branch may have moved
    assert pick(peft=str(adapter), pretrained="another/base").revision is None


def test_foreign_adapter_with_base_and_quantisation_given() -> None:
    adapter = write_adapter(Path("mine/guanaco"))
    found = pick(peft=str(adapter), pretrained="x/y", quant="nf4")
    assert (found.base, found.quant, found.double_quant) == ("x/y", Quant.NF4, True)
    assert (found.recorded, found.compute_dtype) == (None, None)
    assert found.results_dir == Path("mine/guanaco")


def test_foreign_adapter_without_base_is_refused() -> None:
    adapter = write_adapter(Path("guanaco"))
    with pytest.raises(SettingsError) as error:
        pick(peft=str(adapter))
    assert str(error.value) == (
        "peft=guanaco has no record of its base model (its adapter_config.json names "
        "'/somewhere/llama'). Give pretrained= and quant= in --model_args."
    )


def test_foreign_adapter_without_quantisation_is_refused() -> None:
    adapter = write_adapter(Path("guanaco"))
    with pytest.raises(SettingsError) as error:
        pick(peft=str(adapter), pretrained="x/y")
    assert str(error.value) == (
        "peft=guanaco has no record of the quantisation it was trained with. "
        "Give quant=nf4 or quant=bf16 in --model_args."
    )


@pytest.mark.parametrize("quant", ["int8", "NF4", "4bit", ""])
def test_unknown_quantisation_is_refused(quant: str) -> None:
    with pytest.raises(SettingsError) as error:
        pick(pretrained="smollm2", quant=quant)
    assert str(error.value) == f"--model_args quant={quant}. Use one of nf4, fp4, bf16."


@pytest.mark.parametrize("value", ["no", "off", 2])
def test_double_quant_that_is_neither_true_nor_false_is_refused(value: Any) -> None:
    # lm-eval passes what it can't parse as a text, and every text is true.
    with pytest.raises(SettingsError, match=f"double_quant={value}"):
        pick(pretrained="smollm2", quant="nf4", double_quant=value)


def test_revision_of_digits_is_a_text() -> None:
    # lm-eval parses revision=1234567 as a number.
    assert pick(pretrained="x/y", revision=1234567).revision == "1234567"


def test_names_of_digits_are_texts() -> None:
    found = pick(pretrained=2024, results_dir=0)
    assert (found.base, found.results_dir) == ("2024", Path("0"))
    assert pick(pretrained=2024).results_dir == Path("results/2024_base_16bit")
    adapter = write_adapter(Path("2024"), RECORD)
    assert pick(peft=2024).adapter == adapter
    with pytest.raises(
        AdapterError, match=r"^peft=2025 does not exist\. Name an adapter folder\.$"
    ):
        pick(peft=2025)


def test_newest_completed_run_is_the_one_that_finished_last() -> None:
    write_run(Path("results/4bit"), finished="2026-11-24T10:00:00+00:00")
    write_run(Path("results/16bit"), finished="2026-11-24T12:00:00+00:00")
    write_run(Path("results/again"), finished="2026-11-24T11:00:00+00:00")
    write_run(Path("results/failed"), finished="2026-11-24T13:00:00+00:00", status="failed")
    write_run(Path("results/running"), finished=None, status="running")
    headless = write_run(Path("results/headless"), finished="2026-11-24T14:00:00+00:00")
    (headless / "adapter" / "adapter_config.json").unlink()
    found = pick()
    assert found.adapter == Path("results/16bit/adapter")
    assert found.results_dir == Path("results/16bit")


def test_without_a_completed_run_it_says_so() -> None:
    write_run(Path("results/4bit"), finished="2026-11-24T10:00:00+00:00", status="interrupted")
    with pytest.raises(SettingsError) as error:
        pick()
    assert str(error.value) == (
        "--model qlora_adapter: no completed run lies under results/. "
        "Train one, or give peft= or pretrained= in --model_args."
    )


def test_run_of_make_demo_is_found() -> None:
    write_run(Path("results/demo/4bit"), finished="2026-11-24T10:00:00+00:00")
    assert pick().results_dir == Path("results/demo/4bit")


def test_broken_summary_is_named() -> None:
    run = write_run(Path("results/4bit"), finished="2026-11-24T10:00:00+00:00")
    (run / "training_summary.json").write_text('{"status": "comp')
    with pytest.raises(ResultsError, match=r"results/4bit/training_summary\.json, line 1: not val"):
        pick()


def test_run_folder_in_place_of_its_adapter_is_hinted_at() -> None:
    write_run(Path("results/4bit"), finished="2026-11-24T10:00:00+00:00")
    with pytest.raises(AdapterError) as error:
        pick(peft="results/4bit")
    assert str(error.value) == (
        "peft=results/4bit holds no adapter_config.json. Did you mean peft=results/4bit/adapter."
    )


@pytest.mark.parametrize(
    "peft", ["./nowhere", "~nosuchuser/x", "/nowhere/at/all", "a/b/c", "nowhere"]
)
def test_missing_folder(peft: str) -> None:
    with pytest.raises(AdapterError) as error:
        pick(peft=peft)
    assert str(error.value) == f"peft={Path(peft)} does not exist. Name an adapter folder."


def test_hub_adapter_that_cannot_be_fetched() -> None:
    with pytest.raises(AdapterError) as error:
        pick(peft="someone/guanaco-7b")
    text = str(error.value)
    assert text.startswith(
        "peft=someone/guanaco-7b is no folder and can't be loaded from the Hub ("
    )
    assert text.endswith("Check the path; adapters of this project lie in results/<arm>/adapter.")
    assert "\n" not in text


def test_hub_adapter_is_fetched_at_its_revision_and_leaves_the_cache_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshot = write_adapter(Path("cache/models--someone--guanaco-7b/snapshots/0123abc"), RECORD)
    asked = []

    def download(name: str, revision: str | None = None, **options: Any) -> str:
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = pick(peft="someone/guanaco-7b", peft_revision="v2")
    assert asked == [("someone/guanaco-7b", "v2")]
    assert found.adapter == snapshot
    # The records belong to the user's results, not into the Hub's cache.
    assert Path("results") in found.results_dir.parents


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_weights_are_refused(name: str) -> None:
    adapter = write_adapter(Path("adapter"), RECORD)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(b"")
    with pytest.raises(AdapterError) as error:
        pick(peft="adapter")
    assert str(error.value) == (
        f"adapter/{name} is pickled, and unpickling runs code. "
        "Convert it to adapter_model.safetensors."
    )


def test_adapter_without_weights_is_refused() -> None:
    adapter = write_adapter(Path("adapter"), RECORD)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError) as error:
        pick(peft="adapter")
    assert str(error.value) == "adapter holds no adapter_model.safetensors. Save the adapter anew."


def test_adapter_of_another_kind_is_refused() -> None:
    write_adapter(Path("adapter"), RECORD, peft_type="IA3")
    with pytest.raises(AdapterError) as error:
        pick(peft="adapter")
    assert str(error.value) == (
        "adapter/adapter_config.json, key 'peft_type': 'IA3'. Only LoRA adapters are supported."
    )


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"{}"])
def test_broken_configuration_is_named(content: bytes) -> None:
    adapter = write_adapter(Path("adapter"), RECORD)
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterError) as error:
        pick(peft="adapter")
    text = str(error.value)
    assert text.startswith("adapter/adapter_config.json")
    assert "\n" not in text


@pytest.mark.parametrize(
    "change",
    [
        {"quant": "int8"},
        {"quant": 4},
        {"base": "meta-llama/Llama-2-7b-hf"},
        {"compute_dtype": "float16"},
        {"double_quant": "no"},
    ],
)
def test_broken_record_is_named(change: dict[str, Any]) -> None:
    write_adapter(Path("adapter"), RECORD | change)
    with pytest.raises(HarnessError, match=r"adapter/qlora_harness\.json"):
        pick(peft="adapter")

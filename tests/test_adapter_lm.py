"""`qlora_adapter`: exact log-probabilities, exact records, and what it refuses to score."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from conftest import BOS, LETTER_IDS, token_ids, write_tokenizer
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from qlora_harness.errors import (
    AdapterError,
    HarnessError,
    ModelError,
    ResultsError,
    SettingsError,
)
from qlora_harness.families import families
from qlora_harness.model.base import find_base, load_base, load_tokenizer, weights_fingerprint
from qlora_harness.model.lora import adapter_digest, attach_lora, save_adapter
from qlora_harness.question_hashes import prompt_hash
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.mmlu_files import DEMO_FILE, load_questions
from qlora_harness.score.packed_forward import PackedModel
from qlora_harness.score.packed_scorer import PackedScorer
from qlora_harness.score.task_index import extend_index
from qlora_harness.settings import Quant

RANK, ALPHA = 4, 8.0
CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"


# What is scored


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained adapter in the layout of a run folder, recorded as trained in nf4."""
    source = find_base(str(tiny_llama))
    model = load_base(
        source, quant=Quant.NF4, double_quant=True, compute_dtype="float32", device=CPU
    )
    record = {
        "schema_version": 1,
        "kind": "adapter",
        "base": source.record() | {"weights_fingerprint": weights_fingerprint(model)},
        "quant": "nf4",
        "double_quant": True,
        "compute_dtype": "float32",
    }
    torch.manual_seed(1)
    adapted = attach_lora(model, r=RANK, alpha=ALPHA, dropout=0.0, targets="all-linear")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("run") / "4bit" / "adapter"
    save_adapter(adapted, load_tokenizer(source), folder, record)
    return folder


@pytest.fixture
def own_adapter(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "4bit" / "adapter"))


@pytest.fixture
def make_lm(tiny_llama: Path, tmp_path: Path) -> Callable[..., QloraAdapterLM]:
    def make(**arguments: Any) -> QloraAdapterLM:
        if "peft" not in arguments:
            arguments.setdefault("pretrained", str(tiny_llama))
        arguments.setdefault("results_dir", str(tmp_path / "records"))
        return QloraAdapterLM(device="cpu", **{"dtype": "float32", "batch_size": 4} | arguments)

    return make


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """Our tasks without the seconds that lm-eval needs to read its own."""
    manager = TaskManager(include_defaults=False)
    extend_index(manager.task_index, [Path(lm_eval.tasks.__file__).parent])
    return manager


@pytest.fixture(autouse=True)
def unchanged_tracker() -> Iterator[None]:
    """Undoes what a model does to lm-eval's way of saving, for the other test files."""
    names = ("save_results_aggregated", "save_results_samples")
    before = {name: getattr(EvaluationTracker, name) for name in names}
    yield
    for name, method in before.items():
        setattr(EvaluationTracker, name, method)
    if "_qlora_harness" in vars(EvaluationTracker):
        del EvaluationTracker._qlora_harness


def recorded_fingerprint(adapter: Path) -> str:
    found: str = json.loads((adapter / "qlora_harness.json").read_text())["base"][
        "weights_fingerprint"
    ]
    return found


def loglikelihood_requests(prompts: list[str]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (prompt, f" {letter}"), place)
        for prompt in prompts
        for place, letter in enumerate("ABCD")
    ]


def demo_prompts(count: int) -> list[str]:
    return [q.prompt for q in load_questions(DEMO_FILE)[:: 96 // count]][:count]


def score(lm: HFLM, prompts: list[str]) -> list[float]:
    found = lm.loglikelihood(loglikelihood_requests(prompts), disable_tqdm=True)
    return [logprob for logprob, _ in found]


# A hand-written reference: weights by hand, ids by hand, one plain forward pass in float32


def quantised_and_back(weight: torch.Tensor, quant: str) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, quant_type=quant, compress_statistics=True)
    state.dtype = torch.float32  # the values as they are, not rounded to bfloat16
    return dequantize_4bit(packed, state)


def reference_model(folder: Path, quant: str, adapter: Path | None) -> LlamaForCausalLM:
    """The base in float32 with quantisation and adapter worked into its weights."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    lora = load_file(adapter / WEIGHTS) if adapter else {}
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    assert len(layers) == 2 * 7
    assert len(lora) == (2 * len(layers) if adapter else 0)
    weights = {
        name: layer.weight.data.float()
        if quant == "bf16"
        else quantised_and_back(layer.weight.data, quant)
        for name, layer in layers.items()
    }
    model.float()
    for name, layer in layers.items():
        if lora:
            prefix = f"base_model.model.{name}"
            update = lora[f"{prefix}.lora_B.weight"] @ lora[f"{prefix}.lora_A.weight"]
            weights[name] = weights[name] + ALPHA / RANK * update
        layer.weight.data = weights[name]
    return model.eval()


def reference_logprobs(model: LlamaForCausalLM, prompt: str) -> list[float]:
    ids = [BOS, *token_ids(f" {prompt}")]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return [logprobs[LETTER_IDS[f" {letter}"]].item() for letter in "ABCD"]


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("quant", ["bf16", "nf4", "fp4"])
def test_logprobs_of_a_prompt_are_those_worked_out_by_hand(
    make_lm: Callable[..., QloraAdapterLM],
    tiny_llama: Path,
    adapter: Path,
    quant: str,
    with_adapter: bool,
) -> None:
    (prompt,) = demo_prompts(1)
    model = reference_model(tiny_llama, quant, adapter if with_adapter else None)
    expected = reference_logprobs(model, prompt)
    lm = make_lm(quant=quant, **({"peft": str(adapter)} if with_adapter else {}))
    assert lm.tok_encode(prompt) == [BOS, *token_ids(f" {prompt}")]
    assert score(lm, [prompt]) == pytest.approx(expected, abs=1e-5)


def test_quantisation_and_adapter_each_change_the_numbers(tiny_llama: Path, adapter: Path) -> None:
    """The tolerance above tells the six models apart."""
    (prompt,) = demo_prompts(1)
    found = [
        reference_logprobs(reference_model(tiny_llama, quant, peft), prompt)
        for quant in ("bf16", "nf4", "fp4")
        for peft in (None, adapter)
    ]
    for place, one in enumerate(found):
        for other in found[:place]:
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-4


@pytest.mark.parametrize("batch_size", [1, 3])
def test_logprobs_do_not_depend_on_the_batch(
    make_lm: Callable[..., QloraAdapterLM], adapter: Path, batch_size: int
) -> None:
    prompts = demo_prompts(4)
    together = score(make_lm(peft=str(adapter)), prompts)
    apart = score(make_lm(peft=str(adapter), batch_size=batch_size), prompts)
    assert apart == pytest.approx(together, abs=1e-5)


def test_logprobs_of_a_real_model_are_those_worked_out_by_hand(
    make_lm: Callable[..., QloraAdapterLM], smollm2: str
) -> None:
    """SmolLM2 ties its head to its embedding, and its tokenizer adds no BOS."""
    (prompt,) = demo_prompts(1)
    folder = find_base(smollm2).path
    ids = AutoTokenizer.from_pretrained(folder).encode(prompt)
    letters = [AutoTokenizer.from_pretrained(folder).encode(f" {x}") for x in "ABCD"]
    assert [len(letter) for letter in letters] == [1, 1, 1, 1]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], dim=-1)
    expected = [logprobs[letter].item() for (letter,) in letters]
    lm = make_lm(pretrained=smollm2)
    assert score(lm, [prompt]) == pytest.approx(expected, abs=1e-4)
    assert lm.get_model_info()["leading_bos"] == []


# Equal to HFLM


def hf_lm(tiny_llama: Path, quant: str, adapter: Path | None) -> HFLM:
    if quant == "bf16":
        peft = str(adapter) if adapter else None
        return HFLM(
            str(tiny_llama),
            peft=peft,
            dtype="float32",
            softmax_dtype="float32",
            device="cpu",
            batch_size=4,
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = LlamaForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return HFLM(model, tokenizer=tokenizer, softmax_dtype="float32", batch_size=4)


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("quant", ["bf16", "nf4"])
def test_all_three_kinds_of_request_are_answered_as_hflm_does(
    make_lm: Callable[..., QloraAdapterLM],
    tiny_llama: Path,
    adapter: Path,
    quant: str,
    with_adapter: bool,
) -> None:
    ours = make_lm(quant=quant, **({"peft": str(adapter)} if with_adapter else {}))
    theirs = hf_lm(tiny_llama, quant, adapter if with_adapter else None)
    requests = loglikelihood_requests(demo_prompts(2))
    requests += [
        Instance("loglikelihood", {}, pair, 0)
        for pair in [("", "Earth"), ("Which planet?", " Mars or Venus"), ("2 + 2 =", " 4")]
    ]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    settings = {"until": ["x"], "max_gen_toks": 6, "do_sample": False}
    generation = [
        Instance("generate_until", {}, (text, settings), 0) for text in ("Answer:", "The planet")
    ]
    assert ours.generate_until(generation, disable_tqdm=True) == theirs.generate_until(
        generation, disable_tqdm=True
    )
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("Hello", "x" * 3000)]
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-4
    )


# How the model is held


def test_adapter_stays_unmerged_on_a_quantised_base(
    make_lm: Callable[..., QloraAdapterLM], adapter: Path
) -> None:
    import bitsandbytes

    lm = make_lm(peft=str(adapter), dequantize="never")
    layers = [m for m in lm.model.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 14
    for layer in layers:
        assert not layer.merged
        assert isinstance(layer.get_base_layer(), bitsandbytes.nn.Linear4bit)
        assert layer.get_base_layer().weight.quant_type == "nf4"
        assert layer.lora_A["default"].weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert not lm.model.training


def test_what_was_trained_is_what_is_scored(
    make_lm: Callable[..., QloraAdapterLM], tiny_llama: Path, adapter: Path
) -> None:
    info = make_lm(peft=str(adapter), dtype="auto", results_dir=None).get_model_info()
    assert info["base"] == str(tiny_llama)
    assert (info["quant"], info["double_quant"]) == ("nf4", True)
    assert info["model_dtype"] == "float32"
    assert info["peft_sha"] == adapter_digest(adapter)
    assert info["leading_bos"] == [BOS]


def test_softmax_is_float32_unless_asked_otherwise(
    make_lm: Callable[..., QloraAdapterLM],
) -> None:
    lm = make_lm(dtype="bfloat16")
    assert lm.softmax_dtype == torch.float32
    assert lm.get_model_info()["softmax_dtype"] == "float32"
    coarse = make_lm(dtype="bfloat16", softmax_dtype="bfloat16")
    assert coarse.softmax_dtype == torch.bfloat16
    prompts = demo_prompts(3)
    steps = torch.tensor(score(coarse, prompts))
    assert torch.equal(steps, steps.bfloat16().float())  # this is what makes ties
    fine = torch.tensor(score(lm, prompts))
    assert not torch.equal(fine, fine.bfloat16().float())


def test_float32_is_float32_on_every_cpu(
    make_lm: Callable[..., QloraAdapterLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX512-BF16, bitsandbytes would repack the weights and round activations to bfloat16."""
    import bitsandbytes

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    lm = make_lm(quant="nf4", dtype="float32", dequantize="never")
    layers = [m for m in lm.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_dtype_of_a_base_alone_on_a_cpu_is_float32(
    make_lm: Callable[..., QloraAdapterLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm = make_lm(dtype="auto")
    assert lm.get_model_info()["model_dtype"] == "float32"
    assert lm.get_model_info()["quant"] == "bf16"
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}


def test_parameters_are_counted_as_if_unpacked(make_lm: Callable[..., QloraAdapterLM]) -> None:
    packed = make_lm(quant="nf4").get_model_info()["model_num_parameters"]
    assert packed == make_lm(quant="bf16").get_model_info()["model_num_parameters"]


def test_newest_completed_run_is_scored_and_named(
    make_lm: Callable[..., QloraAdapterLM],
    own_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Path(shutil.copytree(own_adapter.parent, tmp_path / "work" / "results" / "4bit"))
    summary = {"status": "completed", "finished": "2026-11-24T10:00:00+00:00"}
    (run / "training_summary.json").write_text(json.dumps(summary))
    monkeypatch.chdir(tmp_path / "work")
    lm = make_lm(pretrained=None, results_dir=None)
    assert "scoring the newest completed run: results/4bit" in caplog.messages
    assert lm.get_model_info()["peft_sha"] == adapter_digest(own_adapter)


# Records of a run


def evaluate(lm: HFLM, manager: TaskManager, task: str = "mmlu_qlora_demo", **options: Any) -> Any:
    return simple_evaluate(
        model=lm, tasks=[task], task_manager=manager, bootstrap_iters=1, **options
    )


def read(folder: Path, name: str = "evaluation_results.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


KNOWN = {
    " A": -1.25,
    " B": -2.5,
    " C": -0.75,
    " D": -4.0,
}


@pytest.fixture
def known_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets every model find "C" likeliest, by a known margin; returns what was asked."""
    asked: list[str] = []

    def answer(self: HFLM, requests: Any, *args: Any, **options: Any) -> list[tuple[float, bool]]:
        asked.extend(context for (context, _), _, _ in requests)
        return [(KNOWN[continuation], False) for (_, continuation), _, _ in requests]

    monkeypatch.setattr(QloraAdapterLM, "_loglikelihood_tokens", answer)
    return asked


def test_progress_file_holds_every_question_in_file_order(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    tiny_llama: Path,
    adapter: Path,
    tmp_path: Path,
    known_answers: list[str],
) -> None:
    evaluate(make_lm(peft=str(adapter)), manager)
    expected, right = [], 0
    for count, q in enumerate(load_questions(DEMO_FILE), start=1):
        right += q.answer == "C"
        expected.append(
            {
                "index": q.index,
                "subject": q.subject,
                "logprobs": {letter.strip(): value for letter, value in KNOWN.items()},
                "prediction": "C",
                "answer": q.answer,
                "correct": q.answer == "C",
                "running_accuracy": right / count,
                "prompt_sha256": prompt_hash(q.prompt),
                "truncated": False,
            }
        )
    progress = read(tmp_path / "records", "mmlu_progress_tiny_llama_4bit_qlora.json")
    created = progress.pop("created")
    assert len(created) == len("2026-11-24T10:00:00+00:00")
    assert progress == {
        "schema_version": 1,
        "kind": "mmlu_progress",
        "arm": "4bit",
        "model": {
            "base": str(tiny_llama),
            "revision": None,
            "commit": None,
            "random_weights": True,
            "quant": "nf4",
            "double_quant": True,
            "peft": "adapter",
            "adapter_sha256": adapter_digest(adapter),
            "weights_fingerprint": recorded_fingerprint(adapter),
        },
        "tasks": {"mmlu_qlora_demo": expected},
    }


def test_evaluation_results_say_what_was_scored_and_how(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    tiny_llama: Path,
    adapter: Path,
    tmp_path: Path,
    known_answers: list[str],
) -> None:
    evaluate(make_lm(quant="bf16", max_length=1900), manager)
    record = read(tmp_path / "records")
    answers: dict[str, list[bool]] = {}
    for q in load_questions(DEMO_FILE):
        answers.setdefault(q.subject, []).append(q.answer == "C")
    environment = record.pop("environment")
    assert environment["device"] == "cpu"
    assert {"python", "torch", "transformers", "peft", "lm_eval", "qlora-harness"} <= set(
        environment["versions"]
    )
    task = record.pop("tasks")["mmlu_qlora_demo"]
    settings = {
        "batch_size": 4,
        "dtype": "float32",
        "softmax_dtype": "float32",
        "max_length": 1900,
        "leading_bos": [BOS],
        "scoring": "packed",
        "expanded_once": False,
        "fused_kernels": True,
        "processes": 1,
    }
    record.pop("created")
    assert record == {
        "schema_version": 1,
        "kind": "evaluation_results",
        "arm": "16bit",
        "model": {
            "base": str(tiny_llama),
            "revision": None,
            "commit": None,
            "random_weights": True,
            "quant": "bf16",
            "double_quant": None,
            "peft": None,
            "adapter_sha256": None,
            "weights_fingerprint": recorded_fingerprint(adapter),
        },
        "settings": settings,
    }
    assert (task["n"], task["n_total"], task["ties"], task["truncated"]) == (96, 96, 0, 0)
    assert task["settings"] == settings
    assert task["acc"] == pytest.approx(sum(map(sum, answers.values())) / 96, abs=1e-12)
    assert {s: values["correct"] for s, values in task["subjects"].items()} == {
        s: sum(values) for s, values in answers.items()
    }
    assert (tmp_path / "records" / "mmlu_progress_tiny_llama_16bit_base.json").is_file()


def test_accuracies_are_those_of_the_harness(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    adapter: Path,
    tmp_path: Path,
) -> None:
    """Over subjects of different sizes, so that the two means and their errors differ."""
    subjects = [s for c in families()["mmlu_qlora_demo"]["categories"].values() for s in c]
    chosen = {f"mmlu_qlora_demo_{s}": list(range(2 + n)) for n, s in enumerate(subjects)}
    theirs = evaluate(make_lm(peft=str(adapter)), manager, samples=chosen)["results"]
    ours = read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]
    assert (ours["n"], ours["n_total"]) == (sum(range(2, 10)), 96)
    assert ours["acc"] != ours["acc_macro"]

    def same(found: dict[str, Any], expected: dict[str, Any], *metrics: str) -> None:
        for metric in metrics:
            for key in (metric, f"{metric}_stderr"):
                assert found[key] == pytest.approx(expected[f"{key},none"], abs=1e-12), key

    same(ours, theirs["mmlu_qlora_demo"], "acc", "acc_macro")
    for category, found in ours["categories"].items():
        same(found, theirs[f"mmlu_qlora_demo_{category}"], "acc", "acc_macro")
    assert set(ours["subjects"]) == set(subjects)
    for subject, found in ours["subjects"].items():
        same(found, theirs[f"mmlu_qlora_demo_{subject}"], "acc")


def test_stored_logprobs_are_those_that_were_scored(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager, adapter: Path, tmp_path: Path
) -> None:
    lm = make_lm(peft=str(adapter))
    evaluate(lm, manager, limit=1)
    rows = read(tmp_path / "records", "mmlu_progress_tiny_llama_4bit_qlora.json")["tasks"]
    questions = [q for q in load_questions(DEMO_FILE) if q.index % 12 == 0]
    expected = score(lm, [q.prompt for q in questions])
    found = [row["logprobs"][letter] for row in rows["mmlu_qlora_demo"] for letter in "ABCD"]
    assert [row["index"] for row in rows["mmlu_qlora_demo"]] == [q.index for q in questions]
    assert found == pytest.approx(expected, abs=1e-5)


def test_single_subject_is_recorded_as_a_part_of_its_family(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    tmp_path: Path,
    known_answers: list[str],
) -> None:
    evaluate(make_lm(), manager, "mmlu_qlora_demo_nutrition")
    task = read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]
    assert (task["n"], task["n_total"]) == (12, 96)
    assert list(task["subjects"]) == ["nutrition"]
    assert list(task["categories"]) == ["other"]


def test_prompts_longer_than_the_window_are_counted(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager, tmp_path: Path
) -> None:
    asked = [q for q in load_questions(DEMO_FILE) if q.index % 12 < 2]
    # BOS and the prompt must fit; the answer itself is never fed to the model.
    lengths = sorted(1 + len(token_ids(f" {q.prompt}")) for q in asked)
    window = lengths[7]
    evaluate(make_lm(max_length=window), manager, limit=2)
    task = read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]
    assert task["truncated"] == sum(length > window for length in lengths)
    assert 0 < task["truncated"] < 16


def test_answers_that_come_from_a_cache_do_not_break_the_rest(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager, known_answers: list[str]
) -> None:
    """After an interrupted run with --use_cache the model is asked some letters of a question."""
    task = manager.load("mmlu_qlora_demo_nutrition")["tasks"]["mmlu_qlora_demo_nutrition"]
    task.build_all_requests(limit=2, rank=0, world_size=1)
    remaining = task.instances[2:]
    assert make_lm().loglikelihood(remaining, disable_tqdm=True) == [
        (KNOWN[request.args[1]], False) for request in remaining
    ]


def test_other_tasks_leave_no_record(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path
) -> None:
    score(make_lm(), demo_prompts(1))
    assert not (tmp_path / "records").exists()


def test_records_that_cannot_be_written_are_reported_before_anything_is_scored(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    tmp_path: Path,
    known_answers: list[str],
) -> None:
    (tmp_path / "records").write_text("a file in the way")
    with pytest.raises(ResultsError) as error:
        evaluate(make_lm(), manager, limit=1)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'records'} can't be written (")
    assert text.endswith("Give another folder with results_dir= in --model_args.")
    assert known_answers == []


def test_damaged_record_is_reported_before_anything_is_scored(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    tmp_path: Path,
    known_answers: list[str],
) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "evaluation_results.json").write_text("{")
    with pytest.raises(ResultsError, match=r"evaluation_results\.json, line 1: not valid JSON"):
        evaluate(make_lm(), manager, limit=1)
    assert known_answers == []


def test_logprobs_that_are_no_numbers_end_with_one_line(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        QloraAdapterLM,
        "_loglikelihood_tokens",
        lambda self, requests, **options: [(math.nan, False)] * len(requests),
    )
    refused(lambda: evaluate(make_lm(), manager, limit=1), HarnessError)


def test_logprobs_that_are_no_numbers_are_not_kept_for_the_next_run(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = PackedScorer.score

    def broken(self: PackedScorer, *args: Any, on_scored: Any, **options: Any) -> dict[int, Any]:
        scores = dict.fromkeys(whole(self, *args, on_scored=None, **options), (math.nan, False))
        on_scored(list(scores.items()))
        return scores

    lm = make_lm()
    monkeypatch.setattr(PackedScorer, "score", broken)
    refused(lambda: evaluate(lm, manager, limit=1), ResultsError)
    monkeypatch.setattr(PackedScorer, "score", whole)
    evaluate(lm, manager, limit=1)
    assert read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]["n"] == 8


def test_questions_of_a_base_that_was_replaced_in_place_are_not_mixed_in(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager, tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    evaluate(make_lm(pretrained=str(base)), manager, "mmlu_qlora_demo_nutrition")
    shutil.rmtree(base)
    another_base(tiny_llama, base, lambda model: model.lm_head.weight.mul_(2))
    evaluate(make_lm(pretrained=str(base)), manager, "mmlu_qlora_demo_astronomy")
    task = read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]
    assert list(task["subjects"]) == ["astronomy"]


# Result files of lm-eval itself


def save(output: Path) -> EvaluationTracker:
    tracker = EvaluationTracker(output_path=str(output))
    tracker.general_config_tracker.model_name_sanitized = "model"
    tracker.save_results_aggregated({"results": {}, "configs": {}}, None)
    return tracker


def test_results_that_were_saved_are_left_alone(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path
) -> None:
    make_lm()
    save(tmp_path / "out")
    save(tmp_path / "out")
    assert len(list((tmp_path / "out" / "model").glob("results_*.json"))) == 2
    save(tmp_path / "single" / "run.json")
    assert len(list((tmp_path / "single").glob("run_*.json"))) == 1


def test_results_that_were_not_saved_are_an_error(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path
) -> None:
    make_lm()
    (tmp_path / "out").write_text("a file in the way")
    with pytest.raises(ResultsError) as error:
        save(tmp_path / "out")
    assert str(error.value) == (
        f"--output_path {tmp_path / 'out'}: lm_eval could not save the results. "
        "Check that the folder can be written and the disk has room."
    )


def test_samples_that_were_not_saved_are_an_error(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path
) -> None:
    make_lm()
    tracker = save(tmp_path / "out")
    (tmp_path / "out" / "blocked").write_text("a file in the way")
    tracker.general_config_tracker.model_name_sanitized = "blocked"
    with pytest.raises(ResultsError, match="could not save the results"):
        tracker.save_results_samples("mmlu_qlora_demo_nutrition", [])


def test_samples_that_were_half_written_are_an_error(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path
) -> None:
    make_lm()
    tracker = save(tmp_path / "out")
    whole = {"arguments": [("Q", " A")], "resps": [], "filtered_resps": [], "target": 0}
    with pytest.raises(ResultsError, match="could not save the results"):
        tracker.save_results_samples("mmlu_qlora_demo_nutrition", [whole, {}])


def test_results_that_were_half_written_are_an_error(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lm()
    whole = Path.write_text

    def full_disk(path: Path, text: str, **options: Any) -> int:
        whole(path, text[:10], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(ResultsError, match="could not save the results"):
        save(tmp_path / "out")


def test_nothing_is_saved_where_nothing_was_asked_for(
    make_lm: Callable[..., QloraAdapterLM],
) -> None:
    make_lm()
    EvaluationTracker().save_results_aggregated({"results": {}}, None)


# Refusals


def refused(make: Callable[[], Any], kind: type[HarnessError]) -> str:
    with pytest.raises(kind) as error:
        make()
    text = str(error.value)
    assert "\n" not in text
    return text


def test_adapter_with_a_missing_weight_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path, tiny_llama: Path
) -> None:
    weights = load_file(own_adapter / WEIGHTS)
    del weights["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(weights, own_adapter / WEIGHTS)
    assert refused(lambda: make_lm(peft=str(own_adapter)), AdapterError) == (
        f"peft={own_adapter} does not fit this base model: 1 adapter weights missing, 0 unexpected "
        "(first: base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight). "
        f"It was trained on {tiny_llama}; give that as pretrained=."
    )


def test_adapter_with_an_unexpected_weight_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    weights = load_file(own_adapter / WEIGHTS)
    weights["base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"] = torch.ones(RANK, 64)
    save_file(weights, own_adapter / WEIGHTS)
    text = refused(lambda: make_lm(peft=str(own_adapter)), AdapterError)
    assert "0 adapter weights missing, 1 unexpected (first: " in text
    assert "layers.2.mlp.up_proj.lora_A" in text


def test_adapter_of_another_shape_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    config = json.loads((own_adapter / "adapter_config.json").read_text())
    (own_adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 2 * RANK}))
    text = refused(lambda: make_lm(peft=str(own_adapter)), AdapterError)
    assert text.startswith(f"peft={own_adapter} does not fit this base model (")
    assert "size mismatch" in text


def test_adapter_for_other_layers_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    config = json.loads((own_adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["c_attn"]
    (own_adapter / "adapter_config.json").write_text(json.dumps(config))
    text = refused(lambda: make_lm(peft=str(own_adapter)), AdapterError)
    assert text.startswith(f"peft={own_adapter} does not fit this base model (")


def test_untrained_adapter_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    weights = load_file(own_adapter / WEIGHTS)
    zero = {n: torch.zeros_like(v) if "lora_B" in n else v for n, v in weights.items()}
    save_file(zero, own_adapter / WEIGHTS)
    assert refused(lambda: make_lm(peft=str(own_adapter)), AdapterError) == (
        f"{own_adapter / WEIGHTS}: every lora_B weight is zero, so the adapter was never trained. "
        "Name the adapter of a completed run."
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_adapter_with_a_non_finite_weight_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path, value: float
) -> None:
    weights = load_file(own_adapter / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    weights[name][0, 0] = value
    save_file(weights, own_adapter / WEIGHTS)
    assert refused(lambda: make_lm(peft=str(own_adapter)), AdapterError) == (
        f"{own_adapter / WEIGHTS}, tensor {name}: non-finite values. Train the adapter anew."
    )


def test_damaged_adapter_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    content = (own_adapter / WEIGHTS).read_bytes()
    (own_adapter / WEIGHTS).write_bytes(content[: len(content) // 2])
    text = refused(lambda: make_lm(peft=str(own_adapter)), AdapterError)
    assert text.startswith(f"{own_adapter / WEIGHTS} is damaged (")
    assert text.endswith("). Save the adapter anew.")


def test_pickled_adapter_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    (own_adapter / WEIGHTS).rename(own_adapter / "adapter_model.bin")
    assert refused(lambda: make_lm(peft=str(own_adapter)), AdapterError) == (
        f"{own_adapter / 'adapter_model.bin'} is pickled, and unpickling runs code. "
        f"Convert it to {WEIGHTS}."
    )


def test_adapter_with_a_broken_tokenizer_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path
) -> None:
    (own_adapter / "tokenizer.json").write_text("{")
    text = refused(lambda: make_lm(peft=str(own_adapter)), HarnessError)
    assert str(own_adapter) in text


def another_base(tiny_llama: Path, folder: Path, change: Callable[[LlamaForCausalLM], None]) -> str:
    """A model folder that differs from the recorded base in some weights."""
    shutil.copytree(tiny_llama, folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "layer", ["model.embed_tokens", "model.norm", "model.layers.1.self_attn.q_proj", "lm_head"]
)
def test_base_with_other_weights_is_refused(
    make_lm: Callable[..., QloraAdapterLM],
    adapter: Path,
    tiny_llama: Path,
    tmp_path: Path,
    layer: str,
) -> None:
    """Of a base with a merged adapter, for example, only linear layers differ."""
    base = another_base(
        tiny_llama, tmp_path / "other", lambda model: model.get_submodule(layer).weight.mul_(2)
    )
    assert refused(lambda: make_lm(peft=str(adapter), pretrained=base), AdapterError) == (
        f"pretrained={base} is not the base model that peft={adapter} was trained on "
        f"({tiny_llama}, revision None): its weights differ. "
        "Give the recorded base, or leave pretrained= out."
    )


def test_copy_of_the_base_elsewhere_is_accepted_in_every_quantisation(
    make_lm: Callable[..., QloraAdapterLM], adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    base = str(shutil.copytree(tiny_llama, tmp_path / "copy"))
    for quant in ("nf4", "fp4", "bf16"):
        for dtype in ("float32", "bfloat16"):
            make_lm(peft=str(adapter), pretrained=base, quant=quant, dtype=dtype)


def test_base_beside_other_weight_files_is_accepted(
    make_lm: Callable[..., QloraAdapterLM], adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """A whole download of a Hub repository may hold weights that transformers never reads."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "download"))
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, base / "consolidated.safetensors")
    make_lm(peft=str(adapter), pretrained=str(base))


def test_foreign_adapter_is_scored_once_base_and_quantisation_are_given(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path, tiny_llama: Path
) -> None:
    expected = score(make_lm(peft=str(own_adapter)), demo_prompts(1))
    (own_adapter / "qlora_harness.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own_adapter / name).unlink()
    text = refused(lambda: make_lm(peft=str(own_adapter)), SettingsError)
    assert text.endswith("Give pretrained= and quant= in --model_args.")
    lm = make_lm(peft=str(own_adapter), pretrained=str(tiny_llama), quant="nf4")
    assert score(lm, demo_prompts(1)) == pytest.approx(expected, abs=1e-6)


def spaced_letters_tokenizer(folder: Path) -> None:
    """Takes the merges of " A" … " D" from a tokenizer, so that each is two tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert len(content["model"]["merges"]) == 4
    content["model"]["merges"] = []
    path.write_text(json.dumps(content), encoding="utf-8")


def test_tokenizer_with_several_tokens_for_an_answer_is_refused(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager, tiny_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "spaced"
    shutil.copytree(tiny_llama, base)
    spaced_letters_tokenizer(base)
    lm = make_lm(pretrained=str(base))
    assert refused(lambda: evaluate(lm, manager, limit=1), SettingsError) == (
        f"the tokenizer of {base} makes 2 tokens of ' A' after 'Answer:'. "
        "These tasks need a tokenizer for which each answer is one token."
    )
    assert math.isfinite(sum(score(lm, ["another task"])))


def test_tokenizer_with_more_tokens_than_the_base_is_refused(
    make_lm: Callable[..., QloraAdapterLM], own_adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(own_adapter)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(own_adapter)
    text = refused(lambda: make_lm(peft=str(own_adapter)), AdapterError)
    assert text == (
        f"the tokenizer beside peft={own_adapter} has 359 tokens, the base model 358. "
        "This adapter was trained with added tokens, which are not supported."
    )
    base = tmp_path / "padded"
    shutil.copytree(tiny_llama, base)
    tokenizer.save_pretrained(base)
    text = refused(lambda: make_lm(pretrained=str(base)), HarnessError)
    assert str(base) in text
    assert "adapter" not in text


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_chat_template_is_refused_for_our_tasks(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    has_template: bool,
    tracked: bool,
) -> None:
    """LLaMA 2's tokenizer has no template; only the command line has a tracker."""
    lm = make_lm()
    if has_template:
        lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    tracker = EvaluationTracker() if tracked else None

    def asked() -> None:
        evaluate(lm, manager, limit=1, apply_chat_template=True, evaluation_tracker=tracker)

    text = refused(asked, SettingsError)
    assert text.startswith("--apply_chat_template with ")
    if has_template:
        assert text == (
            "--apply_chat_template with an mmlu_qlora task. "
            "Leave it out: these prompts are scored verbatim, as QLoRA does."
        )


def test_system_instruction_is_refused_for_our_tasks(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager
) -> None:
    lm = make_lm()
    text = refused(
        lambda: evaluate(lm, manager, limit=1, system_instruction="You are a pirate."),
        SettingsError,
    )
    assert "--system_instruction" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"load_in_4bit": True},
            "--model_args load_in_4bit= is not supported by qlora_adapter. Use quant=nf4.",
        ),
        (
            {"load_in_8bit": True},
            "--model_args load_in_8bit= is not supported by qlora_adapter. "
            "Use quant=nf4 or quant=bf16.",
        ),
        (
            {"token": "hf_secret"},
            "--model_args token= is not supported by qlora_adapter. "
            "Log in with `hf auth login`; a token here would land in the results.",
        ),
        (
            {"trust_remote_code": True},
            "--model_args trust_remote_code= is not supported by qlora_adapter. "
            "Use a model that needs no code of its own.",
        ),
        (
            {"delta": "x/y"},
            "--model_args delta= is not supported by qlora_adapter. Use peft=.",
        ),
        (
            {"quant": "int8"},
            "--model_args quant=int8. Use one of nf4, fp4, bf16.",
        ),
        (
            {"dtype": "float16"},
            "--model_args dtype=float16. Use bfloat16 or float32.",
        ),
    ],
)
def test_arguments_that_would_bypass_this_model_are_refused(
    make_lm: Callable[..., QloraAdapterLM], arguments: dict[str, Any], message: str
) -> None:
    assert refused(lambda: make_lm(**arguments), SettingsError) == message


@pytest.mark.parametrize(
    "arguments",
    [
        {"qaunt": "nf4"},
        {"bits": 4},
        {"adapter": "results/4bit/adapter"},
        {"tokenizer": "x/y"},
        {"softmax_dtype": "float33"},
        {"mixed_precision_dtype": "float16"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_unknown_or_unusable_argument_is_named(
    make_lm: Callable[..., QloraAdapterLM], arguments: dict[str, Any]
) -> None:
    (name,) = arguments
    assert f"--model_args {name}=" in refused(lambda: make_lm(**arguments), SettingsError)


def test_harmless_arguments_of_hflm_are_taken(make_lm: Callable[..., QloraAdapterLM]) -> None:
    lm = make_lm(max_length=100, trust_remote_code=False, load_in_4bit=False, max_batch_size=8)
    assert lm.max_length == 100


def test_without_a_run_it_says_so(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(lambda: make_lm(pretrained=None), SettingsError) == (
        "--model qlora_adapter: no completed run lies under results/. "
        "Train one, or give peft= or pretrained= in --model_args."
    )


@pytest.mark.parametrize("name", ["/no/such/model", "no-such/model"])
def test_missing_base_is_named_by_its_argument(
    make_lm: Callable[..., QloraAdapterLM], name: str
) -> None:
    text = refused(lambda: make_lm(pretrained=name), ModelError)
    assert name in text
    assert "pretrained=" in text  # there is no --model here that names a base


def test_base_without_readable_weights_is_named(
    make_lm: Callable[..., QloraAdapterLM], tiny_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "damaged"
    shutil.copytree(tiny_llama, base)
    (base / "model.safetensors").write_bytes(b"12345678")
    assert str(base) in refused(lambda: make_lm(pretrained=str(base)), ModelError)


def test_tokenizer_that_adds_no_bos_is_scored_without(
    make_lm: Callable[..., QloraAdapterLM], tiny_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "no-bos"
    shutil.copytree(tiny_llama, base)
    write_tokenizer(base, adds_bos=False)
    lm = make_lm(pretrained=str(base))
    assert lm.tok_encode("Answer:")[0] != BOS
    assert lm.get_model_info()["leading_bos"] == []


def test_bos_that_was_asked_for_is_recorded(make_lm: Callable[..., QloraAdapterLM]) -> None:
    lm = make_lm(add_bos_token=False)
    assert lm.tok_encode("Answer:")[0] != BOS
    assert lm.get_model_info()["leading_bos"] == []


# Interrupted and continued


def test_interrupted_run_scores_only_what_is_missing(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from qlora_harness.score.packed_forward import PackedModel

    start_pack = PackedModel.start
    packs: list[int] = []

    def counted(self: PackedModel, pack: Any, pad_to: int | None = None) -> Any:
        if len(packs) == stop_after:
            raise KeyboardInterrupt
        packs.append(len(pack.read_query))
        return start_pack(self, pack, pad_to)

    monkeypatch.setattr(PackedModel, "start", counted)
    options = {"pack_tokens": 1024, "results_dir": str(tmp_path / "killed")}
    stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(make_lm(**options), manager, limit=3)
    assert not (tmp_path / "killed" / "evaluation_results.json").exists()
    done = sum(packs)
    assert 0 < done < 96

    packs.clear()
    stop_after = -1
    evaluate(make_lm(**options), manager, limit=3)
    assert sum(packs) == 96 - done
    assert f"{done} texts were scored before the interruption" in caplog.messages
    assert not list((tmp_path / "killed").glob(".*"))  # the journal is gone once all is recorded

    evaluate(make_lm(pack_tokens=1024), manager, limit=3)
    name = "mmlu_progress_tiny_llama_16bit_base.json"
    for field in ("tasks", "model"):
        assert read(tmp_path / "killed", name)[field] == read(tmp_path / "records", name)[field]

    # Another model is never given these answers.
    packs.clear()
    stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(make_lm(**options), manager, limit=3)
    packs.clear()
    stop_after = -1
    evaluate(make_lm(**options, quant="nf4"), manager, limit=3)
    assert sum(packs) == 96


def test_sample_is_verified_through_the_plain_path(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lm = make_lm(verify=5)
    evaluate(lm, manager, limit=1)
    assert lm.largest_difference < 1e-4
    assert any(m.startswith("verified: 5 texts scored again") for m in caplog.messages)


def test_architecture_that_cannot_be_packed_goes_the_plain_way(
    make_lm: Callable[..., QloraAdapterLM],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from qlora_harness.score import adapter_lm

    prompts = demo_prompts(2)
    expected = score(make_lm(), prompts)
    monkeypatch.setattr(adapter_lm, "why_unsupported", lambda config: "it is odd")
    assert score(make_lm(), prompts) == pytest.approx(expected, abs=1e-5)
    assert "scored through HFLM's own path: it is odd" in caplog.messages


# Kernels that are built while texts are encoded


@pytest.mark.parametrize(
    ("device", "contexts", "processes", "expected"),
    [
        ("cuda", 32, 1, [512]),
        ("cuda", 31, 1, []),  # may be one short pack
        ("cuda", 0, 1, []),
        ("cuda", 32, 2, []),  # the length is agreed on later
        ("cpu", 32, 1, []),  # nothing is built
    ],
)
def test_kernels_are_built_ahead_for_many_texts_on_a_gpu(
    make_lm: Callable[..., QloraAdapterLM],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    contexts: int,
    processes: int,
    expected: list[int],
) -> None:
    lm = make_lm(pack_tokens=512)
    built: list[int] = []
    monkeypatch.setattr(PackedModel, "build_ahead", lambda self, size: built.append(size))
    monkeypatch.setattr(lm, "_device", torch.device(device))
    monkeypatch.setattr(lm, "_world_size", processes)
    lm._build_kernels_ahead([(f"text {n}", k) for n in range(contexts) for k in (" A", " B")])
    assert built == expected
    assert (lm._ahead is not None) is bool(expected)


def test_scoring_waits_for_kernels_also_after_an_error(
    make_lm: Callable[..., QloraAdapterLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    ahead = PackedModel(lm.model, torch.float32)
    waited: list[bool] = []
    monkeypatch.setattr(ahead, "wait", lambda: waited.append(True))
    monkeypatch.setattr(
        lm, "_build_kernels_ahead", lambda wanted: setattr(lm, "_ahead", (ahead, 8))
    )

    def fail(lm: Any, pairs: Any) -> None:
        raise KeyError("encoding")

    monkeypatch.setattr("qlora_harness.score.adapter_lm.encode_pairs", fail)
    with pytest.raises(KeyError, match="encoding"):
        lm._score_pairs([("a", " b")], None, True)
    assert waited == [True]
    assert lm._ahead is None


def test_model_that_was_begun_ahead_is_the_one_that_scores(
    make_lm: Callable[..., QloraAdapterLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    pairs = [("The sky is", " blue"), ("The sky is", " green"), ("Grass", " grows")]
    expected = lm._score_pairs(pairs, None, True)
    sizes: list[int] = []
    ahead = PackedModel(lm.model, torch.float32)

    def begin(wanted: Any) -> None:
        lm._ahead = ahead, 300
        ahead.build_ahead(300)

    start = PackedModel._start

    def noted(self: PackedModel, pack: Any, pad_to: int | None) -> Any:
        assert self is ahead
        sizes.append(max(len(pack.tokens), pad_to or 0))
        return start(self, pack, pad_to)

    monkeypatch.setattr(lm, "_build_kernels_ahead", begin)
    monkeypatch.setattr(PackedModel, "_start", noted)
    assert lm._score_pairs(pairs, None, True) == expected
    assert sizes[0] == 300
    assert len(sizes) == 2
    assert lm._ahead is None


# Through fused layers, and through transformers' own modules


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize(
    ("quant", "dequantize"), [("bf16", "auto"), ("nf4", "auto"), ("nf4", "never")]
)
def test_fused_layers_give_the_numbers_of_the_models_own_modules(
    make_lm: Callable[..., QloraAdapterLM],
    adapter: Path,
    quant: str,
    dequantize: str,
    with_adapter: bool,
) -> None:
    prompts = demo_prompts(3)
    options = {"quant": quant, "dequantize": dequantize}
    options |= {"peft": str(adapter)} if with_adapter else {}
    own, fused = make_lm(**options, kernels="none"), make_lm(**options)
    assert [lm._settings_record()["fused_kernels"] for lm in (own, fused)] == [False, True]
    expected = score(own, prompts)
    info, identity = fused.get_model_info(), fused._identity()
    assert score(fused, prompts) == pytest.approx(expected, abs=1e-5)
    assert fused.get_model_info() == info
    assert fused._identity() == identity
    # HFLM's own path over the same weights.
    fused._scoring = "hf"
    assert score(fused, prompts) == pytest.approx(expected, abs=1e-5)


def test_weights_are_moved_once(make_lm: Callable[..., QloraAdapterLM], adapter: Path) -> None:
    lm = make_lm(peft=str(adapter))
    prompts = demo_prompts(2)
    weight = lm.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    before = weight.data_ptr()
    first = score(lm, prompts)
    moved = weight.data_ptr()
    assert moved != before
    assert score(lm, prompts) == first
    assert weight.data_ptr() == moved


@pytest.mark.parametrize("options", [{"kernels": "none"}, {"scoring": "hf"}])
def test_weights_stay_where_nothing_is_fused(
    make_lm: Callable[..., QloraAdapterLM], options: dict[str, str]
) -> None:
    lm = make_lm(**options)
    before = [p.data_ptr() for p in lm.model.parameters()]
    score(lm, demo_prompts(1))
    assert [p.data_ptr() for p in lm.model.parameters()] == before
    assert lm._settings_record()["fused_kernels"] is False

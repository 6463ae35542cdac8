"""Batch encoding against the plain rule of lm-eval, pair by pair."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM

from qlora_harness.score import encoding
from qlora_harness.score.encoding import encode_pairs

TEXT = st.text(st.sampled_from("ab Z:é\n▁Ġ5?<s>"), max_size=12)
CONTINUATION = st.text(st.sampled_from("ab Z:é\n5"), min_size=1, max_size=6)


def lm_with(tokenizer: Any, add_bos_token: bool | None = None) -> Any:
    """As much of an HFLM as encoding needs; the methods are lm-eval's own."""
    lm = SimpleNamespace(tokenizer=tokenizer, add_bos_token=add_bos_token, backend="causal")
    bos = tokenizer.bos_token_id
    lm.prefix_token_id = bos if bos is not None else tokenizer.eos_token_id
    lm.tok_encode = lambda text, **options: HFLM.tok_encode(lm, text, **options)
    lm._encode_pair = lambda *pair: HFLM._encode_pair(lm, *pair)
    return lm


def plain(lm: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """TemplateLM.loglikelihood's rule."""
    if context:
        pair: tuple[list[int], list[int]] = lm._encode_pair(context, continuation)
        return pair
    ids = lm.tok_encode(continuation, add_special_tokens=False)
    prefix = lm.prefix_token_id
    return ([prefix], ids) if prefix != ids[0] else (ids[:1], ids[1:])


@pytest.fixture(scope="module", params=["tiny", "smollm2", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from qlora_harness.model.source import find_base, load_tokenizer

    if request.param == "tiny":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("tiny_tokenizer"))
    if request.param == "smollm2":
        return load_tokenizer(find_base(request.getfixturevalue("smollm2")))
    folder: Path = request.getfixturevalue("shared_data")
    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer-llama2")


@pytest.mark.parametrize("add_bos_token", [None, False])
@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(TEXT, CONTINUATION), min_size=1, max_size=12))
def test_batch_equals_pair_by_pair(
    tokenizer: Any, add_bos_token: bool | None, pairs: list[tuple[str, str]]
) -> None:
    lm = lm_with(tokenizer, add_bos_token)
    # lm-eval itself asserts that a context is left when its trailing spaces have moved.
    pairs = [(c, k) for c, k in pairs if not c or c.strip()]
    if pairs:
        assert encode_pairs(lm, pairs) == [plain(lm, *pair) for pair in pairs]


def test_real_prompts_and_letters(tokenizer: Any, shared_data: Path) -> None:
    from qlora_harness.score.mmlu_files import load_questions

    lm = lm_with(tokenizer)
    questions = load_questions("five_shot_mmlu_val.json", str(shared_data / "mmlu"))[::60]
    pairs = [(q.prompt, f" {letter}") for q in questions for letter in "ABCD"]
    assert encode_pairs(lm, pairs) == [plain(lm, *pair) for pair in pairs]


@given(
    st.text(st.sampled_from("ab \n"), max_size=60), st.text(st.sampled_from("ab \n"), max_size=60)
)
def test_a_known_head_changes_no_piece(first: str, second: str) -> None:
    """Each pair shares its first paragraphs, which are cut once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_PIECE", 5)
        heads: dict[str, encoding._Cut] = {}
        for text in (f"{first}\n\n{second}", f"{first}\n\nab {second}", first):
            cut = encoding._cut(text, heads)
            alone = encoding._cut_from(text, "", 0).pieces
            assert [*heads[cut.head].pieces[:-1], *cut.pieces] == alone
            assert "".join(piece for _, piece in alone) == text

"""Conversations to token ids and labels, with every id worked out by hand.

`tiny_tokenizer` (conftest.py) gives one token a character and, like LLaMA's, a space before a text
that it sees alone; `token_ids` says what it must give, without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import BOS, EOS, token_ids, write_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_harness.data.chat import (
    IGNORE,
    TEMPLATES,
    ChatEncoder,
    Example,
    chat_template,
    fingerprint,
    leading_bos,
    show,
)
from qlora_harness.data.conversation import Conversation, Turn
from qlora_harness.data.oasst1 import build_conversations
from qlora_harness.data.sources import read_rows
from qlora_harness.errors import SettingsError
from qlora_harness.model.base import find_base, load_tokenizer


def conversation(*texts: str, supervised: tuple[int, ...] | None = None) -> Conversation:
    """Returns alternating turns; all assistant turns are supervised unless given by number."""
    turns = []
    for place, text in enumerate(texts):
        assistant = place % 2 == 1
        learned = assistant and (supervised is None or place // 2 in supervised)
        turns.append(Turn("assistant" if assistant else "user", text, learned))
    return Conversation("tree", tuple(turns))


def load(folder: Path | str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Any:
    return load(tiny_tokenizer)


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_bos=False))


def encoder(
    tokenizer: Any, template: str = "guanaco", length: int = 512, mask: str = "prompt"
) -> ChatEncoder:
    return ChatEncoder(tokenizer, template, length, mask)


# The two pieces of a guanaco exchange: what is only read, and what is learned.
def asked(text: str) -> list[int]:
    return token_ids(f" ### Human: {text}### Assistant:")


def learned(text: str) -> list[int]:
    return [*token_ids(f" {text}"), EOS]


def masked(ids: list[int]) -> list[int]:
    return [IGNORE] * len(ids)


# --- ids and labels -------------------------------------------------------------------------------


def test_one_exchange(tokenizer: Any) -> None:
    example = encoder(tokenizer).encode(conversation("Hi!", "A b"))
    # " A" of the reply is the single token that "Answer: A" ends with: id 354.
    assert asked("Hi!")[:6] == [259, 262, 262, 262, 259, 299]
    assert learned("A b") == [354, 259, 325, 2]
    assert example == Example(
        [BOS, *asked("Hi!"), *learned("A b")],
        [IGNORE, *masked(asked("Hi!")), *learned("A b")],
        truncated=False,
    )
    assert example.supervised_tokens == 4


def test_several_exchanges_have_one_bos_and_an_eos_after_each_reply(tokenizer: Any) -> None:
    example = encoder(tokenizer).encode(conversation("q", "r", "s", "t"))
    assert example is not None
    assert example.input_ids == [BOS, *asked("q"), *learned("r"), *asked("s"), *learned("t")]
    assert example.labels == [
        IGNORE,
        *masked(asked("q")),
        *learned("r"),
        *masked(asked("s")),
        *learned("t"),
    ]
    assert example.input_ids.count(BOS) == 1
    assert example.input_ids.count(EOS) == example.labels.count(EOS) == 2


def test_only_supervised_turns_are_learned(tokenizer: Any) -> None:
    example = encoder(tokenizer).encode(conversation("q", "r", "s", "t", supervised=(1,)))
    assert example is not None
    assert example.input_ids == [BOS, *asked("q"), *learned("r"), *asked("s"), *learned("t")]
    before = [BOS, *asked("q"), *learned("r"), *asked("s")]
    assert example.labels == [*masked(before), *learned("t")]


def test_mask_none_learns_everything_but_bos(tokenizer: Any) -> None:
    example = encoder(tokenizer, mask="none").encode(conversation("q", "r", supervised=()))
    assert example is not None
    assert example.labels == [IGNORE, *asked("q"), *learned("r")]
    assert example.labels[1:] == example.input_ids[1:]
    assert example.supervised_tokens == len(example.input_ids) - 1


def test_bos_stands_only_where_the_tokenizer_itself_puts_it(
    tokenizer: Any, without_bos: Any
) -> None:
    assert leading_bos(tokenizer) == [BOS]
    assert without_bos.bos_token_id == BOS
    assert leading_bos(without_bos) == []
    example = encoder(without_bos).encode(conversation("q", "r"))
    assert example is not None
    assert example.input_ids == [*asked("q"), *learned("r")]
    assert example.labels == [*masked(asked("q")), *learned("r")]


def test_first_token_of_a_row_is_never_predicted(without_bos: Any) -> None:
    example = encoder(without_bos, mask="none").encode(conversation("q", "r"))
    assert example is not None
    assert example.labels == example.input_ids
    assert example.supervised_tokens == len(example.input_ids) - 1


@pytest.mark.parametrize("text", ["</s>", "a</s>b", "<s>", "<unk> </s>"])
def test_special_tokens_typed_by_people_stay_text(tokenizer: Any, text: str) -> None:
    example = encoder(tokenizer).encode(conversation(text, text))
    assert example is not None
    assert example.input_ids == [BOS, *asked(text), *learned(text)]
    assert example.input_ids.count(EOS) == 1
    assert example.input_ids.count(BOS) == 1


def test_template_typed_by_a_user_does_not_start_a_learned_part(tokenizer: Any) -> None:
    text = "x### Assistant: fake### Human: y"
    example = encoder(tokenizer).encode(conversation(text, "r"))
    assert example is not None
    assert example.labels == [IGNORE, *masked(asked(text)), *learned("r")]


@pytest.mark.parametrize("text", ["é 漢\n\n", " two  spaces ", "\n", "Ärger 🙂"])
def test_text_is_kept_verbatim(tokenizer: Any, text: str) -> None:
    example = encoder(tokenizer).encode(conversation(text, text))
    assert example is not None
    assert example.input_ids == [BOS, *asked(text), *learned(text)]
    whole = f"<s> ### Human: {text}### Assistant: {text}</s>"
    assert tokenizer.decode(example.input_ids, skip_special_tokens=False) == whole


# --- templates ------------------------------------------------------------------------------------


def test_alpaca_template(tokenizer: Any) -> None:
    example = encoder(tokenizer, "alpaca").encode(conversation("q", "r"))
    prompt = token_ids(" ### Instruction:\nq\n\n### Response:\n")
    reply = [*token_ids("r"), EOS]
    assert example == Example(
        [BOS, *prompt, *reply], [IGNORE, *masked(prompt), *reply], truncated=False
    )


def test_chatml_is_refused_where_its_tokens_are_missing(tokenizer: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        encoder(tokenizer, "chatml")
    assert str(caught.value) == (
        "--template chatml needs the token '<|im_start|>', which this model's tokenizer does not "
        "have. Use --template guanaco; tokens are never added to the vocabulary."
    )


def test_chatml_with_smollm2(smollm2: str) -> None:
    from qlora_harness.model.base import find_base, load_tokenizer

    tok = load_tokenizer(find_base(smollm2))
    start, end = tok.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def ids(text: str) -> list[int]:
        return list(tok.encode(text, split_special_tokens=True))

    example = encoder(tok, "chatml").encode(conversation("<|im_end|>", "Yes"))
    prompt = [
        start, *ids("user\n"), *ids("<|im_end|>"), end, *ids("\n"), start, *ids("assistant\n")
    ]  # fmt: skip
    reply = [*ids("Yes"), end]
    assert example == Example([*prompt, *reply], [*masked(prompt), *reply], truncated=False)
    assert len(ids("<|im_end|>")) > 1


def test_chatml_is_the_text_of_the_models_own_chat_template(smollm2: str) -> None:
    """Two exchanges as SmolLM2-Instruct and Qwen write them: a line break after each end."""
    from qlora_harness.model.base import find_base, load_tokenizer

    tok = load_tokenizer(find_base(smollm2))
    example = encoder(tok, "chatml").encode(conversation("a", "b", "c", "d"))
    assert example is not None
    text = tok.decode(example.input_ids, skip_special_tokens=False)
    assert text.rstrip("\n") == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
    )


def test_smollm2_has_no_bos_before_a_text(smollm2: str) -> None:
    from qlora_harness.model.base import find_base, load_tokenizer

    tok = load_tokenizer(find_base(smollm2))
    assert tok.bos_token_id is not None
    assert leading_bos(tok) == []
    example = encoder(tok).encode(conversation("Hi", "Yes"))
    assert example is not None
    prompt = list(tok.encode("### Human: Hi### Assistant:"))
    reply = [*tok.encode(" Yes"), tok.eos_token_id]
    assert example.input_ids == [*prompt, *reply]
    assert example.labels == [*masked(prompt), *reply]


def test_tokenizer_without_an_end_token_is_refused(tiny_tokenizer: Path) -> None:
    tok = load(tiny_tokenizer)
    tok.eos_token = None
    with pytest.raises(SettingsError, match="no end-of-sequence token"):
        encoder(tok)


@pytest.mark.parametrize("template", ["guanaco", "alpaca"])
def test_nothing_is_added_to_the_vocabulary(tiny_tokenizer: Path, template: str) -> None:
    tok = load(tiny_tokenizer)
    before = (len(tok), tok.get_vocab(), tok.pad_token_id)
    example = encoder(tok, template).encode(conversation("q</s>", "r"))
    assert example is not None
    assert max(example.input_ids) < before[0]
    assert (len(tok), tok.get_vocab(), tok.pad_token_id) == before
    # Nor is its behaviour changed for whoever uses it next.
    assert tok.encode("</s>")[-1] == EOS


def test_every_template_is_a_choice_of_the_settings() -> None:
    from qlora_harness.settings import setting_fields

    assert set(TEMPLATES) == set(setting_fields()["template"][1].metadata["choices"])


# --- truncation -----------------------------------------------------------------------------------

FIRST, SECOND = [*asked("q"), *learned("rr")], [*asked("s"), *learned("t")]
PAIR = conversation("q", "rr", "s", "t")


@pytest.mark.parametrize(
    ("length", "kept"),
    [
        (1 + len(FIRST) + len(SECOND), FIRST + SECOND),
        # One token too many: the whole second exchange goes, not its last token.
        (len(FIRST) + len(SECOND), FIRST),
        (1 + len(FIRST), FIRST),
        # The first supervised turn is cut only when it alone is too long; its end goes first.
        (len(FIRST), FIRST[:-1]),
        (1 + len(asked("q")) + 1, FIRST[: len(asked("q")) + 1]),
    ],
)
def test_truncation_at_turn_borders(tokenizer: Any, length: int, kept: list[int]) -> None:
    example = encoder(tokenizer, length=length).encode(PAIR)
    assert example is not None
    assert example.input_ids == [BOS, *kept]
    assert example.labels[: 1 + len(asked("q"))] == masked([BOS, *asked("q")])
    assert (
        example.labels[1 + len(asked("q")) : 1 + len(FIRST)] == kept[len(asked("q")) : len(FIRST)]
    )
    assert example.truncated is (kept != FIRST + SECOND)


def test_prompt_that_fills_the_length_leaves_nothing_to_learn(tokenizer: Any) -> None:
    length = 1 + len(asked("q"))
    assert encoder(tokenizer, length=length).encode(PAIR) is None
    assert encoder(tokenizer, length=8).encode(PAIR) is None


def test_last_exchange_is_kept_where_only_it_is_learned(tokenizer: Any) -> None:
    last_only = conversation("q", "rr", "s", "t", "u", "v", supervised=(2,))
    third = [*asked("u"), *learned("v")]
    room = 1 + len(SECOND) + len(third)
    whole = encoder(tokenizer, length=room + len(FIRST)).encode(last_only)
    assert whole is not None
    assert not whole.truncated
    for length, kept in ((room, SECOND), (room - 1, []), (1 + len(third), [])):
        example = encoder(tokenizer, length=length).encode(last_only)
        assert example is not None
        assert example.truncated
        assert example.input_ids == [BOS, *kept, *third]
        assert example.labels == [*masked([BOS, *kept, *asked("u")]), *learned("v")]


def test_learned_exchange_in_the_middle_is_kept(tokenizer: Any) -> None:
    middle = conversation("q", "rr", "s", "t", "u", "v", supervised=(1,))
    example = encoder(tokenizer, length=1 + len(SECOND)).encode(middle)
    assert example is not None
    assert example.input_ids == [BOS, *SECOND]
    assert example.labels == [*masked([BOS, *asked("s")]), *learned("t")]


def test_cut_and_dropped_conversations_are_counted(tokenizer: Any) -> None:
    short = conversation("q", "r")
    too_long = conversation("x" * 100, "r")
    encoded = encoder(tokenizer, length=59).encode_all([short, too_long, PAIR, short])
    assert (len(encoded.examples), encoded.dropped, encoded.truncated) == (3, 1, 1)
    assert [len(e.input_ids) for e in encoded.examples] == [
        1 + len(asked("q")) + len(learned("r")),
        1 + len(FIRST),
        1 + len(asked("q")) + len(learned("r")),
    ]


def test_turns_are_those_that_are_left_in_the_examples(tokenizer: Any) -> None:
    encoded = encoder(tokenizer, length=59).encode_all([conversation("q", "r"), PAIR])
    assert encoded.truncated == 1
    assert encoded.turns == 4


# --- fingerprint and show -------------------------------------------------------------------------


def test_fingerprint_changes_exactly_when_what_is_learned_changes(tokenizer: Any) -> None:
    base = [Example([1, 2, 3], [-100, 2, 3]), Example([4, 5], [-100, 5])]
    same = [Example([1, 2, 3], [-100, 2, 3], truncated=True), Example([4, 5], [-100, 5])]
    assert fingerprint(base) == fingerprint(same)
    # sha256 over lengths, ids and labels as 32-bit little-endian integers.
    assert fingerprint([]) == (
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )
    others = [
        [Example([1, 2, 9], [-100, 2, 9]), base[1]],
        [Example([1, 2, 3], [-100, -100, 3]), base[1]],
        [base[1], base[0]],
        [base[0]],
        [Example([1, 2, 3, 4, 5], [-100, 2, 3, -100, 5])],
        [Example([1, 2], [-100, 2]), Example([3, 4, 5], [3, -100, 5])],
    ]
    prints = [fingerprint(base), *map(fingerprint, others)]
    assert len(set(prints)) == len(prints)


def test_show_marks_what_is_learned(tokenizer: Any) -> None:
    example = encoder(tokenizer).encode(conversation("q", "r", "s", "t", supervised=(1,)))
    assert example is not None
    # The decoder of LLaMA's tokenizer strips the space before each piece that it sees.
    text = show(example, tokenizer)
    assert text == "<s> ### Human: q### Assistant: r</s> ### Human: s### Assistant:⟦t</s>⟧"


def test_show_with_everything_learned(without_bos: Any) -> None:
    example = encoder(without_bos, mask="none").encode(conversation("q", "r"))
    assert example is not None
    assert show(example, without_bos) == "⟦### Human: q### Assistant: r</s>⟧"


# --- the real LLaMA tokenizer on real rows --------------------------------------------------------


@pytest.fixture(scope="module")
def llama(shared_data: Path) -> Any:
    return load(shared_data / "tokenizer-llama2")


@pytest.fixture(scope="module")
def english(shared_data: Path) -> list[Conversation]:
    rows = read_rows(shared_data / "oasst" / "oasst1_validation_best.jsonl")
    return build_conversations(rows).conversations


def test_llama_golden_ids(llama: Any, english: list[Conversation]) -> None:
    short = next(c for c in english if c.turns[0].text == "can you write code?")
    assert short.turns[1].text == (
        "Yes, I can write code. What programming language or task do you need help with?"
    )
    # fmt: off
    prompt = [
        835, 12968, 29901,  # ▁### ▁Human :
        508, 366, 2436, 775, 29973,  # ▁can ▁you ▁write ▁code ?
        2277, 29937, 4007, 22137, 29901,  # ## # ▁Ass istant :
    ]
    reply = [
        3869, 29892, 306, 508, 2436, 775, 29889,  # ▁Yes , ▁I ▁can ▁write ▁code .
        1724, 8720, 4086, 470, 3414,  # ▁What ▁programming ▁language ▁or ▁task
        437, 366, 817, 1371, 411, 29973,  # ▁do ▁you ▁need ▁help ▁with ?
        2,  # </s>
    ]
    # fmt: on
    example = encoder(llama).encode(short)
    assert example == Example([1, *prompt, *reply], [*masked([1, *prompt]), *reply])
    assert list(llama("### Human: can you write code?### Assistant:").input_ids) == [1, *prompt]


def test_llama_ids_are_those_of_the_whole_text(llama: Any, english: list[Conversation]) -> None:
    """Turn by turn or in one go: the ids are the same, so generating meets what was learned."""
    chat = encoder(llama, length=100_000)
    for item in english[:100]:
        example = chat.encode(item)
        assert example is not None
        pairs = zip(item.turns[::2], item.turns[1::2], strict=True)
        text = "</s>".join(f"### Human: {u.text}### Assistant: {a.text}" for u, a in pairs)
        assert example.input_ids == [*llama.encode(text), EOS]


def test_llama_report_of_the_english_half(llama: Any, english: list[Conversation]) -> None:
    encoded = encoder(llama).encode_all(english)
    assert (len(english), len(encoded.examples), encoded.dropped) == (338, 336, 2)
    assert encoded.truncated == 86
    assert max(len(e.input_ids) for e in encoded.examples) == 512
    assert all(e.input_ids[0] == 1 and e.input_ids.count(1) == 1 for e in encoded.examples)
    assert all(e.supervised_tokens > 0 for e in encoded.examples)
    assert len(llama) == 32000


# --- the template as the saved tokenizer has it ---------------------------------------------------


def as_messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in conversation.turns]


def check_chat_template(tokenizer: Any, template: str, conversation: Conversation) -> None:
    example = ChatEncoder(tokenizer, template, 10_000, "prompt").encode(conversation)
    assert example is not None
    tokenizer.chat_template = chat_template(template, tokenizer)
    messages = as_messages(conversation)
    applied = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert list(applied["input_ids"]) == example.input_ids
    learned = [label != IGNORE for label in example.labels]
    assert [bool(mark) for mark in applied["assistant_masks"]] == learned
    last = len(learned) - learned[::-1].index(False)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], return_dict=True, add_generation_prompt=True
    )
    assert list(prompt["input_ids"]) == example.input_ids[:last]


TALK = Conversation(
    "t",
    (
        Turn("user", "Hi 'there'", False),
        Turn("assistant", 'Hello! "How"\nare you?', True),
        Turn("user", "2+2\\3? é", False),
        Turn("assistant", "It is {{ 4 }}.", True),
    ),
)


@pytest.mark.parametrize("template", ["guanaco", "alpaca"])
def test_chat_template_gives_the_training_ids(tiny_tokenizer: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    check_chat_template(tokenizer, template, TALK)
    with pytest.raises(Exception, match="user and assistant turns, not on system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_template_gives_the_training_ids_of_smollm2(smollm2: str, template: str) -> None:
    check_chat_template(load_tokenizer(find_base(smollm2)), template, TALK)


def test_chat_template_gives_the_training_ids_of_real_conversations(shared_data: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared_data / "tokenizer-llama2")
    rows = read_rows(shared_data / "oasst" / "oasst1_validation_best.jsonl")
    for conversation in build_conversations(rows, ("en",)).conversations[:100]:
        check_chat_template(tokenizer, "guanaco", conversation)

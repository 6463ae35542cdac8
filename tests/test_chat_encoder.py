"""Conversations to token ids and labels, with every id worked out by hand.

`tiny_tokenizer` (conftest.py) gives one token a character and, like LLaMA's, a space before a text
that it sees alone; `token_ids` says what it must give, without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BOS, EOS, token_ids, write_tokenizer
from transformers import AutoTokenizer

from qlora_harness.data.chat_encoder import ChatEncoder
from qlora_harness.data.conversation import Conversation, Turn
from qlora_harness.data.examples import IGNORE, Example, fingerprint, show
from qlora_harness.data.files import read_rows
from qlora_harness.data.oasst1 import build_conversations, check_row
from qlora_harness.data.templates import TEMPLATES, chat_template
from qlora_harness.data.text_ids import leading_bos
from qlora_harness.errors import SettingsError
from qlora_harness.model.source import find_base, load_tokenizer
from qlora_harness.settings import setting_fields

Ids = list[int]


def conversation(*texts: str, supervised: tuple[int, ...] | None = None) -> Conversation:
    """Returns alternating turns; all assistant turns are supervised unless given by number."""
    turns = []
    for index, text in enumerate(texts):
        assistant = index % 2 == 1
        learned = assistant and (supervised is None or index // 2 in supervised)
        turns.append(Turn("assistant" if assistant else "user", text, learned))
    return Conversation("tree", tuple(turns))


def load(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Any:
    return load(tiny_tokenizer)


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_bos=False))


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: str) -> Any:
    return load_tokenizer(find_base(smollm2))


def encoder(
    tokenizer: Any, template: str = "guanaco", length: int = 512, mask: str = "prompt"
) -> ChatEncoder:
    return ChatEncoder(tokenizer, template, length, mask)


def encode(tokenizer: Any, item: Conversation, **options: Any) -> Example:
    example = encoder(tokenizer, **options).encode(item)
    assert example is not None
    return example


# The two pieces of a guanaco exchange: what is only read, and what is learned.
def prompt_ids(text: str) -> Ids:
    return token_ids(f" ### Human: {text}### Assistant:")


def reply_ids(text: str) -> Ids:
    return [*token_ids(f" {text}"), EOS]


def expected(*pieces: tuple[Ids, bool], truncated: bool = False) -> Example:
    """Returns an example of pieces of ids, each with whether it is learned."""
    return Example(
        [number for ids, _ in pieces for number in ids],
        [number if learned else IGNORE for ids, learned in pieces for number in ids],
        truncated,
    )


# --- ids and labels -------------------------------------------------------------------------------


def test_one_exchange(tokenizer: Any) -> None:
    # " A" of the reply is the single token that "Answer: A" ends with: id 354.
    assert prompt_ids("Hi!")[:6] == [259, 262, 262, 262, 259, 299]
    reply = [354, 259, 325, 2]
    example = encode(tokenizer, conversation("Hi!", "A b"))
    assert example == expected(([1, *prompt_ids("Hi!")], False), (reply, True))
    assert example.supervised_tokens == 4


@pytest.mark.parametrize("supervised", [(0, 1), (0,), (1,)])
def test_several_exchanges_have_one_bos_and_an_eos_after_each_reply(
    tokenizer: Any, supervised: tuple[int, ...]
) -> None:
    example = encode(tokenizer, conversation("q", "r", "s", "t", supervised=supervised))
    assert example == expected(
        ([BOS, *prompt_ids("q")], False),
        (reply_ids("r"), 0 in supervised),
        (prompt_ids("s"), False),
        (reply_ids("t"), 1 in supervised),
    )


def test_mask_none_learns_everything_but_bos(tokenizer: Any) -> None:
    example = encode(tokenizer, conversation("q", "r", supervised=()), mask="none")
    assert example == expected(([BOS], False), (prompt_ids("q") + reply_ids("r"), True))
    assert example.supervised_tokens == len(example.input_ids) - 1


def test_bos_stands_only_where_the_tokenizer_itself_puts_it(
    tokenizer: Any, without_bos: Any
) -> None:
    assert leading_bos(tokenizer) == [BOS]
    assert without_bos.bos_token_id == BOS
    assert leading_bos(without_bos) == []
    pair = conversation("q", "r")
    assert encode(without_bos, pair) == expected((prompt_ids("q"), False), (reply_ids("r"), True))
    # The first token of a row is never predicted.
    everything = encode(without_bos, pair, mask="none")
    assert everything.labels == everything.input_ids
    assert everything.supervised_tokens == len(everything.input_ids) - 1


@pytest.mark.parametrize(
    "text",
    [
        # Special tokens and templates typed by people are text; nothing is stripped.
        *["</s>", "a</s>b", "<s>", "<unk> </s>", "x### Assistant: fake### Human: y"],
        *["é 漢\n\n", " two  spaces ", "\n", "Ärger 🙂"],
    ],
)
def test_text_stays_verbatim(tokenizer: Any, text: str) -> None:
    example = encode(tokenizer, conversation(text, text))
    assert example == expected(([BOS, *prompt_ids(text)], False), (reply_ids(text), True))
    assert (example.input_ids.count(BOS), example.input_ids.count(EOS)) == (1, 1)
    whole = f"<s> ### Human: {text}### Assistant: {text}</s>"
    if "<" not in text:  # the decoder spaces special tokens out
        assert tokenizer.decode(example.input_ids, skip_special_tokens=False) == whole


# --- templates ------------------------------------------------------------------------------------


def test_alpaca_template(tokenizer: Any) -> None:
    prompt = token_ids(" ### Instruction:\nq\n\n### Response:\n")
    assert encode(tokenizer, conversation("q", "r"), template="alpaca") == expected(
        ([BOS, *prompt], False), ([*token_ids("r"), EOS], True)
    )


def test_chatml_with_smollm2(smollm2_tokenizer: Any) -> None:
    start, end = smollm2_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def ids(text: str) -> Ids:
        return list(smollm2_tokenizer.encode(text, split_special_tokens=True))

    assert len(ids("<|im_end|>")) > 1
    prompt = [
        start, *ids("user\n"), *ids("<|im_end|>"), end, *ids("\n"), start, *ids("assistant\n")
    ]  # fmt: skip
    example = encode(smollm2_tokenizer, conversation("<|im_end|>", "Yes"), template="chatml")
    assert example == expected((prompt, False), ([*ids("Yes"), end], True))
    # Two exchanges as SmolLM2-Instruct and Qwen write them: a line break after each end.
    example = encode(smollm2_tokenizer, conversation("a", "b", "c", "d"), template="chatml")
    text = smollm2_tokenizer.decode(example.input_ids, skip_special_tokens=False)
    assert text.rstrip("\n") == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
    )


def test_smollm2_has_no_bos_before_a_text(smollm2_tokenizer: Any) -> None:
    assert smollm2_tokenizer.bos_token_id is not None
    assert leading_bos(smollm2_tokenizer) == []
    prompt = list(smollm2_tokenizer.encode("### Human: Hi### Assistant:"))
    reply = [*smollm2_tokenizer.encode(" Yes"), smollm2_tokenizer.eos_token_id]
    assert encode(smollm2_tokenizer, conversation("Hi", "Yes")) == expected(
        (prompt, False), (reply, True)
    )


def test_tokenizers_without_the_tokens_of_a_template_are_refused(tiny_tokenizer: Path) -> None:
    tokenizer = load(tiny_tokenizer)
    with pytest.raises(SettingsError, match=r"--template chatml .*'<\|im_start\|>'.*guanaco"):
        encoder(tokenizer, "chatml")
    tokenizer.eos_token = None
    with pytest.raises(SettingsError, match="no end-of-sequence token"):
        encoder(tokenizer)


@pytest.mark.parametrize("template", ["guanaco", "alpaca"])
def test_nothing_is_added_to_the_vocabulary(tiny_tokenizer: Path, template: str) -> None:
    tokenizer = load(tiny_tokenizer)
    before = (len(tokenizer), tokenizer.get_vocab(), tokenizer.pad_token_id)
    example = encode(tokenizer, conversation("q</s>", "r"), template=template)
    assert max(example.input_ids) < before[0]
    assert (len(tokenizer), tokenizer.get_vocab(), tokenizer.pad_token_id) == before
    # Nor is its behaviour changed for whoever uses it next.
    assert tokenizer.encode("</s>")[-1] == EOS


def test_every_template_is_a_choice_of_the_settings() -> None:
    choices = setting_fields()["template"][1].metadata["choices"]
    assert {*TEMPLATES, "tokenizer", "none"} == set(choices)


# --- truncation -----------------------------------------------------------------------------------

PROMPT = prompt_ids("q")
FIRST, SECOND = [*PROMPT, *reply_ids("rr")], [*prompt_ids("s"), *reply_ids("t")]
THIRD = [*prompt_ids("u"), *reply_ids("v")]
PAIR = conversation("q", "rr", "s", "t")


@pytest.mark.parametrize(
    ("length", "remaining"),
    [
        (1 + len(FIRST) + len(SECOND), FIRST + SECOND),
        # One token too many: the whole second exchange goes, not its last token.
        (len(FIRST) + len(SECOND), FIRST),
        (1 + len(FIRST), FIRST),
        # The first supervised turn is cut only when it alone is too long; its end goes first.
        (len(FIRST), FIRST[:-1]),
        (1 + len(PROMPT) + 1, FIRST[: len(PROMPT) + 1]),
    ],
)
def test_truncation_at_turn_borders(tokenizer: Any, length: int, remaining: Ids) -> None:
    assert encode(tokenizer, PAIR, length=length) == expected(
        ([BOS, *PROMPT], False),
        (remaining[len(PROMPT) : len(FIRST)], True),
        (remaining[len(FIRST) :][: len(prompt_ids("s"))], False),
        (remaining[len(FIRST) :][len(prompt_ids("s")) :], True),
        truncated=remaining != FIRST + SECOND,
    )


@pytest.mark.parametrize("length", [1 + len(PROMPT), 8])
def test_prompt_that_fills_the_length_leaves_nothing_to_learn(tokenizer: Any, length: int) -> None:
    assert encoder(tokenizer, length=length).encode(PAIR) is None


@pytest.mark.parametrize(
    ("supervised", "length", "before", "last"),
    [
        (2, 1 + len(FIRST + SECOND + THIRD), FIRST + SECOND, ("u", "v")),
        (2, 1 + len(SECOND + THIRD), SECOND, ("u", "v")),
        (2, len(SECOND + THIRD), [], ("u", "v")),
        (2, 1 + len(THIRD), [], ("u", "v")),
        (1, 1 + len(SECOND), [], ("s", "t")),
    ],
)
def test_the_learned_exchange_stays_whichever_it_is(
    tokenizer: Any, supervised: int, length: int, before: Ids, last: tuple[str, str]
) -> None:
    three = conversation("q", "rr", "s", "t", "u", "v", supervised=(supervised,))
    assert encode(tokenizer, three, length=length) == expected(
        ([BOS, *before, *prompt_ids(last[0])], False),
        (reply_ids(last[1]), True),
        truncated=before != FIRST + SECOND,
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_exchanges_cut_from_the_front_leave_no_trace(smollm2_tokenizer: Any, template: str) -> None:
    exchanges = [
        (Turn("user", f"question {i}"), Turn("assistant", f"reply {i}", supervised=i == 2))
        for i in range(4)
    ]

    def encode(numbers: range, max_length: int) -> Example | None:
        turns = [turn for number in numbers for turn in exchanges[number]]
        encoder = ChatEncoder(smollm2_tokenizer, template, max_length, "prompt")
        return encoder.encode(Conversation("t", tuple(turns)))

    for first in (0, 1, 2):
        alone = encode(range(first, 3), 1000)
        assert alone is not None
        # chatml's line end between exchanges is counted before it is cut.
        cut = encode(range(4), len(alone.input_ids) + (template == "chatml" and first > 0))
        assert cut is not None
        assert (cut.input_ids, cut.labels) == (alone.input_ids, alone.labels)
        assert cut.turns == alone.turns


def test_cut_and_dropped_conversations_are_counted(tokenizer: Any) -> None:
    short, too_long = conversation("q", "r"), conversation("x" * 100, "r")
    encoded = encoder(tokenizer, length=59).encode_all([short, too_long, PAIR, short])
    whole = 1 + len(PROMPT) + len(reply_ids("r"))
    # The turns are those left in the examples.
    assert [e and (len(e.input_ids), e.truncated, e.turns) for e in encoded] == [
        *((whole, False, 2), None, (1 + len(FIRST), True, 2), (whole, False, 2))
    ]


# --- fingerprint and show -------------------------------------------------------------------------


def hashed(examples: list[Example]) -> str:
    return fingerprint((np.array(e.input_ids), np.array(e.labels)) for e in examples)


def test_fingerprint_changes_exactly_when_what_is_learned_changes() -> None:
    base = [Example([1, 2, 3], [-100, 2, 3]), Example([4, 5], [-100, 5])]
    same = [Example([1, 2, 3], [-100, 2, 3], truncated=True), base[1]]
    assert hashed(base) == hashed(same)
    # sha256 over lengths, ids and labels as 32-bit little-endian integers.
    assert hashed([]) == ("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    others = [
        [Example([1, 2, 9], [-100, 2, 9]), base[1]],
        [Example([1, 2, 3], [-100, -100, 3]), base[1]],
        [base[1], base[0]],
        [base[0]],
        [Example([1, 2, 3, 4, 5], [-100, 2, 3, -100, 5])],
        [Example([1, 2], [-100, 2]), Example([3, 4, 5], [3, -100, 5])],
    ]
    prints = [hashed(base), *map(hashed, others)]
    assert len(set(prints)) == len(prints)


def test_show_marks_what_is_learned(tokenizer: Any, without_bos: Any) -> None:
    example = encode(tokenizer, conversation("q", "r", "s", "t", supervised=(1,)))
    # The decoder of LLaMA's tokenizer strips the space before each piece that it sees.
    assert show(example, tokenizer) == (
        "<s> ### Human: q### Assistant: r</s> ### Human: s### Assistant:⟦t</s>⟧"
    )
    everything = encode(without_bos, conversation("q", "r"), mask="none")
    assert show(everything, without_bos) == "⟦### Human: q### Assistant: r</s>⟧"


# --- the real LLaMA tokenizer on real rows --------------------------------------------------------


@pytest.fixture(scope="module")
def llama(shared_data: Path) -> Any:
    return load(shared_data / "tokenizer-llama2")


@pytest.fixture(scope="module")
def english(shared_data: Path) -> list[Conversation]:
    file = shared_data / "oasst" / "oasst1_validation_best.jsonl"
    rows = (check_row(row.values, row.place) for row in read_rows(file))
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
    assert encode(llama, short) == expected(([1, *prompt], False), (reply, True))
    assert list(llama("### Human: can you write code?### Assistant:").input_ids) == [1, *prompt]


def test_llama_ids_are_those_of_the_whole_text(llama: Any, english: list[Conversation]) -> None:
    """Turn by turn or in one go: the ids are the same, so generating meets what was learned."""
    for item in english[:100]:
        pairs = zip(item.turns[::2], item.turns[1::2], strict=True)
        text = "</s>".join(f"### Human: {u.text}### Assistant: {a.text}" for u, a in pairs)
        assert encode(llama, item, length=100_000).input_ids == [*llama.encode(text), EOS]


def test_llama_report_of_the_english_half(llama: Any, english: list[Conversation]) -> None:
    examples = [e.example() for e in encoder(llama).encode_all(english) if e]
    assert (len(english), len(examples), len(llama)) == (338, 336, 32000)
    assert sum(e.truncated for e in examples) == 86
    assert max(len(e.input_ids) for e in examples) == 512
    assert all(e.input_ids[0] == 1 and e.input_ids.count(1) == 1 for e in examples)
    assert all(e.supervised_tokens > 0 for e in examples)


# --- the template as the saved tokenizer has it ---------------------------------------------------

TALK = conversation("Hi 'there'", 'Hello! "How"\nare you?', "2+2\\3? é", "It is {{ 4 }}.")


def check_chat_template(tokenizer: Any, template: str, talk: Conversation) -> None:
    example = encode(tokenizer, talk, template=template, length=10_000)
    tokenizer.chat_template = chat_template(template, leading_bos=bool(leading_bos(tokenizer)))
    messages = [{"role": turn.role, "content": turn.text} for turn in talk.turns]
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


@pytest.mark.parametrize("template", ["guanaco", "alpaca"])
def test_chat_template_gives_the_training_ids(tiny_tokenizer: Path, template: str) -> None:
    tokenizer = load(tiny_tokenizer)
    check_chat_template(tokenizer, template, TALK)
    with pytest.raises(Exception, match="not on system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_template_gives_the_training_ids_of_smollm2(smollm2: str, template: str) -> None:
    check_chat_template(load_tokenizer(find_base(smollm2)), template, TALK)


def test_chat_template_gives_the_training_ids_of_real_conversations(
    shared_data: Path, english: list[Conversation]
) -> None:
    tokenizer = load(shared_data / "tokenizer-llama2")
    for talk in english[:100]:
        check_chat_template(tokenizer, "guanaco", talk)

"""Templates: the text around every turn, and which of its tokens are learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import BOS, EOS, token_ids
from transformers import AutoTokenizer

from qlora_harness.data.chat_encoder import ChatEncoder
from qlora_harness.data.conversation import Conversation, Turn
from qlora_harness.data.examples import IGNORE, Example
from qlora_harness.data.templates import TEMPLATES, chat_template
from qlora_harness.errors import DataError, SettingsError
from qlora_harness.model.source import find_base, load_tokenizer

Ids = list[int]

ALPACA_START = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)


def talk(*texts: str, system: str = "", context: str = "") -> Conversation:
    turns = [
        Turn("assistant", text, supervised=True)
        if index % 2
        else Turn("user", text, context=context)
        for index, text in enumerate(texts)
    ]
    return Conversation("tree", tuple(turns), system, place="row 1")


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(tiny_tokenizer))


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: str) -> Any:
    return load_tokenizer(find_base(smollm2))


def encode(
    tokenizer: Any, item: Conversation, template: str, mask: str = "prompt", length: int = 10_000
) -> Example:
    example = ChatEncoder(tokenizer, template, length, mask).encode(item)
    assert example is not None
    return example


def labelled(*pieces: tuple[Ids, bool]) -> tuple[Ids, Ids]:
    """The ids and labels of pieces of ids, each with whether it is learned."""
    ids = [number for piece, _ in pieces for number in piece]
    labels = [number if learned else IGNORE for piece, learned in pieces for number in piece]
    return ids, labels


def pieces_of(example: Example) -> tuple[Ids, Ids]:
    return example.input_ids, example.labels


def check(tokenizer: Any, item: Conversation, template: str, *texts: str) -> None:
    """Checks prompts and replies in turn; "^" stands for BOS at the start of a prompt."""
    pieces: list[tuple[Ids, bool]] = []
    for index, text in enumerate(texts):
        learned = bool(index % 2)
        bos = [BOS] if text.startswith("^") else []
        ids = token_ids(text.removeprefix("^"))
        pieces += [(bos, False), ([*ids, EOS] if learned else ids, learned)]
    assert pieces_of(encode(tokenizer, item, template)) == labelled(*pieces)
    everything = [(ids, ids != [BOS]) for ids, _ in pieces]
    assert pieces_of(encode(tokenizer, item, template, mask="none")) == labelled(*everything)


# --- each template, token by token ----------------------------------------------------------------
# SentencePiece puts a space before a text that it sees alone: at the start of each exchange.


def test_alpaca_with_preamble(tokenizer: Any) -> None:
    ask = "### Instruction:\nq\n\n### Response:\n"
    check(tokenizer, talk("q", "r"), "alpaca-preamble", f"^ {ALPACA_START}{ask}", "r")
    with_input = "### Instruction:\nq\n\n### Input:\nc\n\n### Response:\n"
    check(
        tokenizer, talk("q", "r", context="c"), "alpaca-preamble",
        f"^ {ALPACA_WITH_INPUT}{with_input}", "r",
    )  # fmt: skip
    # Only the first exchange has the preamble, and a system prompt replaces it.
    check(
        *(tokenizer, talk("q", "r", "q", "s", system="S"), "alpaca-preamble"),
        *(f"^ S\n\n{ask}", "r", f" {ask}", "s"),
    )


def test_vicuna(tokenizer: Any) -> None:
    check(
        *(tokenizer, talk("q", "r", "s", "t"), "vicuna"),
        *(f"^ {VICUNA}USER: q ASSISTANT:", " r", " USER: s ASSISTANT:", " t"),
    )
    check(tokenizer, talk("q", "r", system="S"), "vicuna", "^ S USER: q ASSISTANT:", " r")


def test_llama2_has_bos_before_each_exchange_and_a_space_after_the_reply(tokenizer: Any) -> None:
    check(
        *(tokenizer, talk("q", "r", "s", "t"), "llama2"),
        *("^ [INST] q [/INST]", " r ", "^ [INST] s [/INST]", " t "),
    )
    check(
        *(tokenizer, talk("q", "r", system="S"), "llama2"),
        *("^ [INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST]", " r "),
    )


def test_input_of_an_instruction_follows_it_in_other_templates(tokenizer: Any) -> None:
    item = talk("q", "r", context="c")
    check(tokenizer, item, "guanaco", "^ ### Human: q\n\nc### Assistant:", " r")


def test_plain_text_is_learned_whole(tokenizer: Any) -> None:
    item = Conversation("tree", (Turn("text", "Hi </s>", supervised=True),))
    example = encode(tokenizer, item, "none")
    assert pieces_of(example) == labelled(([BOS], False), ([*token_ids(" Hi </s>"), EOS], True))
    assert example.turns == 1
    cut = encode(tokenizer, item, "none", length=4)
    assert (len(cut.input_ids), cut.truncated) == (4, True)


def test_chatml_with_a_system_prompt(smollm2_tokenizer: Any) -> None:
    start, end = smollm2_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def ids(text: str) -> Ids:
        return list(smollm2_tokenizer.encode(text, split_special_tokens=True))

    prompt = [
        *(start, *ids("system\n"), *ids("S"), end, *ids("\n"), start, *ids("user\n"), *ids("q")),
        *(end, *ids("\n"), start, *ids("assistant\n")),
    ]
    example = encode(smollm2_tokenizer, talk("q", "r", system="S"), "chatml")
    assert pieces_of(example) == labelled((prompt, False), ([*ids("r"), end], True))


@pytest.mark.parametrize("template", ["chatml", "llama2", "vicuna", "alpaca-preamble"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_same_template_in_jinja(
    smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, system: str
) -> None:
    item = talk("Hi there", "Hello!", "2+2?", "4.", system=system)
    example = encode(smollm2_tokenizer, item, template)
    jinja = chat_template(template, leading_bos=False)
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", jinja)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": turn.role, "content": turn.text} for turn in item.turns]
    applied = smollm2_tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert list(applied["input_ids"]) == example.input_ids
    assert [bool(m) for m in applied["assistant_masks"]] == [n != IGNORE for n in example.labels]


@pytest.mark.parametrize("template", ["chatml", "llama2", "vicuna", "alpaca-preamble"])
def test_system_prompt_stays_when_exchanges_are_cut(smollm2_tokenizer: Any, template: str) -> None:
    turns = [
        (Turn("user", f"question {i}"), Turn("assistant", f"reply {i}", supervised=i == 2))
        for i in range(4)
    ]

    def conversation(first: int, last: int) -> Conversation:
        chosen = tuple(turn for pair in turns[first:last] for turn in pair)
        return Conversation("t", chosen, "Be brief.")

    for first in (0, 1, 2):
        alone = encode(smollm2_tokenizer, conversation(first, 3), template)
        length = len(alone.input_ids) + 1
        cut = encode(smollm2_tokenizer, conversation(0, 4), template, length=length)
        assert pieces_of(cut) == pieces_of(alone)
        assert cut.truncated


# --- the tokenizer's own --------------------------------------------------------------------------

# ChatML as SmolLM2 and Qwen write it, with a line break after each end.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}"
)
# Like Qwen3's, which leaves the thoughts of earlier turns out.
REWRITTEN = "{% for m in messages %}{{ m['content'] + ('!' if loop.last else '') }}{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
SPEAKERS = (
    "{{ bos_token }}{% for m in messages %}{{ ' [' + m['role'] + '] ' + m['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' [assistant]' }}{% endif %}"
)


@pytest.mark.parametrize(
    "own", [CHATML, MARKED, MARKED.replace("{% generation %}", "{%-  generation-%}")]
)
@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("mask", ["prompt", "none"])
def test_own_template_gives_the_ids_and_labels_of_ours(
    smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, own: str, system: str, mask: str
) -> None:
    tokenizer = smollm2_tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", own)
    item = talk("Hi there", "Hello!\n", "2+2?", "4.", system=system)
    ours = encode(tokenizer, item, "chatml", mask)
    assert pieces_of(encode(tokenizer, item, "tokenizer", mask)) == pieces_of(ours)
    length = len(ours.input_ids) - 1
    cut, expected = (encode(tokenizer, item, t, length=length) for t in ("tokenizer", "chatml"))
    assert (cut.turns, pieces_of(cut)) == (2, pieces_of(expected))


@pytest.mark.parametrize("own", [CHATML, MARKED])
def test_special_tokens_typed_in_a_message_stay_text(
    smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    tokenizer = smollm2_tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", own)
    item = talk("Hi<|im_end|>", "No<|im_start|>", "2+2?", "4.", system="<|endoftext|>")
    ours = encode(tokenizer, item, "chatml")
    assert pieces_of(encode(tokenizer, item, "tokenizer")) == pieces_of(ours)
    assert ours.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5


def test_own_template_without_special_tokens_is_learned_to_its_end(tokenizer: Any) -> None:
    tokenizer.chat_template = SPEAKERS
    example = encode(tokenizer, talk("q", "r", "s", "t"), "tokenizer")
    prompts = token_ids("  [user] q\n [assistant]"), token_ids(" [user] s\n [assistant]")
    replies = token_ids(" r\n"), token_ids(" t\n")
    assert pieces_of(example) == labelled(
        *(([BOS], False), (prompts[0], False), (replies[0], True)),
        *((prompts[1], False), (replies[1], True)),
    )


@pytest.mark.parametrize(
    ("own", "item", "fact"),
    [
        (REWRITTEN, talk("q", "r", "s", "t"), "earlier messages look different"),
        (NO_SYSTEM, talk("q", "r", system="S"), "no system"),
        ("{{ nothing.at.all }}", talk("q", "r"), "'nothing' is undefined"),
        ("{{ messages[0]['content'] + 1 }}", talk("q", "r"), "can only concatenate str"),
    ],
)
def test_own_template_that_cannot_hold_a_row_is_one_line(
    tokenizer: Any, own: str, item: Conversation, fact: str
) -> None:
    tokenizer.chat_template = own
    with pytest.raises(DataError) as caught:
        encode(tokenizer, item, "tokenizer")
    assert caught.value.problem.startswith("row 1: ")
    assert fact in caught.value.problem


def test_tokenizer_without_a_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(SettingsError, match="--template tokenizer"):
        ChatEncoder(tokenizer, "tokenizer", 100, "prompt")


# --- what a template can't hold -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "item", "facts"),
    [
        ("guanaco", talk("q", "r", system="S"), ["system prompt", "chatml, llama2, vicuna"]),
        ("alpaca", talk("q", "r", system="S"), ["system prompt"]),
        ("vicuna", Conversation("", (Turn("text", "q", True),), place="row 1"), ["plain text"]),
        ("tokenizer", Conversation("", (Turn("text", "q", True),), place="row 1"), ["none"]),
        ("none", talk("q", "r"), ["has turns", *TEMPLATES]),
    ],
)
def test_rows_that_a_template_cannot_hold_are_refused(
    tokenizer: Any, template: str, item: Conversation, facts: list[str]
) -> None:
    tokenizer.chat_template = CHATML
    with pytest.raises(DataError) as caught:
        encode(tokenizer, item, template)
    assert caught.value.problem.startswith("row 1: ")
    assert all(fact in str(caught.value) for fact in (f"--template {template}", *facts))

"""`qlora-harness data`: every number of a survey by hand, its pages, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_harness.cli import main
from qlora_harness.score.mmlu_files import Question
from qlora_harness.settings import DataSettings
from qlora_harness.survey.characters import Characters
from qlora_harness.survey.overlap import Questions, stem_of
from qlora_harness.survey.survey import (
    Survey,
    length_bars,
    quantiles,
    take_surveys,
    turn_bars,
)

Row = dict[str, Any]

STEM = "Which of these cities is the capital of a country with two official languages today?"
PROMPT = (
    "The following are multiple choice questions (with answers) about  geography.\n\n"
    "First?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n"
    f"{STEM}\nA. Rome\nB. Ottawa\nC. Oslo\nD. Lima\nAnswer:"
)


def said(*texts: str, system: str = "") -> Row:
    turns = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    turns += [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns}


ROWS = [
    said("q", "r"),
    said("q", "rr", "s", "t"),
    said("q"),
    said("q", "r"),
    said("q", "r" * 40, system="Be brief."),
]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("QLORA_MMLU_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    path = Path("rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def take(rows: Path, template: str = "chatml", tokenizer: Any = None, **options: Any) -> Survey:
    questions = options.pop("questions", None)
    settings = DataSettings(dataset=str(rows), template=template, **options)
    (survey,) = take_surveys(str(rows), settings, tokenizer, questions)
    return survey


def test_every_number_by_hand(rows: Path) -> None:
    survey = take(rows)
    # <|im_start|>user\n + text + <|im_end|>\n<|im_start|>assistant\n, and a reply with its end.
    around = 1 + 5 + 2 + 1 + 10
    lengths = [around + 1 + 2, 2 * around + 2 + 5 + 1, around + 1 + 2]
    system = 1 + len("system\nBe brief.") + 2
    assert list(survey.lengths) == [*lengths, system + around + 1 + 41]
    assert survey.learned == 2 + 5 + 2 + 41
    assert (survey.form, survey.unit, survey.corpus.messages) == ("messages", "characters", 5)
    assert dict(survey.corpus.dropped) == {"no reply": 1}
    assert survey.first == {"no reply": "rows.jsonl, line 3"}
    assert survey.turns == Counter({2: 3, 4: 1})
    assert (survey.duplicates, survey.first_duplicate) == (1, "rows.jsonl, line 4")
    assert (survey.with_system, survey.questions) == (1, None)


def test_examples_are_the_first_three_with_what_is_learned(rows: Path) -> None:
    first, second, third = take(rows).examples
    assert (first.place, third.place) == ("rows.jsonl, line 1", "rows.jsonl, line 4")
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert first.pieces == [(prompt, False), ("r<|im_end|>", True)]
    assert [text for text, learned in second.pieces if learned] == ["rr<|im_end|>", "t<|im_end|>"]
    everything = take(rows, mask="none").examples[0]
    assert everything.pieces == [(f"{prompt}r<|im_end|>", True)]


def test_tokens_and_truncation_are_those_of_the_model(rows: Path, smollm2: str) -> None:
    from qlora_harness.data.chat_encoder import ChatEncoder
    from qlora_harness.data.corpus import load_training_data
    from qlora_harness.model.source import find_base, load_tokenizer

    tokenizer: Any = load_tokenizer(find_base(smollm2))
    survey = take(rows, tokenizer=tokenizer, max_length=16)
    settings = DataSettings(
        dataset=str(rows), template="chatml", max_length=1000, eval_fraction=0.0
    )
    data = load_training_data(tokenizer, settings)
    assert (survey.unit, list(survey.lengths)) == ("tokens", data.train.lengths)
    assert survey.learned == data.report["train"]["supervised_tokens"]
    cut = ChatEncoder(tokenizer, "chatml", 16, "prompt")
    assert survey.truncated == sum(length > 16 for length in data.train.lengths) == 2
    assert cut.leading_bos == data.report["leading_bos"]


def test_replies_that_a_template_does_not_show_are_left_out(rows: Path, smollm2: str) -> None:
    from qlora_harness.model.source import find_base, load_tokenizer

    tokenizer: Any = load_tokenizer(find_base(smollm2))
    tokenizer.chat_template = "nothing"
    survey = take(rows, "tokenizer", tokenizer)
    assert survey.corpus.dropped == {"no reply": 1, "without a supervised token": 4}
    assert (survey.first["without a supervised token"], len(survey.lengths)) == (
        "rows.jsonl, line 1",
        0,
    )


def test_histograms() -> None:
    assert length_bars([]) == {}
    bars = {"1–16": 2, "17–32": 2, "33–64": 1, "65–128": 0, "129–256": 0, "257–512": 1}
    assert list(length_bars([1, 16, 17, 32, 33, 300]).items()) == list(bars.items())
    assert turn_bars(Counter({2: 5, 4: 1, 20: 1, 40: 2})) == {"2": 5, "4": 1, "20 or more": 3}
    numbers = list(range(1, 101))
    assert quantiles(numbers) == {"median": 50, "90%": 90, "99%": 99, "longest": 100}
    assert quantiles(range(1, 6)) == {"median": 3, "90%": 5, "99%": 5, "longest": 5}


# --- overlap with MMLU ----------------------------------------------------------------------------


def question(stem: str, subject: str = "geography") -> Question:
    return Question(0, subject, PROMPT.replace(STEM, stem), "B")


def test_question_is_the_last_of_its_prompt() -> None:
    assert stem_of(PROMPT) == STEM


@pytest.mark.parametrize(
    ("text", "is_there"),
    [
        (STEM, True),
        # 13 words of the 14, in other case and with other punctuation.
        ("Say: which -- OF these cities is the capital of a country with two official", True),
        ("of these cities is the capital of a country with two official", False),  # 12
        ("these Which of cities is the capital of a country with two official languages", False),
    ],
)
def test_thirteen_words_in_a_row_are_an_overlap(text: str, is_there: bool) -> None:
    questions = Questions([question(STEM)])
    questions.look(f"Hello. {text} And?", "row 1")
    questions.look("nothing", "row 2")
    assert [(o.subject, o.question, o.place, o.rows) for o in questions.overlaps.values()] == (
        [("geography", STEM, "row 1", 1)] if is_there else []
    )


def test_shorter_questions_must_be_there_whole_and_very_short_ones_are_left_out() -> None:
    eight, seven = "one two three four five six seven eight", "one two three four five six seven"
    questions = Questions([question(eight), question(seven)])
    assert len(questions) == 1
    for number, text in enumerate((f"so {eight}?", f"{seven} eighty", f"{eight} nine")):
        questions.look(text, f"row {number}")
    (overlap,) = questions.overlaps.values()
    assert (overlap.question, overlap.place, overlap.rows) == (eight, "row 0", 2)


def test_overlaps_of_real_questions(
    rows: Path, shared_data: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "five_shot_mmlu_val.json"
    Path("mmlu").mkdir()
    Path("mmlu", name).symlink_to(shared_data / "mmlu" / name)
    monkeypatch.setenv("QLORA_MMLU_DIR", "mmlu")
    stem = stem_of(json.loads(Path("mmlu", name).read_text().splitlines()[3])["input"])
    rows.write_text(json.dumps(said(stem, "I don't know.")) + "\n")
    assert main(["data", str(rows)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 1,417 questions" in printed
    assert "in rows.jsonl, line 1" in printed


# --- the command ----------------------------------------------------------------------------------


def test_command_prints_and_writes_a_page(rows: Path, capsys: Any) -> None:
    assert main(["data", str(rows), "--template", "chatml", "--html", "page.html"]) == 0
    printed = capsys.readouterr().out
    for fact in ("messages", "1 no reply (first: rows.jsonl, line 3)", "rows.jsonl, line 4"):
        assert fact in " ".join(printed.split())
    assert "⟦r<|im_end|>⟧" in printed
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<mark>r&lt;|im_end|&gt;</mark>" in page
    assert page.count("plotly-graph-div") >= 2
    assert "<script src" not in page


def test_command_takes_mixtures(rows: Path, capsys: Any) -> None:
    Path("b.jsonl").write_text('{"prompt": "q", "completion": "r"}\n')
    assert main(["data", "rows.jsonl:0.5,b.jsonl:0.5", "--template", "vicuna"]) == 0
    printed = capsys.readouterr().out
    assert "prompt-completion" in printed
    assert "rows.jsonl, train" in printed


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--template", "guanaco"], ["rows.jsonl, line 5", "system prompt"]),
        (["--template", "tokenizer"], ["--model"]),
        (["--template", "chatml", "--revision", "abc"], ["--revision abc", "--model"]),
        (["--format", "alpaca"], ["rows.jsonl, line 1", "instruction"]),
        (["--template", "chatml", "--html", "."], ["--html . is a folder"]),
        (["--quant", "nf4"], ["--quant"]),
        (["--recipe", "demo"], ["--recipe"]),
    ],
)
def test_mistakes_are_one_line(rows: Path, capsys: Any, flags: list[str], facts: list[str]) -> None:
    assert main(["data", str(rows), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(fact in line for fact in facts)
    assert len(line) <= 500


def test_characters_know_the_tokens_of_the_templates() -> None:
    tokenizer = Characters()
    text = "é</s><|im_end|>\n"
    ids = tokenizer.encode(text)
    assert (len(ids), tokenizer.decode(ids)) == (4, text)
    assert tokenizer.encode(text, split_special_tokens=True) == list(map(ord, text))


def test_a_missing_file_name_points_to_this_commands_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["data"]) == 2
    assert "`qlora-harness data --help`" in capsys.readouterr().err

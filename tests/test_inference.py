"""Model cards, answers to prompts, chats and merged models of a small trained run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import BOS, EOS, token_ids
from huggingface_hub import ModelCard
from peft import PeftModel
from training_runs import data_of, read

from qlora_harness.cli import main
from qlora_harness.errors import DataError, RunError
from qlora_harness.inference import export
from qlora_harness.inference.chat import _ReplyStreamer
from qlora_harness.inference.chat_model import ChatModel, Sampling, choose_adapter
from qlora_harness.inference.generate import AnswerJournal, generate, read_prompts
from qlora_harness.inference.output_statistics import distinct_share, scripts
from qlora_harness.score.mmlu_files import Question
from qlora_harness.train.model_card import refresh_card

GREEDY = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run in NF4."""
    from qlora_harness.train.command import main as train

    folder = tmp_path_factory.mktemp("results") / "4bit"
    flags = {
        "model": tiny_llama,
        "dataset": rows,
        "output-dir": folder,
        "quant": "nf4",
        "compute-dtype": "float32",
        "max-steps": 4,
        "batch-size": 4,
        "grad-accum": 1,
        "optimizer": "adamw_torch",
        "checkpointing": "none",
        "max-length": 96,
        "lora-r": 4,
        "eval-fraction": 0.25,
        "learning-rate": 0.01,
    }
    assert train([f"--{name}={value}" for name, value in flags.items()]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "results" / "4bit"))


def prompts_file(folder: Path, count: int = 5) -> Path:
    rows = [
        {"instruction": f"What is {n} plus {n}?" + " Say it." * n, "dataset": "sums"}
        for n in range(count)
    ]
    path = folder / "prompts.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_card_comes_with_training(trained: Path, tiny_llama: Path, rows: Path) -> None:
    text = (trained / "adapter" / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "peft"
    assert data["tags"] == ["lora", "qlora-harness", "nf4"]
    assert not {"base_model", "datasets", "license"} & set(data)  # local: the Hub has no such id
    summary = read(trained / "training_summary.json")
    for fact in (
        summary["data"]["train"]["fingerprint"],
        summary["model"]["weights_fingerprint"],
        f"{summary['results']['eval_loss']:.4f}",
        f"{summary['results']['eval_loss_before']:.4f}",
        f"torch {torch.__version__.partition('+')[0]}",
        "| `lora_r` | 4 |",
        rows.name,
        tiny_llama.name,
    ):
        assert fact in text
    assert not any(str(path.parent) in text for path in (trained, tiny_llama, rows))


def test_the_card_loads_the_adapter_with_plain_peft(
    run: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (run / "adapter" / "README.md").read_text()
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    monkeypatch.chdir(run / "adapter")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace(f'"{tiny_llama.name}"', repr(str(tiny_llama))), names)
        assert isinstance(names["model"], PeftModel)
        assert names["tokenizer"].chat_template
        assert hasattr(names["model"].config, "quantization_config") is ("4bit" in block)
    assert len(blocks) == 2


def test_hub_names_are_the_base_and_data_of_the_card(run: Path) -> None:
    path = run / "training_summary.json"
    summary = read(path)
    summary["model"] |= {"name": "org/base", "commit": "c0ffee"}
    summary["data"] |= {"dataset": "oasst1", "source": "OpenAssistant/oasst1"}
    path.write_text(json.dumps(summary))
    refresh_card(run)
    text = (run / "adapter" / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["datasets"] == ["OpenAssistant/oasst1"]
    assert 'revision="c0ffee"' in text


def test_an_edited_card_stays(run: Path) -> None:
    card = run / "adapter" / "README.md"
    card.write_text("# Mine\n" + card.read_text())
    before = card.read_text()
    refresh_card(run)
    assert card.read_text() == before


def test_scoring_adds_the_accuracy_with_its_interval(
    run: Path, manager: Any, unchanged_tracker: None
) -> None:
    from scoring_runs import evaluate

    from qlora_harness.score.adapter_lm import QloraAdapterLM

    lm = QloraAdapterLM(peft=str(run / "adapter"), device="cpu")
    evaluate(lm, manager, limit=4)
    [scores] = read(run / "evaluation_results.json")["tasks"].values()
    half = 1.96 * scores["acc_stderr"]
    low, high = max(0, scores["acc"] - half), min(1, scores["acc"] + half)
    text = (run / "adapter" / "README.md").read_text()
    assert "accuracy on `mmlu_qlora_demo`" in text
    assert f"{100 * scores['acc']:.1f}%, 95% interval {100 * low:.1f}% to {100 * high:.1f}%" in text


def test_answers_have_the_fields_that_alpaca_eval_reads(run: Path, tmp_path: Path) -> None:
    """It joins two files on `instruction` and takes the one value of `generator` as the name."""
    words = ["--prompts", str(prompts_file(tmp_path)), "--max-new-tokens=6", "--batch-size=2"]
    for extra, name in (([], "adapter.json"), (["--base"], "base.json")):
        output = ["--output", str(tmp_path / name)]
        assert main(["generate", str(run), *words, *output, *extra]) == 0
    import pandas

    outputs, reference = (pandas.read_json(tmp_path / f"{n}.json") for n in ("adapter", "base"))
    assert list(outputs.columns) == ["instruction", "output", "generator", "dataset"]
    assert outputs["generator"].unique().tolist() == ["4bit"]
    assert reference["generator"].unique().tolist() == ["tiny-llama"]
    assert len(outputs.merge(reference, on=["instruction"])) == 5
    assert outputs["output"].map(type).eq(str).all()
    assert not (tmp_path / ".adapter.json.journal").exists()
    assert main(["generate", "--compare", *map(str, (tmp_path / "adapter.json",) * 2)]) == 0


def test_a_batch_answers_as_transformers_does_alone(run: Path) -> None:
    model = ChatModel(choose_adapter(run))
    prompts = [model.encode([{"role": "user", "content": text}]) for text in ("Hi", "Why? " * 4)]
    for ids, reply in zip(prompts, model.reply(prompts, GREEDY), strict=True):
        given = list(ids)
        for _ in range(GREEDY.max_new_tokens):
            logits = model.model(torch.tensor([given])).logits[0, -1]
            given.append(int(logits.argmax()))
            if given[-1] == model.tokenizer.eos_token_id:
                break
        text = model.tokenizer.decode(given[len(ids) :], skip_special_tokens=True)
        assert reply == str(text).partition("### Human:")[0].strip()


def test_a_prompt_has_the_tokens_of_training(run: Path, tiny_llama: Path, rows: Path) -> None:
    model = ChatModel(choose_adapter(run))
    questions = [f"What is {n} plus {n}?" for n in range(16)]
    prompts = [model.encode([{"role": "user", "content": text}]) for text in questions]
    examples = [example.input_ids for example in data_of(tiny_llama, rows).train]
    assert len(examples) == 12
    for ids in examples:
        assert sum(ids[: len(prompt)] == prompt for prompt in prompts) == 1
    typed = model.encode([{"role": "user", "content": "a</s>"}])
    assert EOS not in typed
    assert model.tokenizer.decode(typed).count("a</s>") == 1


def test_a_reply_ends_before_the_marker(run: Path) -> None:
    model = ChatModel(choose_adapter(run))
    prompt = model.encode([{"role": "user", "content": "Hi"}])
    [whole] = model.reply([prompt], Sampling(max_new_tokens=12))
    model = ChatModel(choose_adapter(run))
    passes: list[int] = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    model.ends = [model.tokenizer.eos_token_id], whole[3:6]
    [reply] = model.reply([prompt], Sampling(max_new_tokens=12))
    assert reply == whole[: whole.index(whole[3:6])].strip()
    assert len(passes) < 12


def test_a_prompt_too_long_is_refused_before_weights_are_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ChatModel, "model", None)
    words = ["--prompts", str(prompts_file(tmp_path)), "--output", str(tmp_path / "o.json")]
    assert main(["generate", str(run), *words, "--max-new-tokens=100000"]) == 2
    assert "prompts.json, prompt 1: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("temperature", "damage"),
    [(0.0, b'["cut o'), (1.5, b"\xff\n"), (0.0, b'["one of two"]\n'), (0.0, b'["a", 1]\n')],
)
def test_a_killed_run_continues_to_the_same_answers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, damage: bytes
) -> None:
    prompts = prompts_file(tmp_path)
    sampling = Sampling(6, temperature)
    options: dict[str, Any] = {"seed": 3, "batch_size": 2, "base_alone": False}
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    generate(run, prompts, whole, sampling, **options)

    own, batches = ChatModel.reply, list[Any]()

    def reply(self: ChatModel, ids: Any, *rest: Any) -> list[str]:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(ids)
        return own(self, ids, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ChatModel, "reply", reply)
        with pytest.raises(KeyboardInterrupt):
            generate(run, prompts, killed, sampling, **options)
    journal = tmp_path / ".killed.json.journal"
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + rest[0] + damage)
    assert main(["generate", str(run), "--prompts", str(prompts), "--output", str(killed)]) == 2
    generate(run, prompts, killed, sampling, **options)
    assert read_list(killed) == read_list(whole)
    assert not journal.exists()


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    output = tmp_path / "answers.json"
    journal = AnswerJournal(output, {}, [1])
    with pytest.raises(RunError, match=r"answers\.json"):
        AnswerJournal(output, {}, [1])
    journal.append(["one"])
    journal.close(remove=False)
    again = AnswerJournal(output, {}, [1, 1])
    assert again.batches == [["one"]]
    again.close(remove=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["generate", "run", "--prompts=a.txt", "--output=b.json", "--top-p=0.5"], "--top-p 0.5"),
        (["generate", "run", "--compare", "b.json"], "--compare"),
    ],
)
def test_flags_without_effect_are_refused(
    words: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert flag in capsys.readouterr().err


def read_list(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '[{"instruction": "One"}, {"instruction": "Two"}]', ["One", "Two"]),
        (
            "a.json",
            '{"instruction": "One"}\n\n{"instruction": "T\u2028wo"}\n',
            ["One", "T\u2028wo"],
        ),
        ("a.txt", "One\n[2]\n\n", ["One", "[2]"]),
        ("a.txt", "\n", None),
        ("a.csv", "instruction,input\nOne,\n", ["One"]),
        ("a.jsonl", '"One"\n', None),
        ("a.jsonl", '{"instruction": "\\ud83d"}\n', None),
        ("a.json", '[{"instruction": ""}]', None),
        ("a.json", '[{"instruction": "One", "input": "more"}]', None),
        ("a.json", '[{"instruction": "One"', None),
    ],
)
def test_prompts(tmp_path: Path, name: str, text: str, expected: list[str] | None) -> None:
    path = tmp_path / name
    path.write_text(text)
    if expected is None:
        with pytest.raises(DataError, match=name):
            read_prompts(path)
    else:
        assert [prompt.instruction for prompt in read_prompts(path)] == expected


def test_statistics_of_answers() -> None:
    assert distinct_share(["a", "b", "a", "b", "a"], 1) == 2 / 5
    assert distinct_share(["a", "b", "a", "b", "a"], 2) == 2 / 4
    assert distinct_share("ababa", 3) == 2 / 3
    assert distinct_share("a", 2) is None
    assert scripts(["ab 1!", "яЯ"]) == {"Latin": 0.5, "Cyrillic": 0.5}


def test_a_chat_reads_lines(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    conversations = []
    own = ChatModel.encode

    def encode(self: ChatModel, messages: Any) -> list[int]:
        conversations.append([message["content"] for message in messages])
        return own(self, messages)

    monkeypatch.setattr(ChatModel, "encode", encode)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\udcff\nWhy?\n/reset\nHi\n/exit\nNo\n"))
    words = ["chat", str(run), "--temperature=0", "--max-new-tokens=5"]
    assert main(words) == 0
    first = conversations[0]
    assert [len(conversation) for conversation in conversations] == [1, 3, 1]
    assert conversations[2] == first == ["Hi"]
    assert conversations[1][2] == "Why?"
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].strip() == conversations[1][1]


def test_a_streamed_reply_ends_before_the_next_turn(
    tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_tokenizer)
    streamer = _ReplyStreamer(tokenizer, "### Human:")
    for piece in (" ", "One ##", "# two ", "### Hum", "an: three"):
        streamer.on_finalized_text(piece)
    streamer.on_finalized_text("", stream_end=True)
    assert capsys.readouterr().out == "One ### two \n"


TURN = (
    "{%% for m in messages %%}{%% if m.role == 'user' %%}%s{%% else %%}%s{%% endif %%}"
    "{%% endfor %%}"
)


@pytest.mark.parametrize(
    ("template", "tokens", "marker"),
    [
        (None, ["</s>"], "### Human:"),  # the run's own, guanaco
        (TURN % ("USER: {{ m.content }} ASSISTANT:", " {{ m.content }}</s>"), ["</s>"], "USER:"),
        (TURN % ("\n\nUser: {{ m.content }}\n\nBot:", " {{ m.content }}"), ["</s>"], "User:"),
        (
            TURN % ("<s>[INST] {{ m.content }} [/INST]", " {{ m.content }} </s>"),
            ["</s>", "<s>"],
            "[INST]",
        ),
        (
            TURN % ("<|a|>user\n{{ m.content }}<|b|>\n<|a|>bot\n", "{{ m.content }}<|b|>\n"),
            ["</s>", "<|b|>", "<|a|>"],
            "",
        ),
    ],
)
def test_a_reply_ends_where_the_template_says(
    run: Path, template: str | None, tokens: list[str], marker: str
) -> None:
    model = ChatModel(choose_adapter(run))
    if template is not None:
        model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
        model.tokenizer.chat_template = template
    ids, text = model.ends
    assert (model.tokenizer.convert_ids_to_tokens(ids), text) == (tokens, marker)


def test_a_run_on_plain_text_continues_prompts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "adapter" / "qlora_harness.json"
    path.write_text(json.dumps(read(path) | {"template": "none"}))
    (run / "adapter" / "chat_template.jinja").unlink()
    model = ChatModel(choose_adapter(run))
    typed = model.encode([{"role": "user", "content": "Hi</s>"}])
    assert typed == [BOS, *token_ids(" Hi</s>")]
    assert model.ends == ([model.tokenizer.eos_token_id], "")
    assert main(["chat", str(run)]) == 2
    path.write_text(json.dumps(read(path) | {"template": "guanaco"}))
    assert main(["chat", str(run)]) == 2
    assert str(run / "adapter") in capsys.readouterr().err


def with_base_in(run: Path, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Gives a run a copy of its base in another dtype; returns the base in its record."""
    path = run / "adapter" / "qlora_harness.json"
    record = read(path)
    base = record["base"]["name"]
    transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    record["base"] |= {"name": str(folder), "weights_fingerprint": None}
    path.write_text(json.dumps(record))
    recorded: dict[str, Any] = record["base"]
    return recorded


@pytest.mark.parametrize(
    ("merge", "files", "dtype"),
    [
        ("bf16", torch.float32, torch.bfloat16),
        ("original", torch.float32, torch.float32),
        ("original", torch.bfloat16, torch.bfloat16),
    ],
)
def test_an_export_says_how_far_answers_moved(
    run: Path,
    tmp_path: Path,
    merge: str,
    files: torch.dtype,
    dtype: torch.dtype,
    no_mmlu_files: None,
    unchanged_tracker: None,
) -> None:
    from safetensors.torch import load_file

    base = with_base_in(run, tmp_path / "base", files)
    output = tmp_path / "merged"
    assert main(["export", str(run), "--merge", merge, "--output", str(output)]) == 0
    record = read(output / "merge.json")
    assert record["kind"] == "merge"
    assert record["dtype"] == str(dtype).removeprefix("torch.")
    assert record["trained_quant"] == "nf4"
    assert record["base"] == base
    assert record["run"] == "4bit"
    shift = record["shift"]
    assert (shift["questions"], shift["questions_file"]) == (96, "five_shot_mmlu_demo.json")
    assert 0 < shift["mean_logprob_difference"] <= shift["largest_logprob_difference"] < 1
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    a, b = (weights[f"base_model.model.{layer}.lora_{x}.weight"].float() for x in "AB")
    model = transformers.AutoModelForCausalLM.from_pretrained(base["name"], dtype=dtype)
    plain = model.get_parameter(f"{layer}.weight")
    alpha = read(run / "adapter" / "adapter_config.json")["lora_alpha"]
    expected = (plain.float() + alpha / 4 * (b @ a)).to(dtype)
    merged = transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert torch.equal(merged.get_parameter(f"{layer}.weight"), expected)
    assert not torch.equal(expected, plain)
    assert transformers.AutoTokenizer.from_pretrained(output).chat_template


def test_200_questions_are_the_same_sample_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = tuple(Question(n, "s", f"{n} Answer:", "A") for n in range(300))
    monkeypatch.setenv("QLORA_MMLU_DIR", "files")
    monkeypatch.setattr(export, "load_questions", lambda name: pool)
    name, sample = export._questions()
    assert name == "five_shot_mmlu_test.json"
    assert len({question.index for question in sample}) == 200
    assert export._questions() == (name, sample)


def test_gguf_takes_the_converter_of_llama_cpp(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_mmlu_files: None,
    unchanged_tracker: None,
) -> None:
    output = tmp_path / "merged"
    words = ["export", str(run), "--merge", "bf16", "--output", str(output), "--gguf"]
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    assert main(words) == 2
    assert "LLAMA_CPP_DIR" in capsys.readouterr().err
    assert not output.exists()
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import sys, pathlib\npathlib.Path(sys.argv[3]).write_text(' '.join(sys.argv[1:]))"
    )
    assert main(words) == 0
    file = output / "merged.gguf"
    assert file.read_text() == f"{output} --outfile {file}"


@pytest.mark.parametrize("command", ["generate", "chat", "export"])
def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {
        "generate": [
            "--prompts",
            str(prompts_file(tmp_path)),
            "--output",
            str(tmp_path / "o.json"),
        ],
        "export": ["--merge=bf16", "--output", str(tmp_path / "merged")],
    }
    folder = tmp_path / "none"
    assert main([command, str(folder), *more.get(command, [])]) == 2
    assert str(folder) in capsys.readouterr().err

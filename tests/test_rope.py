"""RoPE scaling: what it computes, where texts share a row, and that a run's scaling is replayed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scoring_runs import MakeLm, demo_prompts, refused, score
from tiny_models import adapted, assert_alike, fused_step, logprobs, plain_step, texts, tiny
from training_runs import Train, as_if_killed, losses, read

from qlora_harness.cli import main as cli
from qlora_harness.errors import AdapterError, ModelError, SettingsError
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.inference.chat_model import ChatModel, Sampling
from qlora_harness.inference.export import _merged
from qlora_harness.model.base import load_base
from qlora_harness.model.rope import finish_scaling, scale, window
from qlora_harness.model.shared_base import sharing_base, take_base
from qlora_harness.model.source import find_base, read_config
from qlora_harness.schema.scoring_records import Evaluation
from qlora_harness.score.evaluation_record import _is_of_same_model
from qlora_harness.score.packed_forward import why_unsupported
from qlora_harness.score.prefix_tree import Query, plan
from qlora_harness.score.run_choice import choose_scored_run
from qlora_harness.settings import Quant
from qlora_harness.settings_checks import build_settings
from qlora_harness.study.definition import build_study

SHORT = 64  # the window of the models here


@pytest.fixture(scope="module")
def short_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a window shorter than its prompts and conversations."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("models") / "short"))
    config = read(folder / "config.json") | {"max_position_embeddings": SHORT}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def scaled(scaling: str | None) -> Any:
    """A tiny model whose scaling came by its configuration, as transformers itself has it."""
    config = tiny("llama").config
    if scaling is not None:
        scale(config, scaling, "it")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("text", "value"),
    [("yarn:4", "yarn:4"), ("yarn:4.0", "yarn:4"), ("linear:1.50", "linear:1.5"), (None, None)],
)
def test_one_scaling_is_written_in_one_way(text: str | None, value: str | None) -> None:
    assert build_settings({"rope_scaling": text}).model.rope_scaling == value


@pytest.mark.parametrize(
    "text", ["ntk:4", "yarn", "yarn:", "yarn:1", "yarn:nan", "linear:-2", "dynamic:inf", ":4", "4"]
)
def test_other_scalings_are_refused(text: str) -> None:
    message = refused(lambda: build_settings({"rope_scaling": text}), SettingsError)
    assert "--rope-scaling" in message
    assert "yarn:4" in message or ":4" in message
    if text == "ntk:4":
        assert "linear, dynamic, yarn" in message


@pytest.mark.parametrize("other", [{"checkpointing": "offload"}, {"compute": "fp8"}])
def test_dynamic_scaling_has_no_fused_layers(other: dict[str, str]) -> None:
    build_settings({"rope_scaling": "linear:2", **other})
    message = refused(lambda: build_settings({"rope_scaling": "dynamic:2", **other}), SettingsError)
    assert "--rope-scaling dynamic:2" in message


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_configuration_keeps_what_the_base_has(short_llama: Path, kind: str) -> None:
    source = find_base(str(short_llama))
    before = read_config(source, None)
    config = read_config(source, f"{kind}:2.5")
    added = {"rope_type": kind, "factor": 2.5}
    if kind == "yarn":
        added["original_max_position_embeddings"] = SHORT
    assert config.rope_parameters == before.rope_parameters | added
    assert (window(before), window(config)) == (SHORT, 160)
    assert config.to_dict() | {"rope_parameters": None} == before.to_dict() | {
        "rope_parameters": None
    }


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason", "tokens"),
    [
        (transformers.GPT2Config(n_positions=48), "no rotary embedding", 48),
        (transformers.BloomConfig(), "no rotary embedding", None),
        (
            transformers.LlamaConfig(max_position_embeddings=4096, rope_parameters=LLAMA3),
            "scaled already (llama3)",
            4096,
        ),
        (transformers.Gemma3TextConfig(), "several kinds", 131072),
    ],
)
def test_bases_that_cannot_be_scaled_say_why(config: Any, reason: str, tokens: int | None) -> None:
    assert reason in refused(lambda: scale(config, "yarn:2", "it"), ModelError)
    assert window(config) == tokens


def test_a_model_that_ignores_its_scaling_is_refused() -> None:
    message = refused(lambda: finish_scaling(scaled(None), "yarn:2", "it"), ModelError)
    assert "'llama'" in message


@pytest.mark.parametrize("scaling", ["linear:4", "yarn:4"])
@pytest.mark.parametrize("kind", ["full", "nf4"])
def test_fused_rows_beyond_the_window_equal_peft(
    monkeypatch: pytest.MonkeyPatch, scaling: str, kind: str
) -> None:
    """YaRN also scales cosines and sines, so turning back is not the inverse of turning."""
    model = tiny("llama", quantised=kind == "nf4")
    model.model.rotary_emb = scaled(scaling).model.rotary_emb
    unscaled = plain_step(adapted(tiny("llama", quantised=kind == "nf4")), texts([200]))[0]
    model = adapted(model)
    rows = texts([200, 3, 90, 20])
    expected = plain_step(model, rows)
    FusedDecoder.attach(model, "selective")
    assert FusedDecoder.reason_against(model) is None
    assert_alike(fused_step(model, rows), expected)
    assert plain_step(model, texts([200]))[0] != pytest.approx(unscaled, abs=1e-4)


def alone(model: Any, query: Query) -> float:
    """The log-probability of a continuation, from one text in one pass."""
    ids = torch.tensor([[*query.context, *query.continuation]])
    with torch.no_grad():
        table = torch.log_softmax(model(ids[:, :-1]).logits[0], dim=-1)
    first = len(query.context) - 1
    return sum(float(table[first + n, token]) for n, token in enumerate(query.continuation))


@pytest.mark.parametrize("scaling", ["linear:4", "yarn:4"])
@pytest.mark.parametrize("fused", [False, True])
def test_packs_equal_each_text_alone(scaling: str, fused: bool) -> None:
    model = scaled(scaling)
    assert why_unsupported(model.config) is None
    ids = texts([220, 30, 90])
    queries = [
        Query(row["input_ids"][:cut], [5, 7]) for row, cut in zip(ids, (220, 30, 90), strict=True)
    ]
    queries.append(Query(ids[0]["input_ids"][:100], [9]))  # shares a prefix with the first
    (pack,) = plan(queries, pack_tokens=10**6, window=SHORT * 4)
    packed = torch.tensor(logprobs(model, pack, fused=fused), dtype=torch.float64)
    expected = [alone(model, query) for query in queries]
    # A pack reads token by token.
    sums = dict.fromkeys(range(len(queries)), 0.0)
    for value, owner in zip(packed.tolist(), pack.read_query.tolist(), strict=True):
        sums[owner] += value
    assert list(sums.values()) == pytest.approx(expected, abs=1e-4)


def test_dynamic_scaling_takes_each_text_by_its_own_length() -> None:
    model = scaled("dynamic:4")
    finish_scaling(model, "dynamic:4", "it")
    assert "dynamic" in str(why_unsupported(model.config))
    assert "dynamic" in str(FusedDecoder.reason_against(model))
    long, short, between = (Query(row["input_ids"], [5]) for row in texts([220, 30, 90]))
    fresh = [alone(scaled("dynamic:4"), query) for query in (long, between, short)]
    # In any order, also where transformers would go on with the frequencies of the longest.
    for order in ((0, 1, 2), (2, 1, 0)):
        computed = {n: alone(model, (long, between, short)[n]) for n in order}
        assert [computed[n] for n in range(3)] == fresh
    worn = scaled("dynamic:4")
    assert alone(worn, long) == fresh[0]
    assert alone(worn, between) != pytest.approx(fresh[1], abs=1e-3)
    # Nor could the text share a row: beside a longer one it would get the other's frequencies.
    rows = torch.tensor([[*short.context, *[1] * 190], long.context])
    with torch.no_grad():
        beside = torch.log_softmax(model(rows).logits[0, 29], dim=-1)[5]
    assert float(beside) != pytest.approx(fresh[2], abs=1e-3)


def test_shared_bases_differ_by_scaling(short_llama: Path) -> None:
    options: dict[str, Any] = {
        "quant": Quant.BF16,
        "double_quant": False,
        "compute_dtype": "float32",
        "device": torch.device("cpu"),
    }
    source = find_base(str(short_llama))
    with sharing_base():
        models = [
            take_base(source, **options, rope_scaling=scaling)
            for scaling in ("dynamic:2", "dynamic:2", None)
        ]
    types = [model.config.rope_parameters["rope_type"] for model in models]
    assert types == ["dynamic", "dynamic", "default"]
    ids = torch.tensor([texts([200])[0]["input_ids"]])
    with torch.no_grad():
        one, other, plain = (model(ids).logits for model in models)
    assert torch.equal(one, other)
    assert not torch.allclose(one, plain, atol=1e-3)
    assert torch.equal(plain, load_base(source, **options)(ids).logits)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_loaded_frequencies_are_those_of_the_type(short_llama: Path, kind: str) -> None:
    model: Any = load_base(
        find_base(str(short_llama)), quant=Quant.NF4, double_quant=True, compute_dtype="bfloat16",
        device=torch.device("cpu"), rope_scaling=f"{kind}:4",
    )  # fmt: skip
    rotary = model.model.rotary_emb
    frequencies, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](model.config)
    assert torch.equal(rotary.inv_freq, frequencies)
    assert rotary.inv_freq.dtype == torch.float32
    assert rotary.attention_scaling == factor
    assert (factor > 1) is (kind == "yarn")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"max_length": 96}, ["--max-length 96", "64 tokens", "--rope-scaling yarn:1.5"]),
        ({"max_length": 65}, ["--rope-scaling yarn:1.02"]),
        ({"max_length": 512, "rope_scaling": "linear:4"}, ["256 tokens", "linear:8"]),
    ],
)
def test_longer_examples_than_the_window_are_refused_with_the_factor_that_suffices(
    train: Train, short_llama: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any],
    parts: list[str],
) -> None:  # fmt: skip
    assert train(model=short_llama, dataset="absent", output_dir="run", **flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(part in line for part in parts)
    assert not Path("run").exists()
    length = str(flags["max_length"])
    words = ["plan", "--model", str(short_llama), "--max-length", length]
    assert cli(words) == 2
    assert cli([*words, "--rope-scaling", "yarn:8"]) == 0


def replayed(folder: Path, base: Path, kind: str) -> Any:
    """The model of a run as plain transformers and PEFT load it."""
    from peft import PeftModel

    config = transformers.AutoConfig.from_pretrained(base)
    config.rope_parameters |= {"rope_type": kind, "factor": 20.0}
    if kind == "yarn":
        config.rope_parameters["original_max_position_embeddings"] = SHORT
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, config=config, dtype=torch.bfloat16
    ).float()
    return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_a_run_is_recorded_resumed_and_replayed(
    train: Train, make_lm: MakeLm, short_llama: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], kind: str,
) -> None:  # fmt: skip
    options: dict[str, Any] = {"model": short_llama, "quant": "bf16", "learning_rate": 0.05}
    options |= {"max_length": 1280, "rope_scaling": f"{kind}:20.0", "output_dir": "run"}
    assert train(**options, save_steps=2) == 0
    record = read("run/training_summary.json")
    assert record["settings"]["rope_scaling"] == f"{kind}:20"
    assert record["computation"]["fused_layers"] is (kind == "yarn")
    capsys.readouterr()
    whole = losses("run")
    shutil.copytree("run", "killed")
    as_if_killed("killed", 4)
    options["output_dir"] = "killed"
    assert train(**options | {"rope_scaling": f"{kind}:5"}) == 2
    assert f"--rope-scaling {kind}:20" in capsys.readouterr().err
    assert train(**options) == 0
    assert losses("killed") == whole

    moved = Path(shutil.copytree("run/adapter", tmp_path / "elsewhere"))
    assert read(moved / "qlora_harness.json")["rope_scaling"] == f"{kind}:20"
    lm = make_lm(peft=str(moved), batch_size=1)
    assert (lm.max_length, lm.session.path.packed) == (1280, kind == "yarn")
    assert lm.loaded.record()["rope_scaling"] == f"{kind}:20"
    prompts = demo_prompts(3)
    expected = []
    for prompt in prompts:
        model = replayed(moved, short_llama, kind)  # afresh, as `dynamic` remembers lengths
        for letter in "ABCD":
            query = Query(lm.tok_encode(prompt), lm.tok_encode(f"{prompt} {letter}")[-1:])
            expected.append(alone(model, query))
    assert max(len(lm.tok_encode(prompt)) for prompt in prompts) > SHORT
    assert score(lm, prompts) == pytest.approx(expected, abs=1e-4)

    # Plain PEFT as the card says, chats, and a merged model have it, too.
    card = Path("run/adapter/README.md").read_text()
    names: dict[str, Any] = {}
    code = card.split("```python\n")[1].partition("```")[0]
    code = code.replace(f'"{short_llama.name}"', repr(str(short_llama)))
    exec(code.replace('adapter = "."', f"adapter = {str(moved)!r}"), names)
    choice = lm.loaded.choice
    chat = ChatModel(choice)
    merged = [_merged(choice, lm.loaded.source, original_dtype=old) for old in (False, True)]
    parameters = model.config.rope_parameters
    for other in (names["model"], chat.model, *merged):
        assert other.config.rope_parameters == parameters
    assert chat.identity()["rope_scaling"] == f"{kind}:20"
    chat.check_length([1] * 1000, Sampling(max_new_tokens=280), "it")

    without = make_lm(peft=str(moved), rope_scaling="none", max_length=1280)
    assert without.loaded.model.config.rope_parameters["rope_type"] == "default"
    assert score(without, prompts) != pytest.approx(expected, abs=1e-3)
    assert "rope_scaling" not in without.session.identity()


def test_a_row_of_thousands_of_tokens(train: Train, tmp_path: Path) -> None:
    """Far beyond the 2,048 tokens of the base, and in a row with a short conversation."""
    long = tmp_path / "long.jsonl"
    common = {"lang": "en"}
    trees = [
        [
            common | {"message_id": f"q{n}", "parent_id": None, "role": "prompter", "text": "Go."},
            common | {"message_id": f"a{n}", "parent_id": f"q{n}", "role": "assistant"}
            | {"text": "ok " * count + "end"},
        ]
        for n, count in enumerate((1050, 5))
    ]  # fmt: skip
    long.write_text("".join(json.dumps(row) + "\n" for tree in trees for row in tree))
    options = {"dataset": long, "quant": "bf16", "max_length": 32768, "rope_scaling": "yarn:16"}
    options |= {"eval_fraction": 0, "max_steps": 1, "batch_size": 2, "checkpointing": "full"}
    assert train(**options, output_dir="fused") == 0
    assert train(**options, output_dir="plain", kernels="none") == 0
    assert read("fused/training_summary.json")["data"]["train"]["tokens"] > 3000
    assert read("fused/training_summary.json")["computation"]["fused_layers"]
    assert losses("fused") == pytest.approx(losses("plain"), abs=1e-5)


def test_the_choice_of_what_to_score(tmp_path: Path, adapter: Path) -> None:
    def pick(**arguments: Any) -> tuple[str | None, str]:
        names = ("pretrained", "peft", "quant", "double_quant", "revision", "peft_revision")
        every = dict.fromkeys((*names, "results_dir")) | arguments
        choice = choose_scored_run(**every)
        return choice.rope_scaling, choice.results_dir.name

    copy = Path(shutil.copytree(adapter, tmp_path / "4bit" / "adapter"))
    assert pick(peft=str(copy)) == (None, "4bit")  # a record of an earlier version
    assert pick(peft=str(copy), rope_scaling="linear:2.0") == ("linear:2", "with_linear_2")
    path = copy / "qlora_harness.json"
    path.write_text(json.dumps(read(path) | {"rope_scaling": "yarn:4"}))
    assert pick(peft=str(copy)) == ("yarn:4", "4bit")
    assert pick(peft=str(copy), rope_scaling="yarn:4.0") == ("yarn:4", "4bit")
    assert pick(peft=str(copy), rope_scaling="none") == (None, "with_none")
    assert pick(pretrained="x/y", rope_scaling="yarn:4") == ("yarn:4", "y_base_16bit_yarn_4")
    message = refused(lambda: pick(peft=str(copy), rope_scaling="ntk:4"), SettingsError)
    assert "rope_scaling" in message
    path.write_text(json.dumps(read(path) | {"rope_scaling": "ntk:4"}))
    assert str(path) in refused(lambda: pick(peft=str(copy)), AdapterError)


def test_results_of_another_scaling_are_those_of_another_model() -> None:
    def same(before: str | None, after: str | None) -> bool:
        models = [
            {"base": "x"} if scaling is None else {"base": "x", "rope_scaling": scaling}
            for scaling in (before, after)
        ]
        record = Evaluation.model_validate({"arm": "4bit", "model": models[0], "tasks": {}})
        return _is_of_same_model(record, {"arm": "4bit", "model": models[1]})

    assert same(None, None)
    assert same("yarn:4", "yarn:4")
    assert not any((same(None, "yarn:4"), same("yarn:4", None), same("yarn:4", "linear:4")))


def test_arms_of_a_study_may_differ_by_scaling() -> None:
    arms = {"short": {"quant": "nf4"}, "long": {"quant": "nf4", "rope_scaling": "yarn:4"}}
    content = {"arms": arms, "tasks": ["mmlu_qlora_demo"], "score_bases": True}
    study = build_study(content, {"max_length": 2048}, None)
    assert [cell.name for cell in study.cells] == ["base_short", "base_long", "short/0", "long/0"]
    scalings = [cell.model_args().get("rope_scaling") for cell in study.cells]
    assert scalings == [None, "yarn:4", None, None]  # an adapter brings its own
    assert "--rope-scaling yarn:4" in study.commands(study.cell("long/0"))[0]

"""Settings: defaults, recipes, flags, and an exact error for each mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_harness.errors import SettingsError
from qlora_harness.locations import recipes_dir
from qlora_harness.recipes import read_recipe
from qlora_harness.settings import (
    Quant,
    Settings,
    field_kind,
    setting_fields,
)
from qlora_harness.settings_checks import build_settings
from qlora_harness.train.command import parse_settings

# The published recipe (artidoro/qlora, scripts/finetune_llama2_guanaco_7b.sh), by our names.
PUBLISHED = {
    "model": "meta-llama/Llama-2-7b-hf", "quant": "nf4", "double_quant": True,
    "compute_dtype": "auto",
    "compute": "bf16", "dataset": "oasst1", "max_length": 512, "lora_r": 64,
    "lora_alpha": 16, "lora_dropout": 0.1, "lora_targets": "all-linear", "max_steps": 1875,
    "epochs": None, "learning_rate": 2e-4, "lr_schedule": "constant",
    "optimizer": "paged_adamw_32bit", "adam_beta2": 0.999, "weight_decay": 0.0,
    "max_grad_norm": 0.3, "group_by_length": True, "checkpointing": "full", "seed": 0,
}  # fmt: skip

# The two deliberate differences from it, and settings it does not state.
OURS = {
    "revision": None, "dataset_revision": None, "languages": "en", "conversations": "best-path",
    "format": "auto", "template": "guanaco", "mask": "prompt", "eval_fraction": 0.05,
    "eval_seed": 0, "eval_steps": None, "batch_size": 1,
    "grad_accum": 16, "eval_batch_size": 8, "warmup_ratio": 0.0, "adapter_dtype": "float32",
    "use_rslora": False, "use_dora": False, "init_lora_weights": "default",
    "kernels": "auto", "memory": None, "output_dir": None, "save_steps": 250,
    "rope_scaling": None, "resume": "auto", "overwrite": False,
    "report_to": "none",
}  # fmt: skip


def parse(*words: str) -> Settings:
    return parse_settings(list(words))[0]


def mistake(*words: str) -> str:
    with pytest.raises(SettingsError) as caught:
        parse_settings(list(words))
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_are_the_published_recipe() -> None:
    assert build_settings({}).flat() == PUBLISHED | OURS


def test_published_recipe_states_every_default() -> None:
    values, _ = read_recipe(recipes_dir() / "qlora-llama2-7b.yaml")
    assert build_settings(values).flat() == build_settings({}).flat()
    # Everything that is part of the published recipe is written out in the file.
    assert set(PUBLISHED) - {"epochs"} <= set(values)


def test_bf16_twin_differs_in_quantisation_only() -> None:
    nf4 = parse("--recipe", "qlora-llama2-7b").flat()
    bf16 = parse("--recipe", "lora-llama2-7b").flat()
    assert {name: (nf4[name], bf16[name]) for name in nf4 if nf4[name] != bf16[name]} == {
        "quant": ("nf4", "bf16")
    }


@pytest.mark.parametrize(
    ("quant", "is_quantised", "is_4bit", "folder", "file_arm"),
    [
        ("nf4", True, True, "results/4bit", "4bit_qlora"),
        ("fp4", True, True, "results/4bit_fp4", "4bit_fp4_qlora"),
        ("int8", True, False, "results/8bit", "8bit_lora"),
        ("hqq", True, False, "results/4bit_hqq", "4bit_hqq_qlora"),
        ("bf16", False, False, "results/16bit", "16bit_lora"),
    ],
)
def test_arms(quant: str, is_quantised: bool, is_4bit: bool, folder: str, file_arm: str) -> None:
    assert parse("--quant", quant).run_dir == Path(folder)
    assert parse("--quant", quant, "--output-dir", "runs/a").run_dir == Path("runs/a")
    assert (Quant(quant).is_quantised, Quant(quant).is_4bit) == (is_quantised, is_4bit)
    assert Quant(quant).file_arm == file_arm


def test_flags_set_their_settings() -> None:
    flat = parse(
        "--quant", "bf16", "--model", "m", "--revision", "r", "--dataset", "d",
        "--languages", "all", "--output-dir", "o", "--max-steps", "7", "--max-length", "99",
        "--batch-size", "2", "--grad-accum", "3", "--learning-rate", "1e-5", "--lora-r", "4",
        "--lora-alpha", "8", "--lora-dropout", "0", "--seed", "5", "--save-steps", "6",
        "--resume", "never", "--overwrite", "--report-to", "wandb",
    ).flat()  # fmt: skip
    assert {name: value for name, value in flat.items() if value != (PUBLISHED | OURS)[name]} == {
        "quant": "bf16", "model": "m", "revision": "r", "dataset": "d", "languages": "all",
        "output_dir": "o", "max_steps": 7, "max_length": 99, "batch_size": 2, "grad_accum": 3,
        "learning_rate": 1e-5, "lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "seed": 5,
        "save_steps": 6, "resume": "never", "overwrite": True, "report_to": "wandb",
    }  # fmt: skip


def test_epochs_negated_flags_and_resume() -> None:
    optimization = parse("--epochs", "1.5", "--no-group-by-length").optimization
    assert (optimization.epochs, optimization.max_steps) == (1.5, None)
    assert optimization.group_by_length is False
    assert parse_settings([])[1] is False  # --resume was not given
    assert parse_settings(["--resume", "auto"])[1] is True


def test_flags_override_the_recipe_and_the_recipe_the_defaults(recipe: Callable[..., Path]) -> None:
    path = recipe("lora_r: 8\nseed: 3\nlearning_rate: 5e-4\n")
    flat = parse("--recipe", str(path), "--seed", "4").flat()
    assert (flat["lora_r"], flat["seed"], flat["learning_rate"]) == (8, 4, 5e-4)
    assert flat["max_grad_norm"] == 0.3


def test_epochs_replace_max_steps_and_the_reverse(recipe: Callable[..., Path]) -> None:
    steps = str(recipe("max_steps: 5\n", "steps.yaml"))
    epochs = str(recipe("epochs: 2\n", "epochs.yaml"))
    optimization = parse("--recipe", steps, "--epochs", "3").optimization
    assert (optimization.max_steps, optimization.epochs) == (None, 3.0)
    optimization = parse("--recipe", epochs, "--max-steps", "9").optimization
    assert (optimization.max_steps, optimization.epochs) == (9, None)
    optimization = parse("--recipe", str(recipe("extends: steps\nepochs: 3\n"))).optimization
    assert (optimization.max_steps, optimization.epochs) == (None, 3.0)


def test_recipe_extends_a_neighbour_or_an_included_recipe(recipe: Callable[..., Path]) -> None:
    recipe("lora_r: 8\nseed: 3\n", "base.yaml")
    middle = recipe("extends: base\nseed: 4\n", "middle.yaml")
    top = recipe("extends: middle.yaml\nlora_alpha: 2\n", "top.yaml")
    assert read_recipe(middle)[0] == {"lora_r": "8", "seed": "4"}
    assert read_recipe(top)[0] == {"lora_r": "8", "seed": "4", "lora_alpha": "2"}
    flat = parse("--recipe", str(recipe("extends: lora-llama2-7b\nlora-r: 8\n"))).flat()
    assert (flat["quant"], flat["lora_r"], flat["lora_alpha"]) == ("bf16", 8, 16)


def test_extends_is_relative_to_the_recipe_not_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, rank in (("recipes", 8), ("elsewhere", 16)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "base.yaml").write_text(f"lora_r: {rank}\n")
    (tmp_path / "recipes" / "mine.yaml").write_text("extends: base.yaml\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert parse("--recipe", str(tmp_path / "recipes" / "mine.yaml")).lora.lora_r == 8


@pytest.mark.parametrize("reference", ["mine", "mine.yaml", "../{folder}/mine.yaml"])
def test_recipe_that_extends_itself(
    recipe: Callable[..., Path], tmp_path: Path, reference: str
) -> None:
    path = recipe(f"extends: {reference.format(folder=tmp_path.name)}\n")
    with pytest.raises(SettingsError, match="extends itself"):
        read_recipe(path)


def test_error_names_the_source_of_the_value(recipe: Callable[..., Path]) -> None:
    base = recipe("lora_r: 0\n", "base.yaml")
    top = recipe("extends: base\nseed: 1\n", "top.yaml")
    assert mistake("--recipe", str(top)).startswith(f"recipe {base}, key 'lora_r': 0 is out of ")
    assert mistake("--recipe", str(top), "--lora-r", "-1").startswith("--lora-r: -1 is out of ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--learing-rate", "1"], "flag --learing-rate is not known. did you mean '--learning-"),
        (["--zzz"], "flag --zzz is not known. `launch/train.py --help` "),
        (["--quant", "int4"], "--quant: 'int4' is not one of nf4, fp4, int8, hqq, bf16. "),
        (["--init-lora-weights", "loftq", "--quant", "fp4"], "--init-lora-weights loftq with "),
        (["--init-lora-weights", "pissa"], "--init-lora-weights pissa with --quant nf4: "),
        (
            ["--init-lora-weights", "pissa", "--quant", "bf16", "--adapter-dtype", "bfloat16"],
            "--init-lora-weights pissa with --adapter-dtype bfloat16: ",
        ),
        (["--init-lora-weights", "loftq", "--use-dora"], "--init-lora-weights loftq with --use-"),
        (["--quant", "int8", "--checkpointing", "offload"], "--checkpointing offload needs fused"),
        (["--use-dora", "--quant", "int8"], "--use-dora with --quant int8: "),
        (["--use-dora", "--checkpointing", "selective"], "--checkpointing selective needs fused"),
        (["--compute", "fp8", "--quant", "int8"], "--compute fp8 with --quant int8: "),
        (["--compute", "fp8", "--use-dora"], "--compute fp8 with --use-dora: "),
        (["--compute", "fp8", "--kernels", "none"], "--compute fp8 with --kernels none: "),
        (["--compute", "fp8", "--compute-dtype", "float32"], "--compute fp8 with --compute-dtype "),
        (["--compute", "fp8", "--compute-dtype", "float16"], "--compute fp8 with --compute-dtype "),
        (
            ["--compute-dtype", "float16", "--adapter-dtype", "bfloat16"],
            "--adapter-dtype bfloat16 ",
        ),
        (
            ["--compute-dtype", "float16", "--checkpointing", "selective"],
            "--checkpointing selective",
        ),
        (["--quant"], "argument --quant: expected one argument. `launch/train.py --help` "),
        (["--max-steps", "1.5"], "--max-steps: '1.5' is not a whole number. "),
        (["--learning-rate", "x"], "--learning-rate: 'x' is not a number. "),
        (["--learning-rate", "nan"], "--learning-rate: 'nan' is not a number. "),
        (["--languages", ""], "--languages: '' is not a text. "),
        (["--max-steps", "0"], "--max-steps: 0 is out of range. It must be at least 1."),
        (["--epochs", "0"], "--epochs: 0.0 is out of range. It must be above 0."),
        (["--lora-dropout", "1"], "--lora-dropout: 1.0 is out of range. It must be from 0 to 0."),
        (["--epochs", "1", "--max-steps", "2"], "--max-steps (2) and --epochs (1.0) exclude each "),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], line: str) -> None:
    assert mistake(*words).startswith(line)


NUMBERS = [name for name, (_, f) in setting_fields().items() if field_kind(f) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_lower_limit(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    assert mistake(f"{flag}=-1").startswith(f"{flag}: -1")
    assert "is out of range. It must be " in mistake(f"{flag}=-1")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("learing_rate: 1\n", "key 'learing_rate' is not known. did you mean 'learning_rate'?"),
        ("7: 1\n", "key '7' is not known"),
        ("languages: {en: de}\n", "key 'languages': {'en': 'de'} is not a text"),
        ("double_quant: 1\n", "key 'double_quant': '1' is not true or false"),
        ("max_steps: true\n", "key 'max_steps': 'true' is not a whole number"),
        ("seed: null\n", "key 'seed': None is not a whole number"),
        (f"max_steps: {10**400}\n", "key 'max_steps': "),
        ("extends: nope\n", "key 'extends': there is no recipe 'nope'"),
    ],
)
def test_mistakes_in_a_recipe_name_file_key_and_value(
    recipe: Callable[..., Path], text: str, problem: str
) -> None:
    path = recipe(text)
    assert mistake("--recipe", str(path)).startswith(f"recipe {path}, {problem}")


def test_steps_and_epochs_in_one_recipe(recipe: Callable[..., Path]) -> None:
    path = recipe("max_steps: 5\nepochs: 2\n")
    line = mistake("--recipe", str(path))
    for key in ("'max_steps' (5)", "'epochs' (2.0)"):
        assert f"recipe {path}, key {key}" in line


def test_recipe_that_is_missing_or_not_a_mapping(recipe: Callable[..., Path]) -> None:
    line = mistake("--recipe", "nope")
    assert line.startswith("--recipe: there is no recipe 'nope'. ")
    assert "demo, lora-llama2-7b, qlora-llama2-7b" in line
    path = recipe("- 1\n")
    assert mistake("--recipe", str(path)).startswith(f"recipe {path} holds a list, ")
    path = recipe("a: [\n")
    assert re.match(f"recipe {path} is not YAML: .*line 2", mistake("--recipe", str(path)))


_HELP = """
import json, sys
from qlora_harness.train.command import main
try:
    main(["--help"])
except SystemExit as stop:
    status = stop.code
heavy = ["torch", "transformers", "peft", "datasets", "lm_eval", "accelerate", "numpy"]
print(json.dumps({"status": status, "heavy": [m for m in heavy if m in sys.modules]}))
"""


@pytest.fixture(scope="module")
def help_output() -> str:
    environment = {"COLUMNS": "10000", "PATH": ""}
    words = [sys.executable, "-c", _HELP]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    return done.stdout


def test_help_imports_nothing_heavy(help_output: str) -> None:
    assert json.loads(help_output.splitlines()[-1]) == {"status": 0, "heavy": []}


@pytest.mark.parametrize("name", list(setting_fields()))
def test_help_states_unit_and_default_of_every_setting(help_output: str, name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    # argparse breaks the line after a long flag.
    entry = re.search(rf"^  {flag}[ ,].*?(?=^  -|^$)", help_output, re.MULTILINE | re.DOTALL)
    assert entry is not None
    text = " ".join(entry.group().split())
    field = setting_fields()[name][1]
    assert field.metadata["help"] in text
    assert field.metadata["unit"] in text
    for choice in field.metadata["choices"] or ():
        assert choice in text
    if field.default is not None:
        shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
        assert f"default {shown}" in text
    elif name != "epochs":  # the default is that of --max-steps
        assert "default" in text  # a setting without a default explains what happens then


def test_examples_in_the_help_are_valid(help_output: str) -> None:
    commands = re.findall(r"accelerate launch launch/train\.py (.*)", help_output)
    assert len(commands) == 4
    for command in commands:
        parse(*command.split())


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Values of a setting as `flat()` gives them."""
    f = setting_fields()[name][1]
    kind = field_kind(f)
    choices = f.metadata["choices"]
    spans = {"lora_dropout": 0.99, "warmup_ratio": 1.0, "eval_fraction": 0.5, "adam_beta2": 0.99}
    if choices:
        strategy: st.SearchStrategy[Any] = st.sampled_from(choices)
    elif name == "memory":
        strategy = st.sampled_from(["fast", "lean", "16", "7.5"])
    elif name == "rope_scaling":
        strategy = st.sampled_from(["linear:1.5", "dynamic:2", "yarn:4"])
    elif kind is str:
        strategy = st.text("abcdefgh0123456789/._-", min_size=1, max_size=12)
    elif kind is bool:
        strategy = st.booleans()
    elif kind is int:
        strategy = st.integers(8, 10**6)
    else:
        strategy = st.floats(1e-9, spans.get(name, 1e6))
    return st.one_of(st.none(), strategy) if f.default is None else strategy


@given(st.fixed_dictionaries({name: values_of(name) for name in setting_fields()}))
def test_settings_round_trip_through_their_flat_form(values: dict[str, Any]) -> None:
    if values["epochs"] is not None:
        values["max_steps"] = None
    # Their other values exclude some quantisations.
    values |= {"init_lora_weights": "eva", "checkpointing": "full", "use_dora": False}
    values |= {"compute": "bf16", "adapter_dtype": "float32"}
    settings = build_settings(values)
    assert build_settings(settings.flat()) == settings


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("memory: 16", "16"), ("memory: 7.5", "7.5"), ("memory: fast", "fast"),
        ("memory: 16.125", "16.125"), ("output_dir: 2024", "2024"),
        ("lora_targets: [q_proj, v_proj]", "q_proj,v_proj"),
        ("lora-targets: q_proj,v_proj", "q_proj,v_proj"),
        ("languages: [en, de]", "en,de"), ("languages: [no, en]", "no,en"),
        ("revision: 1234567", "1234567"), ("revision: 2024-01-01", "2024-01-01"),
        ("revision: 0123456", "0123456"), ("revision: 1.10", "1.10"),
        ("revision: 12:30", "12:30"), ("revision: 1_000", "1_000"),
        ("revision: off", "off"), ("revision: null", None),
        ("lora_r: 010", 10), ("lora_r: 16", 16), ("learning_rate: 2e-4", 2e-4),
        ("epochs: 3", 3.0), ("double_quant: Off", False), ("group_by_length: no", False),
    ],
)  # fmt: skip
def test_recipe_values_in_yaml(tmp_path: Path, line: str, value: object) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(line)
    name = line.split(":")[0].replace("-", "_")
    assert build_settings(*read_recipe(path)).flat()[name] == value


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nlora_r: *x", "lora_r: 8\nlora_r: 9", "lora-r: 8\nlora_r: 9",
        "<<: {lora_r: 9}", "seed: 1:30", "lora_r: 0x10", 'output_dir: "a\\0b"', 'model: "\\ud800"',
        'dataset: "\\e[31m"', "a: &a [x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]",
        "lora_r: " + "9" * 5000, "lora_r: " + "[" * 3000, "model: \x00", "model: {a: {b: c}}",
        "languages: [[en]]", "lora_r: .nan", "seed: 2024-01-01", "model: [a, b]", "x" * 200_000,
        "? [a]\n: b", "!!python/object/apply:os.system ['true']", "model: !!binary aGk=",
        "\x1b]0;owned\x07: 1",
    ],
    ids=range(23),
)  # fmt: skip
def test_unusual_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        build_settings(*read_recipe(path))
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) <= 480


@pytest.mark.parametrize(
    ("value", "text"),
    [(16, "16"), (16.0, "16"), (7.123456789, "7.123456789"), (10**39, f"{10**39}")],
)
def test_numbers_given_for_texts_keep_their_digits(value: float, text: str) -> None:
    assert build_settings({"revision": value}).model.revision == text


@pytest.mark.parametrize(
    "value", [10**5000, float("nan"), float("inf"), "\udcff", "a\0b"], ids=range(5)
)
def test_unstorable_texts_are_refused(value: object) -> None:
    with pytest.raises(SettingsError):
        build_settings({"revision": value})

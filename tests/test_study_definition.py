"""A study file and flags become cells, or one line that says what is wrong."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_harness.errors import HarnessError, SettingsError
from qlora_harness.study.command import run
from qlora_harness.study.definition import Study, build_study, read_study
from qlora_harness.train.command import parse_settings

CONTENT: dict[str, Any] = {
    "name": "s",
    "settings": {"model": "m", "max_steps": 3, "learning-rate": "1e-3"},
    "arms": {"nf4": {"quant": "nf4"}, "single": {"quant": "nf4", "double_quant": False}},
    "seeds": 2,
    "tasks": "a, b",
}


def study(**changes: Any) -> Study:
    return build_study({**CONTENT, **changes}, {})


def test_cells_are_arms_times_seeds() -> None:
    made = study()
    assert [cell.name for cell in made.cells] == ["nf4/0", "nf4/1", "single/0", "single/1"]
    assert [cell.settings.optimization.seed for cell in made.cells] == [0, 1, 0, 1]
    assert {cell.settings.optimization.learning_rate for cell in made.cells} == {0.001}
    assert [str(cell.folder) for cell in made.cells][1:3] == [
        "results/s/nf4/seed_1",
        "results/s/single/seed_0",
    ]
    assert made.tasks == ("a", "b")


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [(1, [0]), ("3", [0, 1, 2]), ("4,7", [4, 7]), (["5"], [5]), ([2, 0], [2, 0])],
)
def test_seeds_are_a_number_or_a_list(seeds: Any, expected: list[int]) -> None:
    assert [c.seed for c in study(seeds=seeds).cells if c.arm == "nf4"] == expected


def test_an_arm_may_have_its_own_seeds() -> None:
    arms = {"nf4": {"quant": "nf4"}, "bf16": {"quant": "bf16", "seeds": [8]}}
    assert [c.name for c in study(arms=arms).cells] == ["nf4/0", "nf4/1", "bf16/8"]


def test_a_base_is_scored_once_for_each_quantisation() -> None:
    arms = {**CONTENT["arms"], "wide": {"quant": "nf4", "lora_r": 128}}
    made = study(arms=arms, score_bases=True)
    assert [cell.name for cell in made.cells if cell.seed is None] == ["base_nf4", "base_single"]
    assert made.cell("base_single").model_args() == {
        "pretrained": "m",
        "quant": "nf4",
        "double_quant": False,
        "results_dir": "results/s/base_single",
    }


def test_the_commands_of_a_cell_have_its_settings() -> None:
    made = study()
    cell = made.cell("single/1")
    train, score = made.commands(cell)
    program, words = shlex.split(train)[:3], shlex.split(train)[3:]
    assert program == ["accelerate", "launch", "launch/train.py"]
    assert parse_settings(words)[0] == cell.settings
    assert shlex.split(score)[4:] == [
        *(
            "--model_args",
            "peft=results/s/single/seed_1/adapter,results_dir=results/s/single/seed_1",
        ),
        *("--tasks", "a,b", "--batch_size", "16"),
        *("--output_path", "results/s/single/seed_1/lm_eval", "--log_samples"),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [1, 1]}, ["seed 1"]),
        ({"seeds": 0}, ["seeds"]),
        ({"seeds": "x"}, ["seeds", "x"]),
        ({"arms": {}}, ["arms"]),
        ({"arms": ["nf4"]}, ["arms"]),
        ({"arms": {"a": {}}}, ["'a'", "quant"]),
        ({"arms": {"a": {"quant": "nf5"}}}, ["'a'", "quant", "nf5"]),
        ({"arms": {"a": {"quant": "nf4"}, "b": {"quant": "nf4"}}}, ["'a'", "'b'"]),
        (
            {"arms": {"a": {"quant": "bf16"}, "b": {"quant": "bf16", "double_quant": False}}},
            ["'a'", "'b'"],
        ),
        ({"arms": {"a": {"quant": "nf4", "lora_rank": 3}}}, ["'a'", "lora_rank", "lora_r"]),
        ({"arms": {"a": {"quant": "nf4", "dataset": "x"}}}, ["'a'", "dataset"]),
        ({"arms": {"a": {"quant": "nf4", "seed": 1}}}, ["'a'", "seed"]),
        ({"arms": {"a": {"quant": "nf4", "save_steps": 1}}}, ["'a'", "save_steps"]),
        ({"arms": {"a": {"quant": "nf4", "seeds": [3, 3]}}}, ["'a'", "seed 3"]),
        ({"arms": {"../a": {"quant": "nf4"}}}, ["'../a'"]),
        ({"arms": {"base_a": {"quant": "nf4"}}}, ["'base_a'"]),
        ({"settings": {"quant": "nf4"}}, ["quant"]),
        ({"settings": {"seed": 3}}, ["seed"]),
        ({"settings": {"max_step": 3}}, ["max_step", "max_steps"]),
        ({"score_bases": True, "tasks": None}, ["score_bases", "tasks"]),
        ({"score_batch_size": "k"}, ["score_batch_size", "'k'"]),
        ({"arms": {"study.json": {"quant": "nf4"}}}, ["'study.json'"]),
        ({"task": "a"}, ["task", "tasks"]),
        ({"name": "a/b"}, ["'a/b'"]),
    ],
)
def test_a_mistake_is_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        study(**changes)
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_a_file_is_read_and_flags_override_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, "name": None}))
    made = build_study(read_study(path), {"max_steps": "9", "output_dir": str(tmp_path)}, path)
    assert made.cells[0].settings.optimization.max_steps == 9
    assert made.folder == tmp_path
    assert build_study(read_study(path), {}, path).folder == Path("results/mine")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--arms", "nf4,nf5"], ["--arms", "nf5"]),
        (["--arms", "nf4,nf4"], ["--arms", "nf4"]),
        ([], ["arms"]),
        (["--arms", "nf4", "--cell", "nf4/7"], ["--cell", "nf4/7", "nf4/0"]),
        (["--arms", "nf4", "--quant", "nf4"], ["--quant"]),
        (["--arms", "nf4", "--seed", "4"], ["--seed", "--seeds"]),
        (["nowhere.yaml"], ["nowhere.yaml"]),
        (["--arms", "nf4", "--measure-steps", "-1"], ["--measure-steps"]),
    ],
)
def test_a_wrong_flag_is_named(words: list[str], parts: list[str]) -> None:
    with pytest.raises(HarnessError) as caught:
        run(words)
    assert all(part in str(caught.value) for part in parts), caught.value

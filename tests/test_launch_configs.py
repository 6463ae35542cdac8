"""launch/accelerate/: accelerate reads every file, and its command is one of the launcher."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import REPOSITORY

from qlora_harness.train.command import parse_settings

FILES = {
    "one_gpu": "NO",
    "ddp": "MULTI_GPU",
    "fsdp2_qlora": "FSDP",
    "deepspeed_zero2": "DEEPSPEED",
    "multi_node": "MULTI_GPU",
}


def test_every_file_is_known() -> None:
    assert {path.stem for path in folder().iterdir()} == set(FILES)


def folder() -> Path:
    return REPOSITORY / "launch" / "accelerate"


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(folder() / f"{name}.yaml"))  # refuses unknown keys
    assert config.distributed_type == FILES[name]
    assert config.mixed_precision == "no"  # the training command casts
    assert config.num_processes % config.num_machines == 0
    # The keys of an engine are flags of accelerate.
    flags = {action.dest for action in launch_command_parser()._actions}
    for key in (*(config.fsdp_config or {}), *(config.deepspeed_config or {})):
        assert key in flags


@pytest.mark.parametrize("name", FILES)
def test_its_command_is_well_formed(name: str) -> None:
    lines = (folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    commands = [line[2:].strip() for line in lines if line.startswith("#   accelerate launch ")]
    assert len(commands) == 1
    words = shlex.split(commands[0])[2:]
    args = launch_command_parser().parse_args(words)
    assert args.config_file == f"launch/accelerate/{name}.yaml"
    assert args.training_script == "launch/train.py"
    settings, _ = parse_settings(args.training_script_args)
    assert settings.quant.value == "nf4"

"""launch/accelerate/: accelerate reads every file, and its command is one of the launcher."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from conftest import REPOSITORY
from torch.distributed import DistError

from qlora_harness.train.command import parse_settings

FILES = {
    "one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2_qlora": "FSDP", "deepspeed_zero2": "DEEPSPEED",
    "multi_node": "MULTI_GPU",
}  # fmt: skip


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


def commands_of(name: str) -> list[str]:
    lines = (folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    start = "#   accelerate launch "
    return [line.removeprefix(start) for line in lines if line.startswith(start)]


@pytest.mark.parametrize("name", FILES)
def test_its_commands_train_by_the_published_recipe(name: str) -> None:
    """One for each machine; a step has 16 conversations."""
    all_args = [launch_command_parser().parse_args(shlex.split(line)) for line in commands_of(name)]
    config = load_config_from_file(str(folder() / f"{name}.yaml"))
    assert len(all_args) == config.num_machines
    for machine, args in enumerate(all_args):
        assert args.config_file == f"launch/accelerate/{name}.yaml"
        assert args.training_script == "launch/train.py"
        assert (args.machine_rank or 0) == machine
        settings, _ = parse_settings(args.training_script_args)
        assert settings.quant.value == "nf4"
        optimization = settings.optimization
        processes = args.num_processes or config.num_processes
        assert optimization.batch_size * optimization.grad_accum * processes == 16


@pytest.mark.parametrize("machine", [0, 1])
def test_a_machine_that_does_not_come_ends_the_run(
    machine: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = commands_of("multi_node")[machine].replace("timeout=300", "timeout=1")
    command = command.replace("node0", f"127.0.0.1 --main_process_port {port}")
    with pytest.raises(DistError):
        launch_command(launch_command_parser().parse_args(shlex.split(command)))

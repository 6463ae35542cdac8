"""The processes that train together: their devices, work for the main process only, their end."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qlora_harness.errors import (
    HarnessError,
    SettingsError,
    TrainingError,
    first_line,
    printable,
)
from qlora_harness.train.heartbeat import Heartbeat, OnLoss
from qlora_harness.train.process import restarts

_YES = ("1", "true", "yes")
FSDP = "QLORA_HARNESS_FSDP"  # in the environment: Trainer empties PartialState
_Result = TypeVar("_Result")
# How long the others wait for a process, for example while the first one encodes the data.
_TIMEOUT = timedelta(minutes=30)


def start_processes(*, fsdp: bool = False) -> PartialState:
    """Joins the other processes, on the CPU with `accelerate launch --cpu` or without a GPU.

    With `fsdp`, or a launcher that was told to use it, the base is spread over the processes, see
    `model.sharded`. Raises SettingsError if one process sees several GPUs: Trainer would use all.
    """
    prepare_accelerate()
    if fsdp:
        os.environ[FSDP] = "true"
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in _YES or not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=_TIMEOUT, **_own_store())
    if not state.is_main_process:
        logging.getLogger("qlora_harness").setLevel(logging.ERROR)  # so that warnings appear once
    if state.device.type == "cuda" and state.num_processes == 1 and torch.cuda.device_count() > 1:
        raise SettingsError(
            f"{torch.cuda.device_count()} GPUs are visible to one process",
            "Use `accelerate launch --multi_gpu launch/train.py …`, or set CUDA_VISIBLE_DEVICES=0",
        )
    return state


def watched(state: PartialState, on_loss: OnLoss = lambda error: None) -> Any:
    """Returns a context in which this process ends if another one is stopped or vanishes."""
    several = state.num_processes > 1
    return Heartbeat(*_meet("heartbeat"), on_loss) if several else contextlib.nullcontext()


def prepare_accelerate() -> None:
    """Hides from accelerate that it was told to use FSDP, as its FSDP2 leaves packed weights whole.

    Without a GPU, accelerate joins processes only if ACCELERATE_USE_CPU is set.
    """
    if os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in _YES:
        os.environ[FSDP] = "true"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def shards_base(state: PartialState) -> bool:
    """Whether the base is spread over processes: several were launched, with FSDP."""
    return state.num_processes > 1 and FSDP in os.environ


def _own_store() -> dict[str, Any]:
    """Returns what processes restarted by torchrun need to join each other.

    torch 2.13 leaves the addresses of those before in the launcher's store.
    """
    if restarts() == 0 or torch.distributed.is_initialized():
        return {}
    return dict(zip(("store", "rank", "world_size"), _meet("attempt"), strict=True))


def _meet(name: str) -> tuple[PrefixStore, int, int]:
    """Returns the store of the processes of this attempt, the rank, and their number."""
    store, rank, processes = next(rendezvous("env://", timeout=_TIMEOUT))
    return PrefixStore(f"{name}_{restarts()}", store), rank, processes


def device_of(state: PartialState) -> torch.device:
    """Returns the device of this process."""
    if state.device.type != "cuda":
        return torch.device(state.device.type)
    # The local rank: the global one may exceed the GPUs of this machine.
    return torch.device("cuda", state.local_process_index)


def on_main(state: PartialState, work: Callable[[], _Result]) -> _Result:
    """Returns the main process's result on every process.

    Its HarnessError ends all of them, and is printed once.
    """
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome[0] = work()
        except HarnessError as error:
            outcome[0] = error
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(outcome)
    if isinstance(outcome[0], HarnessError):
        raise for_all(state, outcome[0])
    result: _Result = outcome[0]
    return result


def for_all(state: PartialState, error: HarnessError) -> BaseException:
    """Returns what each process raises for an error of all of them, which is printed once."""
    return error if state.is_main_process else SystemExit(error.exit_status)


def lost_process(error: BaseException) -> TrainingError | None:
    """Returns the error to raise if another process ended or hangs, else None."""
    lost = isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )
    if not lost:
        return None
    cause = first_line(error).split(". ")[0]
    return TrainingError(
        f"another process of this run ended or doesn't answer ({cause})",
        "See its own error; the same command resumes from the last checkpoint",
    )


def say(state: PartialState, text: str) -> None:
    """Prints a text on the main process, with control characters escaped."""
    if state.is_main_process:
        print(printable(text, keep="\n"), flush=True)

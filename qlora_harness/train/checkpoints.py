"""The checkpoints of a run: which is the newest that can be read?

They are read on trial, by header and checksum; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qlora_harness.errors import RunError
from qlora_harness.model.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from qlora_harness.record import TRAINER_STATE_FILE

_NAME = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")
_ZIPPED = ("optimizer.pt", "scheduler.pt")
_END_BYTES = 22  # the record at the end of a zip archive
_RANDOM_STATE = "rng_state*.pth"
_STATE_TYPES: dict[str, type | tuple[type, ...]] = {
    "epoch": (int, float),
    "max_steps": int,
    "num_train_epochs": int,
    "total_flos": (int, float),
    "log_history": list,
    "stateful_callbacks": dict,
}


def is_checkpoint_name(name: str) -> bool:
    """Returns whether a folder's name is that of a checkpoint, which says its step.

    Args:
        name: For example "checkpoint-250".
    """
    return _NAME.fullmatch(name) is not None


def checkpoint_step(checkpoint: Path) -> int:
    """Returns the step of a checkpoint-N folder.

    Args:
        checkpoint: The folder.
    """
    return int(checkpoint.name.rsplit("-", 1)[1])


def all_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoint-N folders in a folder, newest first.

    Args:
        folder: Need not exist.
    """
    paths = [path for path in folder.glob("checkpoint-*") if is_checkpoint_name(path.name)]
    return sorted(paths, key=checkpoint_step, reverse=True)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Finds the newest checkpoint that can be read.

    Args:
        folder: The folder of checkpoint-N folders; need not exist.

    Returns:
        The checkpoint, or None, and what is wrong with each newer one.

    Raises:
        RunError: There are checkpoints, all were saved to the end, and none can be read.
    """
    passed_over: list[str] = []
    saved = 0
    for path in all_checkpoints(folder):
        problem = fault(path)
        if problem is None:
            return path, passed_over
        passed_over.append(f"{path.name}: {problem}")
        saved += _was_saved(path)
    if saved:
        raise RunError(
            f"{folder} holds no checkpoint that can be read ({'; '.join(passed_over)[:250]})",
            "Restore one, use --overwrite to start again, or another --output-dir",
        )
    return None, passed_over


def _was_saved(checkpoint: Path) -> bool:
    """Whether it was saved to the end: Trainer writes its state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return True


def fault(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None for one that can be resumed from.

    Args:
        checkpoint: A checkpoint-N folder.
    """
    random_states = sorted(path.name for path in checkpoint.glob(_RANDOM_STATE))
    names = [WEIGHTS_FILE, CONFIG_FILE, *_ZIPPED, *(random_states or ["rng_state.pth"])]
    for name in (*names, TRAINER_STATE_FILE):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if not path.stat().st_size:
            return f"{name} is empty"
        try:
            problem = _unreadable(path, checkpoint_step(checkpoint))
        except Exception as error:  # the parsers of damaged files raise many kinds
            problem = f"can't be read ({type(error).__name__})"
        if problem is not None:
            return f"{name} {problem}"
    return None


def _unreadable(path: Path, step: int) -> str | None:
    """What is wrong with one file; other faults are raised."""
    if path.suffix == ".safetensors":
        adapter_shapes(path)
    elif path.suffix == ".json":
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            return "holds no JSON object"
        return _wrong_state(content, step) if path.name == TRAINER_STATE_FILE else None
    else:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            file.seek(-_END_BYTES, os.SEEK_END)
            ends = file.read(4) == b"PK\5\6"  # torch reads no archive with anything behind it
            return None if ends and archive.testzip() is None else "is damaged"
    return None


def _wrong_state(state: dict[str, Any], step: int) -> str | None:
    if state.get("global_step") != step:
        return f"says step {str(state.get('global_step'))[:20]}"
    for name, kind in _STATE_TYPES.items():
        if not isinstance(state.get(name), kind) or isinstance(state.get(name), bool):
            return f"has no valid {name}"
    return None


def adapter_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a safetensors file, from its header.

    Args:
        path: The file; its length is checked as well.
    """
    with safe_open(str(path), framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def check_fits(checkpoint: Path, model: Any) -> None:
    """Refuses a checkpoint whose adapter is not that of a model.

    Args:
        checkpoint: A checkpoint-N folder without fault.
        model: A PEFT model with the adapter of this run.

    Raises:
        RunError: Names or shapes differ.
    """
    from peft import get_peft_model_state_dict

    expected = {
        name: tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    there = adapter_shapes(checkpoint / WEIGHTS_FILE)
    for name in sorted(expected.keys() | there.keys()):
        if expected.get(name) != there.get(name):
            shapes = [s.get(name, "missing") for s in (there, expected)]
            raise RunError(
                f"{checkpoint} does not fit this model: {name} is {shapes[0]} there and "
                f"{shapes[1]} here",
                "Resume with the model and the LoRA flags of its run",
            )

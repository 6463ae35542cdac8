"""The checkpoints of a run, checked by header and checksum without unpickling anything."""

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
_END_BYTES = 22  # the record at the end of a zip archive


def is_checkpoint_name(name: str) -> bool:
    """Returns whether a folder name is checkpoint-N."""
    return _NAME.fullmatch(name) is not None


def checkpoint_step(checkpoint: Path) -> int:
    """Returns the step of a checkpoint-N folder."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def run_of(checkpoint: Path) -> Path:
    """Returns the run folder that a checkpoint belongs to."""
    return checkpoint.absolute().parent.parent


def all_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoint-N folders in a folder, newest first."""
    paths = [path for path in folder.glob("checkpoint-*") if is_checkpoint_name(path.name)]
    return sorted(paths, key=checkpoint_step, reverse=True)


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest intact checkpoint and the newer ones' faults; RunError if all are bad."""
    faults: list[str] = []
    completed = False
    for path in all_checkpoints(folder):
        problem = fault(path)
        if problem is None:
            return path, faults
        faults.append(f"{path.name}: {problem}")
        completed = completed or _was_completed(path)
    if completed:
        raise RunError(
            f"{folder} holds no intact checkpoint ({'; '.join(faults)[:250]})",
            "Restore one, use --overwrite to start again, or another --output-dir",
        )
    return None, faults


def _was_completed(checkpoint: Path) -> bool:
    try:  # Trainer writes its state last
        json.loads((checkpoint / TRAINER_STATE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return True


def fault(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None if a run can resume from it."""
    random_states = sorted(path.name for path in checkpoint.glob("rng_state*.pth"))
    names = [WEIGHTS_FILE, CONFIG_FILE, "optimizer.pt", "scheduler.pt"]
    names += [path.name for path in checkpoint.glob("scaler.pt")]  # with float16 only
    for name in (*names, *(random_states or ["rng_state.pth"]), TRAINER_STATE_FILE):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            problem = _damage(path)
        except Exception as error:  # noqa: BLE001  # the parsers of damaged files raise many kinds
            return f"{name} can't be read ({type(error).__name__})"
        if problem is not None:
            return f"{name} {problem}"
    return None


def _damage(path: Path) -> str | None:
    """Returns what is wrong with a file, or raises what its parser raises."""
    if path.suffix == ".safetensors":
        _tensor_shapes(path)  # raises if header and length don't agree
    elif path.suffix == ".json":
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            return "holds no JSON object"
        step = content.get("global_step")
        if path.name == TRAINER_STATE_FILE and step != checkpoint_step(path.parent):
            return f"says step {str(step)[:20]}"
    else:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            file.seek(-_END_BYTES, os.SEEK_END)
            ends = file.read(4) == b"PK\5\6"  # torch refuses an archive with bytes after its end
            return None if ends and archive.testzip() is None else "is damaged"
    return None


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(str(path), framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def check_fits(checkpoint: Path, model: Any) -> None:
    """Raises RunError if a checkpoint's tensors differ from a PEFT model's in name or shape."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    saved = _tensor_shapes(checkpoint / WEIGHTS_FILE)
    for name in sorted(expected.keys() | saved.keys()):
        if expected.get(name) != saved.get(name):
            raise RunError(
                f"{checkpoint} does not fit this model: {name} is {saved.get(name, 'missing')} "
                f"there and {expected.get(name, 'missing')} here",
                "Resume with the model and the LoRA flags of its run",
            )


def cannot_be_loaded(checkpoint: Path | str, error: Exception) -> RunError:
    """Returns the error for an exception that torch or PEFT raised while loading a checkpoint."""
    reason = (str(error).strip().splitlines() or [""])[0][:120]
    return RunError(
        f"{checkpoint} can't be loaded ({type(error).__name__}: {reason})",
        "Remove it to resume from an older one, or use another --output-dir",
    )

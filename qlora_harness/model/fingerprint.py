"""What tells base models apart, whatever they are called and however they are quantised."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads; a folder may hold others beside them."""
    single = folder / "model.safetensors"
    if single.is_file():  # then transformers doesn't look at an index
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    # As transformers reads it, which has loaded the model by now.
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def checkpoint_fingerprint(name_or_path: str, revision: str | None) -> str | None:
    """Hashes the first row of every tensor of a checkpoint, as bfloat16, by name.

    A mirror in another sharding or in float16 has the same hash; a merged adapter changes it. The
    checkpoint is a folder, or a Hub id that is in the cache. Returns "sha256:" and 64 hexadecimal
    digits, or None for a checkpoint without safetensors files.
    """
    import torch
    from safetensors import safe_open

    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    name_or_path,
                    revision=revision,
                    local_files_only=True,
                    allow_patterns=["*.safetensors", "*.index.json"],
                )
            )
        except Exception:  # noqa: BLE001  # no cached snapshot: nothing to compare with
            return None
    rows: dict[str, bytes] = {}
    for path in _weight_files(folder):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                tensor = file.get_slice(name)
                row = tensor[:1] if tensor.get_shape() else file.get_tensor(name).reshape(1)
                rows[name] = row.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    if not rows:
        return None
    digest = hashlib.sha256()
    for name in sorted(rows):
        digest.update(name.encode() + b"\0" + rows[name])
    return f"sha256:{digest.hexdigest()}"

"""A fingerprint of a base model's weights, the same under any name and quantisation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that transformers reads, which need not be all."""
    single = folder / "model.safetensors"
    if single.is_file():  # transformers then ignores the index
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def checkpoint_folder(name_or_path: str, revision: str | None, *, local_files_only: bool) -> Path:
    """Returns the folder of a checkpoint's safetensors files; a Hub id's comes from the cache."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name_or_path,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=["*.safetensors", "*.index.json"],
        )
    )


def checkpoint_fingerprint(name_or_path: str, revision: str | None) -> str | None:
    """Hashes the first row of every tensor, as bfloat16, in the order of names.

    Resharding or float32 doesn't change the hash; merging an adapter does. The checkpoint is a
    folder or a cached Hub id. Returns "sha256:…", or None if it has no safetensors files.
    """
    import torch
    from safetensors import safe_open

    try:
        folder = checkpoint_folder(name_or_path, revision, local_files_only=True)
    except Exception:  # noqa: BLE001  # no cached snapshot
        return None
    rows: dict[str, bytes] = {}
    for path in weight_files(folder):
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

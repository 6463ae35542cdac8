"""Runs TRL's and Unsloth's trainers, and vLLM, each in its own process.

Unsloth patches transformers and TRL when it is imported, and a peer may need other versions than
this package, so no peer shares a process with another measurement.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_harness.data.examples import Example
from qlora_harness.errors import ResultsError, SettingsError, printable
from qlora_harness.locations import expanded
from qlora_harness.model.source import BaseSource
from qlora_harness.record import read_json, write_json
from qlora_harness.settings import Settings

PEERS = ("trl", "unsloth")
# Padded batches; the same batches in one row without padding; batches of rows of --max-length
# tokens, into which whole conversations were packed.
LAYOUTS = ("pad", "free", "pack")
_SHOWN_LINES = 100  # vLLM prints the cause some fifty lines before its end
_LONGEST_FAILURE = 160  # characters


@dataclass(frozen=True)
class PeerWay:
    """A way to train with a peer's trainer."""

    peer: str
    layout: str
    checkpointing: str  # "none", or "full" for the peer's own kind


PEER_WAYS = {
    f"{peer}-{layout}{ending}": PeerWay(peer, layout, checkpointing)
    for peer in PEERS
    for layout in LAYOUTS
    for ending, checkpointing in (("", "none"), ("-full", "full"))
}


def parse_paths(words: Sequence[str]) -> dict[str, Path]:
    """Returns the folders of --peer-path by peer, or raises SettingsError."""
    paths = {}
    for word in words:
        peer, equals, folder = word.partition("=")
        if peer not in PEERS or not equals:
            raise SettingsError(
                f"--peer-path: {word!r} is not PEER=FOLDER", f"Peers are {', '.join(PEERS)}"
            )
        paths[peer] = peer_folder(folder, peer)
    return paths


def peer_folder(folder: str, peer: str) -> Path:
    """Returns the folder that a peer is imported from, or raises SettingsError."""
    path = expanded(folder)
    if not path.is_dir():
        raise SettingsError(
            f"--peer-path: folder {folder} does not exist",
            f"`pip install --target {folder or 'FOLDER'} {peer}` makes one",
        )
    return path.resolve()


def run_peer(
    way: PeerWay,
    settings: Settings,
    source: BaseSource,
    examples: Sequence[Example],
    *,
    steps: int,
    path: Path | None,
    timeout: float,
) -> dict[str, Any]:
    """Trains `steps` steps with a peer's trainer in its own process, which loads the base again.

    Returns `steps` (tokens, seconds and loss of each), `peak_allocated_bytes`,
    `peak_reserved_bytes` and the `versions` of packages; or `failure` (see `in_own_process`).
    """
    request = {
        **asdict(way),
        "settings": settings.flat(),
        "source": asdict(source) | {"path": absolute(source.path)},
        "steps": steps,
        "input_ids": [example.input_ids for example in examples],
        "labels": [example.labels for example in examples],
    }
    return in_own_process(request, path, timeout)


def absolute(path: str) -> str:
    """Returns the path of a model's folder for a process in another folder; a Hub id stays."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


def in_own_process(request: dict[str, Any], path: Path | None, timeout: float) -> dict[str, Any]:
    """Runs `peer_process` with a request, and returns its result or a line of `failure`.

    `path` comes first on the import path of that process; `timeout` is in seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "request.json", request, rows_at=2)
        status = _run_process(folder, path, timeout)
        output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        if status == 0:
            try:
                return read_json(folder / "result.json")
            except ResultsError as error:
                output += f"\n{error}"
        lines = [line.rstrip() for line in output.splitlines() if line.strip()]
        print(printable("\n".join(lines[-_SHOWN_LINES:]), keep="\n\t"), file=sys.stderr, flush=True)
        if status is None:
            return {"failure": f"timed out after {timeout:g} s"}
        reason = lines[-1].strip() if lines else f"ended with status {status}"
        return {"failure": f"failed: {reason.replace('|', '/')[:_LONGEST_FAILURE]}"}


def _run_process(folder: Path, first_path: Path | None, timeout: float) -> int | None:
    """Returns the exit status, or None after a timeout."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if first_path is not None:
        paths.insert(0, str(first_path))
    # Absolute, because the process runs in its own folder: peers write caches there.
    paths = [str(Path(path).resolve()) for path in paths]
    module = "qlora_harness.benchmark.peer_process"
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "request.json", "result.json"],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths)}
            | {"UNSLOTH_DISABLE_STATISTICS": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Its compilers and other child processes end with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

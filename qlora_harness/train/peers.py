"""Other trainers in the training benchmark: each way in a process of its own.

Unsloth replaces parts of transformers and TRL when it is imported, and a peer may need other
versions than this package: so a peer never shares a process with anything that is measured.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_harness.data.chat import Example
from qlora_harness.errors import ResultsError, SettingsError, printable
from qlora_harness.locations import expanded
from qlora_harness.model.base import BaseSource
from qlora_harness.record import read_json, write_json
from qlora_harness.settings import Settings

PEERS = ("trl", "unsloth")
# How a batch is laid out: as it is drawn, padded; the same conversations in one row; or
# conversations packed into rows of --max-length beforehand, so many of these rows at a time.
LAYOUTS = ("pad", "free", "pack")
_SHOWN_LINES = 30
_LONGEST_FAILURE = 160


@dataclass(frozen=True)
class PeerWay:
    """A way of the benchmark that a peer's trainer goes.

    Attributes:
        peer: Of `PEERS`.
        layout: Of `LAYOUTS`.
        checkpointing: "none", or "full": the peer's own.
    """

    peer: str
    layout: str
    checkpointing: str


PEER_WAYS = {
    f"{peer}-{layout}{ending}": PeerWay(peer, layout, checkpointing)
    for peer in PEERS
    for layout in LAYOUTS
    for ending, checkpointing in (("", "none"), ("-full", "full"))
}


@dataclass(frozen=True)
class PeerOptions:
    """How processes of peers are run.

    Attributes:
        paths: By peer, a folder that is put before all others on its import path.
        timeout: Seconds that one way may take, with starting, loading and compiling.
    """

    paths: Mapping[str, Path]
    timeout: float


def parse_paths(words: Sequence[str]) -> dict[str, Path]:
    """Returns the folders of --peer-path by peer.

    Args:
        words: Each PEER=FOLDER.

    Raises:
        SettingsError: A peer is not known, or a folder is not there.
    """
    found = {}
    for word in words:
        peer, equals, folder = word.partition("=")
        if peer not in PEERS or not equals:
            raise SettingsError(
                f"--peer-path: {word!r} is not PEER=FOLDER", f"Peers are {', '.join(PEERS)}"
            )
        path = expanded(folder)
        if not path.is_dir():
            raise SettingsError(
                f"--peer-path: folder {folder} does not exist",
                f"`pip install --target {folder or 'FOLDER'} {peer}` makes one",
            )
        found[peer] = path.resolve()
    return found


def run_peer(
    way: PeerWay,
    settings: Settings,
    source: BaseSource,
    examples: Sequence[Example],
    *,
    steps: int,
    options: PeerOptions,
) -> dict[str, Any]:
    """Trains with a peer's trainer in a process of its own.

    Args:
        way: Which peer, and how.
        settings: Of the way.
        source: The base model; the process loads it anew.
        examples: What all ways train on.
        steps: Optimizer steps.
        options: How processes of peers are run.

    Returns:
        `steps`: tokens, seconds and loss of each; `peak_allocated_bytes`, `peak_reserved_bytes`;
        `versions` by package. Or `failure`: why there is none of this, in one line.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder_of_base = Path(source.path).expanduser()
        order = {
            **asdict(way),
            "settings": settings.flat(),
            "source": asdict(source)
            | {"path": str(folder_of_base.resolve()) if folder_of_base.is_dir() else source.path},
            "steps": steps,
            "input_ids": [example.input_ids for example in examples],
            "labels": [example.labels for example in examples],
        }
        write_json(folder / "order.json", order)
        ended = _run(folder, options.paths.get(way.peer), options.timeout)
        printed = (folder / "printed.txt").read_text(encoding="utf-8", errors="replace")
        if ended == 0:
            try:
                return read_json(folder / "result.json")
            except ResultsError as error:
                printed += f"\n{error}"
        lines = [line.rstrip() for line in printed.splitlines() if line.strip()]
        shown = printable("\n".join(lines[-_SHOWN_LINES:]), keep="\n\t")
        print(shown, file=sys.stderr, flush=True)
        if ended is None:
            return {"failure": f"timed out after {options.timeout:g} s"}
        reason = lines[-1].strip() if lines else f"ended with status {ended}"
        return {"failure": f"failed: {reason.replace('|', '/')[:_LONGEST_FAILURE]}"}


def _run(folder: Path, first_path: Path | None, timeout: float) -> int | None:
    """Returns the exit status of a peer's process, or None if it took too long."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if first_path is not None:
        paths.insert(0, str(first_path))
    # The process works in an empty folder: peers write caches into the current one.
    paths = [str(Path(path).resolve()) for path in paths]
    words = [sys.executable, "-m", "qlora_harness.train.peer_process", "order.json", "result.json"]
    with (folder / "printed.txt").open("wb") as printed:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths), "UNSLOTH_DISABLE_STATISTICS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Whatever it started, such as compilers, ends with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

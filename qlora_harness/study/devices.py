"""The GPUs that a study may use, without a CUDA context in the command itself."""

from __future__ import annotations

import os
import subprocess
from typing import NamedTuple

from qlora_harness.model.compute_dtype import AMPERE

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_QUERY = (
    "nvidia-smi",
    "--query-gpu=uuid,index,memory.free,compute_cap",
    "--format=csv,noheader,nounits",
)


class Device(NamedTuple):
    """A device for one worker."""

    gpu: str | None  # its value of CUDA_VISIBLE_DEVICES; None is the CPU
    free: int | None  # bytes, None if unknown
    has_bfloat16: bool = True

    def environment(self, workers: int) -> dict[str, str]:
        """Returns the variables of a worker on this device, one of several on a host.

        One OpenMP thread, as OpenMP's threads spin while they wait; the tokenizers share the cores.
        """
        if self.gpu is None:
            return {}
        share = max(1, _cores() // workers)
        threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": str(share)}
        unset = {name: value for name, value in threads.items() if name not in os.environ}
        return {_VISIBLE: self.gpu} | unset


def _cores() -> int:
    """The cores that this process may use, which may be fewer than the host's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_devices() -> list[Device]:
    """Returns the GPUs that this process may use, or the CPU, without a CUDA context.

    Runs would count the context as another process on their GPU.
    """
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if on_cpu or not torch.cuda.is_available():
        return [Device(None, None)]
    known = _by_nvidia_smi()
    named = os.environ.get(_VISIBLE)
    if named is not None:
        names = [name.strip() for name in named.split(",") if name.strip()]
    else:
        names = [str(number) for number in range(torch.cuda.device_count())]
    return [known.get(name, Device(None, None))._replace(gpu=name) for name in names]


def _by_nvidia_smi() -> dict[str, Device]:
    """The GPUs by index and UUID; empty if nvidia-smi fails."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    known = {}
    for line in done.stdout.splitlines():
        uuid, index, mebibytes, capability = (part.strip() for part in line.split(","))
        free = int(mebibytes) * 2**20 if mebibytes.isdecimal() else None
        major, _, _ = capability.partition(".")
        has_bfloat16 = not major.isdecimal() or int(major) >= AMPERE
        known[uuid] = known[index] = Device(index, free, has_bfloat16)
    return known

"""Training on the CPU: the number of threads, and the faster dtype."""

from __future__ import annotations

import os
import time

import psutil
import torch

from qlora_harness.train.process import LAUNCHER

_ROWS, _WIDTH = 256, 512
_REPETITIONS = 3


def use_all_cores() -> bool:
    """Lets torch use every physical core; returns whether the number of threads changed.

    Launchers set OMP_NUM_THREADS to 1 if it is not set; a number from the user stays.
    """
    if _user_set_threads():
        return False
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, cores // processes)
    if threads == torch.get_num_threads():
        return False
    torch.set_num_threads(threads)
    return True


def _user_set_threads() -> bool:
    """Whether the user chose the number, in the launcher's environment or on its command line."""
    if LAUNCHER is None or os.environ.get("OMP_NUM_THREADS") != "1":
        return True
    try:
        words, environment = LAUNCHER.cmdline(), LAUNCHER.environ()
    except psutil.Error:
        return True
    flag = "__num_cpu_threads_per_process"
    named = any(word.split("=")[0].replace("-", "_") == flag for word in words)
    return named or "OMP_NUM_THREADS" in environment


def faster_dtype() -> tuple[str, float]:
    """Returns the faster compute dtype on this CPU, and the `bfloat16_slowdown`."""
    slowdown = bfloat16_slowdown()
    # Only if clearly faster: near 1, noise could give the arms of a comparison two dtypes.
    return ("bfloat16" if slowdown < 2 / 3 else "float32"), slowdown


def bfloat16_slowdown() -> float:
    """Returns the time of a layer's products in bfloat16, divided by that in float32.

    Measures the CPU time of one thread, which other processes don't affect.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {dtype: _product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def _product_seconds(dtype: torch.dtype) -> float:
    x = torch.full((_ROWS, _WIDTH), 0.5, dtype=dtype)
    weight = torch.full((_WIDTH, _WIDTH), 0.5, dtype=dtype)
    best = float("inf")
    for _ in range(_REPETITIONS + 1):  # the first one warms up
        begun = time.thread_time()
        out = x @ weight.t()
        out @ weight
        out.t() @ x
        best = min(best, time.thread_time() - begun)
    return best

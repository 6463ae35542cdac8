"""Says whether this machine can train and score, and what to do where it can't."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from qlora_harness.errors import first_line

_GIB = 2**30
_HOST_MEMORY = 16 * _GIB  # a 7B base in 16 bits on its way to the GPU
_DISK = 20 * _GIB  # such a base, and a few adapters
_TIMEOUT = 5.0  # seconds, for the Hub
_ALL_REDUCE_TIMEOUT = 60.0  # seconds
_SIGNS = {"ok": "✓", "warning": "!", "missing": "✗"}


class Check(NamedTuple):
    """One line: a state ("ok", "warning" or "missing"), what was seen, and the remedy."""

    name: str
    state: str
    value: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{_SIGNS[self.state]} {self.name:<16} {self.value}"
        return f"{line}\n{'':19}{self.remedy}" if self.remedy else line


def diagnose() -> int:
    """Prints a line per check; returns 1 if something needed is missing, else 0."""
    from qlora_harness.results.terminal import close_quietly

    missing = False
    try:
        for check in checks():
            print(check, flush=True)
            missing |= check.state == "missing"
    except BrokenPipeError:
        close_quietly()
    return int(missing)


def checks() -> Iterator[Check]:
    """Yields all checks, the cheap ones first."""
    yield Check("Python", "ok", ".".join(map(str, sys.version_info[:3])))
    packages = [_package(requirement) for requirement in _requirements()]
    yield from packages
    parts: dict[str, Callable[[], Iterable[Check]]] = {
        "lm_eval plugin": lambda: [_plugin()],
        "host": _host,
        "MMLU files": lambda: [_mmlu()],
        "Hugging Face Hub": lambda: [_hub()],
        "GPU": _gpus,
    }
    if any(check.name == "torch" and check.state == "missing" for check in packages):
        del parts["GPU"]
    for name, part in parts.items():
        yield from _guarded(name, part)


def _guarded(name: str, part: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Yields the checks of a part; one that fails, as for a broken package, is a line, too."""
    try:
        yield from part()
    except Exception as error:  # noqa: BLE001  # broken packages raise anything
        where = error.name if isinstance(error, ImportError) and error.name else "the package"
        yield Check(name, "missing", f"the check fails: {first_line(error)}",
                    f"Reinstall {where} in this environment")  # fmt: skip


def _requirements() -> list[Any]:
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in requires("qlora-harness") or []]
    return [requirement for requirement in parsed if requirement.marker is None]


def _package(requirement: Any) -> Check:
    name, tested = requirement.name, requirement.specifier
    install = f"pip install '{name}{tested}'"
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Check(name, "missing", "not installed", install)
    if tested.contains(installed, prereleases=True):
        return Check(name, "ok", installed)
    return Check(name, "warning", f"{installed}, not among the tested {tested}", install)


def _plugin() -> Check:
    """lm_eval 0.4.13 finds our model through a .pth file that Python runs when it starts."""
    from qlora_harness.lm_eval_compat import hook

    name = "lm_eval plugin"
    try:
        if hook.is_registered():
            return Check(name, "ok", f"lm_eval finds --model {hook.MODEL_NAME}")
    except Exception as error:  # noqa: BLE001  # a broken lm_eval raises anything
        return Check(name, "missing", f"lm_eval fails: {first_line(error)}", "Reinstall lm-eval")
    if os.environ.get(hook.OFF_VARIABLE, "") not in ("", "0"):
        return Check(name, "missing", f"switched off by {hook.OFF_VARIABLE}", "Unset it")
    remedy = "Install qlora-harness with pip into this environment; don't start Python with -S"
    return Check(name, "missing", "qlora_harness_hook.pth has not run", remedy)


def _host() -> Iterator[Check]:
    from qlora_harness.model.free_memory import available_memory

    hint = "A 7B base takes up to 13 GiB while it loads"
    yield _free("host memory", available_memory(), _HOST_MEMORY, "", hint)
    hint = "A 7B base takes 13 GiB in the Hub's cache (HF_HOME)"
    yield _free("disk", shutil.disk_usage(Path.cwd()).free, _DISK, f" in {Path.cwd()}", hint)


def _free(name: str, size: int, least: int, where: str, hint: str) -> Check:
    state, remedy = ("ok", "") if size >= least else ("warning", hint)
    return Check(name, state, f"{size / _GIB:.1f} GiB free{where}", remedy)


def _mmlu() -> Check:
    from qlora_harness.locations import cache_dir, expanded
    from qlora_harness.score.mmlu_files import PINNED

    named = os.environ.get("QLORA_MMLU_DIR")
    folder = expanded(named) if named else cache_dir() / "mmlu"
    here = [
        name for name in PINNED if (folder / name).is_file() or (folder / f"{name}.xz").is_file()
    ]
    if here:
        return Check("MMLU files", "ok", f"{', '.join(here)} in {folder}")
    remedy = "Put the QLoRA repository's data/mmlu files there"
    if not named:
        remedy = "The first scoring downloads them, or set QLORA_MMLU_DIR to their folder"
    return Check("MMLU files", "warning", f"none in {folder}", remedy)


def _hub() -> Check:
    from huggingface_hub import constants, get_token

    token = "with a token" if get_token() else "without a token"
    if constants.HF_HUB_OFFLINE:
        return Check("Hugging Face Hub", "warning", f"HF_HUB_OFFLINE is set, {token}",
                     "Only models and data in the cache or in folders can be used")  # fmt: skip
    address = urlsplit(constants.ENDPOINT)
    host = address.hostname or ""
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT).close()
    except OSError as error:
        return Check("Hugging Face Hub", "warning", f"{host} can't be reached ({error}), {token}",
                     "Use models and data in folders, or HF_ENDPOINT for a mirror")  # fmt: skip
    remedy = "" if get_token() else "Gated models, such as LLaMA-2, need `hf auth login`"
    return Check("Hugging Face Hub", "ok", f"{host}, {token}", remedy)


def _gpus() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check(
            "GPU",
            "warning",
            "none that torch can use: runs take the CPU",
            "Check `nvidia-smi`, and that torch is a CUDA build (`torch.version.cuda`)",
        )
        yield _quantises("cpu")
        return
    for number in range(torch.cuda.device_count()):
        yield _gpu(number)
        yield _quantises(f"cuda:{number}")
    if torch.cuda.device_count() > 1:
        yield _all_reduce()


def _gpu(number: int) -> Check:
    import torch

    from qlora_harness.model.compute_dtype import has_bfloat16

    about = torch.cuda.get_device_properties(number)
    formats = "bf16" if has_bfloat16(number) else "no bf16: float16 will be used"
    if about.major == 9:  # --compute fp8 is for Hopper only
        formats += " and fp8"
    return Check(
        f"GPU {number}",
        "ok",
        f"{about.name}, {about.total_memory / _GIB:.0f} GiB, CUDA {torch.version.cuda}, {formats}",
    )


def _quantises(device: str) -> Check:
    """Whether bitsandbytes' backend for a device works."""
    name = f"4 bits on {device}"
    try:
        from qlora_harness.model.base import nf4_error

        largest = nf4_error(device)
    except Exception as error:  # noqa: BLE001  # native libraries raise anything
        return Check(name, "missing", f"bitsandbytes fails: {first_line(error)}",
                     "Run `python -m bitsandbytes`; --quant bf16 works without")  # fmt: skip
    if not largest < 0.2:
        return Check(name, "missing", f"bitsandbytes is off by {largest:.2f}",
                     "Reinstall bitsandbytes")  # fmt: skip
    return Check(name, "ok", "bitsandbytes quantises to NF4 and back")


def _all_reduce() -> Check:
    """Whether the GPUs reach each other through NCCL, in a process each."""
    import torch
    from torch.multiprocessing.spawn import spawn

    count = torch.cuda.device_count()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context: Any = spawn(_reduce, (count, port), nprocs=count, join=False)
    try:
        if context.join(_ALL_REDUCE_TIMEOUT):
            return Check("NCCL", "ok", f"{count} GPUs add up a tensor")
        seen = f"{count} GPUs don't finish within {_ALL_REDUCE_TIMEOUT:.0f} s"
    except Exception as error:  # noqa: BLE001
        seen = first_line(error)
    for process in context.processes:
        process.kill()
    return Check("NCCL", "missing", seen, "Run with NCCL_DEBUG=INFO; try NCCL_P2P_DISABLE=1")


def _reduce(rank: int, count: int, port: int) -> None:
    import torch
    from torch import distributed

    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("nccl", init_method=address, rank=rank, world_size=count)
    total = torch.ones(1 << 20, device="cuda")
    distributed.all_reduce(total)
    assert float(total[-1]) == count
    distributed.destroy_process_group()

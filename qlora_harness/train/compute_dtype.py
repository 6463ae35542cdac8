"""The compute dtype of a run: as its record, its flag or its device says."""

from __future__ import annotations

import torch
from accelerate import PartialState

from qlora_harness.model.compute_dtype import check_training_dtype, own_dtype
from qlora_harness.settings import COMPUTE_DTYPES, Settings
from qlora_harness.settings_checks import with_dtype
from qlora_harness.train.cpu import faster_dtype, use_all_cores
from qlora_harness.train.ranks import device_of, on_main, say


def with_compute_dtype(settings: Settings, state: PartialState, recorded: str | None) -> Settings:
    """Replaces the compute dtype "auto", by that of a resumed run if `recorded`; sets CPU threads.

    Raises SettingsError if the device can't train in it, or if other settings exclude it.
    """
    on_cpu = state.device.type == "cpu"
    if on_cpu and use_all_cores():
        flag = "accelerate launch --num_cpu_threads_per_process N"
        say(state, f"on the CPU: {torch.get_num_threads()} threads ({flag} sets another number)")
    dtype = settings.model.compute_dtype
    if dtype == "auto" and recorded in COMPUTE_DTYPES:
        dtype = recorded
    elif dtype == "auto" and on_cpu:
        dtype, slowdown = on_main(state, faster_dtype)
        say(state, f"on the CPU: {dtype} (bfloat16 takes {slowdown:.1f} times as long as float32)")
    elif dtype == "auto":
        dtype, note = on_main(state, lambda: own_dtype(device_of(state)))
        if note is not None:
            say(state, note)
    check_training_dtype(dtype, device_of(state))
    return with_dtype(settings, dtype)


def with_own_dtype(settings: Settings) -> Settings:
    """Replaces the compute dtype "auto" as a run on this machine's GPU, if it has one, would."""
    if settings.model.compute_dtype != "auto" or not torch.cuda.is_available():
        return settings
    dtype, note = own_dtype(torch.device("cuda"))
    if note is not None:
        print(note)
    return with_dtype(settings, dtype)

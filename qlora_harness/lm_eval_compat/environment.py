"""Describes the environment for lm_eval's results while the model computes.

lm_eval waits for `nvidia-smi`, `lscpu` and others at the end of each evaluation.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def describe_environment_ahead() -> None:
    """Starts torch's description of the environment in a thread; lm_eval then gets its result."""
    from torch.utils import collect_env

    with_threads = ThreadPoolExecutor(1, thread_name_prefix="qlora_harness environment")
    description = with_threads.submit(collect_env.get_pretty_env_info)
    with_threads.shutdown(wait=False)
    collect_env.get_pretty_env_info = description.result

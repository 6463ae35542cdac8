"""Does in a thread, while the model computes, what lm_eval would do after it.

lm_eval waits for `nvidia-smi`, `lscpu` and others to describe the environment in its results, and
imports what prints its tables.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module


@cache
def describe_environment_ahead() -> None:
    """Starts torch's description of the environment in a thread; lm_eval then gets its result."""
    from torch.utils import collect_env

    executor = ThreadPoolExecutor(1, thread_name_prefix="qlora_harness environment")
    description = executor.submit(collect_env.get_pretty_env_info)
    executor.submit(import_module, "pytablewriter")
    executor.shutdown(wait=False)
    collect_env.get_pretty_env_info = description.result

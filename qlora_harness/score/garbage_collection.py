"""Python's cyclic garbage collector, where it costs seconds and can find nothing.

A million objects of the libraries live as long as the process. The collector looks through all of
them again and again while token ids, requests and samples are made, and when the process ends.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collection() -> Iterator[None]:
    """Switches the collector off inside the `with` block, for work that leaves no cycles behind."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def set_aside_for_good() -> bool:
    """In the lm_eval command, takes all objects there are out of the collector's sight.

    What is garbage already is collected first. A Python program that imports lm_eval is left alone:
    there a model may be dropped later and has to be found then.

    Returns:
        Whether it was done.
    """
    if not hasattr(sys.modules.get("__main__"), "cli_evaluate"):
        return False
    gc.collect()
    gc.freeze()
    return True

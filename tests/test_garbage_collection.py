"""The garbage collector: off for a while and on again; and what the lm_eval command sets aside."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from qlora_harness.score.garbage_collection import paused_collection, set_aside_for_good


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_collection_goes_on_after_a_pause() -> None:
    assert gc.isenabled()
    with paused_collection():
        assert not gc.isenabled()
        with paused_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collection_goes_on_after_an_error() -> None:
    with pytest.raises(KeyError), paused_collection():
        raise KeyError
    assert gc.isenabled()


def test_collection_that_the_caller_switched_off_stays_off() -> None:
    gc.disable()
    with paused_collection():
        pass
    assert not gc.isenabled()


def test_a_program_that_imports_us_is_left_alone() -> None:
    before = gc.get_freeze_count()
    assert set_aside_for_good() is False
    assert gc.get_freeze_count() == before


def test_the_command_sets_aside_what_is_not_garbage() -> None:
    code = (
        "import gc, weakref\n"
        "from lm_eval.__main__ import cli_evaluate\n"
        "from qlora_harness.score.garbage_collection import set_aside_for_good\n"
        "class Node: pass\n"
        "node = Node(); node.self = node; gone = weakref.ref(node); del node\n"
        "assert gone() is not None\n"
        "print(gc.get_freeze_count(), set_aside_for_good(), gone() is None, "
        "gc.get_freeze_count() > 10000, gc.isenabled())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "0 True True True True\n"

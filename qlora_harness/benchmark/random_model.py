"""Writes models of a known shape with random weights, to measure speed and memory offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_harness.errors import ModelError, first_line
from qlora_harness.record import new_folder

_DIMENSIONS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
SHAPES = {
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32, 4096),
    "llama-2-70b": (32000, 8192, 28672, 80, 64, 8, 4096),
    "qwen2.5-1.5b": (151936, 1536, 8960, 28, 12, 2, 4096),
    "qwen2.5-0.5b": (151936, 896, 4864, 24, 14, 2, 4096),
    "tiny": (32000, 64, 128, 2, 4, 2, 2048),
}


def write_random_model(
    folder: Path,
    *,
    shape: str,
    tokenizer: str,
    seed: int = 0,
    weights_on_load: bool = False,
    vocab_size: int | None = None,
) -> None:
    """Writes a LLaMA folder with random bfloat16 weights; its config says that they are random.

    With `weights_on_load` the folder has none: whoever loads it makes them, layer by layer.
    `tokenizer` is a folder, a Hub id or "smollm2", copied beside the weights. The vocabulary is
    `vocab_size`, or that of the shape and at least as large as the tokenizer's. Raises ModelError
    if the folder exists or the tokenizer can't be read.
    """
    from transformers import AutoTokenizer, LlamaConfig

    from qlora_harness.model.source import (
        EMBEDDED,
        RANDOM_WEIGHTS_KEY,
        WEIGHTS_SEED_KEY,
        find_base,
    )

    if folder.exists():
        raise ModelError(f"{folder} exists", "Name a new folder")
    if tokenizer == EMBEDDED:
        tokenizer = find_base(EMBEDDED, argument="--tokenizer").path
    try:
        tok = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # transformers raises many kinds
        raise ModelError(
            f"--tokenizer: {tokenizer!r} can't be loaded ({first_line(error)})",
            "Name a tokenizer folder or a Hub id",
        ) from None
    dimensions: dict[str, Any] = dict(zip(_DIMENSIONS, SHAPES[shape], strict=True))
    dimensions["vocab_size"] = vocab_size or max(dimensions["vocab_size"], len(tok))
    config = LlamaConfig(
        **dimensions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    setattr(config, RANDOM_WEIGHTS_KEY, True)
    if weights_on_load:
        setattr(config, WEIGHTS_SEED_KEY, seed)
    model = config if weights_on_load else _made(config, seed)
    with new_folder(folder) as work:
        model.save_pretrained(work)
        tok.save_pretrained(work)


def _made(config: Any, seed: int) -> Any:
    """Returns the model, on a GPU if there is one, which makes its weights faster."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)

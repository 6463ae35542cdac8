"""Writes models of a known shape with random weights, to measure speed and memory offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_harness.errors import ModelError, first_line
from qlora_harness.model.source import (
    EMBEDDED,
    RANDOM_WEIGHTS_KEY,
    WEIGHTS_SEED_KEY,
    find_base,
)
from qlora_harness.record import new_folder

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama-2-70b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 32000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
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
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

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
    dims = dict(SHAPES[shape])
    dims["vocab_size"] = vocab_size or max(dims["vocab_size"], len(tok))
    config = LlamaConfig(
        **dims,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    setattr(config, RANDOM_WEIGHTS_KEY, True)
    if weights_on_load:
        setattr(config, WEIGHTS_SEED_KEY, seed)
        with new_folder(folder) as work:
            config.save_pretrained(work)
            tok.save_pretrained(work)
        return
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    with new_folder(folder) as work:
        model.save_pretrained(work)
        tok.save_pretrained(work)

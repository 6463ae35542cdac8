"""Loads the chosen base, checks that the adapter was trained on it, and loads the adapter."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import AdapterError, ModelError
from qlora_harness.model.adapter_folder import adapter_digest, read_adapter_config
from qlora_harness.model.base import unquantised_share, weights_fingerprint
from qlora_harness.model.facts import attention_of, base_of
from qlora_harness.model.lora import load_adapter
from qlora_harness.model.shared_base import take_base
from qlora_harness.model.source import BaseSource, load_tokenizer
from qlora_harness.score.run_choice import ScoringChoice
from qlora_harness.train.ranks import shards_base

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("qlora_harness")


@dataclass(frozen=True)
class ScoredModel:
    """A model ready for scoring, and its origin."""

    model: Any  # the base, or the base with an unmerged adapter
    choice: ScoringChoice
    source: BaseSource
    compute_dtype: str  # "bfloat16", "float16" or "float32"
    adapter_config: dict[str, Any] | None = None  # None for a base alone
    adapter_sha256: str | None = None  # of the adapter's content

    def record(self) -> dict[str, Any]:
        """Returns the "model" section of the records."""
        choice, base = self.choice, base_of(self.model)
        rare = {"gguf": self.source.gguf, "rope_scaling": choice.rope_scaling}
        return {
            "base": self.source.recorded_name,
            "revision": choice.revision,
            "commit": self.source.commit,
            "random_weights": self.source.random_weights,
            "quant": choice.quant.value,
            "double_quant": choice.double_quant if choice.quant.is_4bit else None,
            "peft": choice.adapter.name if choice.adapter else None,
            "adapter_sha256": self.adapter_sha256,
            "unquantised_share": unquantised_share(self.model),
            "attention": attention_of(base),
            "weights_fingerprint": weights_fingerprint(base),
            **{name: value for name, value in rare.items() if value is not None},
        }


def load_scored_tokenizer(choice: ScoringChoice, source: BaseSource) -> PreTrainedTokenizerBase:
    """Loads the tokenizer saved with the adapter, else the base's."""
    folder = choice.adapter
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        folder = None
    return load_tokenizer(source, folder)


def load_scored_model(
    choice: ScoringChoice,
    source: BaseSource,
    tokens: int,
    compute_dtype: str,
    device: torch.device,
) -> ScoredModel:
    """Loads base and adapter; `tokens` is the size of the tokenizer.

    Raises ModelError if the base is missing, unreadable or too small for its tokenizer, and
    AdapterError if the adapter is broken or was trained on another base or with added tokens.
    """
    from accelerate import PartialState

    base = take_base(
        source,
        quant=choice.quant,
        double_quant=choice.double_quant,
        compute_dtype=compute_dtype,
        device=device,
        rope_scaling=choice.rope_scaling,
        sharded=shards_base(PartialState()),
    )
    embedding: Any = base.get_input_embeddings()
    _check_vocabulary(choice, tokens, embedding.weight.shape[0])
    if choice.adapter is None:
        return ScoredModel(base, choice, source, compute_dtype)
    _check_base(choice, weights_fingerprint(base))
    model = load_adapter(base, choice.adapter)
    config, digest = read_adapter_config(choice.adapter), adapter_digest(choice.adapter)
    return ScoredModel(model, choice, source, compute_dtype, config, digest)


def _check_vocabulary(choice: ScoringChoice, tokens: int, rows: int) -> None:
    if tokens <= rows:
        return
    if choice.adapter is None:
        raise ModelError(
            f"pretrained={choice.base}: its tokenizer has {tokens} tokens, its embedding "
            f"{rows} rows",
            "Put the model's own tokenizer into its folder",
        )
    raise AdapterError(
        f"the tokenizer of peft={choice.adapter} has {tokens} tokens, the base model {rows}",
        "This adapter was trained with added tokens, which are not supported",
    )


def _check_base(choice: ScoringChoice, fingerprint: str | None) -> None:
    """Compares the fingerprint of the base's weights with the adapter's record."""
    recorded = choice.recorded or {}
    expected = recorded.get("weights_fingerprint")
    if expected is None or fingerprint is None:
        logger.warning(
            "can't check whether %s is the base that %s was trained on",
            choice.base,
            choice.adapter,
        )
    elif fingerprint != expected:
        raise AdapterError(
            f"pretrained={choice.base} is not the base model that peft={choice.adapter} was "
            f"trained on ({recorded.get('name')}, revision {recorded.get('revision')}): its "
            "weights differ",
            "Give the recorded base, or leave pretrained= out",
        )

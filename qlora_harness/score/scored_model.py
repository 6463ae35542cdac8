"""Loads what was chosen to be scored: a base, checked to be the adapter's, and its adapter."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import AdapterError, ModelError
from qlora_harness.model.adapter_folder import adapter_digest, read_adapter_config
from qlora_harness.model.base import (
    BaseSource,
    attention_of,
    base_of,
    load_base,
    load_tokenizer,
    unquantised_share,
    weights_fingerprint,
)
from qlora_harness.model.lora import load_adapter
from qlora_harness.score.run_choice import ScoringChoice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("qlora_harness")


@dataclass(frozen=True)
class ScoredModel:
    """A model that is ready to be scored, and where it comes from."""

    model: Any
    """The base, with its unmerged adapter where there is one."""
    choice: ScoringChoice
    source: BaseSource
    compute_dtype: str
    """bfloat16 or float32."""
    adapter_config: dict[str, Any] | None = None
    """What the adapter says of itself; None for a base alone."""
    adapter_sha256: str | None = None
    """Of the adapter's content; None for a base alone."""

    def record(self) -> dict[str, Any]:
        """Returns the model as records hold it."""
        choice, base = self.choice, base_of(self.model)
        return {
            "base": choice.base,
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
        }


def load_scored_tokenizer(choice: ScoringChoice, source: BaseSource) -> PreTrainedTokenizerBase:
    """Loads the adapter's tokenizer, or the base's where none lies beside the adapter."""
    folder = choice.adapter
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        folder = None
    return load_tokenizer(source, folder)


def load_scored_model(
    choice: ScoringChoice, source: BaseSource, tokens: int, compute_dtype: str, device: torch.device
) -> ScoredModel:
    """Loads base and adapter as they were trained; `tokens` are those of the tokenizer.

    Raises ModelError where the base is missing, unreadable or has too few rows for its tokenizer;
    AdapterError where the adapter was trained on another base or with added tokens, or is broken.
    """
    base = load_base(
        source,
        quant=choice.quant,
        double_quant=choice.double_quant,
        compute_dtype=compute_dtype,
        device=device,
    )
    embedding: Any = base.get_input_embeddings()
    _check_vocabulary(choice, tokens, embedding.weight.shape[0])
    if choice.adapter is None:
        return ScoredModel(base, choice, source, compute_dtype)
    _check_base(choice, weights_fingerprint(base))
    model = load_adapter(base, choice.adapter)
    return ScoredModel(
        model,
        choice,
        source,
        compute_dtype,
        adapter_config=read_adapter_config(choice.adapter),
        adapter_sha256=adapter_digest(choice.adapter),
    )


def _check_vocabulary(choice: ScoringChoice, tokens: int, rows: int) -> None:
    if tokens <= rows:
        return
    if choice.adapter is None:
        raise ModelError(
            f"pretrained={choice.base}: its tokenizer has {tokens} tokens, its embedding "
            f"{rows} rows",
            "Put the tokenizer that belongs to the model beside it",
        )
    raise AdapterError(
        f"the tokenizer beside peft={choice.adapter} has {tokens} tokens, the base model {rows}",
        "This adapter was trained with added tokens, which are not supported",
    )


def _check_base(choice: ScoringChoice, fingerprint: str | None) -> None:
    """Refuses another base than the adapter was trained on, by the fingerprint of its weights."""
    recorded = choice.recorded or {}
    expected = recorded.get("weights_fingerprint")
    if expected is None or fingerprint is None:
        logger.warning(
            "whether %s is the base that %s was trained on can't be checked",
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

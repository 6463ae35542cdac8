"""Chooses how to compute log-probabilities, before the model is changed."""

from __future__ import annotations

from typing import Any, NamedTuple

from qlora_harness.errors import SettingsError
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.adapter_folder import unknown_field
from qlora_harness.model.base import fits_dequantised, is_4bit, mixes_tokens, why_not_plain
from qlora_harness.model.facts import base_of
from qlora_harness.model.plain_lora import is_plain
from qlora_harness.model.sharded import sharded_layers
from qlora_harness.score.model_arguments import ScoringOptions, refuse_fp8
from qlora_harness.score.packed_forward import why_unsupported
from qlora_harness.score.scored_model import ScoredModel


class ScoringPath(NamedTuple):
    """How log-probabilities are computed."""

    packed: bool  # in packs of the prefix tree, or else by HFLM
    fused: bool = False  # packs run through fused layers, or else through the model's own
    expanded: bool = False  # a 4-bit base is dequantised once
    reason: str | None = None  # why scoring=packed is not possible


def choose_path(scored: ScoredModel, options: ScoringOptions) -> ScoringPath:
    """Chooses the fastest path that the model and the options allow.

    Raises SettingsError if the options ask for FP8 products and the model can't have them, or if
    the base is spread over processes and it can't have fused layers.
    """
    path = _choose(scored, options)
    if sharded_layers(scored.model) is None:
        return path
    if not path.fused or options.verify:
        raise SettingsError(
            "FSDP spreads the base over the processes, for fused layers only: "
            f"{path.reason or 'scoring=hf, kernels=none and verify= need whole modules'}",
            "Launch without FSDP",
        )
    return path._replace(expanded=False)


def _choose(scored: ScoredModel, options: ScoringOptions) -> ScoringPath:
    if options.scoring == "hf":
        return ScoringPath(packed=False)
    model = scored.model
    if options.compute == "fp8":
        refuse_fp8(_why_not_packed(scored) or FusedDecoder.reason_against_fp8(model))
        return ScoringPath(packed=True, fused=True)
    reason = _why_not_packed(scored)
    allowed = reason is None and options.kernels == "auto"
    fused = allowed and FusedDecoder.reason_against(model) is None
    if reason is None and not fused and not _share_config(base_of(model)):
        reason = "some of its layers have a separate configuration"
    if reason is not None:
        return ScoringPath(packed=False, reason=reason)
    expanded = (
        options.dequantize == "auto"
        and any(map(is_4bit, model.modules()))
        and _is_all_plain(model)
        and fits_dequantised(model, scored.compute_dtype)
    )
    return ScoringPath(True, fused, expanded)


def _why_not_packed(scored: ScoredModel) -> str | None:
    model = scored.model
    reason = why_unsupported(base_of(model).config)
    if reason is None and mixes_tokens(model):
        reason = why_not_plain(model)
    if reason is not None or base_of(model) is model:
        return reason
    field = unknown_field(scored.adapter_config or {})
    return _why_adapter_not_packed(model) if field is None else f"its adapter sets {field!r:.80}"


def _share_config(base: Any) -> bool:
    """Whether one call sets the attention of all layers; PEFT may have copied some."""
    return all(getattr(m, "config", base.config) is base.config for m in base.modules())


def _adapter_modules(model: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [module for module in model.modules() if isinstance(module, kinds)]


def _is_all_plain(model: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return all(isinstance(m, LoraLayer) and is_plain(m) for m in _adapter_modules(model))


def _why_adapter_not_packed(model: Any) -> str | None:
    """Why an adapter can't run in packs.

    A pack mixes tokens of many texts, so the adapter's output for a token may depend only on that
    token's hidden state.
    """
    from peft.tuners import lora
    from peft.tuners.lora import hqq
    from peft.tuners.lora.dora import DoraEmbeddingLayer, DoraLinearLayer
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    kinds: tuple[type, ...] = (
        lora.Linear,
        lora.Embedding,
        TrainableTokensLayer,
        ModulesToSaveWrapper,
        TrainableTokensWrapper,
        DoraLinearLayer,
        DoraEmbeddingLayer,
    )
    if hasattr(lora, "Linear4bit"):
        kinds += (lora.Linear4bit,)
    if hasattr(hqq, "HqqLoraLinear"):  # only with hqq installed
        kinds += (hqq.HqqLoraLinear,)
    for module in _adapter_modules(model):
        if type(module) not in kinds:
            return f"its adapter has a {type(module).__name__}"
        for variant in getattr(module, "lora_variant", {}).values():
            if type(variant) not in (DoraLinearVariant, DoraEmbeddingVariant):
                return f"its adapter is a variant of LoRA ({type(variant).__name__})"
    return None

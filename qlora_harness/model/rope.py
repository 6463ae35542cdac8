"""RoPE scaling: a base's window made longer, or a base that came so."""

from __future__ import annotations

from typing import Any

from qlora_harness.errors import ModelError

# Types whose cosines and sines depend on a token's position alone, so texts can share a row.
_BY_POSITION = ("default", "linear", "llama3", "yarn")


def rope_type(config: Any) -> str:
    """Returns the type of a configuration's rotary embedding; "default" without scaling."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))


def why_by_length(config: Any) -> str | None:
    """Returns what is wrong with a row of several texts for a rotary embedding, or None."""
    kind = rope_type(config)
    if kind in _BY_POSITION:
        return None
    return f"its rotary embedding ({kind}) depends on the length of the text"


def scale(config: Any, scaling: str, base: str) -> None:
    """Sets the scaling, TYPE:FACTOR, of a configuration without one.

    `max_position_embeddings` stays the window before scaling, from which `dynamic` computes.
    Raises ModelError, which names the base as `base`, if the configuration can't have a scaling.
    """
    kind, _, factor = scaling.partition(":")
    parameters, positions = getattr(config, "rope_parameters", None), _positions(config)
    if not parameters or positions is None:
        reason = "it has no rotary embedding"
    elif "rope_type" not in parameters:
        reason = "its layers have rotary embeddings of several kinds"
    elif parameters["rope_type"] != "default":
        reason = f"it is scaled already ({parameters['rope_type']})"
    else:
        changes: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn":
            changes["original_max_position_embeddings"] = positions
        config.rope_parameters = {**parameters, **changes}
        return
    raise ModelError(f"{base} can't have RoPE scaling {scaling}: {reason}", "Leave the scaling out")


def window(config: Any) -> int | None:
    """Returns the longest text, in tokens, that a configuration is for; None if unlimited."""
    positions = _positions(config)
    parameters = getattr(config, "rope_parameters", None) or {}
    factor = parameters.get("factor")
    if positions is None or not isinstance(factor, int | float):
        return positions
    if rope_type(config) in ("linear", "dynamic"):
        return int(positions * factor)
    if rope_type(config) == "yarn":
        # Some bases count the scaling in max_position_embeddings.
        return max(positions, int(parameters["original_max_position_embeddings"] * factor))
    return positions


def _positions(config: Any) -> int | None:
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def finish_scaling(model: Any, scaling: str | None, base: str) -> None:
    """Makes each pass of a loaded model with `dynamic` scaling compute as its first one does.

    transformers keeps the frequencies of the longest pass so far until one fits the window before
    scaling, so results would depend on the order of texts, and a resumed run on where it stopped.
    Raises ModelError if the model ignores its scaling.
    """
    rotary = [(m, m.rope_type) for m in model.modules() if hasattr(m, "rope_type")]
    if scaling is not None and scaling.partition(":")[0] not in [kind for _, kind in rotary]:
        raise ModelError(
            f"{base} can't have RoPE scaling {scaling}: transformers ignores it for model type "
            f"{model.config.model_type!r}",
            "Leave the scaling out",
        )
    for module, kind in rotary:
        if kind == "dynamic":
            module.register_forward_pre_hook(_restart)


def _restart(module: Any, _: Any) -> None:
    module.max_seq_len_cached = module.original_max_seq_len
    module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)

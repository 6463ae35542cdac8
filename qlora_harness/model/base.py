"""Base models, quantised or in bf16. The only file that uses bitsandbytes and hqq.

Training and scoring both load through `load_base`, so they see the same weights.
"""

from __future__ import annotations

import copy
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import ModelError
from qlora_harness.model.compute_dtype import check_dtype
from qlora_harness.model.facts import attention_of, base_of, elements
from qlora_harness.model.fingerprint import checkpoint_fingerprint
from qlora_harness.model.free_memory import available_memory
from qlora_harness.model.rope import finish_scaling
from qlora_harness.model.shape import Shape
from qlora_harness.model.source import BaseSource, read_config, remedy_of, unreadable
from qlora_harness.settings import NOTABLE_SHARE, Quant

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger("qlora_harness")

_HQQ_GROUP = 64  # weights that share a scale and a zero point


def load_base(
    source: BaseSource,
    *,
    quant: Quant,
    double_quant: bool,
    compute_dtype: str,
    device: torch.device,
    rope_scaling: str | None = None,
    sharded: bool = False,
) -> PreTrainedModel:
    """Loads a base model onto one device, frozen and in evaluation mode.

    Reads weights as bfloat16, or as float16 if that is the compute dtype. `quant` then quantises
    all linear layers except the output head; `double_quant` quantises the scales of nf4 and fp4
    too. Compute dtype "float32" casts all other weights to float32, so their values are still the
    bfloat16 ones. `sharded` spreads the layers of a model of the types of `fused.model` over all
    processes, which must all call this. Raises ModelError if weights are missing or unreadable, and
    SettingsError if the device can't compute in that dtype.
    """
    import torch

    check_dtype(compute_dtype, device)
    model = (
        _read_by_layer(source, quant, double_quant, compute_dtype, device, rope_scaling, sharded)
        if sharded or source.weights_seed is not None
        else _read_weights(source, quant, double_quant, compute_dtype, device, rope_scaling)
    )
    finish_scaling(model, rope_scaling, source.shown)
    if compute_dtype == "float32":
        if not quant.is_quantised and read_config(source, None).dtype == torch.float32:
            logger.warning("the float32 weights of %s are rounded to bfloat16", source.name)
        for parameter in model.parameters():
            if parameter.is_floating_point():  # quantised weights are stored as integers
                parameter.data = parameter.data.to(torch.float32)
    if attention_of(model) != "sdpa":
        logger.warning("%s has %s attention only", source.name, attention_of(model))
    if quant is Quant.HQQ:
        _quantise_hqq(model, getattr(torch, compute_dtype), device)
    if quant.is_4bit:
        _keep_layout(model)
    if quant.is_quantised:
        share = _count_unquantised(model)
        model.qlora_harness_unquantised_share = share
        if share > NOTABLE_SHARE:
            logger.warning(
                "%s in %s: %.0f%% of the weights in its layers stay in 16 bits because they are "
                "not in linear layers",
                *(source.name, quant.value, 100 * share),
            )
    model.qlora_harness_fingerprint = (
        checkpoint_fingerprint(source.path, source.revision)
        if source.weights_seed is None
        else f"made on {device.type}, seed {source.weights_seed}"
    )
    model.requires_grad_(False)
    model.config.use_cache = False
    model.eval()
    return model  # type: ignore[no-any-return]


def _read_weights(
    source: BaseSource,
    quant: Quant,
    double_quant: bool,
    compute_dtype: str,
    device: torch.device,
    rope_scaling: str | None,
) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"device_map": {"": device}}
    if quant is Quant.HQQ:
        options = {}  # `_quantise_hqq` moves it, a layer at a time
    elif quant.is_quantised:
        options["quantization_config"] = _bitsandbytes_config(quant, double_quant, compute_dtype)
    if rope_scaling is not None:
        options["config"] = read_config(source, rope_scaling)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            revision=source.revision or "main",
            dtype=torch.float16 if compute_dtype == "float16" else torch.bfloat16,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    except torch.OutOfMemoryError:
        raise _too_large(source, quant, device) from None
    except Exception as error:  # noqa: BLE001  # as in `find_base`
        raise unreadable(source.shown, error, remedy_of(source.argument)) from None
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        # transformers fills them with random numbers.
        raise ModelError(
            f"{source.shown} lacks {len(missing)} weights (first: {missing[0]})",
            "Download the model again",
        )
    return model


def _read_by_layer(
    source: BaseSource,
    quant: Quant,
    double_quant: bool,
    compute_dtype: str,
    device: torch.device,
    rope_scaling: str | None,
    sharded: bool,
) -> Any:
    import torch

    from qlora_harness.model.by_layer import checkpoint_reader, load_by_layer, random_reader
    from qlora_harness.model.sharded import ShardedLayers

    if quant in (Quant.INT8, Quant.HQQ):
        raise ModelError(
            f"{source.shown} is loaded a layer at a time, which {quant.value} can't be",
            "Use --quant nf4, fp4 or bf16",
        )
    config = read_config(source, rope_scaling)
    if source.weights_seed is None:
        read = checkpoint_reader(source.path, source.revision, source.shown)
    else:
        read = random_reader(source.weights_seed, config.initializer_range, device)
    try:
        return load_by_layer(
            config,
            read,
            empty_4bit=partial(
                _empty_4bit, config=_bitsandbytes_config(quant, double_quant, compute_dtype)
            )
            if quant.is_4bit
            else None,
            dtype=getattr(torch, compute_dtype),
            device=device,
            sharded=ShardedLayers() if sharded else None,
        )
    except torch.OutOfMemoryError:
        raise _too_large(source, quant, device) from None


def _empty_4bit(layer: torch.nn.Linear, *, config: Any) -> torch.nn.Module:
    """Returns a 4-bit layer without weights, as transformers makes them from its configuration."""
    from bitsandbytes.nn import Linear4bit

    empty: torch.nn.Module = Linear4bit(
        *(layer.in_features, layer.out_features, layer.bias is not None),
        compute_dtype=config.bnb_4bit_compute_dtype,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        device="meta",
    )
    return empty


def _too_large(source: BaseSource, quant: Quant, device: torch.device) -> ModelError:
    return ModelError(
        f"{source.name!r} in {quant.value} does not fit into the memory of {device}",
        "Free the device, or use --quant nf4",
    )


def _bitsandbytes_config(quant: Quant, double_quant: bool, compute_dtype: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if quant is Quant.INT8:
        # It warns at every call of every layer that inputs are cast to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.value,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
    )


def _quantise_hqq(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Moves a model to a device, with HQQ's layers in place of the linear ones.

    transformers 5 can't load with its HqqConfig; the layers have that one's defaults.
    """
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    head = model.get_output_embeddings()
    config = BaseQuantizeConfig(nbits=4, group_size=_HQQ_GROUP, axis=1)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear and layer is not head:
                quantised = HQQLinear(layer, config, compute_dtype=dtype, device=str(device))
                setattr(parent, name, quantised)
    model.to(device)  # type: ignore[arg-type]  # declared without devices


def unquantised_share(model: Any) -> float | None:
    """Returns the share, 0 to 1, of the layers' weights that a quantised base holds in 16 bits.

    Ignores embeddings, output head, norms and biases. Only linear layers are quantised, not the
    fused expert tensors of most mixtures of experts. None without quantisation.
    """
    return getattr(base_of(model), "qlora_harness_unquantised_share", None)


def _count_unquantised(model: Any) -> float:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = {id(p) for module in ends if module is not None for p in module.parameters()}
    quantised = others = 0
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            quantised += elements(parameter)
        elif parameter.dim() > 1 and id(parameter) not in outside:
            others += parameter.numel()
    return others / max(1, quantised + others)


def is_4bit(layer: torch.nn.Module) -> bool:
    """Whether bitsandbytes holds a layer's weight in 4 bits."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def is_plain_linear(layer: torch.nn.Module) -> bool:
    """Whether a layer is exactly torch's Linear or bitsandbytes' Linear4bit, not a subclass."""
    import torch

    layers = _bitsandbytes_layers()
    kinds = [torch.nn.Linear] if layers is None else [torch.nn.Linear, layers.Linear4bit]
    return type(layer) in kinds


def _bitsandbytes_layers() -> Any:
    """bitsandbytes.nn, or None if nothing has imported it, so that no layer can be one of its own.

    The import takes seconds, which a base in bf16 needn't wait for.
    """
    return sys.modules.get("bitsandbytes.nn")


def why_not_plain(model: torch.nn.Module) -> str | None:
    """Returns why a quantised base has no fused layers whatever its adapter, or None."""
    if mixes_tokens(model):
        return "LLM.int8 chooses its outlier columns by all tokens of a pass"
    return "its layers are HQQ's" if hqq_layers(model) else None


def hqq_layers(model: torch.nn.Module) -> list[str]:
    """Returns the names of a model's HQQ layers, which PEFT's "all-linear" leaves out."""
    return [name for name, m in model.named_modules() if type(m).__name__ == "HQQLinear"]


def mixes_tokens(model: torch.nn.Module) -> bool:
    """Whether the result for a token depends on the other texts of a pass, as with LLM.int8."""
    layers = _bitsandbytes_layers()
    return layers is not None and any(
        isinstance(layer, layers.Linear8bitLt) for layer in model.modules()
    )


def dequantise(model: PreTrainedModel, compute_dtype: str) -> int:
    """Expands all 4-bit linear layers in place, and returns their number.

    The numbers stay the same, since bitsandbytes expands each weight to the input's dtype at every
    call: this trades memory for time.
    """
    import torch
    from bitsandbytes.nn import Linear4bit

    dtype = getattr(torch, compute_dtype)
    count = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, Linear4bit):
                continue
            weight = expand_4bit(layer.weight.data, layer.weight.quant_state, dtype)
            plain = torch.nn.Linear(
                layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
            )
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            if layer.bias is not None:
                plain.bias = layer.bias
            setattr(parent, name, plain)
            count += 1
    # transformers and PEFT choose their layers by these attributes.
    base = base_of(model)
    base.is_quantized = False
    base.is_loaded_in_4bit = False
    base.quantization_method = None
    base.hf_quantizer = None
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    return count


def expand_4bit(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Returns a packed 4-bit weight expanded to [N, K]; `state` is bitsandbytes' QuantState."""
    from bitsandbytes.functional import dequantize_4bit

    if state.dtype != dtype:
        state = copy.copy(state)
        state.dtype = dtype
    weight: torch.Tensor = dequantize_4bit(packed, state)
    return weight


def nf4_error(device: str) -> float:
    """Returns the largest error of weights in [-1, 1] after NF4, which shows whether it works."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    weight = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    return float((expand_4bit(packed, state, weight.dtype) - weight).abs().max())


def fits_dequantised(model: PreTrainedModel, compute_dtype: str) -> bool:
    """Whether free memory holds the expanded 4-bit layers and 3 GiB of working memory."""
    import torch
    from bitsandbytes.nn import Linear4bit

    size = getattr(torch, compute_dtype).itemsize
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    needed = sum(m.in_features * m.out_features for m in layers) * size
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else available_memory()
    return bool(free > needed + 3 * 2**30)


def _keep_layout(model: PreTrainedModel) -> None:
    """Stops bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    Nothing else can expand the repacked form, and it rounds float32 activations to bfloat16.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def weight_bytes(shape: Shape, quant: Quant, *, double_quant: bool, size: int) -> int:
    """Returns the bytes of a base's weights; one that isn't quantised takes `size` bytes."""
    scales = 4 / 64  # a float32 per 64 weights
    if double_quant:
        scales = (1 + 4 / 256) / 64  # a byte, and a float32 per 256 of these
    linear: float = {
        Quant.NF4: shape.linear * (0.5 + scales),
        Quant.FP4: shape.linear * (0.5 + scales),
        Quant.INT8: shape.linear + 4 * shape.rows,  # a float32 scale a row
        Quant.HQQ: shape.linear * (0.5 + 2 * size / _HQQ_GROUP),  # scale and zero point
        Quant.BF16: shape.linear * size,
    }[quant]
    return int(linear) + shape.others * size


def expansion_bytes(shape: Shape, quant: Quant, size: int) -> int:
    """Returns the bytes of the expanded weight, with copies, that a quantised layer works with."""
    copies = {Quant.BF16: 0, Quant.HQQ: 3}.get(quant, 1)
    return shape.largest * size * copies


def weights_fingerprint(model: torch.nn.Module) -> str | None:
    """Returns the `checkpoint_fingerprint` of the checkpoint that `load_base` read."""
    fingerprint: str | None = getattr(model, "qlora_harness_fingerprint", None)
    return fingerprint

"""Base models, quantised or in bf16. The only file that uses bitsandbytes and hqq.

Training and scoring both load through `load_base`, so they see the same weights.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import ModelError, first_line
from qlora_harness.locations import expanded
from qlora_harness.model.compute_dtype import check_dtype
from qlora_harness.model.fingerprint import checkpoint_fingerprint
from qlora_harness.model.free_memory import available_memory
from qlora_harness.model.gguf import expand_gguf
from qlora_harness.model.rope import finish_scaling, scale
from qlora_harness.model.shape import Shape
from qlora_harness.model.smollm2 import smollm2_file
from qlora_harness.settings import NOTABLE_SHARE, Quant

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("qlora_harness")

EMBEDDED = "smollm2"
_HQQ_GROUP = 64  # weights that share a scale and a zero point
RANDOM_WEIGHTS_KEY = "qlora_harness_random_weights"
WEIGHTS_SEED_KEY = "qlora_harness_weights_seed"  # of weights that are made while they are loaded


@dataclass(frozen=True)
class BaseSource:
    """Where a base model comes from."""

    name: str  # as the user named it
    path: str  # what transformers loads: a folder or a Hub id
    revision: str | None  # branch, tag or commit, as the user named it
    commit: str | None  # the commit that the Hub resolved it to; None for a folder
    random_weights: bool  # as its configuration declares
    argument: str = "--model"  # the flag or model argument that named it, for messages
    gguf: dict[str, Any] | None = None  # of `expand_gguf`: hash and tensor types of the file
    weights_seed: int | None = None  # of a folder without weights, which are made when loaded

    @property
    def recorded_name(self) -> str:
        """The name in records: that of a GGUF file, without its folder."""
        return self.name if self.gguf is None else expanded(self.name).name

    def record(self) -> dict[str, Any]:
        """Returns the fields to store: all but the path, which is local, and the argument."""
        record = asdict(self) | {"name": self.recorded_name}
        local = ("path", "argument", "weights_seed", *(["gguf"] if self.gguf is None else []))
        return {name: value for name, value in record.items() if name not in local}

    @property
    def shown(self) -> str:
        """The flag with its value: "--model: 'x'", or "--model_args pretrained=x"."""
        return _flag_and_value(self.argument, self.name)


def find_base(name: str, revision: str | None = None, *, argument: str = "--model") -> BaseSource:
    """Resolves a Hub id, a folder, a GGUF file or "smollm2", and reads the configuration.

    Expands a GGUF file into a folder, once. Raises ModelError if the model is missing, gated or
    already quantised, or has no readable configuration; the message names `argument`.
    """
    from transformers import AutoConfig

    path = expanded(name)
    if revision is not None and (name == EMBEDDED or path.exists()):
        raise ModelError(
            f"{argument}: {name!r} is not on the Hub and has no revision {revision!r}",
            "Leave the revision out",
        )
    if name == EMBEDDED or path.is_file():
        file = smollm2_file() if name == EMBEDDED else path
        folder, gguf = expand_gguf(file, _flag_and_value(argument, name))
        return BaseSource(name, str(folder), None, None, False, argument, gguf)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{argument}: folder {name} holds no config.json",
                "Name a Hugging Face model folder, or a .gguf file",
            )
        name_or_path = str(path)
    elif name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        flag = argument if argument.endswith("=") else f"{argument}: "
        raise ModelError(f"{flag}{name} does not exist", "Name a folder, a GGUF file or a Hub id")
    else:
        name_or_path = name
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001  # the Hub client and the parsers raise many kinds
        raise _unreadable(_flag_and_value(argument, name), error, _remedy(argument)) from None
    if getattr(config, "quantization_config", None):
        # transformers would load it as it is and ignore `quant`.
        raise ModelError(
            f"{_flag_and_value(argument, name)} is already quantised (its config.json has a "
            "quantization_config)",
            "Name the model that it was made from",
        )
    return BaseSource(
        name,
        name_or_path,
        revision,
        getattr(config, "_commit_hash", None),
        bool(getattr(config, RANDOM_WEIGHTS_KEY, False)),
        argument,
        weights_seed=getattr(config, WEIGHTS_SEED_KEY, None),
    )


def read_config(source: BaseSource, rope_scaling: str | None) -> Any:
    """Returns the configuration of a base that `find_base` has read, with its RoPE scaling.

    Raises ModelError if the base can't have it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        source.path, revision=source.revision or "main", trust_remote_code=False
    )
    if rope_scaling is not None:
        scale(config, rope_scaling, source.shown)
    return config


def _unreadable(shown: str, error: Exception, remedy: str) -> ModelError:
    """Returns the error for a model or tokenizer that transformers can't load."""
    if _is_refused_by_hub(error):
        return ModelError(
            f"{shown} is gated on the Hub and this account has no access",
            "Accept its licence on its Hub page and log in with `hf auth login`, or give a local "
            "folder",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{shown} comes with its own code, which is never run",
            "Use a model and a tokenizer that transformers implements",
        )
    return ModelError(f"{shown} can't be loaded ({first_line(error)})", remedy)


def _remedy(argument: str) -> str:
    revision = "revision=" if argument.endswith("=") else "--revision"
    return f"Check the name, {revision} and the network, or give a local folder"


def _flag_and_value(argument: str, name: str) -> str:
    return f"{argument}{name}" if argument.endswith("=") else f"{argument}: {name!r}"


def _is_refused_by_hub(error: BaseException) -> bool:
    """Whether any exception in the chain says that the Hub denied access."""
    current: BaseException | None = error
    while current is not None:
        status = getattr(getattr(current, "response", None), "status_code", None)
        gated = type(current).__name__ == "GatedRepoError" or "gated repo" in str(current)
        if gated or status in (401, 403):
            return True
        current = current.__cause__ or current.__context__
    return False


def load_tokenizer(source: BaseSource, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base model, or its copy in an adapter folder.

    Adds nothing to the vocabulary; raises ModelError if there is no readable tokenizer.
    """
    from transformers import AutoTokenizer

    path = str(folder) if folder else source.path
    revision = None if folder else source.revision
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001  # as in `find_base`
        what = f"the tokenizer of {folder or source.shown}"
        raise _unreadable(what, error, "Put the tokenizer's files there") from None


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
        raise _unreadable(source.shown, error, _remedy(source.argument)) from None
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


def attention_of(model: Any) -> str:
    """Returns the attention implementation that transformers chose, such as "sdpa" or "eager"."""
    return str(model.config._attn_implementation)  # noqa: SLF001  # has no public name


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
            quantised += _elements(parameter)
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


def base_of(model: Any) -> Any:
    """Returns the model under a PEFT adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_size(config: Any) -> int:
    """Returns the size of one attention head."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


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


def count_parameters(model: torch.nn.Module) -> int:
    """Returns the number of parameters; a uint8 holds two 4-bit ones."""
    return sum(map(_elements, model.parameters()))


def _elements(parameter: torch.nn.Parameter) -> int:
    import torch

    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def parameter_dtypes(model: torch.nn.Module) -> dict[str, int]:
    """Counts stored elements by dtype (a uint8 holds two 4-bit weights)."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return dict(sorted(counts.items()))


def weights_fingerprint(model: torch.nn.Module) -> str | None:
    """Returns the `checkpoint_fingerprint` of the checkpoint that `load_base` read."""
    fingerprint: str | None = getattr(model, "qlora_harness_fingerprint", None)
    return fingerprint


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device ran out of memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )

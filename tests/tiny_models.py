"""Tiny models with adapters, rows of texts for them, and training steps of both kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qlora_harness.data.examples import IGNORE
from qlora_harness.fused.host_memory import HostMemory, Stored
from qlora_harness.model.lora import attach_lora
from qlora_harness.score.generator import generate
from qlora_harness.score.packed_forward import PackedModel
from qlora_harness.score.prefix_tree import Pack, Query, plan
from qlora_harness.train.batches import pack_batch, pad_batch

VOCABULARY = 61
WINDOW = 64
Step = tuple[float, dict[str, torch.Tensor]]  # loss, gradients by name


def tiny(
    kind: str, *, quantised: bool = False, num_key_value_heads: int = 2, layers: int = 2,
    num_attention_heads: int = 4,
) -> Any:  # fmt: skip
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": layers, "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads, "max_position_embeddings": 64,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    kinds = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    head = {"head_dim": 64 // num_attention_heads} if kind == "qwen3" else {}
    config = kinds[kind](**shape, **head)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if quantised:
        quantise(model)
    return model.requires_grad_(False)


def quantise(model: Any) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    packed = Linear4bit(
                        linear.in_features, linear.out_features, bias=linear.bias is not None,
                        compute_dtype=torch.float32, quant_type="nf4",
                    )  # fmt: skip
                    packed.weight = Params4bit(linear.weight.data, quant_type="nf4")
                    packed.bias = linear.bias
                    packed.support_avx512bf16_for_cpu = False
                    setattr(parent, name, packed.to("cpu"))


def adapted(
    model: Any, *, dropout: float = 0.0, targets: str = "all-linear", **variant: Any
) -> Any:
    torch.manual_seed(1)
    peft = attach_lora(model, r=4, alpha=16, dropout=dropout, targets=targets, **variant)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft.train()


def texts(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        learned = torch.rand(length, generator=generator) < 0.6
        labels = [i if k else IGNORE for i, k in zip(ids, learned.tolist(), strict=True)]
        labels[-1] = ids[-1]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def gradients(model: Any) -> dict[str, torch.Tensor]:
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def plain_step(model: Any, rows: list[dict[str, list[int]]]) -> Step:
    batch = pad_batch(rows, 0)
    count = (batch["labels"][:, 1:] != IGNORE).sum()
    loss = model(**batch, num_items_in_batch=count).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def fused_step(model: Any, rows: list[dict[str, list[int]]]) -> Step:
    batch = pack_batch(rows)
    loss = model(**batch, num_items_in_batch=(batch["shift_labels"] != IGNORE).sum()).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def assert_alike(step: Step, expected: Step) -> None:
    assert step[0] == pytest.approx(expected[0], abs=1e-5)
    assert step[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # Queries have no gradient in a text of two tokens: only rounding is left there.
        assert (step[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def noted_widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that will hold the columns of every tensor that goes to the host."""
    widths: list[int] = []
    own = HostMemory._put

    def put(host: HostMemory, x: torch.Tensor) -> Stored:
        widths.append(x.shape[1])
        return own(host, x)

    monkeypatch.setattr(HostMemory, "_put", put)
    return widths


def queries(count: int, vocabulary: int = VOCABULARY) -> list[Query]:
    """A few prefixes with questions, and choices of several tokens."""
    rng = np.random.default_rng(0)

    def ids(size: int) -> list[int]:
        drawn: list[int] = rng.integers(1, vocabulary, size=size).tolist()
        return drawn

    prefixes = [ids(size) for size in (1, 7, 20)]
    contexts = [[*prefixes[n % 3], *ids(int(rng.integers(1, 9)))] for n in range(count)]
    return [Query(context, ids(size)) for context in contexts for size in (1, 1, 3)]


def one_pack(texts: list[Query]) -> Pack:
    (pack,) = plan(texts, pack_tokens=10**6, window=WINDOW)
    return pack


def logprobs(model: Any, pack: Pack, **options: Any) -> list[float]:
    return list(PackedModel(model, torch.float32, **options).start(pack).reads().logprobs)


def model_of(kind: str, quantised: bool, keys: int, targets: str | None) -> Any:
    model = tiny(kind, quantised=quantised, num_key_value_heads=keys)
    if targets is not None:
        model = adapted(model, targets=targets).requires_grad_(False)
    return model.eval()


def prompts(count: int, vocabulary: int = VOCABULARY, *, shared: int = 5) -> list[list[int]]:
    """Prompts of several lengths that begin with the same tokens."""
    draw = torch.Generator().manual_seed(3)
    prefix = torch.randint(1, vocabulary, (shared,), generator=draw).tolist()
    lengths = [1 + n * 7 % 13 for n in range(count)]
    return [
        prefix + torch.randint(1, vocabulary, (length,), generator=draw).tolist()
        for length in lengths
    ]


def continued(model: Any, ids: list[list[int]], longest: int, end: int) -> list[list[int]]:
    """What transformers generates for each prompt alone."""
    texts = []
    for prompt in ids:
        out = model.generate(
            input_ids=torch.tensor([prompt], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=model.device),
            max_new_tokens=longest, do_sample=False, eos_token_id=end, pad_token_id=0,
        )  # fmt: skip
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def generated(model: PackedModel, ids: list[list[int]], longest: int, end: int) -> list[list[int]]:
    """What `score.generator` generates."""
    texts: list[list[int]] = [[] for _ in ids]
    done = generate(model, ids, longest, lambda new: [text[-1] == end for text in new])
    for text in done:
        assert not texts[text.number]
        texts[text.number] = text.tokens
    return texts


def write_gguf(
    path: Path, weights: dict[str, np.ndarray], *, architecture: str = "llama",
    types: tuple[str, ...] = ("F32",), drop: tuple[str, ...] = (), **fields: Any,
) -> Path:  # fmt: skip
    """Writes a GGUF file with a byte-level tokenizer of 260 tokens.

    Args:
        path: The file.
        weights: By GGUF name; matrices are quantised to each of the `types` in turn. For K types,
            their values don't matter: the blocks are random.
        architecture: In llama.cpp's words.
        types: Of tensors, such as "Q8_0".
        drop: Names of metadata to leave out.
        fields: Further numbers and texts of the metadata, with "__" for a dot.
    """
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = gguf.GGUFWriter(path, architecture)
    embedding = weights["token_embd.weight"]
    tokens = ["<|endoftext|>", "</s>", *bytes_to_unicode().values(), "he", "Ġa"]
    assert len(tokens) == len(embedding)
    metadata = {
        f"{architecture}.block_count": 2, f"{architecture}.context_length": 256,
        f"{architecture}.embedding_length": embedding.shape[1],
        f"{architecture}.feed_forward_length": len(weights["blk.0.ffn_up.weight"]),
        f"{architecture}.attention.head_count": 2, f"{architecture}.attention.head_count_kv": 1,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0, f"{architecture}.rope.dimension_count": 128,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["h e", "Ġ a"], "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    } | {name.replace("__", "."): value for name, value in fields.items()}  # fmt: skip
    for name, value in metadata.items():
        if name not in drop:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(name, value)
    rng = np.random.default_rng(0)
    matrices = 0
    for name, values in weights.items():
        kind = gguf.GGMLQuantizationType.F32
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType[types[matrices % len(types)]]
            matrices += 1
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if kind.name.endswith("_K"):
            blocks = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size))
            halves = {"Q4_K": (1, 3), "Q6_K": (209,)}[kind.name]
            blocks[..., halves] = 0x14  # the high bytes of its scales: about 0.001
            data = blocks.astype(np.uint8).reshape(*values.shape[:-1], -1)
        else:
            data = gguf.quants.quantize(values.astype(np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_weights(architecture: str = "llama", *, tied: bool = False) -> dict[str, np.ndarray]:
    """Random weights of two layers by their GGUF names: width 256, two heads, one of keys."""
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (260, 256)}
    for layer in range(2):
        part = {
            "attn_norm": (256,), "attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256),
            "attn_output": (256, 256), "ffn_norm": (256,), "ffn_gate": (512, 256),
            "ffn_up": (512, 256), "ffn_down": (256, 512),
        }  # fmt: skip
        if architecture == "qwen3":
            part |= {"attn_q_norm": (128,), "attn_k_norm": (128,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in part.items()}
        if architecture == "qwen2":
            biases = {"attn_q": (256,), "attn_k": (128,), "attn_v": (128,)}
            shapes |= {f"blk.{layer}.{name}.bias": shape for name, shape in biases.items()}
    shapes["output_norm.weight"] = (256,)
    if not tied:
        shapes["output.weight"] = (260, 256)
    return {name: rng.normal(0.0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}


def tiny_of_any_kind(kind: str) -> Any:
    """A model whose weights are large enough that a wrong mask shows; 40 tokens, a window of 48."""
    tf = transformers

    shared: dict[str, Any] = {"vocab_size": 40, "attn_implementation": "sdpa"}
    llama_like: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48,
    }  # fmt: skip
    configs = {
        "llama": lambda: tf.LlamaConfig(**shared, **llama_like),
        "qwen2": lambda: tf.Qwen2Config(**shared, **llama_like),
        "qwen3": lambda: tf.Qwen3Config(**shared, **llama_like, head_dim=8),
        "gpt2": lambda: tf.GPT2Config(**shared, n_embd=32, n_layer=2, n_head=4, n_positions=48),
        "gpt_neox": lambda: tf.GPTNeoXConfig(
            **shared, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=48,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(configs[kind]())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.float().eval()

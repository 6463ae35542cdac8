"""Scores the benchmark's prompts with vLLM: the request, and the process that answers it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.benchmark.peers import absolute, in_own_process
from qlora_harness.errors import SettingsError
from qlora_harness.record import installed_versions
from qlora_harness.schema.mmlu import LETTERS

if TYPE_CHECKING:
    from qlora_harness.lm_eval_compat.hflm import Encoded
    from qlora_harness.score.adapter_lm import QloraAdapterLM

_TIMEOUT = 3600.0  # seconds, with loading
_MEMORY_SHARE = 0.9  # of what is free
_WARM_UP = 64  # prompts


def run_vllm(lm: QloraAdapterLM, encoded: Sequence[Encoded], folder: Path) -> dict[str, Any]:
    """Scores encoded pairs with vLLM, imported from `folder`, in a process of its own.

    Returns what `score_prompts` does. Raises SettingsError if an answer isn't one token, or vLLM
    fails.
    """
    answers = list(dict.fromkeys(token for *_, answer in encoded for token in answer))
    if len(answers) != len(LETTERS) or any(len(answer) != 1 for *_, answer in encoded):
        raise SettingsError(
            "--peer-path: the answers are not one token each in this model's tokenizer",
            "Leave it out",
        )
    import torch  # not at the top: in its process, vLLM sets variables before it does this

    free, total = torch.cuda.mem_get_info() if lm.device.type == "cuda" else (1, 1)
    source = lm.loaded.source
    request = {
        "peer": "vllm",
        "model": absolute(source.path),
        "revision": source.revision,
        "dtype": lm.loaded.compute_dtype,
        "memory_share": _MEMORY_SHARE * free / total,
        # All answers to a prompt follow each other.
        "prompts": [tokens[-lm.max_length :] for _, tokens, _ in encoded[:: len(LETTERS)]],
        "answers": answers,
    }
    result = in_own_process(request, folder, _TIMEOUT)
    if "failure" in result:
        raise SettingsError(
            f"--peer-path {folder}: vllm {result['failure']}",
            "See the lines above, or leave the flag out",
        )
    return result


def score_prompts(request: dict[str, Any]) -> dict[str, Any]:
    """Returns log-probabilities of `answers` after each of `prompts`, and times; runs there."""
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    # Compiling takes longer than it can save: the layers of large batches are matrix products.
    llm = LLM(
        model=request["model"],
        revision=request["revision"],
        dtype=request["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=True,
        prefix_caching_hash_algo="xxhash",
        max_model_len=1 + max(map(len, request["prompts"])),
        max_num_batched_tokens=16384,
        max_num_seqs=1024,
        gpu_memory_utilization=request["memory_share"],
    )
    answers: list[int] = request["answers"]
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, logprob_token_ids=answers, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    llm.generate(prompts[:_WARM_UP], sampling, use_tqdm=False)
    llm.reset_prefix_cache()
    loading = time.perf_counter() - started
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    scoring = time.perf_counter() - started
    rows = [output.outputs[0].logprobs[0] for output in outputs]
    return {
        "loading_seconds": loading,
        "scoring_seconds": scoring,
        "computed_tokens": sum(len(o.prompt_token_ids) - o.num_cached_tokens for o in outputs),
        "logprobs": [[row[answer].logprob for answer in answers] for row in rows],
        "answers": answers,
        "likeliest": [output.outputs[0].token_ids[0] for output in outputs],
        "version": installed_versions(["vllm"])["vllm"],
    }

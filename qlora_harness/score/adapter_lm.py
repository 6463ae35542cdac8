"""`lm_eval --model qlora_adapter`: a base, quantised or not, with an unmerged adapter."""

from __future__ import annotations

# ruff: noqa: E402  # imports make most of the objects
import atexit
import gc

# Python looks for unused cycles after every 700 new objects, and at its exit among all of them. A
# scoring makes millions that are needed to the end; this was a quarter of a command's time.
gc.set_threshold(100_000, 20, 100)
atexit.register(gc.freeze)

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from qlora_harness.errors import SettingsError, install_excepthook
from qlora_harness.fused.launch import hash_triton_ahead
from qlora_harness.lm_eval_compat.hflm import LoadedHFLM, Request
from qlora_harness.lm_eval_compat.saving import verify_saved_results
from qlora_harness.model.facts import count_parameters
from qlora_harness.model.rope import window
from qlora_harness.model.source import find_base, read_config
from qlora_harness.score.generation import GenerationTask
from qlora_harness.score.model_arguments import (
    ScoringOptions,
    check_arguments,
    check_fp8,
    resolve_dtype,
)
from qlora_harness.score.prefix_tree import Score
from qlora_harness.score.run_choice import choose_scored_run
from qlora_harness.score.scored_model import load_scored_model, load_scored_tokenizer
from qlora_harness.score.session import ScoringSession
from qlora_harness.train.ranks import prepare_accelerate

logger = logging.getLogger("qlora_harness")


class QloraAdapterLM(LoadedHFLM):
    """Scores a base model with an adapter as HFLM does, but computes each distinct token once.

    Training and scoring load the base with the same function, and the adapter stays unmerged.

    Args:
        pretrained: Base model: a Hub id, a folder, a GGUF file, "smollm2". Default: the adapter's.
        peft: Adapter folder or Hub id. With neither, the newest completed run under ./results.
        quant: "nf4", "fp4", "int8", "hqq" or "bf16". Default: as trained; bf16 for a base alone.
        double_quant: Whether 4-bit scales are quantised too. Default: as trained.
        revision: Branch, tag or commit of the base.
        peft_revision: Branch, tag or commit of an adapter on the Hub.
        dtype: Compute dtype, "bfloat16", "float16" or "float32". Default: as trained; for a base
            alone bfloat16 on a GPU and float32 on a CPU. On a GPU without bfloat16 the default is
            float16 instead.
        softmax_dtype: dtype of the log-softmax; bfloat16 makes ties.
        results_dir: Folder of the progress and evaluation records.
        scoring: "packed", or "hf" for HFLM's batches.
        dequantize: "auto" expands a 4-bit base once (to the same values) if memory allows, or
            "never".
        pack_tokens: Most tokens in a forward pass. Default: what fits the device.
        kernels: "auto" uses fused layers if they support the model, "none" transformers' own.
        verify: Number of texts to score through unmodified HFLM, too. A difference beyond rounding
            is an error.
        compute: "fp8" multiplies by the base's layers in 8-bit floats, on a Hopper GPU: faster and
            less exact than "bf16".
        rope_scaling: Longer window of the base, TYPE:FACTOR, or "none". Default: as trained.
        **options: Arguments of HFLM: max_length, batch_size, device, …
    """

    def __init__(
        self,
        pretrained: str | None = None,
        peft: str | None = None,
        quant: str | None = None,
        double_quant: bool | None = None,
        revision: str | None = None,
        peft_revision: str | None = None,
        dtype: str = "auto",
        softmax_dtype: str | None = "float32",
        results_dir: str | None = None,
        scoring: str = "packed",
        dequantize: str = "auto",
        pack_tokens: int | None = None,
        verify: int = 0,
        kernels: str = "auto",
        compute: str = "bf16",
        rope_scaling: str | None = None,
        **options: Any,
    ) -> None:
        install_excepthook()
        check_arguments(options, softmax_dtype)
        scoring_options = ScoringOptions(scoring, kernels, dequantize, pack_tokens, verify, compute)
        choice = choose_scored_run(
            pretrained=pretrained,
            peft=peft,
            quant=quant,
            double_quant=double_quant,
            revision=revision,
            peft_revision=peft_revision,
            results_dir=results_dir,
            rope_scaling=rope_scaling,
        )
        if torch.cuda.is_available():
            hash_triton_ahead()
        if pretrained is None and peft is None:
            logger.warning("scoring the newest completed run: %s", choice.results_dir)
        compute_dtype = resolve_dtype(dtype, choice.compute_dtype)
        if compute == "fp8":
            check_fp8(choice.quant, compute_dtype)
        source = find_base(choice.base, choice.revision, argument="--model_args pretrained=")
        if choice.rope_scaling is not None and not options.get("max_length"):
            options["max_length"] = window(read_config(source, choice.rope_scaling))
        tokenizer = load_scored_tokenizer(choice, source)
        prepare_accelerate()
        super().__init__(
            partial(load_scored_model, choice, source, len(tokenizer), compute_dtype),
            exact_logits=scoring_options.exact_logits,
            pretrained=source.path,
            revision=choice.revision or "main",
            tokenizer=tokenizer,
            dtype=compute_dtype,
            softmax_dtype=softmax_dtype,
            **options,
        )
        if self.rank > 0:
            logger.setLevel(logging.ERROR)  # so that warnings appear once
        self.session = ScoringSession(self, scoring_options)
        verify_saved_results()
        logger.warning(
            "%s, %s%s%s%s, adapter %s, compute dtype %s%s",
            choice.base,
            choice.quant.value,
            " (expanded once)" if self.session.path.expanded else "",
            f", RoPE scaling {choice.rope_scaling}" if choice.rope_scaling else "",
            ", random weights" if source.random_weights else "",
            choice.adapter or "none",
            compute_dtype,
            ", products with the base in FP8" if compute == "fp8" else "",
        )

    def take(self, model: Any, kernels: str, compute: str = "bf16") -> None:
        """Replaces the model with one of the same kind; an adapter must be plain LoRA."""
        self.session.close()
        self.loaded = replace(self.loaded, model=model, adapter_config=None)
        options = replace(self.session.options, kernels=kernels, compute=compute)
        self.session = ScoringSession(self, options)

    def loglikelihood(self, requests: list[Request], disable_tqdm: bool = False) -> list[Score]:
        """Scores continuations, and records the answers to our MMLU tasks."""
        if self.enable_thinking:  # HFLM refuses this for every log-probability
            refused: list[Score] = super().loglikelihood(requests)
            return refused
        return self.session.answer(requests, show_progress=not disable_tqdm and self.rank == 0)

    def generate_until(self, requests: list[Request], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts as HFLM does, greedy ones many at a time (see `generator`)."""
        show_progress = not disable_tqdm and self.rank == 0
        return GenerationTask(self, self.session, show_progress=show_progress).answer(requests)

    def get_model_info(self) -> dict[str, Any]:
        """Returns the model's entry in the results JSON, without a request to the Hub."""
        choice = self.loaded.choice
        settings = self.session.settings_record()
        return {
            "model_num_parameters": count_parameters(self.model),
            "model_dtype": settings["dtype"],
            "model_revision": choice.revision,
            "model_sha": self.loaded.source.commit or "",
            "peft_sha": self.loaded.adapter_sha256 or "",
            "base": self.loaded.source.recorded_name,
            "quant": choice.quant.value,
            "double_quant": choice.double_quant if choice.quant.is_4bit else None,
            "rope_scaling": choice.rope_scaling,
            **{key: settings[key] for key in ("softmax_dtype", "max_length", "leading_bos")},
        }

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Selects a chat template as HFLM does; a tokenizer without one is a SettingsError."""
        if not chat_template:
            return None
        self._check_chat_template()
        selected: str | None = super().chat_template(chat_template)
        return selected

    def apply_chat_template(self, *args: Any, **options: Any) -> str:
        """Applies the chat template as HFLM does; a tokenizer without one is a SettingsError."""
        self._check_chat_template()
        applied: str = super().apply_chat_template(*args, **options)
        return applied

    def _check_chat_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise SettingsError(
                f"--apply_chat_template: {self.loaded.choice.base} has no chat template",
                "Leave the flag out",
            )

"""HFLM with a model that we load; no other module uses HFLM's private names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from qlora_harness.model.facts import base_of
from qlora_harness.score.encoding import Pair
from qlora_harness.score.output_head import float32_logits
from qlora_harness.score.prefix_tree import Score

if TYPE_CHECKING:
    from qlora_harness.score.scored_model import ScoredModel

Request: TypeAlias = Instance
Encoded = tuple[Pair, list[int], list[int]]  # the ids of context and continuation


class GenerationSettings(NamedTuple):
    """How a `generate_until` request's text is made, with HFLM's defaults."""

    stops: list[str]  # with the tokenizer's EOS
    longest: int  # new tokens
    others: dict[str, Any]


class LoadedHFLM(HFLM):  # type: ignore[misc]  # HFLM has no type information
    """HFLM with a model from `load`, called once with the device that HFLM chose.

    `exact_logits` computes the output head in float32. HFLM takes the other options.
    """

    loaded: ScoredModel

    def __init__(
        self, load: Callable[[torch.device], ScoredModel], *, exact_logits: bool, **options: Any
    ) -> None:
        self._load = load
        self._exact_logits = exact_logits
        super().__init__(**options)

    @property
    def model(self) -> Any:
        """The loaded model."""
        return self.loaded.model

    @property
    def rank(self) -> int:
        """This process's number across hosts; HFLM counts on one host, and GPUs only."""
        accelerator = getattr(self, "accelerator", None)
        return 0 if accelerator is None else int(accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        accelerator = getattr(self, "accelerator", None)
        return 1 if accelerator is None else int(accelerator.num_processes)

    def _create_model(self, pretrained: str, **options: Any) -> None:
        del pretrained, options
        accelerator = getattr(self, "accelerator", None)
        device = self.device if accelerator is None else accelerator.device
        self.loaded = self._load(torch.device(device))
        # HFLM ties weights again, which fails if PEFT has wrapped one of the tied modules.
        base_of(self.model).tie_weights = lambda *_, **__: None

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Encoded],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Score]:
        head = base_of(self.model).get_output_embeddings()
        with float32_logits(head) if self._exact_logits else contextlib.nullcontext():
            scores: list[Score] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
        return scores

    def score_plainly(self, encoded: Sequence[Encoded], *, show_progress: bool) -> list[Score]:
        """Scores token ids with HFLM's batches."""
        return self._loglikelihood_tokens(encoded, disable_tqdm=not show_progress)

    def score_as_hflm(self, encoded: Sequence[Encoded]) -> list[Score]:
        """Scores token ids exactly as HFLM does, without the float32 output head."""
        scores: list[Score] = super()._loglikelihood_tokens(encoded, disable_tqdm=True)
        return scores

    def generation_settings(self, given: dict[str, Any]) -> GenerationSettings:
        """Completes the settings of a request."""
        others = normalize_gen_kwargs(given, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(others.pop("until"), eos=eos)
        return GenerationSettings(stops, others.pop("max_gen_toks"), others)

    def encode_contexts(self, contexts: list[str], room: int) -> list[list[int]]:
        """Encodes the contexts of a batch, cut on the left to `room` tokens."""
        ids, mask = self.tok_batch_encode(
            contexts, left_truncate_len=room, truncation=self.truncation
        )
        return [row[used].tolist() for row, used in zip(ids, mask.bool(), strict=True)]

    def text_of(self, tokens: list[int], stops: list[str]) -> str:
        """Decodes new tokens, up to the first stop string."""
        text: str = postprocess_generated_text(self.tok_decode(tokens), stops, None)
        return text

    def generate_plainly(self, requests: list[Request], *, show_progress: bool) -> list[str]:
        """Continues contexts with HFLM's batches."""
        texts: list[str] = HFLM.generate_until(self, requests, disable_tqdm=not show_progress)
        return texts


class StockHFLM:
    """lm_eval's `hf` model with loaded weights, for timing each step."""

    def __init__(self, lm: LoadedHFLM, batch_size: int) -> None:
        self._hflm = HFLM(
            pretrained=lm.model,
            tokenizer=lm.tokenizer,
            batch_size=batch_size,
            max_length=lm.max_length,
            add_bos_token=lm.add_bos_token,
            softmax_dtype=lm.softmax_dtype,
        )

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """Encodes texts pair by pair."""
        encode = self._hflm._encode_pair  # noqa: SLF001  # the only way to time it separately
        return [(pair, *encode(*pair)) for pair in pairs]

    def score(self, encoded: Sequence[Encoded]) -> list[Score]:
        """Scores token ids, without a progress bar."""
        score = self._hflm._loglikelihood_tokens  # noqa: SLF001  # as above
        scores: list[Score] = score(encoded, disable_tqdm=True)
        return scores

    def generate(self, requests: list[Request]) -> list[str]:
        """Continues contexts."""
        texts: list[str] = self._hflm.generate_until(requests, disable_tqdm=True)
        return texts

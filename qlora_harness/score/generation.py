"""lm_eval's `generate_until` requests: which go to `generator`, and where their texts end.

Their text is HFLM's. It takes all requests that aren't greedy or whose model has no packs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from qlora_harness.errors import DataError, SettingsError
from qlora_harness.lm_eval_compat.hflm import LoadedHFLM, Request
from qlora_harness.model.facts import base_of
from qlora_harness.model.sharded import sharded_layers
from qlora_harness.score.generator import generate
from qlora_harness.score.session import ScoringSession

logger = logging.getLogger("qlora_harness")

_LOOKBACK = 2  # tokens more than a stop string has, as in HFLM: it may be spelled with more
_GREEDY = {"do_sample": False, "temperature": 0.0}
# Of a model's generation config: what doesn't change greedy choices, or is followed here.
_NEUTRAL = {
    "_from_model_config",
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}


class Stops:
    """Says which texts end: at one of some tokens, or at a stop string as HFLM looks for it."""

    def __init__(self, tokenizer: Any, strings: Sequence[str], tokens: Iterable[int]) -> None:
        self._tokenizer, self._tokens = tokenizer, frozenset(tokens)
        self._strings: dict[int, list[str]] = {}
        for string in strings:
            length = len(tokenizer.encode(string, add_special_tokens=False)) + _LOOKBACK
            self._strings.setdefault(length, []).append(string)

    def __call__(self, texts: Sequence[list[int]]) -> list[bool]:
        """Looks at the ends of the new tokens of each text."""
        ended = [tokens[-1] in self._tokens for tokens in texts]
        for length, strings in self._strings.items() if texts else ():
            windows = self._tokenizer.batch_decode([tokens[-length:] for tokens in texts])
            ended = [
                end or any(string in window for string in strings)
                for end, window in zip(ended, windows, strict=True)
            ]
        return ended


class GenerationTask:
    """Answers `generate_until` requests of one call."""

    def __init__(self, lm: LoadedHFLM, session: ScoringSession, *, show_progress: bool) -> None:
        self._lm, self._session, self._show_progress = lm, session, show_progress
        self._config = base_of(lm.model).generation_config

    def answer(self, requests: Sequence[Request]) -> list[str]:
        """Returns the texts.

        Raises SettingsError if the window has no room for new tokens, or if the base is spread over
        processes, whose texts take different numbers of steps.
        """
        if sharded_layers(self._lm.model) is not None:
            raise SettingsError(
                "FSDP spreads the base over the processes, which can't generate text together",
                "Launch without FSDP, or leave tasks out that generate, such as gsm8k",
            )
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            group = [requests[n] for n in numbers]
            texts.update(zip(numbers, self._answer_alike(group), strict=True))
        return [texts[n] for n in range(len(requests))]

    def _answer_alike(self, requests: list[Request]) -> list[str]:
        """Answers requests with the same settings."""
        lm, path = self._lm, self._session.path
        settings = lm.generation_settings(requests[0].args[1])
        room = lm.max_length - settings.longest
        if settings.longest < 1:
            raise SettingsError(
                f"generation_kwargs: max_gen_toks {settings.longest} is out of range",
                "It must be at least 1",
            )
        if room < 1:
            raise SettingsError(
                f"generation_kwargs: max_gen_toks {settings.longest} leaves no room for a prompt "
                f"in max_length={lm.max_length}",
                "Give a lower max_gen_toks",
            )
        prompts = lm.encode_contexts([request.args[0] for request in requests], room)
        if not all(prompts):
            raise DataError(
                "generate_until: a prompt is empty, and the tokenizer puts no BOS before it",
                "Correct the task's doc_to_text",
            )
        reason = path.reason or self._why_not_greedy(settings.others)
        if reason is not None:
            logger.warning("generating with HFLM's batches: %s", reason)
        if reason is not None or not path.packed:
            return lm.generate_plainly(requests, show_progress=self._show_progress)
        ends = self._config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        # A model's own limit has precedence in transformers.
        longest = self._config.max_new_tokens or settings.longest
        stops = Stops(lm.tokenizer, settings.stops, ends)
        texts = [""] * len(requests)
        for text in tqdm(
            generate(self._session.packed_model(), prompts, longest, stops),
            desc="Generating",
            total=len(requests),
            unit=" texts",
            disable=not self._show_progress,
        ):
            texts[text.number] = lm.text_of(text.tokens, settings.stops)
            request = requests[text.number]
            lm.cache_hook.add_partial("generate_until", request.args, texts[text.number])
        return texts

    def _why_not_greedy(self, settings: dict[str, Any]) -> str | None:
        """Returns why only HFLM can follow settings, those of the model included, or None."""
        if self._lm.think_end_token is not None:
            return "think_end_token is set"
        for name, value in settings.items():
            if name not in _GREEDY or value != _GREEDY[name]:
                return f"{name} is {value!r}"
        own = self._config.to_diff_dict()
        others = sorted(name for name in own.keys() - _NEUTRAL if own[name])
        return f"the model's generation config sets {others[0]}" if others else None

"""Answers lm_eval's requests, and journals and records those of our tasks."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch

from qlora_harness.errors import DataError, ResultsError, SettingsError, shown
from qlora_harness.lm_eval_compat.environment import describe_environment_ahead
from qlora_harness.lm_eval_compat.hflm import Encoded, LoadedHFLM, Request
from qlora_harness.model.base import dequantise
from qlora_harness.record import environment, scrub_all
from qlora_harness.schema.mmlu import LETTERS
from qlora_harness.score.encoding import Pair, encode_pairs
from qlora_harness.score.journal import Journal, question_key
from qlora_harness.score.mmlu_recorder import MmluRecorder
from qlora_harness.score.model_arguments import ScoringOptions
from qlora_harness.score.packed_forward import PackedModel
from qlora_harness.score.packed_scorer import PackedScorer, default_pack_tokens
from qlora_harness.score.prefix_tree import Query, Score
from qlora_harness.score.scoring_path import choose_path

logger = logging.getLogger("qlora_harness")

_FEW_PACKS = 6  # enough to time
_PART = 8192  # texts that are encoded while a GPU computes those before
# Largest mean difference, nats, between two ways of scoring that rounding can explain.
_TOLERANCES = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
_FP8_TOLERANCE = 1.0


@dataclass(frozen=True)
class Verification:
    """Difference between packed scoring and HFLM, in nats."""

    mean: float
    largest: float


class TokenScores(NamedTuple):
    """Scores of token ids, and the number of tokens that packs computed for them."""

    scores: list[Score]
    computed_tokens: int | None


class ScoringSession:
    """Scores requests with one model, in packs of a trie of token ids (see `prefix_tree`).

    Scores for our MMLU tasks go to a journal in the run folder, so that the same command continues
    an interrupted run.
    """

    def __init__(self, lm: LoadedHFLM, options: ScoringOptions) -> None:
        self.lm, self.options = lm, options
        choice = lm.loaded.choice
        self.path = choose_path(lm.loaded, options)
        if self.path.reason is not None:
            logger.warning("scoring with HFLM's batches: %s", self.path.reason)
        self.verification: Verification | None = None
        self._recorder = MmluRecorder(choice.results_dir, choice.progress_name)
        self._packed: PackedModel | None = None

    def answer(self, requests: Sequence[Request], *, show_progress: bool) -> list[Score]:
        """Scores requests of any task, and records those of our tasks.

        Raises SettingsError if prompts of our tasks were changed or if " A" is several tokens, and
        ResultsError if records can't be written, a log-probability is not finite or `verify` fails.
        """
        pairs: list[Pair] = [request.args for request in requests]
        journal = self._open_journal(requests)
        expected = self._score_sample_as_hflm(pairs)
        scores, truncated = self._score_pairs(pairs, journal, show_progress)
        if expected:
            self._verify(expected, scores, journal)
        results = [scores[pair] for pair in pairs]
        answered = self._recorder.collect(requests, results, truncated)
        parts = self.lm.gather_object(answered, dst=0)
        if self.lm.rank == 0 and parts is not None and any(parts):
            self._recorder.write(parts, self._header())
        self.lm.barrier()  # for all processes, also those without a question of our tasks
        if journal is not None:
            journal.close(remove=self.lm.rank == 0)
        return results

    def score_tokens(self, encoded: Sequence[Encoded]) -> TokenScores:
        """Scores token ids without a journal or a record."""
        scorer = self._scorer() if self.path.packed else None
        return self._score_with(scorer, [list(encoded)], journal=None, show_progress=False)[1]

    def projected_seconds(self, requests: Sequence[Request]) -> float:
        """Estimates how long `answer` takes, from a few packs or from a sample of the texts."""
        began = time.perf_counter()
        encoded = self.encode(list(dict.fromkeys(request.args for request in requests)))
        encoding = time.perf_counter() - began
        if self.path.packed:
            scorer = self._scorer()
            packs = scorer.plan([Query(context, more) for _, context, more in encoded])
            middle = len(packs) // 2
            part = [n for pack in packs[middle : middle + _FEW_PACKS] for n in pack.queries()]
            whole = sum(pack.tokens for pack in packs)
        else:
            part = sorted(random.Random(0).sample(range(len(encoded)), min(256, len(encoded))))
            whole = len(encoded)
        for _ in range(2):  # the first time builds kernels
            began = time.perf_counter()
            computed = self.score_tokens([encoded[n] for n in part]).computed_tokens
            seconds = time.perf_counter() - began
        return encoding + seconds * whole / (len(part) if computed is None else computed)

    def close(self) -> None:
        """Gives the weights of the model back their own memory; it can't score any more."""
        if self._packed is not None:
            self._packed.close()
            self._packed = None

    def expand_base(self) -> None:
        """Dequantises a 4-bit base if the path needs that."""
        if self.path.expanded:
            dequantise(self.lm.model, self.lm.loaded.compute_dtype)

    def identity(self) -> dict[str, Any]:
        """Returns all that a score depends on, which identifies a journal."""
        identity = {**self.lm.loaded.record(), **self.settings_record()}
        if identity["compute"] == "bf16":  # as in journals of earlier versions
            del identity["compute"]
        return identity

    def settings_record(self) -> dict[str, Any]:
        """Returns the "settings" section of the records."""
        return {
            "batch_size": self.lm.batch_size,
            "dtype": self.lm.loaded.compute_dtype,
            "compute": self.options.compute,
            "softmax_dtype": str(self.lm.softmax_dtype).removeprefix("torch."),
            "max_length": self.lm.max_length,
            "leading_bos": self._leading_bos(),
            "scoring": "packed" if self.path.packed else "hf",
            "logits": "float32" if self.options.exact_logits else "as computed",
            "expanded_once": self.path.expanded,
            "fused_kernels": self.path.fused,
        }

    def _header(self) -> dict[str, Any]:
        device = self.lm.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        header: dict[str, Any] = scrub_all(
            {
                "arm": self.lm.loaded.choice.quant.arm,
                "model": self.lm.loaded.record(),
                "settings": self.settings_record() | {"processes": self.lm.world_size},
                "environment": environment() | {"device": {"name": name}},
            }
        )
        return header

    def _leading_bos(self) -> list[int]:
        bos = self.lm.tokenizer.bos_token_id
        return [bos] if bos is not None and self.lm.tok_encode("a")[:1] == [bos] else []

    def _open_journal(self, requests: Sequence[Request]) -> Journal | None:
        """Checks the requests of our tasks, and opens their journal."""
        ours = self._recorder.ours(requests)
        if not ours:
            return None
        self._check_letters()
        self._recorder.check(ours)
        return Journal(self._recorder.journal_path, self.identity(), self.lm.rank)

    def _check_letters(self) -> None:
        context = self.lm.tok_encode("Answer:")
        for letter in LETTERS:
            whole = self.lm.tok_encode(f"Answer: {letter}")
            if whole[: len(context)] != context or len(whole) != len(context) + 1:
                raise SettingsError(
                    f"the tokenizer of {self.lm.loaded.choice.base} makes "
                    f"{len(whole) - len(context)} tokens of ' {letter}' after 'Answer:'",
                    "These tasks need a tokenizer for which each answer is one token",
                )

    def _score_pairs(
        self, pairs: Sequence[Pair], journal: Journal | None, show_progress: bool
    ) -> tuple[dict[Pair, Score], set[str]]:
        """Scores distinct pairs, and returns the contexts that were cut to the window, too."""
        distinct = list(dict.fromkeys(pairs))
        known = {} if journal is None else _known(journal, distinct)
        own = [pair for pair in distinct if pair not in known]
        earlier = self.encode(list(known)) if known else []
        if not any(self._gather(len(own))):
            return known, self._cut(earlier)
        scorer = self._scorer() if self.path.packed else None
        overlaps = scorer is not None and self.packed_model().overlaps and self.lm.world_size == 1
        if overlaps:
            self.packed_model().build_ahead()
        try:
            parts = self._encoded(own, _PART if overlaps else max(1, len(own)))
            encoded, scored = self._score_with(
                scorer, parts, journal, show_progress, texts=len(own)
            )
        finally:
            if self._packed is not None:
                self._packed.wait()
        pairs_scored = (pair for pair, _, _ in encoded)
        scores = known | dict(zip(pairs_scored, scored.scores, strict=True))
        return scores, self._cut([*earlier, *encoded])

    def _cut(self, encoded: Sequence[Encoded]) -> set[str]:
        """Returns the contexts that are cut to the window; the last token is never an input."""
        most = self.lm.max_length + 1
        return {pair[0] for pair, ids, more in encoded if len(ids) + len(more) > most}

    def _encoded(self, pairs: Sequence[Pair], size: int) -> Iterator[list[Encoded]]:
        """Yields texts of all processes, `size` of this one's at a time."""
        for start in range(0, max(1, len(pairs)), size):
            part = self._of_all(self.encode(pairs[start : start + size]))
            describe_environment_ahead()
            yield part

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """Encodes texts in batches.

        Raises DataError for a continuation that has no token of its own or exceeds the window.
        """
        encoded = encode_pairs(self.lm, pairs)
        for pair, (_, more) in zip(pairs, encoded, strict=True):
            if not 0 < len(more) <= self.lm.max_length:
                raise DataError(
                    f"{shown(pair[1])} after {shown(pair[0][-40:])} adds {len(more)} tokens, but "
                    f"must add 1 to {self.lm.max_length} (max_length)",
                    "Correct the task's doc_to_choice, doc_to_target or target_delimiter",
                )
        return [(pair, *ids) for pair, ids in zip(pairs, encoded, strict=True)]

    def packed_model(self) -> PackedModel:
        """Returns the model that computes packs; only for a path that is packed."""
        if self._packed is None:  # made once, as it moves weights
            self.expand_base()
            self._packed = PackedModel(
                *(self.lm.model, self.lm.softmax_dtype),
                fused=self.path.fused,
                compute=self.options.compute,
            )
        return self._packed

    def _scorer(self) -> PackedScorer:
        packed = self.packed_model()
        tokens = self.options.pack_tokens or default_pack_tokens(
            self.lm.model, self.lm.device, self.lm.world_size
        )
        # All processes must plan the same packs.
        return PackedScorer(
            packed, window=self.lm.max_length, pack_tokens=min(self._gather(tokens))
        )

    def _score_with(
        self,
        scorer: PackedScorer | None,
        parts: Iterable[list[Encoded]],
        journal: Journal | None,
        show_progress: bool,
        texts: int = 0,
    ) -> tuple[list[Encoded], TokenScores]:
        """Returns the texts with their scores, from HFLM's batches if there is no scorer."""
        if scorer is None:
            encoded = list(chain.from_iterable(parts))
            plain = self.lm.score_plainly(encoded, show_progress=show_progress)
            return encoded, TokenScores(plain, None)
        encoded = []

        def queries() -> Iterator[list[Query]]:
            for part in parts:
                encoded.extend(part)
                yield [Query(context, continuation) for _, context, continuation in part]

        def note(scored: Sequence[tuple[int, Score]]) -> None:
            if journal is not None:
                journal.append((question_key(*encoded[n][0]), *score) for n, score in scored)

        mine = scorer.score(
            queries(),
            texts=texts if self.lm.world_size == 1 else 0,
            share=(self.lm.rank, self.lm.world_size),
            show_progress=show_progress,
            on_scored=note,
        )
        by_number = {n: score for part in self._gather(mine.scores) for n, score in part.items()}
        for number, (pair, _, _) in enumerate(encoded):
            self.lm.cache_hook.add_partial("loglikelihood", pair, by_number[number])
        scores = [by_number[n] for n in range(len(encoded))]
        return encoded, TokenScores(scores, mine.computed_tokens)

    def _gather(self, value: Any) -> list[Any]:
        """The values of all processes."""
        if self.lm.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.lm.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def _of_all(self, encoded: list[Encoded]) -> list[Encoded]:
        """The texts of all processes, each once; this process's own for HFLM's batches."""
        if not self.path.packed:
            return encoded
        by_pair = {text[0]: text for part in self._gather(encoded) for text in part}
        return list(by_pair.values())

    def _score_sample_as_hflm(self, pairs: Sequence[Pair]) -> dict[Pair, float]:
        """Scores a random sample for `verify` with the unmodified model."""
        if not self.options.verify:
            return {}
        distinct = sorted(set(pairs))
        sample = random.Random(0).sample(distinct, min(self.options.verify, len(distinct)))
        scores = self.lm.score_as_hflm(self.encode(sample))
        return {pair: logprob for pair, (logprob, _) in zip(sample, scores, strict=True)}

    def _verify(
        self, expected: Mapping[Pair, float], scores: Mapping[Pair, Score], journal: Journal | None
    ) -> None:
        """Raises ResultsError if the two ways differ by more than rounding."""
        differences = [abs(scores[pair][0] - logprob) for pair, logprob in expected.items()]
        mean, largest = sum(differences) / len(differences), max(differences)
        self.verification = Verification(mean, largest)
        logger.warning(
            "verified %d texts with HFLM: difference %.2g nats on average, %.2g at most",
            len(differences),
            mean,
            largest,
        )
        allowed = _TOLERANCES[self.lm.loaded.compute_dtype]
        if mean > (_FP8_TOLERANCE if self.options.compute == "fp8" else allowed):
            if journal is not None:
                journal.close(remove=True)
            raise ResultsError(
                f"verify={self.options.verify}: packed scoring is {mean:.2g} nats off HFLM's",
                "Use scoring=hf in --model_args, and report this",
            )


def _known(journal: Journal, pairs: Sequence[Pair]) -> dict[Pair, Score]:
    """The scores of an interrupted run."""
    if not journal.known:
        return {}
    keys = {pair: question_key(*pair) for pair in pairs}
    known = {pair: journal.known[key] for pair, key in keys.items() if key in journal.known}
    if known:
        logger.warning("%d texts were scored before the interruption", len(known))
    return known

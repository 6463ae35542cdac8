"""`--model qlora_adapter`: a base in nf4, fp4 or bf16, with an unmerged adapter, for lm-eval."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from qlora_harness.errors import ResultsError, SettingsError, install_excepthook
from qlora_harness.families import LETTERS
from qlora_harness.model.base import (
    attention_of,
    base_of,
    count_parameters,
    dequantise,
    find_base,
    unquantised_share,
    weights_fingerprint,
)
from qlora_harness.record import environment, scrub_all
from qlora_harness.score.encoding import encode_pairs
from qlora_harness.score.evaluation_record import model_slug
from qlora_harness.score.garbage_collection import paused_collection, set_aside_for_good
from qlora_harness.score.journal import Journal, question_keys
from qlora_harness.score.mmlu_recorder import MmluRecorder
from qlora_harness.score.model_arguments import check_arguments, check_counts, resolve_dtype
from qlora_harness.score.output_head import float32_logits
from qlora_harness.score.packed_forward import PackedModel
from qlora_harness.score.packed_scorer import PackedScorer, Score, default_pack_tokens
from qlora_harness.score.prefix_tree import Query
from qlora_harness.score.run_choice import choose
from qlora_harness.score.saving import verify_saved_results
from qlora_harness.score.scored_model import load_scored_model, load_scored_tokenizer
from qlora_harness.score.scoring_path import choose_path

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger("qlora_harness")

Pair = tuple[str, str]
Encoded = tuple[Pair, list[int], list[int]]

# What a text adds to those that share its beginning; a low guess, as most add a question.
_FEW_TOKENS = 16
# Mean difference, nats, from which on two ways to score are not one: rounding alone stays below.
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}


class QloraAdapterLM(HFLM):  # type: ignore[misc]  # HFLM has no type information
    """A base model and an adapter, scored as HFLM scores, each distinct token once.

    The base is loaded by the function that training uses, and the adapter stays unmerged on it, so
    what is scored is what was trained. Requests are planned as a trie over token ids and computed
    pack by pack (see `prefix_tree` and `packed_forward`). Questions of our MMLU tasks are recorded
    in the run folder as they come; after an interruption the same command scores the rest.

    Args:
        pretrained: Base model: a Hub id, a folder, or "smollm2". Default: the adapter's.
        peft: Adapter folder or Hub id. With neither, the newest completed run under ./results.
        quant: "nf4", "fp4" or "bf16". Default: what the adapter was trained with; bf16 for a base
            alone.
        double_quant: Whether 4-bit scales are quantised too. Default: as trained.
        revision: Branch, tag or commit of the base.
        peft_revision: The same of an adapter on the Hub.
        dtype: Compute dtype, "bfloat16" or "float32". Default: as trained; for a base alone
            bfloat16 on a GPU and float32 on a CPU.
        softmax_dtype: dtype of the log-softmax; bfloat16 would make ties.
        results_dir: Folder of the progress and evaluation records.
        scoring: "packed", or "hf" for HFLM's own path.
        dequantize: "auto" expands a 4-bit base once (the same values) if memory allows; "never".
        pack_tokens: Most tokens in a forward pass. Default: what fits the device.
        kernels: "auto" computes packs through fused layers where they take the model; "none"
            through transformers' own modules.
        verify: How many texts to score through HFLM's path as well, by the model's and PEFT's own
            modules, before anything is replaced. The differences are logged; if they are more than
            rounding, the run ends with an error.
        **options: Further arguments of HFLM: max_length, batch_size, device, …

    Raises:
        HarnessError: The base, the adapter or an argument is wrong; see `run_choice.choose` and
            `scored_model.load_scored_model`.
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
        **options: Any,
    ) -> None:
        install_excepthook()
        check_arguments(options, softmax_dtype, scoring, dequantize, kernels)
        check_counts(pack_tokens, verify)
        self._choice = choose(
            pretrained=pretrained,
            peft=peft,
            quant=quant,
            double_quant=double_quant,
            revision=revision,
            peft_revision=peft_revision,
            results_dir=results_dir,
        )
        choice = self._choice
        if pretrained is None and peft is None:
            logger.warning("scoring the newest completed run: %s", choice.results_dir)
        with paused_collection():  # it imports much
            self._source = find_base(
                choice.base, choice.revision, argument="--model_args pretrained="
            )
        self._compute_dtype = resolve_dtype(dtype, choice.compute_dtype)
        self._scoring, self._dequantize, self._verify = scoring, dequantize, verify
        self._kernels = kernels
        self._plain_logits = scoring == "hf"
        self._asked_pack_tokens = pack_tokens
        self._chat_template_asked = False
        self._truncated: set[str] = set()
        self._ahead: tuple[PackedModel, int] | None = None
        self._packed: PackedModel | None = None
        super().__init__(
            pretrained=self._source.path,
            revision=choice.revision or "main",
            tokenizer=load_scored_tokenizer(choice, self._source),
            dtype=self._compute_dtype,
            softmax_dtype=softmax_dtype,
            **options,
        )
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1:
            # HFLM divides the work among GPUs only, and by local rank.
            self._rank = accelerator.process_index
            self._world_size = accelerator.num_processes
        kind = choice.quant.file_arm if choice.adapter else f"{choice.quant.arm}_base"
        self._recorder = MmluRecorder(
            choice.results_dir, f"mmlu_progress_{model_slug(choice.base)}_{kind}.json"
        )
        verify_saved_results()
        logger.warning(
            "%s, %s%s%s, adapter %s, compute dtype %s",
            choice.base,
            choice.quant.value,
            " (expanded once)" if self._path.expanded else "",
            ", random weights" if self._source.random_weights else "",
            choice.adapter or "none",
            self._compute_dtype,
        )
        set_aside_for_good()

    def _create_model(self, pretrained: str, **options: Any) -> None:
        """Loads base and adapter; HFLM's own way can't quantise under transformers 5."""
        del pretrained, options
        accelerator = getattr(self, "accelerator", None)
        device = accelerator.device if accelerator is not None else self.device
        loaded = load_scored_model(
            self._choice,
            self._source,
            tokens=len(self.tokenizer),
            compute_dtype=self._compute_dtype,
            device=torch.device(device),
        )
        self._adapter_sha256 = loaded.adapter_sha256
        # HFLM ties weights once more, which fails where PEFT has wrapped one of the tied modules.
        base_of(loaded.model).tie_weights = lambda *_, **__: None
        self.take(loaded.model, self._kernels, loaded.adapter_config)

    def take(
        self, model: Any, kernels: str, adapter_config: Mapping[str, Any] | None = None
    ) -> None:
        """Scores with a model from now on.

        Args:
            model: With or without an adapter; it may be changed, to the same numbers.
            kernels: "auto" or "none".
            adapter_config: What the adapter says of itself; None for plain LoRA, or without one.
        """
        self._model, self._packed = model, None
        self._path = choose_path(
            model,
            adapter_config,
            scoring=self._scoring,
            kernels=kernels,
            dequantize=self._dequantize,
            compute_dtype=self._compute_dtype,
        )
        if self._path.reason is not None:
            logger.warning("scored through HFLM's own path: %s", self._path.reason)

    def expand_base(self) -> None:
        """Expands a 4-bit base to the values that it computes with, where the path says so."""
        if self._path.expanded:
            dequantise(self.model, self._compute_dtype)

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the results JSON says of the model, without asking the Hub."""
        choice = self._choice
        return {
            "model_num_parameters": count_parameters(self.model),
            "model_dtype": self._compute_dtype,
            "model_revision": choice.revision,
            "model_sha": self._source.commit or "",
            "peft_sha": self._adapter_sha256 or "",
            "base": choice.base,
            "quant": choice.quant.value,
            "double_quant": choice.double_quant if choice.quant.is_4bit else None,
            "softmax_dtype": str(self.softmax_dtype).removeprefix("torch."),
            "max_length": self.max_length,
            "leading_bos": self._leading_bos(),
        }

    def _leading_bos(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tok_encode("a")[:1] == [bos] else []

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Notes whether a chat template was asked for, and selects it as HFLM does."""
        if not chat_template:
            return None
        self._need_chat_template()
        selected: str | None = super().chat_template(chat_template)
        return selected

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """Notes that a chat template is applied, and applies it as HFLM does."""
        self._need_chat_template()
        applied: str = super().apply_chat_template(*args, **kwargs)
        return applied

    def _need_chat_template(self) -> None:
        self._chat_template_asked = True
        if not self.tokenizer.chat_template:
            raise SettingsError(
                f"--apply_chat_template with {self._choice.base}, whose tokenizer has none",
                "Leave it out",
            )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores continuations as HFLM does, and records the questions of our MMLU tasks.

        Args:
            requests: With (context, continuation) in `args`.
            disable_tqdm: Whether to hide the progress bar.

        Returns:
            Log-probability in nats and whether the continuation is the greedy one, a request.

        Raises:
            SettingsError: Our tasks with other prompts than those of the files, or with a tokenizer
                for which " A" is several tokens.
            ResultsError: The records can't be written, or a log-probability is not a number.
        """
        if self.enable_thinking:  # HFLM refuses this for every log-probability
            refused: list[tuple[float, bool]] = super().loglikelihood(requests)
            return refused
        mine = self._recorder.ours(requests)
        journal = None
        if mine:
            self._check_letters()
            self._recorder.check(mine, self._chat_template_asked)
            journal = Journal(self._recorder.journal_path, self._identity(), self.rank)
        plain = self._score_plainly([r.args for r in requests])
        scores = self._score_pairs([r.args for r in requests], journal, disable_tqdm)
        if plain and not self._is_verified(plain, scores):
            if journal is not None:
                journal.close(remove=True)
            raise ResultsError(
                f"verify={self._verify}: packed scoring differs from HFLM's path by "
                f"{self.mean_difference:.2g} nats on average",
                "Score with scoring=hf in --model_args, and report this",
            )
        results = [scores[request.args] for request in requests]
        found = self._recorder.collect(requests, results, self._truncated)
        parts = self.gather_object(found, dst=0)
        if self.rank == 0 and parts is not None and any(parts):
            self._recorder.write(parts, self._header())
        self.barrier()  # of all processes, also those that have no question of ours
        if journal is not None:
            journal.close(remove=self.rank == 0)
        return results

    def _score_pairs(
        self, pairs: Sequence[Pair], journal: Journal | None, disable_tqdm: bool
    ) -> dict[Pair, Score]:
        """Scores distinct pairs; several processes do it together."""
        keys = question_keys(dict.fromkeys(pairs)) if journal else {}
        known = (
            {p: journal.known[k] for p, k in keys.items() if k in journal.known} if journal else {}
        )
        if known:
            logger.warning("%d texts were scored before the interruption", len(known))
        wanted = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        if self.world_size > 1 and self._path.packed:
            shared: list[list[Pair]] = [[] for _ in range(self.world_size)]
            torch.distributed.all_gather_object(shared, wanted)
            wanted = list(dict.fromkeys(pair for part in shared for pair in part))
        if journal is not None:  # other processes ask for texts that this one was not asked for
            keys |= question_keys(pair for pair in wanted if pair not in keys)

        def note(scored: Sequence[tuple[Pair, Score]]) -> None:
            if journal is not None:
                journal.append((keys[pair], *score) for pair, score in scored)

        self._build_kernels_ahead(wanted)
        try:
            with paused_collection():
                encoded = [
                    (pair, *ids)
                    for pair, ids in zip(wanted, encode_pairs(self, wanted), strict=True)
                ]
            scores = self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm, on_scored=note)
        finally:
            if self._ahead is not None:
                self._ahead[0].wait()
                self._ahead = None
        return known | dict(zip(wanted, scores, strict=True))

    def _build_kernels_ahead(self, wanted: Sequence[Pair]) -> None:
        """On a GPU, builds the kernels of whole packs while many texts are encoded and planned."""
        if self.device.type != "cuda" or self.world_size > 1 or not wanted:
            return
        if not self._path.packed:
            return
        model = self._packed_model()
        pack_tokens = self._asked_pack_tokens or default_pack_tokens(self.model, self.device)
        contexts = len({context for context, _ in wanted})
        # Fewer may fit into one short pack, for which other kernels are built.
        if contexts * _FEW_TOKENS >= pack_tokens:
            self._ahead = model, pack_tokens
            model.build_ahead(pack_tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Encoded],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        on_scored: Callable[[Sequence[tuple[Pair, Score]]], None] | None = None,
    ) -> list[Score]:
        for pair, context, continuation in requests:
            if pair is not None and len(context) + len(continuation) > self.max_length + 1:
                self._truncated.add(pair[0])
        # Windows of one rolling text share nothing: they stay with HFLM, as does what it asks for.
        if override_bs is None and requests and self._path.packed:
            return self._score_packed(requests, disable_tqdm, on_scored)
        exact = contextlib.nullcontext() if self._plain_logits else float32_logits(self._head())
        with exact:
            plain: list[Score] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
        return plain

    def _head(self) -> torch.nn.Module:
        head: torch.nn.Module = base_of(self.model).get_output_embeddings()
        return head

    def _packed_model(self) -> PackedModel:
        """Made once, as it moves weights."""
        if self._packed is None:
            self.expand_base()
            self._packed = PackedModel(self.model, self.softmax_dtype, fused=self._path.fused)
        return self._packed

    def _score_packed(
        self,
        requests: Sequence[Encoded],
        disable_tqdm: bool,
        on_scored: Callable[[Sequence[tuple[Pair, Score]]], None] | None,
    ) -> list[Score]:
        if self._ahead is not None:
            model, pack_tokens = self._ahead
        else:
            model = self._packed_model()
            pack_tokens = self._asked_pack_tokens or default_pack_tokens(self.model, self.device)
        if self.world_size > 1:
            # The shares make the whole only if all processes plan alike.
            sizes = [0] * self.world_size
            torch.distributed.all_gather_object(sizes, pack_tokens)
            pack_tokens = min(sizes)
        scorer = PackedScorer(model, window=self.max_length, pack_tokens=pack_tokens)

        def note(scored: Sequence[tuple[int, Score]]) -> None:
            if on_scored is not None:
                on_scored([(requests[number][0], score) for number, score in scored])

        scores = scorer.score(
            [Query(context, continuation) for _, context, continuation in requests],
            share=(self.rank, self.world_size),
            show_progress=not disable_tqdm and self.rank == 0,
            on_scored=note,
        )
        if self.world_size > 1:
            parts: list[dict[int, Score]] = [{} for _ in range(self.world_size)]
            torch.distributed.all_gather_object(parts, scores)
            scores = {number: score for part in parts for number, score in part.items()}
        self.last_plan = scorer.last_plan
        for number, (pair, _, _) in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood", pair, scores[number])
        return [scores[number] for number in range(len(requests))]

    def _score_plainly(self, pairs: Sequence[Pair]) -> dict[Pair, float]:
        """Scores a random sample for `verify` as HFLM does, with nothing of the model replaced."""
        if not self._verify:
            return {}
        distinct = sorted(set(pairs))
        sample = random.Random(0).sample(distinct, min(self._verify, len(distinct)))
        encoded = [
            (pair, *ids) for pair, ids in zip(sample, encode_pairs(self, sample), strict=True)
        ]
        plain = super()._loglikelihood_tokens(encoded, disable_tqdm=True)
        return {pair: logprob for pair, (logprob, _) in zip(sample, plain, strict=True)}

    def _is_verified(self, plain: Mapping[Pair, float], scores: Mapping[Pair, Score]) -> bool:
        """Says how far the two ways are apart, and whether that is rounding."""
        differences = [abs(scores[pair][0] - logprob) for pair, logprob in plain.items()]
        self.largest_difference = max(differences)
        self.mean_difference = sum(differences) / len(differences)
        logger.warning(
            "verified: %d texts scored through HFLM's path as well; difference %.2g nats on "
            "average, %.2g at most",
            len(differences),
            self.mean_difference,
            self.largest_difference,
        )
        return self.mean_difference <= _TOLERANCES[self._compute_dtype]

    def _check_letters(self) -> None:
        context = self.tok_encode("Answer:")
        for letter in LETTERS:
            whole = self.tok_encode(f"Answer: {letter}")
            if whole[: len(context)] != context or len(whole) != len(context) + 1:
                raise SettingsError(
                    f"the tokenizer of {self._choice.base} makes {len(whole) - len(context)} "
                    f"tokens of ' {letter}' after 'Answer:'",
                    "These tasks need a tokenizer for which each answer is one token",
                )

    def _model_record(self) -> dict[str, Any]:
        choice = self._choice
        return {
            "base": choice.base,
            "revision": choice.revision,
            "commit": self._source.commit,
            "random_weights": self._source.random_weights,
            "quant": choice.quant.value,
            "double_quant": choice.double_quant if choice.quant.is_4bit else None,
            "peft": choice.adapter.name if choice.adapter else None,
            "adapter_sha256": self._adapter_sha256,
            "unquantised_share": unquantised_share(self.model),
            "attention": attention_of(base_of(self.model)),
            "weights_fingerprint": weights_fingerprint(base_of(self.model)),
        }

    def _settings_record(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "dtype": self._compute_dtype,
            "softmax_dtype": str(self.softmax_dtype).removeprefix("torch."),
            "max_length": self.max_length,
            "leading_bos": self._leading_bos(),
            "scoring": "packed" if self._path.packed else "hf",
            "logits": "as computed" if self._plain_logits else "float32",
            "expanded_once": self._path.expanded,
            "fused_kernels": self._path.fused,
        }

    def _identity(self) -> dict[str, Any]:
        """What a stored score depends on; another model can never be given it."""
        return {**self._model_record(), **self._settings_record()}

    def _header(self) -> dict[str, Any]:
        header: dict[str, Any] = scrub_all(
            {
                "arm": self._choice.quant.arm,
                "model": self._model_record(),
                "settings": self._settings_record() | {"processes": self.world_size},
                "environment": environment() | {"device": {"name": _device_name(self.device)}},
            }
        )
        return header


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"

"""`--model qlora_adapter`: a base in nf4, fp4 or bf16, with an unmerged adapter, for lm-eval."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from qlora_harness.data.chat import leading_bos
from qlora_harness.errors import AdapterError, ResultsError, SettingsError, install_excepthook
from qlora_harness.model.base import find_base, load_base, load_tokenizer, weights_fingerprint
from qlora_harness.model.lora import adapter_digest, load_adapter
from qlora_harness.record import environment
from qlora_harness.score.evaluation_record import (
    ScoredQuestion,
    model_slug,
    summarise,
    write_records,
)
from qlora_harness.score.mmlu_files import LETTERS, rows_in
from qlora_harness.score.run_choice import choose
from qlora_harness.score.saving import verify_saved_results
from qlora_harness.score.task_index import families

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger("qlora_harness")


class QloraAdapterLM(HFLM):  # type: ignore[misc]  # HFLM has no type information
    """A base model and an adapter, scored as HFLM scores.

    The base is loaded by the function that training uses, and the adapter stays unmerged on it, so
    what is scored is what was trained. Questions of our MMLU tasks are recorded in the run folder.

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
        **options: Further arguments of HFLM: max_length, batch_size, device, …

    Raises:
        HarnessError: The base, the adapter or an argument is wrong; see `run_choice.choose` and
            `model.lora.load_adapter`.
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
        **options: Any,
    ) -> None:
        install_excepthook()
        _refuse_options(options)
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
        self._source = find_base(choice.base, choice.revision)
        self._compute_dtype = _compute_dtype(dtype, choice.compute_dtype)
        self._chat_template_asked = False
        self._truncated: set[str] = set()
        tokenizer_folder = choice.adapter
        if tokenizer_folder is None or not (tokenizer_folder / "tokenizer_config.json").is_file():
            tokenizer_folder = None
        super().__init__(
            pretrained=self._source.path,
            revision=choice.revision or "main",
            tokenizer=str(tokenizer_folder) if tokenizer_folder else load_tokenizer(self._source),
            dtype=self._compute_dtype,
            softmax_dtype=softmax_dtype,
            **options,
        )
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1:
            # HFLM divides the work among GPUs only, and by local rank.
            self._rank = accelerator.process_index
            self._world_size = accelerator.num_processes
        verify_saved_results()
        logger.warning(
            "%s, %s%s, adapter %s, compute dtype %s",
            choice.base,
            choice.quant.value,
            ", random weights" if self._source.random_weights else "",
            choice.adapter or "none",
            self._compute_dtype,
        )

    def _create_model(self, pretrained: str, **options: Any) -> None:
        """Loads base and adapter; HFLM's own way can't quantise under transformers 5."""
        del pretrained, options
        choice = self._choice
        accelerator = getattr(self, "accelerator", None)
        device = accelerator.device if accelerator is not None else self.device
        base = load_base(
            self._source,
            quant=choice.quant,
            double_quant=choice.double_quant,
            compute_dtype=self._compute_dtype,
            device=torch.device(device),
        )
        rows = base.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > rows:
            raise AdapterError(
                f"the tokenizer beside peft={choice.adapter} has {len(self.tokenizer)} tokens, the "
                f"base model {rows}",
                "This adapter was trained with added tokens, which are not supported",
            )
        self._adapter_sha256 = None
        if choice.adapter is not None:
            self._check_base(base)
            base = load_adapter(base, choice.adapter)
            self._adapter_sha256 = adapter_digest(choice.adapter)
        self._model = base

    def _check_base(self, base: torch.nn.Module) -> None:
        recorded = self._choice.recorded or {}
        expected = recorded.get("weights_fingerprint")
        if expected is not None and weights_fingerprint(base) != expected:
            raise AdapterError(
                f"pretrained={self._choice.base} is not the base model that peft="
                f"{self._choice.adapter} was trained on ({recorded.get('name')}, revision "
                f"{recorded.get('revision')}): its weights differ",
                "Give the recorded base, or leave pretrained= out",
            )

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the results JSON says of the model, without asking the Hub."""
        choice = self._choice
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": self._compute_dtype,
            "model_revision": choice.revision,
            "model_sha": self._source.commit or "",
            "peft_sha": self._adapter_sha256 or "",
            "base": choice.base,
            "quant": choice.quant.value,
            "double_quant": choice.double_quant if choice.quant.is_4bit else None,
            "softmax_dtype": str(self.softmax_dtype).removeprefix("torch."),
            "max_length": self.max_length,
            "leading_bos": leading_bos(self.tokenizer),
        }

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Notes whether a chat template was asked for, and selects it as HFLM does."""
        self._chat_template_asked = bool(chat_template)
        if not chat_template:
            return None
        selected: str | None = super().chat_template(chat_template)
        return selected

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
            SettingsError: Our tasks with a chat template, or with a tokenizer for which " A" is
                several tokens.
        """
        ours = families()
        mine = [r for r in requests if _family(r, ours) is not None]
        if mine:
            self._check_mmlu_conditions()
        results: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm=disable_tqdm
        )
        if mine or self.world_size > 1:
            self._record(requests, results, ours)
        return results

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for (context, _), context_ids, continuation_ids in requests:
            if len(context_ids) + len(continuation_ids) > self.max_length + 1:
                self._truncated.add(context)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _check_mmlu_conditions(self) -> None:
        if self._chat_template_asked:
            raise SettingsError(
                "--apply_chat_template with an mmlu_qlora task",
                "Leave it out: these prompts are scored verbatim, as QLoRA does",
            )
        context = self.tok_encode("Answer:")
        for letter in LETTERS:
            whole = self.tok_encode(f"Answer: {letter}")
            if whole[: len(context)] != context or len(whole) != len(context) + 1:
                raise SettingsError(
                    f"the tokenizer of {self._choice.base} makes {len(whole) - len(context)} "
                    f"tokens of ' {letter}' after 'Answer:'",
                    "These tasks need a tokenizer for which each answer is one token",
                )

    def _record(
        self,
        requests: Sequence[Instance],
        results: Sequence[tuple[float, bool]],
        ours: dict[str, dict[str, Any]],
    ) -> None:
        """Writes the records of the run folder; every process must call it."""
        found: dict[str, dict[int, ScoredQuestion]] = defaultdict(dict)
        logprobs: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
        docs: dict[tuple[str, int], tuple[str, Instance]] = {}
        for request, (logprob, _) in zip(requests, results, strict=True):
            family = _family(request, ours)
            if family is not None:
                key = (request.task_name, request.doc_id)
                logprobs[key][request.idx] = logprob
                docs[key] = (family, request)
        for key, (family, request) in docs.items():
            a, b, c, d = (logprobs[key][i] for i in range(4))
            doc = request.doc
            found[family][doc["index"]] = ScoredQuestion(
                doc["index"], doc["subject"], request.args[0], doc["output"], (a, b, c, d)
            )
        gathered = self.gather_object((dict(found), self._truncated), dst=0)
        if self.rank != 0 or gathered is None:
            return
        merged: dict[str, dict[int, ScoredQuestion]] = defaultdict(dict)
        truncated: set[str] = set()
        for part, cut in gathered:
            truncated |= cut
            for family, questions in part.items():
                merged[family].update(questions)
        if merged:
            self._write({f: list(q.values()) for f, q in merged.items()}, truncated, ours)

    def _write(
        self,
        questions: dict[str, list[ScoredQuestion]],
        truncated: set[str],
        ours: dict[str, dict[str, Any]],
    ) -> None:
        choice = self._choice
        tasks = {
            family: summarise(
                scored,
                ours[family]["categories"],
                n_total=rows_in(ours[family]["file"]),
                truncated=sum(q.prompt in truncated for q in scored),
            )
            for family, scored in questions.items()
        }
        kind = choice.quant.file_arm if choice.adapter else f"{choice.quant.arm}_base"
        name = f"mmlu_progress_{model_slug(choice.base)}_{kind}.json"
        header = {
            "arm": choice.quant.arm,
            "model": {
                "base": choice.base,
                "revision": choice.revision,
                "commit": self._source.commit,
                "random_weights": self._source.random_weights,
                "quant": choice.quant.value,
                "double_quant": choice.double_quant if choice.quant.is_4bit else None,
                "peft": choice.adapter.name if choice.adapter else None,
                "adapter_sha256": self._adapter_sha256,
            },
            "settings": {
                "batch_size": self.batch_size,
                "dtype": self._compute_dtype,
                "softmax_dtype": str(self.softmax_dtype).removeprefix("torch."),
                "max_length": self.max_length,
                "leading_bos": leading_bos(self.tokenizer),
                "processes": self.world_size,
            },
            "environment": environment() | {"device": _device_name(self.device)},
        }
        try:
            written = write_records(choice.results_dir, name, header, tasks, questions)
        except OSError as error:
            raise ResultsError(
                f"{choice.results_dir} can't be written ({error})",
                "Give another folder with results_dir= in --model_args",
            ) from None
        for family in tasks:
            if family in written:
                logger.warning("record of %s written to %s", family, choice.results_dir)
            else:
                logger.warning(
                    "record of %s in %s kept: it holds more questions than this run",
                    family,
                    choice.results_dir,
                )


def _refuse_options(options: dict[str, Any]) -> None:
    """Arguments of HFLM that would bypass the loading that this model is about."""
    remedies = {
        "load_in_4bit": "Use quant=nf4",
        "load_in_8bit": "Use quant=nf4 or quant=bf16",
        "delta": "Use peft=",
        "parallelize": "Use `accelerate launch -m lm_eval` for several GPUs",
        "tp_plan": "Use `accelerate launch -m lm_eval` for several GPUs",
        "autogptq": "Use --model hf",
        "gptqmodel": "Use --model hf",
        "gguf_file": "Use pretrained=smollm2 or a converted folder",
        "token": "Log in with `hf auth login`; a token here would land in the results",
        "trust_remote_code": "Use a model that needs no code of its own",
    }
    for name, remedy in remedies.items():
        if options.get(name) not in (None, False):
            raise SettingsError(f"--model_args {name}= is not supported by qlora_adapter", remedy)
        options.pop(name, None)


def _compute_dtype(asked: str, recorded: str | None) -> str:
    if asked in ("bfloat16", "float32"):
        return asked
    if asked != "auto":
        raise SettingsError(f"--model_args dtype={asked}", "Use bfloat16 or float32")
    return recorded or ("bfloat16" if torch.cuda.is_available() else "float32")


def _family(request: Instance, ours: dict[str, dict[str, Any]]) -> str | None:
    """The family of a request's task, or None for a task that is not ours."""
    subject = request.doc.get("subject") if isinstance(request.doc, dict) else None
    name = request.task_name or ""
    if not isinstance(subject, str) or not name.endswith(f"_{subject}"):
        return None
    family = name.removesuffix(f"_{subject}")
    return family if family in ours else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"

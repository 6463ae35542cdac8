"""A trained adapter on its base, which answers conversations in the template of its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from qlora_harness.data.own_template import TypedTokens
from qlora_harness.errors import AdapterError, DataError, ModelError, RunError, first_line
from qlora_harness.locations import expanded
from qlora_harness.model.adapter_folder import (
    CONFIG_FILE,
    RECORD_FILE,
    adapter_digest,
    read_adapter_record,
)
from qlora_harness.model.facts import base_of, is_out_of_memory
from qlora_harness.model.lora import public_name
from qlora_harness.model.rope import window
from qlora_harness.model.source import find_base, read_config
from qlora_harness.record import ADAPTER_DIR, SUMMARY_FILE
from qlora_harness.score.model_arguments import resolve_dtype
from qlora_harness.score.run_choice import ScoringChoice, choose_scored_run
from qlora_harness.score.scored_model import load_scored_model, load_scored_tokenizer

Message = Mapping[str, str]  # "role" and "content"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else at random among `top_p`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


def choose_adapter(run: Path) -> ScoringChoice:
    """Returns what a run or adapter folder recorded of base and quantisation; raises RunError."""
    folder = expanded(str(run))
    adapter = folder / ADAPTER_DIR if (folder / ADAPTER_DIR).is_dir() else folder
    if not (adapter / CONFIG_FILE).is_file():
        unfinished = "a run without an adapter" if (folder / SUMMARY_FILE).is_file() else "no run"
        raise RunError(
            f"{run} holds {unfinished}", "Name the folder of a completed run, or its adapter"
        )
    if read_adapter_record(adapter) is None:
        raise RunError(
            f"{adapter} has no {RECORD_FILE}, which says on which base it was trained",
            "Name an adapter that this project trained",
        )
    return choose_scored_run(
        pretrained=None,
        peft=str(adapter),
        quant=None,
        double_quant=None,
        revision=None,
        peft_revision=None,
        results_dir=None,
    )


def run_name(choice: ScoringChoice) -> str:
    """Returns the name of the run that trained the adapter, which is that of its folder."""
    folder = (choice.adapter or choice.results_dir).resolve()
    if folder.name == ADAPTER_DIR:
        folder = folder.parent
    is_cell = folder.name.startswith("seed_")  # of a study, in the folder of its arm
    return f"{folder.parent.name}_{folder.name}" if is_cell else folder.name


def compute_device() -> torch.device:
    """Returns the GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ChatModel:
    """Base, unmerged adapter and tokenizer as the adapter's record names them, or the base alone.

    Weights are loaded on first use. Raises HarnessError as scoring does.
    """

    def __init__(self, choice: ScoringChoice, *, base_alone: bool = False) -> None:
        self._choice = dataclasses.replace(choice, adapter=None) if base_alone else choice
        self._source = find_base(choice.base, choice.revision, argument="the adapter's base")
        self._dtype = resolve_dtype("auto", choice.compute_dtype)
        self._window = window(read_config(self._source, choice.rope_scaling))
        self.tokenizer: PreTrainedTokenizerBase = load_scored_tokenizer(choice, self._source)
        record = read_adapter_record(choice.adapter) if choice.adapter else None
        self.is_plain_text = (record or {}).get("template") == "none"
        if self.tokenizer.chat_template is None and not self.is_plain_text:
            raise AdapterError(
                f"the tokenizer in {choice.adapter} has no chat template", "Train the adapter again"
            )
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.name = public_name(choice.base) if base_alone else run_name(choice)

    @property
    def title(self) -> str:
        """Run, base and quantisation."""
        return f"{self.name} on {self._source.recorded_name}, {self._choice.quant.value}"

    def identity(self) -> dict[str, Any]:
        """Returns what replies to the same tokens depend on, as JSON."""
        choice, adapter = self._choice, self._choice.adapter
        return {
            "base": self._source.recorded_name,
            "weights_fingerprint": (choice.recorded or {}).get("weights_fingerprint"),
            "quant": choice.quant.value,
            "double_quant": choice.double_quant if choice.quant.is_4bit else None,
            "compute_dtype": self._dtype,
            "rope_scaling": choice.rope_scaling,
            "adapter_sha256": adapter_digest(adapter) if adapter else None,
        }

    def load(self) -> None:
        """Loads the weights; call it before you seed, since PEFT draws random numbers."""
        self.model  # noqa: B018  # a cached property

    @cached_property
    def model(self) -> Any:
        """The loaded base, with the adapter's modules inside."""
        tokens, device = len(self.tokenizer), compute_device()
        scored = load_scored_model(self._choice, self._source, tokens, self._dtype, device)
        model = base_of(scored.model)
        # Else the base's own temperature or penalties would join in.
        model.generation_config = GenerationConfig()
        return model

    @cached_property
    def ends(self) -> tuple[list[int], str]:
        """The tokens that end a reply, and the text with which the next turn begins, or ""."""
        eos = self.tokenizer.eos_token_id
        tokens = [eos] if isinstance(eos, int) else []
        if self.is_plain_text:
            return tokens, ""
        roles = {"FIRST": "user", "REPLY": "assistant", "SECOND": "user"}
        text = self._render([{"role": role, "content": name} for name, role in roles.items()])
        between = text.rpartition("REPLY")[2].partition("SECOND")[0]
        ids = self.tokenizer.encode(between, add_special_tokens=False)
        added = self.tokenizer.added_tokens_decoder
        special = [token for token in ids if token in added]
        last = max((at for at, token in enumerate(ids) if token in added), default=-1)
        marker = str(self.tokenizer.decode(ids[last + 1 :])).strip()
        edges = (self.tokenizer.bos_token_id, eos)
        if (special and special[-1] not in edges) or marker.replace(" ", "").isalnum():
            marker = ""  # such as "user" after <|im_start|>, a token that ends the reply itself
        return list(dict.fromkeys([*tokens, *special])), marker

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # noqa: BLE001  # Jinja raises what a template says
            raise AdapterError(
                f"the adapter's chat template refuses the conversation ({first_line(error)})",
                "Use user and assistant turns only",
            ) from None
        return str(text)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Returns the token ids of a conversation up to where the model's reply begins.

        As in training, special tokens that are typed in a message are text.
        """
        if self.is_plain_text:
            text = messages[-1]["content"]
            return list(self.tokenizer.encode(text, split_special_tokens=True))
        text, typed = self._render(messages), TypedTokens(self.tokenizer)
        if not typed.occur(messages):
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = encoded["input_ids"], encoded["offset_mapping"]
        return typed.as_text(messages, self._render, *tokens)[0]

    def check_length(self, ids: Sequence[int], sampling: Sampling, what: str) -> None:
        """Raises DataError if a prompt leaves no room for `max_new_tokens` in the window."""
        longest = self._window
        if longest is not None and len(ids) + sampling.max_new_tokens > longest:
            raise DataError(
                f"{what}: {len(ids)} tokens and --max-new-tokens {sampling.max_new_tokens} exceed "
                f"the model's window of {longest}",
                "Shorten it, or give a lower --max-new-tokens",
            )

    def reply(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        streamer: TextStreamer | None = None,
    ) -> list[str]:
        """Returns the replies to a batch of prompts; random choices follow torch's global seed."""
        tokens, marker = self.ends
        rows = {"input_ids": [list(ids) for ids in prompts]}
        batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.model.device)
        random = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            eos_token_id=tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            stop_strings=[marker] if marker else None,
            **(random if sampling.temperature > 0 else {}),
        )
        try:
            with torch.inference_mode():
                output = self.model.generate(
                    **batch,
                    generation_config=config,
                    tokenizer=self.tokenizer,
                    streamer=streamer,
                )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError(
                f"{self.model.device} ran out of memory with {len(prompts)} prompts in a batch",
                "Give a lower --batch-size or --max-new-tokens",
            ) from None
        new = output[:, batch["input_ids"].shape[1] :]
        return [self._text(ids.tolist(), tokens, marker) for ids in new]

    def _text(self, ids: list[int], tokens: list[int], marker: str) -> str:
        end = next((at for at, token in enumerate(ids) if token in tokens), len(ids))
        text = str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
        return (text.partition(marker)[0] if marker else text).strip()

"""Picks the questions of our MMLU tasks out of what lm-eval asks, and records what was answered."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import ResultsError, SettingsError
from qlora_harness.families import LETTERS, families
from qlora_harness.question_hashes import prompt_hash
from qlora_harness.score.evaluation_record import (
    Family,
    ScoredQuestion,
    check_folder,
    write_records,
)
from qlora_harness.score.mmlu_files import rows_in

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger("qlora_harness")

Found = dict[str, dict[int, ScoredQuestion]]


class MmluRecorder:
    """Records the questions of our tasks in a run folder.

    Args:
        folder: The run folder.
        progress_name: File name of the progress file.
    """

    def __init__(self, folder: Path, progress_name: str) -> None:
        self._folder = folder
        self._progress_name = progress_name
        self._families = families()

    @property
    def journal_path(self) -> Path:
        """Where scored questions are kept while a run is not done."""
        return self._folder / f".{self._progress_name}l"

    def ours(self, requests: Iterable[Instance]) -> list[Instance]:
        """Returns the requests that are questions of our tasks.

        Args:
            requests: Of any tasks.
        """
        return [r for r in requests if self._family(r) is not None]

    def check(self, requests: Sequence[Instance], chat_template_asked: bool) -> None:
        """Refuses, before anything is scored, what would not be a score of these tasks.

        Args:
            requests: Questions of our tasks.
            chat_template_asked: Whether --apply_chat_template was given.

        Raises:
            SettingsError: The prompts are not those of the files.
            ResultsError: The records can't be written.
        """
        if chat_template_asked:
            raise SettingsError(
                "--apply_chat_template with an mmlu_qlora task",
                "Leave it out: these prompts are scored verbatim, as QLoRA does",
            )
        if any(request.args[0] != request.doc["input"] for request in requests):
            raise SettingsError(
                "--system_instruction changes the prompts of an mmlu_qlora task",
                "Leave it out: these prompts are scored verbatim, as QLoRA does",
            )
        check_folder(self._folder, self._progress_name)

    def collect(
        self,
        requests: Sequence[Instance],
        results: Sequence[tuple[float, bool]],
        truncated: set[str],
    ) -> Found:
        """Returns the questions that were answered in full, by family and line of the file.

        With --use_cache lm-eval asks for some letters of a question only; such a question is left
        out.

        Args:
            requests: Of any tasks.
            results: Log-probability and greediness of each.
            truncated: Prompts that were longer than the window.

        Raises:
            ResultsError: A log-probability is not a number.
        """
        logprobs: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
        docs: dict[tuple[str, int], tuple[str, Instance]] = {}
        for request, (logprob, _) in zip(requests, results, strict=True):
            family = self._family(request)
            if family is None:
                continue
            if not math.isfinite(logprob):
                raise ResultsError(
                    f"{request.task_name}, question {request.doc_id}: the log-probability of "
                    f"{request.args[1]!r} is {logprob}",
                    "The model or the adapter is broken; score the base to see which",
                )
            logprobs[request.task_name, request.doc_id][request.idx] = logprob
            docs[request.task_name, request.doc_id] = (family, request)
        found: Found = defaultdict(dict)
        for key, (family, request) in docs.items():
            if len(logprobs[key]) == len(LETTERS):
                doc = request.doc
                found[family][doc["index"]] = ScoredQuestion(
                    doc["index"],
                    doc["subject"],
                    prompt_hash(request.args[0]),
                    doc["output"],
                    tuple(logprobs[key][i] for i in range(len(LETTERS))),
                    request.args[0] in truncated,
                )
        return dict(found)

    def write(self, parts: Iterable[Found], header: Mapping[str, Any]) -> None:
        """Writes the records of a run.

        Args:
            parts: What each process found.
            header: arm, model, settings and environment.

        Raises:
            ResultsError: The folder can't be written.
        """
        merged: Found = defaultdict(dict)
        for part in parts:
            for family, questions in part.items():
                merged[family].update(questions)
        scored = {
            name: Family(
                list(questions.values()),
                self._families[name]["categories"],
                rows_in(self._families[name]["file"]),
            )
            for name, questions in merged.items()
        }
        try:
            written = write_records(self._folder, self._progress_name, header, scored)
        except OSError as error:
            raise ResultsError(
                f"{self._folder} can't be written ({error})",
                "Give another folder with results_dir= in --model_args",
            ) from None
        for family in scored:
            if family in written:
                logger.warning("record of %s written to %s", family, self._folder)
            else:
                logger.warning(
                    "record of %s in %s kept: it holds more questions than this run",
                    family,
                    self._folder,
                )

    def _family(self, request: Instance) -> str | None:
        """The family of a request's task, or None for a task that is not ours."""
        subject = request.doc.get("subject") if isinstance(request.doc, dict) else None
        name = request.task_name or ""
        if not isinstance(subject, str) or not name.endswith(f"_{subject}"):
            return None
        family = name.removesuffix(f"_{subject}")
        return family if family in self._families else None

"""Records the model's answers to our MMLU tasks from lm_eval's requests."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import ResultsError, SettingsError
from qlora_harness.schema.mmlu import LETTERS, families, prompt_hash
from qlora_harness.schema.scoring_records import QuestionRow
from qlora_harness.score.evaluation_record import (
    Family,
    check_folder,
    question_row,
    unwritable,
    write_records,
)
from qlora_harness.score.mmlu_files import rows_in
from qlora_harness.train.model_card import refresh_card

if TYPE_CHECKING:
    from qlora_harness.lm_eval_compat.hflm import Request

logger = logging.getLogger("qlora_harness")

Answered = dict[str, dict[int, QuestionRow]]  # by family and line of the file


class MmluRecorder:
    """Records answers to our tasks in a run folder."""

    def __init__(self, folder: Path, progress_name: str) -> None:
        self._folder = folder
        self._progress_name = progress_name
        self._families = families()

    @property
    def journal_path(self) -> Path:
        """The journal of an unfinished run."""
        return self._folder / f".{self._progress_name}l"

    def ours(self, requests: Iterable[Request]) -> list[Request]:
        """Returns the requests of our tasks."""
        return [r for r in requests if self._family(r) is not None]

    def check(self, requests: Sequence[Request]) -> None:
        """Checks, before scoring, that prompts are unchanged and records can be written.

        Raises SettingsError for changed prompts, ResultsError for records that can't be written.
        """
        if any(request.args[0] != request.doc["input"] for request in requests):
            raise SettingsError(
                "--apply_chat_template or --system_instruction with an mmlu_qlora task",
                "Leave the flag out: these prompts are scored verbatim, as in QLoRA",
            )
        check_folder(self._folder, self._progress_name)

    def collect(
        self,
        requests: Sequence[Request],
        results: Sequence[tuple[float, bool]],
        truncated: set[str],
    ) -> Answered:
        """Returns the questions of our tasks with all four letters scored.

        With --use_cache lm_eval may request only some letters. `truncated` holds the prompts that
        were cut to the window. Raises ResultsError if a log-probability is not finite.
        """
        logprobs: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
        first: dict[tuple[str, int], tuple[str, Request]] = {}
        for request, (logprob, _) in zip(requests, results, strict=True):
            family = self._family(request)
            if family is None:
                continue
            if not math.isfinite(logprob):
                raise ResultsError(
                    f"{request.task_name}, question {request.doc_id}: the log-probability of "
                    f"{request.args[1]!r} is {logprob}",
                    "The model or the adapter is broken; score the base alone to find out which",
                )
            question = request.task_name, request.doc_id
            logprobs[question][request.idx] = logprob
            first.setdefault(question, (family, request))
        answered: Answered = defaultdict(dict)
        for question, (family, request) in first.items():
            if len(logprobs[question]) == len(LETTERS):
                doc = request.doc
                answered[family][doc["index"]] = question_row(
                    index=doc["index"],
                    subject=doc["subject"],
                    prompt_sha256=prompt_hash(request.args[0]),
                    answer=doc["output"],
                    logprobs=[logprobs[question][i] for i in range(len(LETTERS))],
                    truncated=request.args[0] in truncated,
                )
        return dict(answered)

    def write(self, parts: Iterable[Answered], header: Mapping[str, Any]) -> None:
        """Merges the answers of all processes and writes the records.

        `header` holds arm, model, settings and environment.
        """
        rows: Answered = defaultdict(dict)
        for part in parts:
            for family, questions in part.items():
                rows[family].update(questions)
        scored = {
            name: Family(
                list(questions.values()),
                self._families[name]["categories"],
                rows_in(self._families[name]["file"]),
            )
            for name, questions in rows.items()
        }
        try:
            written = write_records(self._folder, self._progress_name, header, scored)
        except OSError as error:
            raise unwritable(self._folder, error) from None
        refresh_card(self._folder)
        for family in scored:
            if family in written:
                logger.warning("record of %s written to %s", family, self._folder)
            else:
                logger.warning(
                    "record of %s in %s not replaced: it has more questions than this run",
                    family,
                    self._folder,
                )

    def _family(self, request: Request) -> str | None:
        """The family of a request's task; None for the tasks of others."""
        subject = request.doc.get("subject") if isinstance(request.doc, dict) else None
        name = request.task_name or ""
        if not isinstance(subject, str) or not name.endswith(f"_{subject}"):
            return None
        family = name.removesuffix(f"_{subject}")
        return family if family in self._families else None

"""Every answer of every run as rows of one DataFrame, whatever task and file they come from.

Columns: subject, item (its number there), index (the line in a data file of this project, else -1),
the hashes document, prompt and target, answer (position of the right choice, -1 where there are no
choices), choice (position of the best), logprob_0, logprob_1, … (nats), score (the metric as
recorded) and credit (the same, with a tie of k best choices that holds the right one worth 1/k).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_harness.errors import ComparisonError, ResultsError, shown
from qlora_harness.schema.mmlu import LETTERS
from qlora_harness.schema.mmlu import PROMPT_DIGITS, prompts_hash
from qlora_harness.record import EVALUATION_FILE
from qlora_harness.results.harness import read_samples, samples_path
from qlora_harness.results.scored import FAMILIES, HarnessFile, Scored
from qlora_harness.schema.evaluation import Progress
from qlora_harness.schema.section import LARGEST, first_problem, read_record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_OTHER_RUN = "The file is half written or belongs to another run; score again or remove it"
_SHOWN_CHARACTERS = 600  # of a question


def read_answers(scored: Scored) -> pd.DataFrame | None:
    """Reads the answers behind a result; None where they aren't recorded.

    Raises ResultsError if a file is unreadable, contradicts itself, or is another run's.
    """
    frame = _read_progress(scored) if scored.path.name == EVALUATION_FILE else None
    if frame is None and scored.harness is not None:
        frame = _read_logged(scored.harness, scored)
    return frame


def _read_progress(scored: Scored) -> pd.DataFrame | None:
    """The answers in the mmlu_progress file beside evaluation_results.json."""
    path, progress = _find_progress(scored)
    if progress is None or scored.task not in progress.tasks:
        return None
    rows = progress.tasks[scored.task]
    where = f"{path}: tasks.{scored.task}"
    if not rows:
        raise ResultsError(f"{where} is empty", _OTHER_RUN)
    logprobs = np.array([[row.logprobs[letter] for letter in LETTERS] for row in rows])  # type: ignore[index]
    answer = np.array([LETTERS.index(row.answer) for row in rows], dtype=np.int16)
    choice = logprobs.argmax(axis=1)
    right = choice == answer
    for number, row in enumerate(rows):
        if (row.prediction, row.correct) != (LETTERS[choice[number]], bool(right[number])):
            raise ResultsError(
                f"{where}[{number}]: prediction is {row.prediction} and correct is {row.correct}, "
                f"but logprobs and answer give {LETTERS[choice[number]]} and {right[number]}",
                _OTHER_RUN,
            )
    index = np.array([row.index for row in rows])
    if len(np.unique(index)) < len(index) or index.max() >= scored.n_total:
        raise ResultsError(
            f"{where}: an index is repeated, or is not below {scored.n_total}", _OTHER_RUN
        )
    # lm_eval's target_hash is the hash of the right choice's position as text.
    targets = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(len(LETTERS))]
    columns = {
        "subject": [row.subject for row in rows],
        "item": index,
        "index": index,
        "document": "",
        "prompt": [row.prompt_sha256 for row in rows],
        "target": [targets[position] for position in answer],
        "answer": answer,
        "score": right.astype(np.float64),
    }
    frame = _with_choices(pd.DataFrame(columns), logprobs)
    _check_totals(frame, scored, where)
    digest = prompts_hash((row.index, row.subject, row.prompt_sha256, row.answer) for row in rows)
    if scored.prompts_sha256 not in (None, digest):
        raise ResultsError(
            f"{where}: its questions give prompts_sha256 {digest[:12]}, but {EVALUATION_FILE} says "
            f"{str(scored.prompts_sha256)[:12]}",
            _OTHER_RUN,
        )
    return frame


def _find_progress(scored: Scored) -> tuple[Path, Progress | None]:
    """The progress file of the model that evaluation_results.json is about."""
    folder = scored.path.parent
    paths = sorted(p for p in folder.glob("mmlu_progress_*.json") if p.is_file())
    records = {path: read_record(path, Progress) for path in paths}
    mine = [p for p, r in records.items() if (r.arm, r.model) == (scored.arm, scored.model)]
    if paths and len(mine) != 1:
        problem = (
            f"{mine[0]} and {mine[1]} are both of the model of {EVALUATION_FILE}"
            if mine
            else f"{paths[0]}: arm or model is not that of {EVALUATION_FILE}"
        )
        raise ResultsError(problem, "Remove the file that is another run's or out of date")
    return (mine[0], records[mine[0]]) if mine else (folder, None)


def _read_logged(file: HarnessFile, scored: Scored) -> pd.DataFrame | None:
    """The answers that lm_eval logged with --log_samples; None without any samples file."""
    paths = [samples_path(file, leaf) for leaf in file.tasks[scored.task]]
    missing = [path for path in paths if not path.is_file()]
    if not file.date or len(missing) == len(paths):
        return None
    if missing:
        raise ResultsError(
            f"{missing[0]} is missing ({len(missing)} of {len(paths)} sample files are)",
            "Score again with --log_samples, or remove the sample files that are left",
        )
    rows = [
        row
        for path, subject in zip(paths, scored.subjects, strict=True)
        for row in _read_leaf(path, subject, scored)
    ]
    frame = pd.DataFrame(rows)
    lines, logprobs = frame.pop("where"), frame.pop("logprobs")
    frame = _with_choices(frame, _choices(frame, list(logprobs), list(lines), scored))
    _check_totals(frame, scored, str(file.path))
    return frame


class _Sample(BaseModel):
    """What every sample must have."""

    model_config = ConfigDict(strict=True)
    doc_id: int
    doc_hash: str
    prompt_hash: str
    target_hash: str


def _read_leaf(path: Path, subject: str, scored: Scored) -> list[dict[str, Any]]:
    rows = [
        {"subject": subject, "where": where, **_row(where, sample, scored)}
        for where, sample in read_samples(path)
        if sample.get("filter", scored.filter) == scored.filter
    ]
    if not rows:
        raise ResultsError(f"{path} holds no sample of the filter {scored.filter}", _OTHER_RUN)
    if len({row["item"] for row in rows}) < len(rows):
        raise ResultsError(f"{path}: a doc_id is repeated", "Score again")
    return rows


def _row(where: str, sample: Mapping[str, Any], scored: Scored) -> dict[str, Any]:
    score = sample.get(scored.metric)
    if not isinstance(score, int | float) or not abs(score) <= LARGEST:
        raise ResultsError(
            f"{where}: {scored.metric} is {shown(score)}, not one number for each question",
            "Choose another metric with --metric, or score again",
        )
    try:
        known = _Sample.model_validate(sample)
    except ValidationError as error:
        raise ResultsError(f"{where}: {first_problem(error)}", _OTHER_RUN) from None
    ours = scored.task in FAMILIES
    logprobs = _logprobs(sample.get("filtered_resps"))
    if ours and len(logprobs) != len(LETTERS):
        raise ResultsError(
            f"{where}: filtered_resps does not hold four [log-probability, greedy] pairs",
            _OTHER_RUN,
        )
    doc, target = sample.get("doc"), str(sample.get("target"))
    index = doc.get("index") if ours and isinstance(doc, Mapping) else None
    position = int(target) if target.isdecimal() and len(target) < 4 else -1
    return {
        "item": known.doc_id,
        "index": index if isinstance(index, int) else -1,
        "document": known.doc_hash,
        "prompt": known.prompt_hash[:PROMPT_DIGITS],
        "target": known.target_hash,
        "answer": position if position < len(logprobs) else -1,
        "score": float(score),
        "logprobs": logprobs,
    }


def _logprobs(responses: object) -> list[float]:
    """[[-1.2, false], …], or with every leaf turned into text; empty for generated text."""
    if not isinstance(responses, list):
        return []
    try:
        values = [float(response[0]) for response in responses if not isinstance(response, str)]
    except (IndexError, KeyError, TypeError, ValueError, OverflowError):
        return []
    whole = len(values) == len(responses) and all(-LARGEST < value <= 0 for value in values)
    return values if whole else []


def _choices(
    frame: pd.DataFrame, responses: Sequence[list[float]], lines: Sequence[str], scored: Scored
) -> Floats | None:
    """The log-probabilities, [n, most choices]; None if the best of them don't give the score."""
    ours = scored.task in FAMILIES
    answer = frame["answer"].to_numpy()
    missing = np.flatnonzero(answer < 0)
    if len(missing) and ours:
        raise ResultsError(
            f"{lines[missing[0]]}: the target is not a choice from 0 to 3", _OTHER_RUN
        )
    # acc_norm chooses by other numbers.
    if len(missing) or scored.metric != "acc" or min(map(len, responses)) < 2:
        return None
    logprobs = np.array(list(zip_longest(*responses, fillvalue=np.nan)), dtype=np.float64).T
    wrong = np.flatnonzero((np.nanargmax(logprobs, axis=1) == answer) != frame["score"])
    if len(wrong) and ours:
        raise ResultsError(
            f"{lines[wrong[0]]}: acc is {frame['score'].iloc[wrong[0]]:g}, but the best "
            f"log-probability says otherwise for the target {answer[wrong[0]]}",
            "The file was changed or is damaged; score again",
        )
    return None if len(wrong) else logprobs


def _with_choices(frame: pd.DataFrame, logprobs: Floats | None) -> pd.DataFrame:
    """Adds what follows from log-probabilities, [n, choices], if they are known."""
    frame = frame.assign(subject=frame["subject"].astype("category"))
    if logprobs is None:
        return frame.assign(answer=np.int16(-1), choice=np.int16(-1), credit=frame["score"])
    tied = logprobs == np.nanmax(logprobs, axis=1, keepdims=True)
    right = tied[np.arange(len(frame)), frame["answer"].to_numpy()]
    frame = frame.assign(
        answer=frame["answer"].astype(np.int16),
        choice=np.nanargmax(logprobs, axis=1).astype(np.int16),
        credit=right / tied.sum(axis=1),
    )
    names = [f"logprob_{number}" for number in range(logprobs.shape[1])]
    return pd.concat([frame, pd.DataFrame(logprobs, columns=names)], axis=1)


def _logprob_columns(frame: pd.DataFrame) -> list[str]:
    return [str(name) for name in frame.columns if str(name).startswith("logprob_")]


def logprobs_of(frame: pd.DataFrame) -> Floats:
    """Returns the log-probabilities of the choices, [n, choices]; NaN where there is none."""
    table: Floats = frame[_logprob_columns(frame)].to_numpy(dtype=np.float64)
    return table


def _check_totals(frame: pd.DataFrame, scored: Scored, where: str) -> None:
    """Checks that the answers are those that the result was made of."""
    groups = frame.groupby("subject", observed=True)["score"]
    sums, sizes = groups.sum().to_dict(), groups.size().to_dict()
    for subject in sizes.keys() | scored.subjects.keys():
        part = scored.subjects.get(subject)
        n, total = sizes.get(subject, 0), sums.get(subject, 0.0)
        if part is None or part.n != n or abs(total - part.value * n) > 1e-6 * max(1.0, abs(total)):
            recorded = "nothing" if part is None else f"{part.value:.6f} of {part.n}"
            raise ResultsError(
                f"{where}: {subject}: {scored.metric} is {total / max(n, 1):.6f} over {n} answers, "
                f"but {scored.path.name} says {recorded}",
                _OTHER_RUN,
            )


def _item_keys(frames: Sequence[pd.DataFrame]) -> list[pd.MultiIndex]:
    """What identifies each question, in a form that all frames have in common.

    The line in the data file for tasks of this project; else lm_eval's hash of the document; else
    that of the prompt. Questions of one subject with the same hash are numbered.
    """
    name = "prompt"
    if all((frame["index"] >= 0).all() for frame in frames):
        name = "index"
    elif all((frame["document"] != "").all() for frame in frames):
        name = "document"
    keys = []
    for frame in frames:
        part = frame[["subject", name]].astype({"subject": str})
        part["again"] = part.groupby(["subject", name]).cumcount()
        keys.append(pd.MultiIndex.from_frame(part))
    return keys


def align(
    frames: Mapping[str, pd.DataFrame], *, intersect: bool
) -> tuple[dict[str, pd.DataFrame], dict[str, int]]:
    """Brings the answers of runs, by label, to the same questions in the same order.

    Returns the frames, and how many questions of each were left out, which only `intersect`
    allows. Raises ComparisonError if the runs answered different questions.
    """
    labels, parts = list(frames), list(frames.values())
    keys = _item_keys(parts)
    common = keys[0]
    for label, key in zip(labels[1:], keys[1:], strict=True):
        odd = keys[0].symmetric_difference(key)
        if len(odd) and not intersect:
            subject, item, _ = odd[0]
            raise ComparisonError(
                f"{labels[0]} and {label} answered different questions: {len(odd):,} are in only "
                f"one of them, the first in {subject}, {str(item)[:16]}",
                "Score all runs with the same task, data and template, or pass --intersect to "
                "compare the questions that all runs answered",
            )
        common = common.intersection(key, sort=False)
    if not len(common):
        raise ComparisonError(
            f"--intersect: {', '.join(labels)} have no question in common",
            "Score them on the same questions, or leave one out",
        )
    columns = {name: None for frame in parts for name in frame.columns}
    if not all((frame["answer"] >= 0).all() for frame in parts):
        parts = [frame.assign(answer=-1, choice=-1, credit=frame["score"]) for frame in parts]
        columns = {name: None for name in columns if not name.startswith("logprob_")}
    aligned = {
        label: frame.reindex(columns=list(columns))
        .iloc[key.get_indexer(common)]
        .reset_index(drop=True)
        for label, frame, key in zip(labels, parts, keys, strict=True)
    }
    for label in labels[1:]:
        _check_same(labels[0], aligned[labels[0]], label, aligned[label])
    return aligned, {label: len(frame) - len(common) for label, frame in frames.items()}


def _check_same(first: str, one: pd.DataFrame, label: str, other: pd.DataFrame) -> None:
    """Checks the hashes that both have."""
    for name in ("document", "prompt", "target"):
        a, b = one[name].to_numpy(), other[name].to_numpy()
        differ = np.flatnonzero((a != b) & (a != "") & (b != ""))
        if len(differ):
            row = one.iloc[differ[0]]
            raise ComparisonError(
                f"{first} and {label} answered different questions: the {name} hash differs in "
                f"{len(differ):,} of {len(one):,}, the first {row['subject']}, doc_id "
                f"{row['item']}",
                "Score all runs with the same task, data folder and template",
            )


def questions_of(file: HarnessFile, task: str, prompts: set[str]) -> dict[str, str]:
    """Returns texts of questions by prompt hash, from logged samples, cut and without shots."""
    texts = {}
    for path in (samples_path(file, leaf) for leaf in file.tasks[task]):
        for _, sample in read_samples(path) if path.is_file() else ():
            prompt = str(sample.get("prompt_hash"))[:PROMPT_DIGITS]
            if prompt in prompts:
                texts[prompt] = _question(sample)
    return texts


def _question(sample: Mapping[str, Any]) -> str:
    arguments = sample.get("arguments")
    text = sample["doc"].get("input") if isinstance(sample.get("doc"), Mapping) else None
    if not isinstance(text, str) and isinstance(arguments, Mapping) and arguments:
        first = next(iter(arguments.values()))
        text = first.get("arg_0") if isinstance(first, Mapping) else None
    if not isinstance(text, str):
        return ""
    text = text.rsplit("\n\n", 1)[-1].removesuffix("Answer:").strip()
    return text if len(text) <= _SHOWN_CHARACTERS else f"…{text[-_SHOWN_CHARACTERS:]}"

"""The answers of a run as a DataFrame with one row per question, for any task and file.

Columns: subject, item (its number there), index (the line in a data file of this project, else -1),
the hashes document, prompt and target, answer (position of the right choice, -1 without choices),
choice (position of the best), logprob_0, logprob_1, … (nats), score (the metric as recorded), its
weight (1, or the number of values if a question has several) and credit (the score, but 1/k if the
right choice is one of k tied best).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_harness.errors import ComparisonError, ResultsError, shown
from qlora_harness.record import EVALUATION_FILE, PROGRESS_FILES
from qlora_harness.results.lm_eval_files import read_samples
from qlora_harness.results.scored import FAMILIES, Scored
from qlora_harness.schema.mmlu import LETTERS, PROMPT_DIGITS, prompts_hash
from qlora_harness.schema.scoring_records import Progress
from qlora_harness.schema.section import LARGEST, first_problem, read_record

_OTHER_RUN = "The file is half written or belongs to another run; score again or remove it"


def read_answers(scored: Scored) -> pd.DataFrame | None:
    """Reads the answers behind a result; None if they aren't recorded. Raises ResultsError."""
    frame = _read_progress(scored) if scored.path.name == EVALUATION_FILE else None
    return _read_logged(scored) if frame is None else frame


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
        "weight": 1.0,
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
    """The progress file of the model in evaluation_results.json."""
    folder = scored.path.parent
    paths = sorted(p for p in folder.glob(PROGRESS_FILES) if p.is_file())
    records = {path: read_record(path, Progress) for path in paths}
    mine = [p for p, r in records.items() if (r.arm, r.model) == (scored.arm, scored.model)]
    if paths and len(mine) != 1:
        problem = (
            f"{mine[0]} and {mine[1]} are both of the model of {EVALUATION_FILE}"
            if mine
            else f"{paths[0]}: arm or model differs from {EVALUATION_FILE}"
        )
        raise ResultsError(problem, "Remove the file that is out of date or another run's")
    return (mine[0], records[mine[0]]) if mine else (folder, None)


def _read_logged(scored: Scored) -> pd.DataFrame | None:
    """The answers that lm_eval logged with --log_samples; None without any samples file."""
    paths = list(scored.samples.values())
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        return None
    if missing:
        raise ResultsError(
            f"{missing[0]} is missing ({len(missing)} of {len(paths)} samples files are)",
            "Score again with --log_samples, or remove the other samples files",
        )
    rows = [
        row for subject, path in scored.samples.items() for row in _read_leaf(path, subject, scored)
    ]
    frame = pd.DataFrame(rows)
    lines, logprobs = frame.pop("where"), frame.pop("logprobs")
    frame = _with_choices(frame, _choices(frame, list(logprobs), list(lines), scored))
    _check_totals(frame, scored, str(paths[0].parent))
    return frame


class _Sample(BaseModel):
    """The fields that every sample must have."""

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
    score, weight = _score(where, sample.get(scored.metric), scored.metric)
    try:
        known = _Sample.model_validate(sample)
    except ValidationError as error:
        raise ResultsError(f"{where}: {first_problem(error)}", _OTHER_RUN) from None
    logprobs = _logprobs(sample.get("filtered_resps"))
    doc, target = sample.get("doc"), str(sample.get("target"))
    index = doc.get("index") if scored.task in FAMILIES and isinstance(doc, dict) else None
    position = int(target) if target.isdecimal() and len(target) < 4 else -1
    return {
        "item": known.doc_id,
        "index": index if isinstance(index, int) else -1,
        "document": known.doc_hash,
        "prompt": known.prompt_hash[:PROMPT_DIGITS],
        "target": known.target_hash,
        "answer": position if position < len(logprobs) else -1,
        "score": score,
        "weight": weight,
        "logprobs": logprobs,
    }


def _score(where: str, logged: Any, metric: str) -> tuple[float, float]:
    """Returns the value of a sample and its weight in the mean."""
    values: list[Any] = logged if isinstance(logged, list) else [logged]
    if all(map(_is_number, values)):
        if not isinstance(logged, list):
            return float(values[0]), 1.0
        if metric.startswith("inst_level_") and values:  # IFEval: one for each instruction
            return sum(map(float, values)) / len(values), float(len(values))
        if metric == "bits_per_byte" and len(values) == 2 and values[1] > 0:
            logprob, size = values  # nats, bytes
            return -logprob / size / math.log(2), float(size)
    raise ResultsError(
        f"{where}: {metric} is {shown(logged)}, not one number for each question",
        "Choose another metric with --metric, or score again",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _logprobs(responses: object) -> list[float]:
    """From [[-1.2, false], …], also with every leaf as text; empty for generated text."""
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
) -> NDArray[np.float64] | None:
    """The log-probabilities, [n, most choices]; None if the best choices don't give the score."""
    ours = scored.task in FAMILIES
    fits = [
        0 <= answer < len(row) > 1
        and (len(row) == len(LETTERS) or not ours)
        and (row.index(max(row)) == answer) == score
        for row, answer, score in zip(responses, frame["answer"], frame["score"], strict=True)
    ]
    if ours and not all(fits):
        raise ResultsError(
            f"{lines[fits.index(False)]}: filtered_resps, target and acc contradict each other",
            _OTHER_RUN,
        )
    if scored.metric != "acc" or not all(fits):  # acc_norm chooses by other numbers
        return None
    return np.array(list(zip_longest(*responses, fillvalue=np.nan)), dtype=np.float64).T


def _with_choices(frame: pd.DataFrame, logprobs: NDArray[np.float64] | None) -> pd.DataFrame:
    """Adds choice, credit and log-probabilities; without [n, choices] the score is the credit."""
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


def logprobs_of(frame: pd.DataFrame) -> NDArray[np.float64]:
    """Returns the log-probabilities, [n, choices]; NaN for choices that a question lacks."""
    table: NDArray[np.float64] = frame.filter(regex="^logprob_").to_numpy(dtype=np.float64)
    return table


def _check_totals(frame: pd.DataFrame, scored: Scored, where: str) -> None:
    """Checks that the answers give the recorded result of each subject."""
    frame = frame.assign(total=frame["score"] * frame["weight"])
    groups = frame.groupby("subject", observed=True)
    sums, sizes = groups[["total", "weight"]].sum(), groups.size().to_dict()
    for subject in sizes.keys() | scored.subjects.keys():
        part, n = scored.subjects.get(subject), sizes.get(subject, 0)
        total, weight = sums.loc[subject] if n else (0.0, 0.0)
        allowed = 1e-6 * max(1.0, abs(total))
        if part is None or part.n != n or abs(total - part.value * weight) > allowed:
            recorded = "nothing" if part is None else f"{part.value:.6f} of {part.n}"
            raise ResultsError(
                f"{where}: {subject}: {scored.metric} is {total / max(weight, 1):.6f} over {n} "
                "answers, "
                f"but {scored.path.name} says {recorded}",
                _OTHER_RUN,
            )


def _item_keys(frames: Sequence[pd.DataFrame]) -> list[pd.MultiIndex]:
    """Keys of the questions in each frame, by the first of these that all frames have.

    The line in the data file (tasks of this project), lm_eval's hash of the document, or that of
    the prompt. Questions of one subject with the same hash are numbered.
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
    """Aligns the answers of runs to the same questions; returns them and how many were dropped.

    Raises ComparisonError if the runs answered different questions, unless `intersect`.
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
    """Checks the hashes that both runs have."""
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

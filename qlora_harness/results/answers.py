"""Every answer of every run as rows of one DataFrame, whatever task and file they come from.

Columns: subject, item (its number there), index (the line in a data file of this project, else -1), the hashes
document, prompt and target, answer (place of the right choice, -1 where there are no choices),
choice (place of the best), logprob_0, logprob_1, … (nats), score (the metric as recorded) and
credit (the same, with a tie of k best choices that holds the right one worth 1/k).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qlora_harness.results.harness import read_samples, samples_path
from qlora_harness.results.scored import FAMILIES, HarnessFile, Scored
from qlora_harness.errors import ComparisonError, ResultsError, shown
from qlora_harness.families import LETTERS
from qlora_harness.question_hashes import PROMPT_DIGITS, prompts_hash
from qlora_harness.record import EVALUATION_FILE
from qlora_harness.schema.evaluation import Evaluation, Progress
from qlora_harness.schema.section import LARGEST, read_record

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OTHER_RUN = "The file is half written or belongs to another run; score again or remove it"
_SHOWN_CHARACTERS = 600  # of a question


def read_progress(scored: Scored) -> pd.DataFrame | None:
    """Reads the answers behind evaluation_results.json from the mmlu_progress file beside it.

    Returns:
        The answers of the task, or None if no file holds them.

    Raises:
        ResultsError: The file is unreadable, foreign, contradicts itself, or is another run's.
    """
    found = _find_progress(scored.path)
    if found is None or scored.task not in found[1].tasks:
        return None
    path, rows = found[0], found[1].tasks[scored.task]
    where = f"{path}: tasks.{scored.task}"
    if not rows:
        raise ResultsError(f"{where} is empty", _OTHER_RUN)
    logprobs = np.array([[row.logprobs[letter] for letter in LETTERS] for row in rows])  # type: ignore[index]
    answer = np.array([LETTERS.index(row.answer) for row in rows], dtype=np.int16)
    choice = logprobs.argmax(axis=1)
    for place, row in enumerate(rows):
        right = bool(choice[place] == answer[place])
        if (row.prediction, row.correct) != (LETTERS[choice[place]], right):
            raise ResultsError(
                f"{where}[{place}]: prediction is {row.prediction} and correct is {row.correct}, "
                f"but logprobs and answer give {LETTERS[choice[place]]} and {right}",
                _OTHER_RUN,
            )
    index = np.array([row.index for row in rows])
    if len(set(index.tolist())) < len(index) or index.max() >= scored.n_total:
        raise ResultsError(
            f"{where}: an index is repeated, or is not below {scored.n_total}", _OTHER_RUN
        )
    # The hash is of the place of the right answer as text, as lm_eval's target_hash is.
    targets = [hashlib.sha256(str(place).encode()).hexdigest() for place in range(len(LETTERS))]
    frame = _frame(
        subject=[row.subject for row in rows],
        item=index,
        index=index,
        document=[""] * len(rows),
        prompt=[row.prompt_sha256 for row in rows],
        target=[targets[place] for place in answer],
        answer=answer,
        logprobs=logprobs,
        score=(choice == answer).astype(np.float64),
    )
    _check_totals(frame, scored, where)
    digest = prompts_hash((row.index, row.subject, row.prompt_sha256, row.answer) for row in rows)
    if scored.prompts_sha256 not in (None, digest):
        raise ResultsError(
            f"{where}: its questions give prompts_sha256 {digest[:12]}, but {EVALUATION_FILE} says "
            f"{str(scored.prompts_sha256)[:12]}",
            _OTHER_RUN,
        )
    return frame


def _find_progress(evaluation: Path) -> tuple[Path, Progress] | None:
    """The progress file of the model that evaluation_results.json is about."""
    paths = sorted(p for p in evaluation.parent.glob("mmlu_progress_*.json") if p.is_file())
    if not paths:
        return None
    owner = read_record(evaluation, Evaluation)
    records = {path: read_record(path, Progress) for path in paths}
    mine = [
        path
        for path, record in records.items()
        if (record.arm, record.model) == (owner.arm, owner.model)
    ]
    if len(mine) != 1:
        problem = (
            f"{paths[0]}: arm or model is not that of {EVALUATION_FILE}"
            if not mine
            else f"{mine[0]} and {mine[1]} are both of the model of {EVALUATION_FILE}"
        )
        raise ResultsError(problem, "Remove the file that is another run's or out of date")
    return mine[0], records[mine[0]]


def read_logged(file: HarnessFile, scored: Scored) -> pd.DataFrame | None:
    """Reads the answers that lm_eval logged with --log_samples.

    Returns:
        The answers, or None if no samples were logged.

    Raises:
        ResultsError: Samples are missing, half written, broken, or another run's.
    """
    paths = {leaf: samples_path(file, leaf) for leaf in file.tasks[scored.task]}
    missing = [path for path in paths.values() if not path.is_file()]
    if not file.date or len(missing) == len(paths):
        return None
    if missing:
        raise ResultsError(
            f"{missing[0]} is missing ({len(missing)} of {len(paths)} sample files are)",
            "Score again with --log_samples, or remove the sample files that are left",
        )
    parts = [
        _read_leaf(path, subject, scored)
        for path, subject in zip(paths.values(), scored.subjects, strict=True)
    ]
    frame = _without_choices(pd.concat(parts, ignore_index=True))
    _check_totals(frame, scored, str(file.path))
    return frame


def _read_leaf(path: Path, subject: str, scored: Scored) -> pd.DataFrame:
    columns: dict[str, list[Any]] = {
        name: [] for name in ("item", "index", "document", "prompt", "target", "score", "answer")
    }
    responses: list[list[float] | None] = []
    ours = scored.task in FAMILIES
    for where, sample in read_samples(path):
        if sample.get("filter", scored.filter) != scored.filter:
            continue
        score = sample.get(scored.metric)
        if not isinstance(score, int | float) or not abs(score) <= LARGEST:
            raise ResultsError(
                f"{where}: {scored.metric} is {shown(score)}, not one number a question",
                "Choose another metric with --metric, or score again",
            )
        for name in ("doc_hash", "prompt_hash", "target_hash"):
            if not isinstance(sample.get(name), str):
                raise ResultsError(
                    f"{where}: {name} is {shown(sample.get(name))}, not a text", _OTHER_RUN
                )
        doc, doc_id = sample.get("doc"), sample.get("doc_id")
        if isinstance(doc_id, bool) or not isinstance(doc_id, int):
            raise ResultsError(f"{where}: doc_id is {shown(doc_id)}, not a number", _OTHER_RUN)
        index = doc.get("index") if ours and isinstance(doc, Mapping) else None
        columns["item"].append(doc_id)
        columns["index"].append(index if isinstance(index, int) else -1)
        columns["document"].append(sample["doc_hash"])
        columns["prompt"].append(sample["prompt_hash"][:PROMPT_DIGITS])
        columns["target"].append(sample["target_hash"])
        columns["score"].append(float(score))
        logprobs = _logprobs(sample.get("filtered_resps"))
        if ours and (logprobs is None or len(logprobs) != len(LETTERS)):
            raise ResultsError(
                f"{where}: filtered_resps does not hold four [log-probability, greedy] pairs",
                _OTHER_RUN,
            )
        responses.append(logprobs)
        target = str(sample.get("target"))
        choices = len(logprobs or ())
        columns["answer"].append(
            int(target) if target.isdecimal() and len(target) < 4 and int(target) < choices else -1
        )
    if not responses:
        raise ResultsError(f"{path} holds no sample of the filter {scored.filter}", _OTHER_RUN)
    if len(set(columns["item"])) < len(columns["item"]):
        raise ResultsError(f"{path}: a doc_id is repeated", "Score again")
    matrix, answer = _choices(responses, columns, path, ours, scored.metric)
    return _frame(
        subject=[subject] * len(responses),
        answer=answer,
        logprobs=matrix,
        **{
            name: columns[name]
            for name in ("item", "index", "document", "prompt", "target", "score")
        },
    )


def _logprobs(responses: object) -> list[float] | None:
    """[[-1.2, false], …], or with every leaf turned into text; None for generated text."""
    if not isinstance(responses, list) or not responses:
        return None
    try:
        values = [float(response[0]) for response in responses if not isinstance(response, str)]
    except (IndexError, KeyError, TypeError, ValueError, OverflowError):
        return None
    whole = len(values) == len(responses) and all(-LARGEST < value <= 0 for value in values)
    return values if whole else None


def _choices(
    responses: Sequence[list[float] | None],
    columns: Mapping[str, list[Any]],
    path: Path,
    ours: bool,
    metric: str,
) -> tuple[NDArray[np.float64], NDArray[np.int16]]:
    """Log-probabilities [n, most choices] and right choices; -1 where the score isn't theirs."""
    n = len(responses)
    answer = np.array(columns["answer"], dtype=np.int16)
    nothing = np.full((n, 0), np.nan), np.full(n, -1, dtype=np.int16)
    if (
        metric != "acc"  # acc_norm chooses by other numbers
        or any(values is None or len(values) < 2 for values in responses)
        or (answer < 0).any()
    ):
        if ours:
            raise ResultsError(f"{path}: a target is not a choice from 0 to 3", _OTHER_RUN)
        return nothing
    most = max((len(values or ()) for values in responses), default=0)
    matrix = np.full((n, most), np.nan)
    for row, values in enumerate(responses):
        matrix[row, : len(values or ())] = values
    wrong = np.flatnonzero((np.nanargmax(matrix, axis=1) == answer) != np.array(columns["score"]))
    if len(wrong) and ours:
        raise ResultsError(
            f"{path}, line {wrong[0] + 1}: acc is {columns['score'][wrong[0]]:g}, but the best "
            f"log-probability says otherwise for the target {answer[wrong[0]]}",
            "The file was changed or is damaged; score again",
        )
    return nothing if len(wrong) else (matrix, answer)


def _frame(*, logprobs: NDArray[np.float64], **columns: Any) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    frame["subject"] = frame["subject"].astype("category")
    known = frame["answer"].to_numpy() >= 0
    frame["choice"] = np.int16(-1)
    frame["credit"] = frame["score"]
    names = [f"logprob_{place}" for place in range(logprobs.shape[1])]
    frame = pd.concat([frame, pd.DataFrame(logprobs, columns=names)], axis=1)
    if logprobs.shape[1] and known.any():
        best = np.nanmax(logprobs, axis=1, keepdims=True)
        tied = logprobs == best
        rows = np.arange(len(frame))
        frame["choice"] = np.nanargmax(logprobs, axis=1).astype(np.int16)
        right = tied[rows, frame["answer"].to_numpy()]
        frame["credit"] = right / tied.sum(axis=1)
    return frame


def _without_choices(frame: pd.DataFrame) -> pd.DataFrame:
    """Drops the choices where only some questions have them."""
    if (frame["answer"] >= 0).all():
        return frame
    choices = [name for name in frame.columns if str(name).startswith("logprob_")]
    return frame.drop(columns=choices).assign(answer=-1, choice=-1, credit=frame["score"])


def logprobs_of(frame: pd.DataFrame) -> NDArray[np.float64]:
    """Returns the log-probabilities of the choices, [n, choices]; NaN where there is none."""
    names = [name for name in frame.columns if str(name).startswith("logprob_")]
    table: NDArray[np.float64] = frame[names].to_numpy(dtype=np.float64)
    return table


def _check_totals(frame: pd.DataFrame, scored: Scored, where: str) -> None:
    """Checks that the answers are those that the result was made of."""
    groups = frame.groupby("subject", observed=True)["score"]
    sums, sizes = groups.sum().to_dict(), groups.size().to_dict()
    for subject in sizes.keys() | scored.subjects.keys():
        said = scored.subjects.get(subject)
        n, total = sizes.get(subject, 0), sums.get(subject, 0.0)
        if said is None or said.n != n or abs(total - said.value * n) > 1e-6 * max(1.0, abs(total)):
            wanted = "nothing" if said is None else f"{said.value:.6f} of {said.n}"
            raise ResultsError(
                f"{where}: {subject}: {scored.metric} is {total / max(n, 1):.6f} over {n} answers, "
                f"but {scored.path.name} says {wanted}",
                _OTHER_RUN,
            )


def item_keys(frames: Sequence[pd.DataFrame]) -> list[pd.Index]:
    """Returns what identifies each question, in a form that all frames have in common.

    The line in the data file for tasks of this project; else lm_eval's hash of the document; else
    that of the prompt. Questions of one subject with the same hash are numbered.
    """
    if all((frame["index"] >= 0).all() for frame in frames):
        names = ["subject", "index"]
    elif all((frame["document"] != "").all() for frame in frames):
        names = ["subject", "document"]
    else:
        names = ["subject", "prompt"]
    keys = []
    for frame in frames:
        part = frame[names].astype({"subject": str})
        part["again"] = part.groupby(names).cumcount()
        keys.append(pd.MultiIndex.from_frame(part))
    return keys


def align(
    frames: Mapping[str, pd.DataFrame], *, intersect: bool
) -> tuple[dict[str, pd.DataFrame], dict[str, int]]:
    """Brings the answers of several runs to the same questions in the same order.

    Args:
        frames: By label of the run.
        intersect: Whether questions that not all runs answered are left out.

    Returns:
        The frames, and how many questions of each were left out.

    Raises:
        ComparisonError: The runs answered different questions.
    """
    labels, parts = list(frames), list(frames.values())
    keys = item_keys(parts)
    common = keys[0]
    for label, key in zip(labels[1:], keys[1:], strict=True):
        odd = keys[0].symmetric_difference(key)
        if len(odd) and not intersect:
            subject, item, _ = odd[0]
            raise ComparisonError(
                f"{labels[0]} and {label} answered different questions: {len(odd):,} are in only "
                f"one of them, the first in {subject}, {str(item)[:16]}",
                "Score all runs with the same task, data and template, or pass --intersect to "
                "compare the questions that all answered",
            )
        common = common.intersection(key, sort=False)
    if not len(common):
        raise ComparisonError(
            f"--intersect: {', '.join(labels)} have no question in common",
            "Score them on the same questions, or leave one out",
        )
    aligned = {}
    choices = all((frame["answer"] >= 0).all() for frame in parts)
    most = max(logprobs_of(frame).shape[1] for frame in parts)
    for label, frame, key in zip(labels, parts, keys, strict=True):
        frame = frame if choices else _without_choices(frame.assign(answer=-1))
        missing = [f"logprob_{k}" for k in range(most if choices else 0)]
        padded = frame.reindex(columns=[*dict.fromkeys([*frame.columns, *missing])])
        aligned[label] = padded.iloc[key.get_indexer(common)].reset_index(drop=True)
    first = aligned[labels[0]]
    for label in labels[1:]:
        _check_same(labels[0], first, label, aligned[label])
    dropped = {label: len(frame) - len(common) for label, frame in frames.items()}
    return aligned, dropped


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
    """Reads the texts of some questions from logged samples.

    Returns:
        The end of each prompt, without its shots, shortened; by prompt hash.
    """
    found = {}
    for path in (samples_path(file, leaf) for leaf in file.tasks[task]):
        for _, sample in read_samples(path) if path.is_file() else ():
            prompt = str(sample.get("prompt_hash"))[:PROMPT_DIGITS]
            if prompt in prompts:
                found[prompt] = _question(sample)
    return found


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

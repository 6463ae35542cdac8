"""The comparison itself: from the paths of runs to tables, notes and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qlora_harness.compare import conditions, verdict
from qlora_harness.compare.answers import Answer, Question, RecordedAnswers, count_letters
from qlora_harness.compare.constant_answer import against_constant
from qlora_harness.compare.design import only_seed_differs
from qlora_harness.compare.evaluation import Evaluation
from qlora_harness.compare.evidence import gather
from qlora_harness.compare.intersection import (
    Intersection,
    any_dropped,
    category_of,
    common_to_all,
    intersections,
    restrict,
)
from qlora_harness.compare.intersection import (
    notes as intersection_notes,
)
from qlora_harness.compare.losses import (
    LossDifference,
    StepLog,
    compare_losses,
    perplexity_interval,
    read_log,
)
from qlora_harness.compare.paired import (
    DEFAULT_DRAWS,
    DEFAULT_MARGIN,
    DEFAULT_SEED,
    PairedStatistics,
    analyse,
    correct,
)
from qlora_harness.compare.report import Comparison, RunInfo
from qlora_harness.compare.runs import Run, load_run
from qlora_harness.compare.statistics import (
    Difference,
    count_pairs,
    unpaired_difference,
)
from qlora_harness.compare.tables.groups import groups_table
from qlora_harness.compare.tables.selection import design_tables, main_tables
from qlora_harness.compare.tables.settings import settings_table, shared_table
from qlora_harness.compare.timing import without_times
from qlora_harness.errors import ComparisonError, SettingsError
from qlora_harness.record import LOGS_FILE, now, scrub

_Answers = Mapping[Question, Answer]


def compare(
    paths: Sequence[Path],
    *,
    labels: Sequence[str] | None = None,
    task: str | None = None,
    allow_limit: bool = False,
    allow_different_data: bool = False,
    margin: float = DEFAULT_MARGIN,
    draws: int = DEFAULT_DRAWS,
    seed: int = DEFAULT_SEED,
    rescore: bool = False,
    baseline: str | None = None,
    intersect: bool = False,
) -> Comparison:
    """Compares runs from their files.

    Args:
        paths: Two or more runs; differences are against the first.
        labels: Their names in the tables; by default as much of the path as tells them apart.
        task: The MMLU family to compare; by default mmlu_qlora_5shot, or the only common one.
        allow_limit: Whether runs with the same --limit may be compared.
        allow_different_data: Whether runs on different data may be compared.
        margin: Of the equivalence test, as a share of the questions.
        draws: Samples of the bootstrap.
        seed: Of the bootstrap.
        rescore: Whether each answer is checked against its log-probabilities.
        baseline: Label of the run that differences are against, in place of the first.
        intersect: Whether runs that answered different sets of questions are compared on those
            that each has in common with the baseline.

    Raises:
        SettingsError: The labels don't fit the runs, or the baseline is none of them.
        ResultsError: A file is unreadable, foreign, incomplete or contradicts another one.
        ComparisonError: The runs were not made under conditions that allow a comparison.
    """
    _check_paths(paths)
    names = default_labels(paths) if labels is None else _checked_labels(labels, len(paths))
    if baseline is not None:
        if baseline not in names:
            raise SettingsError(
                f"--baseline {baseline} is none of the runs", f"They are {', '.join(names)}"
            )
        first = list(names).index(baseline)
        order = [first, *(i for i in range(len(names)) if i != first)]
        paths, names = [paths[i] for i in order], [names[i] for i in order]
    runs = [load_run(path, name) for path, name in zip(paths, names, strict=True)]
    conditions.check_substance(runs)
    notes = conditions.check_data(runs, allow_different_data)
    notes += conditions.settings_notes(runs)
    notes += conditions.quantisation_notes(runs)
    runs, untimed = without_times(runs)
    notes += untimed
    family = conditions.choose_family(runs, task)
    evaluations = _pick(runs, family)
    notes += conditions.check_limit(evaluations, allow_limit, intersect)
    recorded = {
        name: run.answers(str(family), rescore=rescore)
        for run in runs
        if (name := run.label) in evaluations
    }
    answers = {name: None if item is None else item.by_question for name, item in recorded.items()}
    shared = intersections(names, evaluations, answers, family) if intersect else {}
    notes += conditions.check_questions(evaluations, answers, intersect)
    notes += intersection_notes(shared)
    evaluations = {name: _count(item, answers[name]) for name, item in evaluations.items()}
    constants = {
        name: against_constant(item.values()) for name, item in answers.items() if item is not None
    }
    seeds_apart = [
        index for index, run in enumerate(runs) if index > 0 and only_seed_differs(runs[0], run)
    ]
    paired = correct(_pair(names, answers, family, margin, draws, seed), seeds_apart)
    notes += _seed_notes(names, [index for index in seeds_apart if index in paired])
    # What puts all runs together needs questions that all of them answered.
    joint, joint_answers = _join(evaluations, answers, shared)
    size = next(iter(joint.values())).n if joint and joint is not evaluations else None
    if evaluations and not joint:
        notes.append(
            "No question was answered by all runs: nothing that puts more than two together is "
            "shown."
        )
    logs = {run.label: read_log(run) for run in runs}
    losses = _compare_losses(runs, logs, draws, seed)
    perplexities = {
        index: interval
        for index, log in enumerate(logs.values())
        if log is not None
        and (interval := perplexity_interval(log, draws=draws, seed=seed)) is not None
    }
    notes += _log_notes(runs, logs)
    notes += _answer_notes(recorded)
    for item in runs:
        notes += verdict.run_notes(item, evaluations.get(item.label), constants.get(item.label))
    notes += verdict.shared_notes(runs, family)
    together, missing = design_tables(runs, joint, joint_answers, size)
    notes += missing
    found = conditions.compare_conditions(runs, family)
    return Comparison(
        created=now(),
        runs=tuple(
            _describe(item, evaluations.get(item.label), recorded.get(item.label)) for item in runs
        ),
        family=family,
        tables=(
            *main_tables(runs, evaluations, paired, losses, perplexities, shared),
            *together,
        ),
        details=(
            (groups_table(names, paired, "subjects", common=any_dropped(shared)),) if paired else ()
        ),
        settings=settings_table(names, found),
        shared=shared_table(found),
        notes=tuple(scrub(note) for note in notes),
        verdict=tuple(
            verdict.sentence(
                runs[0],
                item,
                _difference(names[0], item.label, evaluations),
                paired.get(index),
                losses.get(index),
                family,
                conditions.share_data(runs[0], item),
                guessing=all(
                    (constant := constants.get(name)) is not None and not constant.beaten
                    for name in (names[0], item.label)
                ),
                common=index in shared and shared[index].total.dropped > 0,
            )
            for index, item in enumerate(runs)
            if index > 0
        ),
        evidence=gather(runs, joint, answers, logs, size),
        intersection=tuple(shared.values()) if intersect else None,
    )


def default_labels(paths: Sequence[Path]) -> list[str]:
    """Returns for each run the shortest end of its path that tells it from the others.

    Args:
        paths: The runs; of a results file, the folder counts, as its name is only a time.
    """
    parts = [
        (path.parent if path.suffix == ".json" else path).resolve().parts[1:] or ("/",)
        for path in paths
    ]
    if len(set(parts)) < len(parts):
        parts = [path.resolve().parts[1:] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in paths]


def _check_paths(paths: Sequence[Path]) -> None:
    if len(paths) < 2:
        found = f"only {paths[0]}" if paths else "none"
        raise ComparisonError(
            f"a comparison needs two or more runs, found {found}",
            "Name them, for example qlora-harness compare results/4bit results/16bit",
        )
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ComparisonError(f"the run {path} is named twice", "Name two different runs")
        seen.add(path.resolve())


def _checked_labels(labels: Sequence[str], runs: int) -> list[str]:
    names = [label.strip() for label in labels]
    if len(names) != runs:
        raise SettingsError(
            f"--labels {','.join(labels)}: {len(names)} names for {runs} runs",
            "Give one name for each run, separated by commas",
        )
    if len(set(names)) < runs or not all(names):
        raise SettingsError(
            f"--labels {','.join(labels)}: a name is empty or there twice", "Use different names"
        )
    return names


def _pick(runs: Sequence[Run], family: str | None) -> dict[str, Evaluation]:
    if family is None:
        return {}
    return {run.label: run.evaluations[family] for run in runs if family in run.evaluations}


def _count(evaluation: Evaluation, answers: _Answers | None) -> Evaluation:
    """Adds what only the answers one by one tell."""
    if answers is None:
        return evaluation
    ties = evaluation.ties
    if ties is None:
        ties = sum(answer.tied for answer in answers.values())
    return replace(evaluation, ties=ties, letters=count_letters(answers.values()))


def _pair(
    names: Sequence[str],
    answers: Mapping[str, _Answers | None],
    family: str | None,
    margin: float,
    draws: int,
    seed: int,
) -> dict[int, PairedStatistics]:
    first = answers.get(names[0])
    if first is None:
        return {}
    found = {}
    for index, name in enumerate(names[1:], start=1):
        other = answers.get(name)
        if other is None:
            continue
        # All questions, unless --intersect allowed other sets.
        both = [(q, answer, other[q]) for q, answer in first.items() if q in other]
        by_subject: dict[str, list[tuple[bool, bool]]] = {}
        for question, one, two in both:
            by_subject.setdefault(question.subject, []).append((one.right, two.right))
        found[index] = analyse(
            {subject: count_pairs(marks) for subject, marks in by_subject.items()},
            category_of(family),
            same_letter=sum(one.choice == two.choice for _, one, two in both),
            margin=margin,
            draws=draws,
            seed=seed,
        )
    return found


def _seed_notes(names: Sequence[str], apart: Sequence[int]) -> list[str]:
    """Says which runs are left out of Holm's correction."""
    if not apart:
        return []
    listed = ", ".join(names[index] for index in apart)
    return [
        f"Only the seed differs between {names[0]} and {listed}: no comparison of interest, so the "
        "p of McNemar's test is uncorrected there, and Holm's correction is over the other runs."
    ]


def _join(
    evaluations: dict[str, Evaluation],
    answers: Mapping[str, _Answers | None],
    shared: Mapping[int, Intersection],
) -> tuple[dict[str, Evaluation], Mapping[str, _Answers | None]]:
    """Returns evaluations and answers over the questions common to all runs.

    They are the given ones where no question was dropped, and none where no question is common.
    """
    if not any_dropped(shared):
        return evaluations, answers
    questions = common_to_all(answers)
    if not questions:
        return {}, {}
    restricted = {
        name: {question: item[question] for question in sorted(questions)}
        for name, item in answers.items()
        if item is not None
    }
    return {
        name: restrict(evaluations[name], item, questions) for name, item in restricted.items()
    }, restricted


def _compare_losses(
    runs: Sequence[Run], logs: Mapping[str, StepLog | None], draws: int, seed: int
) -> dict[int, LossDifference]:
    differences = {
        index: compare_losses(runs[0], run, logs, draws=draws, seed=seed)
        for index, run in enumerate(runs)
        if index > 0
    }
    return {index: item for index, item in differences.items() if item is not None}


def _log_notes(runs: Sequence[Run], logs: Mapping[str, StepLog | None]) -> list[str]:
    """Says which trained runs have no step log."""
    missing = [run.label for run in runs if run.training and logs[run.label] is None]
    if not missing:
        return []
    return [
        f"No {LOGS_FILE} of {', '.join(missing)}: losses without intervals, and not compared step "
        "by step."
    ]


def _answer_notes(recorded: Mapping[str, RecordedAnswers | None]) -> list[str]:
    """Says which runs have no answers question by question, and which have them without samples."""
    if len(recorded) < 2:
        return []
    notes = []
    missing = [name for name, item in recorded.items() if item is None]
    if missing:
        notes.append(
            "No logged samples (lm_eval --log_samples) and no mmlu_progress file of "
            f"{', '.join(missing)}: the difference is unpaired, which is usually too cautious for "
            "runs that answered the same questions."
        )
    ours = [name for name, item in recorded.items() if item and item.source == "mmlu_progress"]
    first = next(iter(recorded.values()))
    if ours and first is not None and len(recorded) - len(missing) > 1:
        notes.append(
            f"Answers of {', '.join(ours)} from the mmlu_progress file, as no samples of lm_eval "
            "are there: their prompts (by 16 digits of the hash) and right answers were checked "
            "to be those of the other runs, the hashes of documents were not."
        )
    return notes


def _difference(first: str, name: str, evaluations: Mapping[str, Evaluation]) -> Difference | None:
    if first not in evaluations or name not in evaluations:
        return None
    one, other = evaluations[first], evaluations[name]
    return unpaired_difference(one.acc, one.acc_stderr, other.acc, other.acc_stderr)


def _describe(run: Run, evaluation: Evaluation | None, answers: RecordedAnswers | None) -> RunInfo:
    training = run.training
    model = training.model if training else evaluation.model if evaluation else None
    quant = evaluation.conditions.get("evaluation.model.quant") if evaluation else None
    return RunInfo(
        label=run.label,
        path=scrub(str(run.path)),
        model=None if model is None else scrub(model),
        quant=training.quant if training else None if quant is None else str(quant),
        device=training.device_name if training else None,
        status=training.status if training else None,
        evaluation=scrub(str(evaluation.path)) if evaluation else None,
        answers=None if answers is None else answers.source,
    )

"""`qlora_adapter`: interrupted and continued, what is never recorded, and unwritable files."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from scoring_runs import KNOWN, MakeLm, another_base, evaluate, read, refused

from qlora_harness.errors import ResultsError
from qlora_harness.score.packed_forward import PackedModel
from qlora_harness.score.packed_scorer import PackedScorer, PackedScores

# Interrupted and continued


def test_interrupted_run_scores_only_what_is_missing(
    make_lm: MakeLm, manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    start_pack = PackedModel.start
    packs: list[int] = []
    stop_after = -1

    def counted(self: PackedModel, pack: Any) -> Any:
        if len(packs) == stop_after:
            raise KeyboardInterrupt
        packs.append(len(pack.read_query))
        return start_pack(self, pack)

    def scored(stop: int = -1, **options: Any) -> int:
        nonlocal stop_after
        stop_after = stop
        packs.clear()
        fixed = {"pack_tokens": 256, "max_length": 64, "results_dir": str(tmp_path / "killed")}
        lm = make_lm(**fixed | options)
        if stop < 0:
            evaluate(lm, manager, limit=3)
        else:
            with pytest.raises(KeyboardInterrupt):
                evaluate(lm, manager, limit=3)
        return sum(packs)

    monkeypatch.setattr(PackedModel, "start", counted)
    done = scored(stop=3)
    assert 0 < done < 96
    assert not (tmp_path / "killed" / "evaluation_results.json").exists()
    assert scored() == 96 - done
    assert f"{done} texts were scored before the interruption" in caplog.messages
    assert not list((tmp_path / "killed").glob(".*"))  # the journal is gone once all is recorded
    scored(results_dir=str(tmp_path / "records"))
    name = "mmlu_progress_tiny_llama_16bit_base.json"
    for field in ("tasks", "model"):
        assert read(tmp_path / "killed", name)[field] == read(tmp_path / "records", name)[field]
    # Another model is never given these answers.
    scored(stop=3)
    assert scored(quant="nf4") == 96


def test_answers_that_come_from_a_cache_do_not_break_the_rest(
    make_lm: MakeLm, manager: TaskManager, known_answers: list[str]
) -> None:
    """After an interrupted run with --use_cache lm_eval may request some letters only."""
    task = manager.load("mmlu_qlora_demo_nutrition")["tasks"]["mmlu_qlora_demo_nutrition"]
    task.build_all_requests(limit=2, rank=0, world_size=1)
    remaining = task.instances[2:]
    assert make_lm().loglikelihood(remaining, disable_tqdm=True) == [
        (KNOWN[request.args[1]], False) for request in remaining
    ]


@pytest.mark.parametrize("scoring", ["packed", "hf"])
def test_logprobs_that_are_no_numbers_are_refused_and_not_journaled(
    make_lm: MakeLm, manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    scoring: str,
) -> None:  # fmt: skip
    def broken(self: PackedScorer, parts: Any, *, on_scored: Any, **options: Any) -> PackedScores:
        scores = dict.fromkeys(range(sum(map(len, parts))), (math.nan, False))
        on_scored(list(scores.items()))
        return PackedScores(scores, 1)

    lm = make_lm(scoring=scoring)
    with monkeypatch.context() as patch:
        patch.setattr(PackedScorer, "score", broken)
        patch.setattr(lm, "score_plainly", lambda encoded, **_: [(math.nan, False)] * len(encoded))
        refused(lambda: evaluate(lm, manager, limit=1), ResultsError)
    evaluate(lm, manager, limit=1)
    assert read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]["n"] == 8


def test_questions_of_a_base_that_was_replaced_in_place_are_not_mixed_in(
    make_lm: MakeLm, manager: TaskManager, tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    evaluate(make_lm(pretrained=str(base)), manager, "mmlu_qlora_demo_nutrition")
    shutil.rmtree(base)
    another_base(tiny_llama, base, lambda model: model.lm_head.weight.mul_(2))
    evaluate(make_lm(pretrained=str(base)), manager, "mmlu_qlora_demo_astronomy")
    task = read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]
    assert list(task["subjects"]) == ["astronomy"]


@pytest.mark.parametrize(
    ("blocked", "named"),
    [("records", "records can't be written ("), ("records/evaluation_results.json", "line 1")],
)
def test_unusable_records_are_reported_before_anything_is_scored(
    make_lm: MakeLm, manager: TaskManager, tmp_path: Path, known_answers: list[str], blocked: str,
    named: str,
) -> None:  # fmt: skip
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("{")
    text = refused(lambda: evaluate(make_lm(), manager, limit=1), ResultsError)
    assert text.startswith(str(tmp_path / blocked))
    assert named in text
    assert known_answers == []


# Result files of lm_eval itself


@pytest.fixture
def checked_tracker(unchanged_tracker: None) -> None:
    from qlora_harness.lm_eval_compat.saving import verify_saved_results

    verify_saved_results()
    verify_saved_results()  # as a second model does


def save(output: Path) -> EvaluationTracker:
    tracker = EvaluationTracker(output_path=str(output))
    tracker.general_config_tracker.model_name_sanitized = "model"
    tracker.save_results_aggregated({"results": {}, "configs": {}}, None)
    return tracker


@pytest.mark.usefixtures("checked_tracker")
def test_results_that_were_saved_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path / "out")
    save(tmp_path / "out")
    assert len(list((tmp_path / "out" / "model").glob("results_*.json"))) == 2
    save(tmp_path / "single" / "run.json")
    assert len(list((tmp_path / "single").glob("run_*.json"))) == 1
    EvaluationTracker().save_results_aggregated({"results": {}}, None)  # nothing to be saved


@pytest.mark.usefixtures("checked_tracker")
def test_results_that_were_not_saved_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    text = refused(lambda: save(tmp_path / "file"), ResultsError)
    assert text.startswith(f"--output_path {tmp_path / 'file'}: ")
    whole = Path.write_text

    def full_disk(path: Path, text: str, **options: Any) -> int:
        whole(path, text[:10], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    refused(lambda: save(tmp_path / "out"), ResultsError)


@pytest.mark.usefixtures("checked_tracker")
def test_samples_that_were_not_saved_are_an_error(tmp_path: Path) -> None:
    tracker = save(tmp_path / "out")
    whole = {"arguments": [("Q", " A")], "resps": [], "filtered_resps": [], "target": 0}
    half_written = [whole, {}]
    refused(lambda: tracker.save_results_samples("mmlu_qlora_demo", half_written), ResultsError)
    (tmp_path / "out" / "blocked").write_text("a file in the way")
    tracker.general_config_tracker.model_name_sanitized = "blocked"
    refused(lambda: tracker.save_results_samples("mmlu_qlora_demo", []), ResultsError)

"""`qlora_adapter`: interrupted and continued, what is never kept, and files that can't be saved."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from scoring_runs import KNOWN, another_base, evaluate, read, refused

from qlora_harness.errors import HarnessError, ResultsError
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.packed_scorer import PackedScorer

# Interrupted and continued


def test_interrupted_run_scores_only_what_is_missing(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from qlora_harness.score.packed_forward import PackedModel

    start_pack = PackedModel.start
    packs: list[int] = []

    def counted(self: PackedModel, pack: Any, pad_to: int | None = None) -> Any:
        if len(packs) == stop_after:
            raise KeyboardInterrupt
        packs.append(len(pack.read_query))
        return start_pack(self, pack, pad_to)

    monkeypatch.setattr(PackedModel, "start", counted)
    options = {"pack_tokens": 1024, "results_dir": str(tmp_path / "killed")}
    stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(make_lm(**options), manager, limit=3)
    assert not (tmp_path / "killed" / "evaluation_results.json").exists()
    done = sum(packs)
    assert 0 < done < 96

    packs.clear()
    stop_after = -1
    evaluate(make_lm(**options), manager, limit=3)
    assert sum(packs) == 96 - done
    assert f"{done} texts were scored before the interruption" in caplog.messages
    assert not list((tmp_path / "killed").glob(".*"))  # the journal is gone once all is recorded

    evaluate(make_lm(pack_tokens=1024), manager, limit=3)
    name = "mmlu_progress_tiny_llama_16bit_base.json"
    for field in ("tasks", "model"):
        assert read(tmp_path / "killed", name)[field] == read(tmp_path / "records", name)[field]

    # Another model is never given these answers.
    packs.clear()
    stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(make_lm(**options), manager, limit=3)
    packs.clear()
    stop_after = -1
    evaluate(make_lm(**options, quant="nf4"), manager, limit=3)
    assert sum(packs) == 96


def test_answers_that_come_from_a_cache_do_not_break_the_rest(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager, known_answers: list[str]
) -> None:
    """After an interrupted run with --use_cache the model is asked some letters of a question."""
    task = manager.load("mmlu_qlora_demo_nutrition")["tasks"]["mmlu_qlora_demo_nutrition"]
    task.build_all_requests(limit=2, rank=0, world_size=1)
    remaining = task.instances[2:]
    assert make_lm().loglikelihood(remaining, disable_tqdm=True) == [
        (KNOWN[request.args[1]], False) for request in remaining
    ]


def test_logprobs_that_are_no_numbers_are_not_kept_for_the_next_run(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = PackedScorer.score

    def broken(self: PackedScorer, *args: Any, on_scored: Any, **options: Any) -> dict[int, Any]:
        scores = dict.fromkeys(whole(self, *args, on_scored=None, **options), (math.nan, False))
        on_scored(list(scores.items()))
        return scores

    lm = make_lm()
    monkeypatch.setattr(PackedScorer, "score", broken)
    refused(lambda: evaluate(lm, manager, limit=1), ResultsError)
    monkeypatch.setattr(PackedScorer, "score", whole)
    evaluate(lm, manager, limit=1)
    assert read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]["n"] == 8


def test_questions_of_a_base_that_was_replaced_in_place_are_not_mixed_in(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager, tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    evaluate(make_lm(pretrained=str(base)), manager, "mmlu_qlora_demo_nutrition")
    shutil.rmtree(base)
    another_base(tiny_llama, base, lambda model: model.lm_head.weight.mul_(2))
    evaluate(make_lm(pretrained=str(base)), manager, "mmlu_qlora_demo_astronomy")
    task = read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]
    assert list(task["subjects"]) == ["astronomy"]


# Records that can't be written


def test_records_that_cannot_be_written_are_reported_before_anything_is_scored(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    tmp_path: Path,
    known_answers: list[str],
) -> None:
    (tmp_path / "records").write_text("a file in the way")
    with pytest.raises(ResultsError) as error:
        evaluate(make_lm(), manager, limit=1)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'records'} can't be written (")
    assert text.endswith("Give another folder with results_dir= in --model_args.")
    assert known_answers == []


def test_damaged_record_is_reported_before_anything_is_scored(
    make_lm: Callable[..., QloraAdapterLM],
    manager: TaskManager,
    tmp_path: Path,
    known_answers: list[str],
) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "evaluation_results.json").write_text("{")
    with pytest.raises(ResultsError, match=r"evaluation_results\.json, line 1: not valid JSON"):
        evaluate(make_lm(), manager, limit=1)
    assert known_answers == []


def test_logprobs_that_are_no_numbers_end_with_one_line(
    make_lm: Callable[..., QloraAdapterLM], manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        QloraAdapterLM,
        "_loglikelihood_tokens",
        lambda self, requests, **options: [(math.nan, False)] * len(requests),
    )
    refused(lambda: evaluate(make_lm(), manager, limit=1), HarnessError)


# Result files of lm-eval itself


def save(output: Path) -> EvaluationTracker:
    tracker = EvaluationTracker(output_path=str(output))
    tracker.general_config_tracker.model_name_sanitized = "model"
    tracker.save_results_aggregated({"results": {}, "configs": {}}, None)
    return tracker


def test_results_that_were_saved_are_left_alone(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path
) -> None:
    make_lm()
    save(tmp_path / "out")
    save(tmp_path / "out")
    assert len(list((tmp_path / "out" / "model").glob("results_*.json"))) == 2
    save(tmp_path / "single" / "run.json")
    assert len(list((tmp_path / "single").glob("run_*.json"))) == 1


def test_results_that_were_not_saved_are_an_error(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path
) -> None:
    make_lm()
    (tmp_path / "out").write_text("a file in the way")
    with pytest.raises(ResultsError) as error:
        save(tmp_path / "out")
    assert str(error.value) == (
        f"--output_path {tmp_path / 'out'}: lm_eval could not save the results. "
        "Check that the folder can be written and the disk has room."
    )


def test_samples_that_were_not_saved_are_an_error(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path
) -> None:
    make_lm()
    tracker = save(tmp_path / "out")
    (tmp_path / "out" / "blocked").write_text("a file in the way")
    tracker.general_config_tracker.model_name_sanitized = "blocked"
    with pytest.raises(ResultsError, match="could not save the results"):
        tracker.save_results_samples("mmlu_qlora_demo_nutrition", [])


def test_samples_that_were_half_written_are_an_error(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path
) -> None:
    make_lm()
    tracker = save(tmp_path / "out")
    whole = {"arguments": [("Q", " A")], "resps": [], "filtered_resps": [], "target": 0}
    with pytest.raises(ResultsError, match="could not save the results"):
        tracker.save_results_samples("mmlu_qlora_demo_nutrition", [whole, {}])


def test_results_that_were_half_written_are_an_error(
    make_lm: Callable[..., QloraAdapterLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lm()
    whole = Path.write_text

    def full_disk(path: Path, text: str, **options: Any) -> int:
        whole(path, text[:10], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(ResultsError, match="could not save the results"):
        save(tmp_path / "out")


def test_nothing_is_saved_where_nothing_was_asked_for(
    make_lm: Callable[..., QloraAdapterLM],
) -> None:
    make_lm()
    EvaluationTracker().save_results_aggregated({"results": {}}, None)

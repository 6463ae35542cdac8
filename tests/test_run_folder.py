"""Whether and where a run starts in its folder, decided without touching anything."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import CHECKPOINT_FILES, change_summary, write_checkpoint, write_summary

from qlora_harness.errors import RunError
from qlora_harness.settings_checks import build_settings
from qlora_harness.train.checkpoints import fault, newest_intact
from qlora_harness.train.run_folder import (
    LOCK_FILE,
    StartingPoint,
    clear_run_folder,
    find_start,
    lock_run_folder,
    remove_temporary_files,
)

VALUES = {"max_steps": 8, "learning_rate": 1e-3}
SETTINGS = build_settings(VALUES)


def start(
    run_dir: Path, *, resume_given: bool = False, has_lock: bool = False, **values: Any
) -> StartingPoint:
    before = listing(run_dir)
    settings = build_settings(VALUES | values)
    try:
        return find_start(run_dir, settings, resume_given=resume_given, has_lock=has_lock)
    finally:
        assert listing(run_dir) == before


def listing(folder: Path) -> list[tuple[str, int]]:
    # Some releases of filelock touch the lock when they try to take it.
    return sorted(
        (str(p), 0 if p.name == LOCK_FILE else p.stat().st_mtime_ns) for p in folder.rglob("*")
    )


def refusal(run_dir: Path, **options: Any) -> str:
    with pytest.raises(RunError) as caught:
        start(run_dir, **options)
    assert len(str(caught.value)) <= 500
    return str(caught.value)


def write_run(run_dir: Path, status: str, *steps: int, **settings: Any) -> dict[str, Any]:
    """A run with the settings of `start` and these changes, and checkpoints at these steps."""
    for step in steps:
        write_checkpoint(run_dir, step)
    return write_summary(run_dir, status, SETTINGS.flat() | settings)


# --- the decision ---------------------------------------------------------------------------------

# Status of the run in the folder, steps of its checkpoints, flags, and the starting point.
STARTS: list[tuple[str, tuple[int, ...], dict[str, Any], str]] = [
    ("completed", (8,), {"overwrite": True}, "fresh"),
    ("completed", (8,), {"resume_given": True}, "nothing to do"),
    ("running", (4, 10, 9), {}, "checkpoint-10"),
    ("interrupted", (4, 10, 9), {}, "checkpoint-10"),
    ("failed", (4, 10, 9), {"resume_given": True}, "checkpoint-10"),
    ("interrupted", (4,), {"overwrite": True}, "fresh"),
    ("interrupted", (), {}, "fresh"),
    ("interrupted", (), {"resume": "never"}, "fresh"),
]
# Likewise, and words of the error.
REFUSALS: list[tuple[str, tuple[int, ...], dict[str, Any], list[str]]] = [
    ("completed", (8,), {}, ["--overwrite", "--output-dir"]),
    ("completed", (8,), {"resume": "never", "resume_given": True}, ["--overwrite"]),
    ("completed", (8,), {"resume_given": True, "seed": 1}, ["--seed 0, not 1"]),
    ("interrupted", (4,), {"resume": "never"}, ["'interrupted'", "checkpoint-4", "--resume auto"]),
    ("interrupted", (4,), {"learning_rate": 5e-4}, ["--learning-rate 0.001, not 0.0005"]),
    ("interrupted", (4,), {"quant": "bf16"}, ["--quant nf4, not bf16"]),
    ("interrupted", (4,), {"max_steps": 100}, ["--max-steps 8, not 100"]),
    ("interrupted", (4,), {"dataset": "demo"}, ["--dataset oasst1, not demo"]),
    ("running", (4,), {"lora_r": 8}, ["--lora-r 64, not 8"]),
]


@pytest.mark.parametrize(("status", "steps", "options", "expected"), STARTS)
def test_where_a_run_starts(
    tmp_path: Path, status: str, steps: tuple[int, ...], options: dict[str, Any], expected: str
) -> None:
    summary = write_run(tmp_path, status, *steps)
    checkpoint = tmp_path / "checkpoints" / expected
    assert start(tmp_path, **options) == {
        "fresh": StartingPoint(replace=True),
        "nothing to do": StartingPoint(previous=summary, nothing_to_do=True),
    }.get(expected, StartingPoint(checkpoint, summary))


def test_a_restarted_run_does_not_overwrite_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    summary = write_run(tmp_path, "running", 4)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-4"
    assert start(tmp_path, overwrite=True) == StartingPoint(checkpoint, summary)
    write_run(tmp_path / "earlier", "completed", 8)
    assert start(tmp_path / "earlier", overwrite=True) == StartingPoint(replace=True)


@pytest.mark.parametrize(("status", "steps", "options", "words"), REFUSALS)
def test_what_is_refused(
    tmp_path: Path, status: str, steps: tuple[int, ...], options: dict[str, Any], words: list[str]
) -> None:
    write_run(tmp_path, status, *steps)
    line = refusal(tmp_path, **options)
    assert line.startswith(f"{tmp_path} holds a ")
    assert [word for word in words if word not in line] == []


def test_folder_without_a_run_is_a_fresh_start(tmp_path: Path) -> None:
    assert start(tmp_path / "new") == StartingPoint()
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").write_text("mine")
    assert start(tmp_path) == StartingPoint()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["adapter", "checkpoints", "training_logs.json"])
def test_files_without_a_summary_are_never_replaced(
    tmp_path: Path, name: str, overwrite: bool
) -> None:
    (tmp_path / name).mkdir()
    line = refusal(tmp_path, overwrite=overwrite)
    assert f"{tmp_path} holds {name} but no training_summary.json" in line


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_adapter_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    write_run(tmp_path, "interrupted")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert str(tmp_path / "adapter") in refusal(tmp_path, overwrite=overwrite)


def test_output_dir_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "results"
    path.write_text("a file")
    for run_dir in (path, path / "4bit"):
        assert refusal(run_dir).startswith(f"--output-dir {run_dir}: {path} is a file")


DAMAGED = {
    "half": '{"status": "comp',
    "no object": "[]",
    "no settings": '{"schema_version": 1, "kind": "training_summary", "status": "running"}',
    "long": json.dumps({"kind": "training_summary", "status": "x" * 200_000, "settings": {}}),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_summary_is_named_and_never_replaced(
    tmp_path: Path, content: str, overwrite: bool
) -> None:
    path = tmp_path / "training_summary.json"
    path.write_text(content)
    assert str(path) in refusal(tmp_path, overwrite=overwrite)


# --- checkpoints that can't be read ---------------------------------------------------------------


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-20],
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
}


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[how](path.read_bytes()))


@pytest.mark.parametrize("how", [*DAMAGES, "missing"])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_damaged_checkpoint_is_skipped(tmp_path: Path, name: str, how: str) -> None:
    write_run(tmp_path, "running", 4, 8)
    checkpoints = tmp_path / "checkpoints"
    damage(checkpoints / "checkpoint-8" / name, how)
    assert start(tmp_path).checkpoint == checkpoints / "checkpoint-4"
    (note,) = start(tmp_path).notes
    assert note.startswith(f"checkpoint-8: {name} {'is missing' if how == 'missing' else ''}")


def test_changed_bit_in_an_optimizer_state_is_noticed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 4) / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(50).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    assert fault(path.parent) == "optimizer.pt is damaged"


def test_checkpoint_with_the_state_of_another_step_is_damaged(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 4) / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"global_step": 5}))
    assert fault(path.parent) == "trainer_state.json says step 5"


def test_checking_unpickles_nothing(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    folder = write_checkpoint(tmp_path, 4)
    torch.save(Harmful(), folder / "optimizer.pt")
    assert fault(folder) is None
    assert not (tmp_path / "harm").exists()


def test_damaged_checkpoints_are_not_discarded(tmp_path: Path) -> None:
    write_run(tmp_path, "interrupted")
    for step in (4, 8):
        damage(write_checkpoint(tmp_path, step) / "optimizer.pt", "half")
    line = refusal(tmp_path)
    for step in (4, 8):
        assert f"checkpoint-{step}: optimizer.pt" in line
    assert start(tmp_path, overwrite=True) == StartingPoint(replace=True)


def test_checkpoints_of_several_processes_have_a_state_each(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4, without="rng_state.pth")
    torch.save({}, folder / "rng_state_0.pth")
    assert fault(folder) is None


def test_other_folders_are_not_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-").mkdir()
    assert newest_intact(tmp_path) == (None, [])
    assert newest_intact(tmp_path / "missing") == (None, [])


def test_half_written_checkpoint_is_discarded(tmp_path: Path) -> None:
    write_run(tmp_path, "interrupted")
    write_checkpoint(tmp_path, 4, without="trainer_state.json")  # Trainer writes it last
    notes = ("checkpoint-4: trainer_state.json is missing",)
    assert start(tmp_path) == StartingPoint(replace=True, notes=notes)


# --- the settings of a resumed run ----------------------------------------------------------------


def test_bookkeeping_may_change(tmp_path: Path) -> None:
    change = {"save_steps": 1, "eval_batch_size": 1, "report_to": "wandb", "resume": "never"}
    write_run(tmp_path, "interrupted", output_dir="elsewhere", overwrite=True, **change)
    checkpoint = write_checkpoint(tmp_path, 4)
    assert start(tmp_path).checkpoint == checkpoint


def test_setting_missing_from_an_older_record_has_its_default(tmp_path: Path) -> None:
    settings = write_run(tmp_path, "interrupted")["settings"]
    del settings["kernels"]
    change_summary(tmp_path, settings=settings)
    checkpoint = write_checkpoint(tmp_path, 4)
    assert start(tmp_path).checkpoint == checkpoint
    assert "--kernels auto, not none" in refusal(tmp_path, kernels="none")


@pytest.mark.parametrize(
    ("recorded", "given"),
    [
        *[("float32", "auto"), ("bfloat16", "auto"), ("float16", "auto")],
        *[("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")],
    ],
)
def test_compute_dtype_is_that_of_the_run(tmp_path: Path, recorded: str, given: str) -> None:
    write_run(tmp_path, "interrupted")
    change_summary(tmp_path, quantization={"compute_dtype": recorded})
    write_checkpoint(tmp_path, 4)
    if given in ("auto", recorded):
        assert start(tmp_path, compute_dtype=given).checkpoint is not None
    else:
        assert f"--compute-dtype {recorded}, not {given}" in refusal(tmp_path, compute_dtype=given)


# --- a checkpoint by its path ---------------------------------------------------------------------


def resume(checkpoint: Path, **values: Any) -> dict[str, Any]:
    return {"resume": str(checkpoint), "resume_given": True, **values}


def test_resume_from_a_path(tmp_path: Path) -> None:
    for folder, status in (("own", "interrupted"), ("elsewhere", "completed")):
        summary = write_run(tmp_path / folder, status, 4, 8)
        older = tmp_path / folder / "checkpoints" / "checkpoint-4"
        run_dir = tmp_path / ("own" if folder == "own" else "new")
        assert start(run_dir, **resume(older)) == StartingPoint(older, summary)


def test_resume_from_a_path_checks_the_settings_of_its_run(tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere", "interrupted", 4, seed=1)
    checkpoint = tmp_path / "elsewhere" / "checkpoints" / "checkpoint-4"
    for run_dir in (tmp_path / "new", tmp_path / "elsewhere"):
        assert "--seed 1, not 0" in refusal(run_dir, **resume(checkpoint))


def test_resume_from_a_path_does_not_replace_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "done", "completed", 4)
    summary = write_run(tmp_path / "other", "interrupted", 4)
    own, foreign = (tmp_path / name / "checkpoints/checkpoint-4" for name in ("done", "other"))
    for checkpoint in (own, foreign):
        assert "another --output-dir" in refusal(tmp_path / "done", **resume(checkpoint))
    replaced = start(tmp_path / "done", **resume(foreign, overwrite=True))
    assert replaced == StartingPoint(foreign, summary, replace=True)


def test_resume_from_a_path_that_is_not_a_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path, "interrupted")
    half = write_checkpoint(tmp_path, 4, without="optimizer.pt")
    # Trainer and our step log read the step from the name.
    renamed = write_checkpoint(tmp_path, 8).rename(tmp_path / "best")
    unrecorded = write_checkpoint(tmp_path / "elsewhere", 4)
    for checkpoint, words in {
        half: "is not an intact checkpoint (optimizer.pt is missing)",
        tmp_path / "checkpoint-1": "is not an intact checkpoint (",
        renamed: "Name a checkpoint-N folder",
        unrecorded: "holds no training_summary.json",
    }.items():
        assert words in refusal(tmp_path, **resume(checkpoint))


def test_overwrite_does_not_delete_the_checkpoint_to_resume_from(tmp_path: Path) -> None:
    write_run(tmp_path, "interrupted", 4)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-4"
    line = refusal(tmp_path, **resume(checkpoint, overwrite=True))
    assert line.startswith(f"--overwrite would remove the checkpoint of --resume {checkpoint}")


# --- clearing -------------------------------------------------------------------------------------


def own_adapter(run_dir: Path) -> None:
    (run_dir / "adapter").mkdir()
    for name in ("adapter_config.json", "qlora_harness.json", "adapter_model.safetensors"):
        (run_dir / "adapter" / name).write_text("{}")


def test_clearing_removes_the_files_of_the_run_only(tmp_path: Path) -> None:
    write_run(tmp_path, "completed")
    write_checkpoint(tmp_path, 4)
    (tmp_path / "checkpoints" / "mine").mkdir()
    own_adapter(tmp_path)
    names = ("training_logs", "trainer_state", "evaluation_results", "mmlu_progress_llama_4bit")
    for name in (*(f"{name}.json" for name in names), "notes.txt"):
        (tmp_path / name).write_text("x")
    clear_run_folder(tmp_path)
    remaining = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))]
    assert remaining == ["checkpoints", "checkpoints/mine", "notes.txt"]


def test_results_of_other_runs_are_left_alone(tmp_path: Path) -> None:
    """The run's folder may hold other runs, as in `--output-dir results --overwrite`."""
    write_run(tmp_path, "completed")
    own_adapter(tmp_path)
    digest = hashlib.sha256(b"{}{}").hexdigest()
    about = {
        "4bit/lm_eval/m/results_1.json": {"model_args": {"peft": "results/4bit/adapter"}},
        "4bit/lm_eval/m/results_2.json": {"model_args": "peft=x", "peft_sha": "0" * 64},
        "lm_eval/m/results_3.json": {"model_args": {"peft": "x"}, "peft_sha": digest},
        "lm_eval/m/results_4.json": {"model_args": f"peft={tmp_path}/adapter,verify=16"},
        "lm_eval/m/results_5.json": {"model_args": "pretrained=gpt2"},
    }
    for name, config in about.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"config": config}))
        number = path.stem.removeprefix("results_")
        (path.parent / f"samples_mmlu_{number}.jsonl").write_text("{}")
    (tmp_path / "lm_eval" / "m" / "results_6.json").write_text("half")
    before = {path.name for path in tmp_path.glob("*/**/*.json*")} - {
        "adapter_config.json", "qlora_harness.json",
    }  # fmt: skip
    clear_run_folder(tmp_path)
    after = {path.name for path in tmp_path.rglob("*.json*")}
    stale = {f"{n}" for k in (3, 4) for n in (f"results_{k}.json", f"samples_mmlu_{k}.jsonl")}
    assert after == (before - stale) | {f"replaced_{name}" for name in stale}


# --- one at a time --------------------------------------------------------------------------------


def test_folder_of_a_running_run_is_refused(tmp_path: Path) -> None:
    held = lock_run_folder(tmp_path)
    assert "still training" in refusal(tmp_path)
    assert "still training" in refusal(tmp_path, overwrite=True)
    assert start(tmp_path, has_lock=True) == StartingPoint()
    with pytest.raises(RunError):
        lock_run_folder(tmp_path)
    held.release()
    assert start(tmp_path) == StartingPoint()


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from filelock import FileLock
lock = FileLock(Path({str(tmp_path)!r}) / {LOCK_FILE!r})
lock.acquire(); print(flush=True); input()"""
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert "still training" in refusal(tmp_path)
        other.kill()
        other.wait()
    assert start(tmp_path) == StartingPoint()


def test_files_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    stale = ["training_summary.json.a1", "training_logs.json.b2", "trainer_state.json"]
    others = {".evaluation_results.json.c3.tmp", "notes.tmp"}
    for name in (*others, *(f".{name}.tmp" for name in stale)):
        (tmp_path / name).write_text("{")
    (tmp_path / ".adapter-x1").mkdir()
    remove_temporary_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == others

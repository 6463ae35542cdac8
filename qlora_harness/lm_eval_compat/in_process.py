"""Scores several models in this process, with lm_eval's own functions and records."""

from __future__ import annotations

# ruff: noqa: E402  # the finder must come before lm_eval
import difflib
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_harness.errors import HarnessError, SettingsError, first_line
from qlora_harness.lm_eval_compat.hook import MODEL_NAME, add_finder

add_finder()  # also where no hook runs at the interpreter's start

from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from qlora_harness.lm_eval_compat.hflm import Request
from qlora_harness.lm_eval_compat.tasks import (
    check_ifeval,
    check_shots,
    missing_package,
    read_mmlu_files,
    use_local_data,
)
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.generator import MOST_ROWS
from qlora_harness.score.prefix_tree import Score
from qlora_harness.score.suite import SUITE

_DEVICE = "cuda:0"  # the command's default, which becomes the CPU if there is no GPU


class _Projection(QloraAdapterLM):
    """Times a sample of the texts, and gives every request the same answer."""

    spent: float = 0.0  # seconds for the sample
    projected: float = 0.0  # projected seconds for all texts

    def loglikelihood(self, requests: list[Request], disable_tqdm: bool = False) -> list[Score]:
        began = time.perf_counter()
        self.projected += self.session.projected_seconds(requests)
        self.spent += time.perf_counter() - began
        return [(-1.0, False)] * len(requests)

    def generate_until(self, requests: list[Request], disable_tqdm: bool = False) -> list[str]:
        began = time.perf_counter()
        rows = MOST_ROWS if self.device.type == "cuda" else self.batch_size  # one round
        batch = random.Random(0).sample(requests, min(rows, len(requests)))
        super().generate_until(batch, disable_tqdm=True)
        seconds = time.perf_counter() - began
        self.spent += seconds
        self.projected += seconds * len(requests) / len(batch)
        return [""] * len(requests)


def check_tasks(
    tasks: Sequence[str],
    data_dir: str | None = None,
    include_path: str | None = None,
    flag: str = "--tasks",
) -> TaskManager:
    """Returns lm_eval's task manager; raises SettingsError for an unknown task.

    Reads the files of our MMLU tasks; a missing or damaged one raises DataError. `include_path` is
    a folder of a user's own tasks.
    """
    metadata = {} if data_dir is None else {"data_dir": data_dir}
    if include_path is not None and not Path(include_path).is_dir():
        raise SettingsError(f"--include-path: {include_path} is no folder", "Name one with YAML")
    manager = TaskManager(include_path=include_path, metadata=metadata)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        close = difflib.get_close_matches(unknown[0], [*SUITE, *manager.all_tasks], n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise SettingsError(
            f"{flag}: lm_eval has no task {', '.join(map(repr, unknown))}",
            f"{hint}`lm_eval ls tasks` lists every task",
        )
    for tag in manager.all_tags:
        if tag in tasks:  # results list only its tasks, not the tag
            members = ", ".join(sorted(manager.task_index[tag].tags or ()))
            raise SettingsError(
                f"{flag}: {tag} is a tag of several tasks", f"Name the tasks themselves: {members}"
            )
    use_local_data(manager.task_index, tasks, metadata)
    read_mmlu_files(tasks, metadata)
    return manager


def load_tasks(
    tasks: Sequence[str],
    data_dir: str | None = None,
    include_path: str | None = None,
    flag: str = "--tasks",
) -> TaskManager:
    """Does what `check_tasks` does, and loads the questions.

    Raises SettingsError for a task that can't be loaded.
    """
    manager = check_tasks(tasks, data_dir, include_path, flag)
    for task in tasks:
        try:
            loaded = manager.load([task])["tasks"]
            for leaf in loaded.values():
                check_shots(leaf)
            if task == "ifeval":
                check_ifeval(loaded[task])
        except HarnessError:
            raise
        except ImportError as error:
            raise missing_package(task, error) from None
        except Exception as error:  # noqa: BLE001  # any task's own code and data
            raise SettingsError(
                f"{flag}: {task} can't be loaded ({first_line(error)})",
                "Check the network, give --data-dir, or leave the task out",
            ) from None
    return manager


class InProcessScorer:
    """Does what `lm_eval run --model qlora_adapter --log_samples` does, for several models.

    Each list of tasks is one such command: it has its own results file. The index of tasks is
    built once, and each model is loaded once.
    """

    def __init__(
        self,
        benchmarks: Sequence[Sequence[str]],
        batch_size: int,
        data_dir: str | None = None,
        manager: TaskManager | None = None,
    ) -> None:
        """`manager` is that of `check_tasks` for the same tasks, if there is one already."""
        self._benchmarks = [list(tasks) for tasks in benchmarks]
        tasks = [task for part in self._benchmarks for task in part]
        self._manager = manager or check_tasks(tasks, data_dir)
        # As the command passes them.
        self._options = {"batch_size": str(batch_size), "device": _DEVICE}

    def project(self, model_args: Mapping[str, Any]) -> float:
        """Returns the seconds that `score` takes, estimated from a sample of the texts."""
        began = time.perf_counter()
        lm = _Projection.create_from_arg_obj(dict(model_args), self._options)
        try:
            for tasks in self._benchmarks:
                self._evaluate(lm, tasks, model_args)
        finally:
            lm.session.close()
        seconds: float = time.perf_counter() - began - lm.spent + lm.projected
        return seconds

    def _evaluate(
        self, lm: QloraAdapterLM, tasks: list[str], model_args: Mapping[str, Any], **more: Any
    ) -> Any:
        return simple_evaluate(
            lm,
            model_args=dict(model_args),
            tasks=tasks,
            task_manager=self._manager,
            gen_kwargs={},
            **self._options,
            **more,
        )

    def score(self, model_args: Mapping[str, Any], output_path: Path) -> None:
        """Scores one model, saves lm_eval's results and samples below `output_path`, prints both.

        A results file appears last and whole, after its samples, even if the process is killed.
        """
        lm = QloraAdapterLM.create_from_arg_obj(dict(model_args), self._options)
        try:
            for tasks in self._benchmarks:
                self._score(lm, tasks, model_args, output_path)
        finally:
            lm.session.close()

    def _score(
        self,
        lm: QloraAdapterLM,
        tasks: list[str],
        model_args: Mapping[str, Any],
        output_path: Path,
    ) -> None:
        # Beside the run folder, in which every results file counts, and on its file system.
        run = output_path.absolute().parent
        work = run.with_name(f".{run.name}.lm_eval")
        shutil.rmtree(work, ignore_errors=True)  # of a killed process
        try:
            tracker = EvaluationTracker(output_path=str(work))
            results = self._evaluate(lm, tasks, model_args, evaluation_tracker=tracker)
            # lm_eval knows the model as an object only; its name is what the command would record.
            results["config"]["model"] = MODEL_NAME
            tracker.general_config_tracker.model_source = MODEL_NAME
            samples = results.pop("samples")
            tracker.save_results_aggregated(results=results, samples=samples)
            for task in results["configs"]:
                tracker.save_results_samples(task_name=task, samples=samples[task])
            _move(work, output_path)
            print(make_table(results), flush=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Moves the files of a folder into another one, the results last."""
    paths = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.name.startswith("results_")):
        new = target / path.relative_to(source)
        new.parent.mkdir(parents=True, exist_ok=True)
        path.replace(new)

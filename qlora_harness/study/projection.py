"""Projects the time of a study from a few measured steps and packs of each arm."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_harness.results.terminal import duration
from qlora_harness.study.checks import ArmPlan
from qlora_harness.study.definition import Cell, Study
from qlora_harness.train.memory_plan import GIB


@dataclass(frozen=True)
class Measurement:
    """Projected seconds of one cell."""

    start: float  # data, base and adapter, once for a base
    train: float
    evaluate: float
    score: float


@dataclass(frozen=True)
class Probe:
    """A job for a worker: measures a cell with a few optimizer steps."""

    cell: Cell
    plan: ArmPlan
    steps: int

    @property
    def name(self) -> str:
        """Name of the cell."""
        return self.cell.name

    @property
    def base(self) -> tuple[object, ...]:
        """Identifies the loaded base of the cell."""
        return self.cell.base


def measure(probe: Probe, study: Study) -> Measurement:
    """Trains a few steps and scores a few packs, and projects from their speed."""
    from qlora_harness.lm_eval_compat.in_process import InProcessScorer
    from qlora_harness.train.run import run_training

    settings, plan, begun = probe.cell.settings, probe.plan, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qlora-harness-") as folder:
        optimization = dataclasses.replace(
            settings.optimization, max_steps=probe.steps, epochs=None
        )
        # One evaluation before training and one after it, which are counted apart.
        run = dataclasses.replace(
            settings.run, output_dir=folder, save_steps=10**9, eval_steps=None
        )
        brief = dataclasses.replace(settings, optimization=optimization, run=run)
        summary = run_training(brief)
        runtime, speed = summary["runtime"], summary["throughput"]["tokens_per_second"]
        evaluate = runtime.get("eval_seconds") or 0.0
        start = time.perf_counter() - begun - runtime["train_seconds"] - 2 * evaluate
        score = 0.0
        if study.tasks:
            arguments = {
                **probe.cell.model_args(),
                "peft": f"{folder}/adapter",
                "results_dir": folder,
            }
            score = InProcessScorer([study.tasks], study.batch_size, study.data_dir).project(
                arguments
            )
    return Measurement(start, plan.tokens / speed, evaluate * plan.evaluations, score)


def project(
    cells: Sequence[Cell],
    plans: Mapping[str, ArmPlan],
    measured: Mapping[str, Measurement],
    devices: int,
) -> str:
    """Returns a table of the cells with their memory and time."""
    lines = [f"{'cell':<20} {'memory':>10} {'steps':>6} {'training':>10} {'scoring':>10}"]
    total, bases = 0.0, set()
    for cell in cells:
        one, plan = measured.get(cell.arm), plans[cell.arm]
        trains = cell.seed is not None
        row = f"{cell.name:<20} {plan.peak / GIB:>6.1f} GiB {plan.steps if trains else '':>6}"
        if one is not None:
            training = one.train + one.evaluate if trains else 0.0
            row += f" {duration(training) if trains else '':>10} {duration(one.score):>10}"
            total += training + one.score + (one.start if cell.base not in bases else 0.0)
            bases.add(cell.base)
        lines.append(row.rstrip())
    if all(cell.arm in measured for cell in cells):
        on = f"on {devices} devices" if devices > 1 else "on one device"
        lines.append(f"{len(cells)} cells, {duration(total / devices)} {on}, projected")
    return "\n".join(lines)

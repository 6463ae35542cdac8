"""`qlora-harness score RUN --suite mmlu,gsm8k`: a trained adapter on benchmarks of lm_eval."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qlora_harness.errors import SettingsError
from qlora_harness.flag_checks import check_at_least, why_not_writable
from qlora_harness.record import ADAPTER_DIR
from qlora_harness.score.suite import SUITE, benchmarks, lm_eval_command, lm_eval_words


def add_command(commands: Any) -> None:
    """Adds `score` to the subcommands of `qlora-harness`; imports nothing heavy."""
    parser = commands.add_parser(
        "score",
        help="score a trained adapter on benchmarks",
        description="Does what `lm_eval --model qlora_adapter` does, for one benchmark after "
        "another, and prints each command. A benchmark's results are saved when it ends.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    suite = f"{', '.join(SUITE)}, or any tasks of lm_eval, separated by commas"
    data = "folder with the benchmarks' files, for a machine without a network"
    add("run", type=Path, metavar="RUN", help="a run folder, such as results/4bit")
    add("--suite", required=True, metavar="A,B,…", help=suite)
    add("--data-dir", metavar="DIR", help=data)
    add("--include-path", metavar="DIR", help="folder with the YAML of your own tasks")
    add("--batch-size", type=int, default=16, metavar="N", help="texts at a time (default 16)")


def run(args: argparse.Namespace) -> None:
    """Scores a run; raises HarnessError for a mistake before the model is loaded."""
    check_at_least({"--batch-size": args.batch_size}, 1)
    chosen = benchmarks([name.strip() for name in args.suite.split(",")], "--suite")
    folder, output = args.run, args.run / "lm_eval"
    model_args = {"peft": str(folder / ADAPTER_DIR), "results_dir": str(folder)}
    if not (folder / ADAPTER_DIR).is_dir():
        raise SettingsError(f"{folder} holds no {ADAPTER_DIR}/", "Name the folder of a trained run")
    if reason := why_not_writable(output):
        raise SettingsError(f"{output}: {reason}", "Check the permissions")
    from qlora_harness.lm_eval_compat.in_process import InProcessScorer, load_tasks

    every = [task for tasks in chosen for task in tasks]
    sources = args.data_dir, args.include_path
    manager = load_tasks(every, *sources, flag="--suite")
    for tasks in chosen:
        words = lm_eval_words(model_args, tasks, args.batch_size, output, *sources)
        print(lm_eval_command(words), flush=True)
    InProcessScorer(chosen, args.batch_size, manager=manager).score(model_args, output)

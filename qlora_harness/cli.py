"""The command `qlora-harness` and its subcommands."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from qlora_harness import __version__
from qlora_harness.benchmark.command import add_commands, run_benchmark
from qlora_harness.compare import command as compare_command
from qlora_harness.errors import SettingsError, run_command
from qlora_harness.flag_checks import check_at_least
from qlora_harness.inference.command import COMMANDS, run_inference
from qlora_harness.inference.command import add_commands as add_inference
from qlora_harness.score import command as score_command

_SCHEMAS = {
    "training_summary": "schema.training_records:TrainingSummary",
    "training_logs": "schema.training_records:TrainingLog",
    "evaluation_results": "schema.scoring_records:Evaluation",
    "mmlu_progress": "schema.scoring_records:Progress",
    "comparison": "compare.comparison:Comparison",
    "study": "schema.study_record:StudyRecord",
    "merge": "schema.merge_record:MergeRecord",
}

_PLAN = (
    "Predicts the GPU memory of a training run with these flags, for every way to save memory, "
    "from the model's configuration alone; needs no GPU. --gpus N [--engine ddp] predicts that of "
    "each of N GPUs."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, f"`{self.prog} --help` lists every flag")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all subcommands; imports nothing heavy."""
    parser = _Parser(
        prog="qlora-harness",
        description="What do the 4 bits of QLoRA cost? Compares runs. Training is launch/train.py, "
        "scoring is lm_eval --model qlora_adapter, or `score` for a suite.",
    )
    parser.add_argument("--version", action="version", version=f"qlora-harness {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    compare = commands.add_parser(
        "compare",
        help="two or more runs side by side: memory, runtime, loss, MMLU",
        description="Compares training records and lm_eval outputs. Runs over different questions, "
        "with --limit, or on different data are refused.",
        allow_abbrev=False,
    )
    compare_command.add_arguments(compare)
    _add_study_plan(commands)
    commands.add_parser(
        "study",
        help="train every arm with every seed, score them, and compare",
        add_help=False,  # `study.command` parses the flags of launch/train.py, too
    )
    commands.add_parser(
        "plan",
        help="predict a training run's GPU memory from the model's configuration",
        add_help=False,  # `_plan` parses the flags of launch/train.py
    )
    commands.add_parser(
        "data",
        help="what a data set holds: form, lengths, duplicates, overlap with MMLU, examples",
        add_help=False,  # `survey.command` parses the flags of launch/train.py for data
    )
    score_command.add_command(commands)
    runs = commands.add_parser(
        "runs",
        help="list the runs below a folder",
        description="Prints a line per run: model, data, base, status, memory, loss, accuracy.",
        allow_abbrev=False,
    )
    runs.add_argument(
        "folder", nargs="?", type=Path, default=Path("results"), help="default results"
    )
    schema = commands.add_parser(
        "schema", help="print the JSON schema of a record", allow_abbrev=False
    )
    schema.add_argument("kind", choices=sorted(_SCHEMAS), metavar="KIND", help=", ".join(_SCHEMAS))
    add_inference(commands)
    commands.add_parser(
        "doctor",
        help="check packages, GPUs, memory, data and the plugin, with a remedy for each fault",
        description="Prints a line per check. The exit status is 1 if something needed is missing.",
        allow_abbrev=False,
    )
    add_commands(commands)
    return parser


def _add_study_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan-study",
        help="how many questions and seeds a comparison takes, before you run it",
        description="Prints, for several numbers of seeds, how many questions show that "
        "two arms are the same within a margin, or that they differ by it (5% level, 80% power).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="pilot runs, from which --discordance and --seed-sd are estimated",
    )
    parser.add_argument("--margin", type=float, default=1.0, metavar="POINTS", help="default 1")
    parser.add_argument(
        "--discordance",
        type=float,
        metavar="SHARE",
        help="share of questions that one arm gets right and the other wrong (default 0.1)",
    )
    parser.add_argument(
        "--seed-sd",
        type=float,
        metavar="POINTS",
        help="standard deviation of an arm's accuracy between seeds (default 0.2)",
    )


def _print_schema(kind: str) -> None:
    module, _, name = _SCHEMAS[kind].partition(":")
    model = getattr(import_module(f"qlora_harness.{module}"), name)
    print(json.dumps(model.model_json_schema(), indent=1))


def _plan(words: Sequence[str]) -> None:
    """Parses the flags of launch/train.py and prints the memory of every way to train."""
    from qlora_harness.model.source import find_base
    from qlora_harness.settings_checks import check_can_shard
    from qlora_harness.train.command import add_settings, flag_parser, settings_of
    from qlora_harness.train.compute_dtype import with_own_dtype
    from qlora_harness.train.memory_plan import Ranks, choose_memory_plan, measure_shape
    from qlora_harness.train.plan_text import table
    from qlora_harness.train.window import check_window

    parser = flag_parser("qlora-harness plan", _PLAN, epilog=None)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument(
        "--engine",
        choices=["ddp", "fsdp2"],
        default="ddp",
        help="of several GPUs: fsdp2 spreads the base over them (default ddp)",
    )
    flags = vars(add_settings(parser).parse_args(words))
    gpus, engine = flags.pop("gpus"), flags.pop("engine")
    check_at_least({"--gpus": gpus}, 1)
    ranks = Ranks(gpus, engine == "fsdp2" and gpus > 1)
    settings = settings_of(flags)
    if ranks.sharded:
        check_can_shard(settings)
    source = find_base(settings.model.model, settings.model.revision)
    check_window(settings, source)
    settings = with_own_dtype(settings)
    shape = measure_shape(source.path, source.revision, settings.lora.lora_targets)
    # Without data, assumes that every example has the longest permitted length.
    examples = settings.optimization.batch_size * settings.optimization.grad_accum
    lengths = [settings.data.max_length] * examples
    chosen, _, tokens = choose_memory_plan(shape, settings, lengths, ranks)
    print(table(shape, settings, chosen, tokens, ranks))


def _read(command: Callable[[], None]) -> int:
    """Runs a command that only reads; `head` or a pager may close its output early."""
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:
        from qlora_harness.results.terminal import close_quietly

        close_quietly()
    return 0


def _read_runs(args: argparse.Namespace) -> None:
    if args.command == "compare":
        compare_command.run(args)
    elif args.command == "plan-study":
        from qlora_harness.compare.sample_size import report

        print(report(args.runs, args.margin, args.discordance, args.seed_sd))
    else:
        from qlora_harness.results.listing import print_runs
        from qlora_harness.results.terminal import PipedConsole

        print_runs(args.folder, PipedConsole(highlight=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 2 for a mistake in the input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without UTF-8 shows "?"
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["plan"]:
        _plan(words[1:])
        return 0
    if words[:1] == ["study"]:
        from qlora_harness.study.command import run

        return run(words[1:])
    if words[:1] == ["data"]:
        from qlora_harness.survey.command import run as run_survey

        return _read(lambda: run_survey(words[1:]))
    args = build_parser().parse_args(words)
    if args.command in ("compare", "plan-study", "runs"):
        return _read(lambda: _read_runs(args))
    if args.command == "schema":
        _print_schema(args.kind)
    elif args.command == "score":
        score_command.run(args)
    elif args.command in COMMANDS:
        run_inference(args)
    elif args.command == "doctor":
        from qlora_harness.doctor import diagnose

        return diagnose()
    else:
        run_benchmark(args)
    return 0

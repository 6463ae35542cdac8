"""The command `qlora-harness`: its subcommands, and errors as one line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from qlora_harness import __version__
from qlora_harness.errors import SettingsError, run_command
from qlora_harness.flag_checks import check_above_zero, check_at_least, check_output_file


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, f"`{self.prog} --help` lists every flag")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all subcommands; nothing heavy is imported for it."""
    parser = _Parser(
        prog="qlora-harness",
        description="What do the 4 bits of QLoRA cost? Compares runs, and makes models to measure "
        "with. Training is launch/train.py, scoring is lm_eval --model qlora_adapter.",
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
    from qlora_harness.compare.command import add_arguments

    add_arguments(compare)
    _add_study_plan(commands)
    schema = commands.add_parser(
        "schema", help="print the JSON schema of a record", allow_abbrev=False
    )
    schema.add_argument("kind", choices=sorted(_SCHEMAS), metavar="KIND", help=", ".join(_SCHEMAS))

    runs = commands.add_parser(
        "runs",
        help="list the runs below a folder",
        description="One line a run: model, data, base, status, memory, loss, accuracy.",
        allow_abbrev=False,
    )
    runs.add_argument(
        "folder", nargs="?", type=Path, default=Path("results"), help="default results"
    )
    show = commands.add_parser(
        "show",
        help="print what is recorded of one run",
        description="Prints a run's results, how it was computed, and its settings.",
        allow_abbrev=False,
    )
    show.add_argument("run", type=Path, metavar="RUN", help="a run folder, such as results/4bit")

    random_model = commands.add_parser(
        "random-model",
        help="write a model folder of a known shape with random weights, to measure with",
        description="Writes a LLaMA folder with random bfloat16 weights. Loss and accuracy of such "
        "a model say nothing; every record of it says so.",
        allow_abbrev=False,
    )
    random_model.add_argument("folder", type=Path, help="folder to write; must not exist")
    random_model.add_argument("--shape", required=True, choices=["llama-2-7b", "tiny"])
    random_model.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="tokenizer folder or Hub id"
    )
    random_model.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    commands.add_parser(
        "plan",
        help="predict a training run's GPU memory, from the model's configuration alone",
        add_help=False,
    )
    _add_benchmark(commands)
    _add_training_benchmark(commands)
    return parser


_SCHEMAS = {
    "training_summary": "schema.training:TrainingSummary",
    "training_logs": "schema.training:TrainingLog",
    "evaluation_results": "schema.evaluation:Evaluation",
    "mmlu_progress": "schema.evaluation:Progress",
    "comparison": "compare.comparison:Comparison",
}


def _print_schema(kind: str) -> None:
    module, _, name = _SCHEMAS[kind].partition(":")
    model = getattr(import_module(f"qlora_harness.{module}"), name)
    print(json.dumps(model.model_json_schema(), indent=1))


def _add_study_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan-study",
        help="how many questions and seeds a comparison takes, before the runs",
        description="Prints for several numbers of seeds how many questions show, at 5% and in "
        "80% of studies, that two arms are the same within a margin, or that they differ by it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="pilot runs, which tell the rest"
    )
    parser.add_argument("--margin", type=float, default=1.0, metavar="POINTS", help="default 1")
    parser.add_argument(
        "--discordance",
        type=float,
        metavar="SHARE",
        help="of questions that one arm gets right and the other wrong (default 0.1)",
    )
    parser.add_argument(
        "--seed-sd",
        type=float,
        metavar="POINTS",
        help="standard deviation of an arm's accuracy between seeds (default 0.2)",
    )


def _add_training_benchmark(commands: Any) -> None:
    parser = commands.add_parser(
        "benchmark-training",
        help="time training steps of the published recipe, of PEFT, of fused layers and of peers",
        description="Runs optimizer steps of several ways on the same base and data, and prints "
        "tokens a second, ratios and memory. Ratios are to the first way. TRL and Unsloth, where "
        "they are installed, run in processes of their own.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="base model")
    parser.add_argument("--quant", default="nf4,bf16", metavar="A,B", help="default nf4,bf16")
    parser.add_argument(
        "--ways",
        default="published,peft-full,fused-none,fused-selective,fused-full",
        metavar="A,B",
        help="which (default %(default)s); others are published-fused, published-fast, "
        "published-balanced (the recipe with --memory), peft-none, fused-offload, "
        "fused-lean and fused-lean-1, and of the peers trl and unsloth PEER-pad, PEER-free (the "
        "same batches without padding) and PEER-pack (conversations packed into rows), each also "
        "PEER-...-full (with its own checkpointing); NAME@N takes N conversations at a time",
    )
    parser.add_argument(
        "--peer-path",
        action="append",
        default=[],
        metavar="PEER=DIR",
        help="folder that the process of trl or unsloth imports from first (`pip install --target "
        "DIR PEER`); once for each peer",
    )
    parser.add_argument(
        "--peer-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds that one way of a peer may take, with loading and compiling (default 600)",
    )
    parser.add_argument("--dataset", default="oasst1", metavar="NAME", help="default oasst1")
    parser.add_argument("--max-length", type=int, default=512, metavar="N", help="default 512")
    parser.add_argument("--compute-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed (default 5)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="before (default 3)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of every way")
    parser.add_argument("--lora-r", type=int, metavar="N", help="of every way")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")


def _benchmark_training(args: argparse.Namespace) -> None:
    check_at_least({"--steps": args.steps}, 1)
    check_at_least({"--warm-up": args.warm_up}, 0)
    check_above_zero("--peer-timeout", args.peer_timeout)
    check_output_file("--json", args.json)
    from qlora_harness.train.benchmark import run
    from qlora_harness.train.peers import PeerOptions, parse_paths

    changes = {"batch_size": args.batch_size, "lora_r": args.lora_r}
    print(
        run(
            model=args.model,
            quants=args.quant.split(","),
            ways=args.ways.split(","),
            dataset=args.dataset,
            max_length=args.max_length,
            compute_dtype=args.compute_dtype,
            steps=args.steps,
            warm_up=args.warm_up,
            changes={name: value for name, value in changes.items() if value is not None},
            peers=PeerOptions(parse_paths(args.peer_path), args.peer_timeout),
            output=args.json,
        )
    )


def _add_benchmark(commands: Any) -> None:
    parser = commands.add_parser(
        "benchmark-scoring",
        help="time the packed scoring of MMLU prompts against lm-eval's hf model",
        description="Scores the same prompts in one process as lm-eval's hf model does and packed, "
        "and prints times, ratios, memory and the largest difference.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="base model")
    parser.add_argument("--quant", default="bf16", choices=["nf4", "fp4", "bf16"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--file", default="five_shot_mmlu_test.json", metavar="NAME")
    parser.add_argument("--mmlu-dir", metavar="DIR", help="folder of the file (default: fetched)")
    parser.add_argument("--subjects", metavar="A,B", help="only these subjects")
    parser.add_argument("--rows", type=int, metavar="N", help="at most N rows of each subject")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="of hf")
    parser.add_argument(
        "--margin-batch-size",
        type=int,
        metavar="N",
        help="also hf at this batch size: how far that alone moves its numbers",
    )
    parser.add_argument("--pack-tokens", type=int, metavar="N", help="most tokens in a pack")
    parser.add_argument(
        "--baseline-questions",
        type=int,
        metavar="N",
        help="hf scores a random sample of N; its time is scaled by prompt tokens",
    )
    parser.add_argument(
        "--adapter-rank", type=int, metavar="R", help="also with a random unmerged adapter"
    )
    parser.add_argument(
        "--float32-reference",
        action="store_true",
        help="also packed with the weights in float32: how far each way is from that",
    )
    parser.add_argument("--kernels", default="auto", choices=["auto", "none"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")


def _benchmark(args: argparse.Namespace) -> None:
    counts = {
        "--rows": args.rows,
        "--batch-size": args.batch_size,
        "--margin-batch-size": args.margin_batch_size,
        "--pack-tokens": args.pack_tokens,
        "--baseline-questions": args.baseline_questions,
        "--adapter-rank": args.adapter_rank,
    }
    check_at_least(counts, 1)
    check_output_file("--json", args.json)
    from qlora_harness.score.benchmark import run

    print(
        run(
            model=args.model,
            quant=args.quant,
            file=args.file,
            folder=args.mmlu_dir,
            subjects=args.subjects.split(",") if args.subjects else None,
            rows=args.rows,
            batch_size=args.batch_size,
            dtype=args.dtype,
            pack_tokens=args.pack_tokens,
            margin_batch_size=args.margin_batch_size,
            baseline_questions=args.baseline_questions,
            adapter_rank=args.adapter_rank,
            kernels=args.kernels,
            float32_reference=args.float32_reference,
            output=args.json,
        )
    )


def _plan(words: Sequence[str]) -> int:
    """Takes the flags of launch/train.py and prints the plan of every way to save memory."""
    from qlora_harness.model.base import find_base
    from qlora_harness.train.command import parse_settings
    from qlora_harness.train.memory_choice import choose_memory_plan
    from qlora_harness.train.model_shape import measure_shape
    from qlora_harness.train.plan_text import table

    settings, _ = parse_settings(words, prog="qlora-harness plan")
    source = find_base(settings.model.model, settings.model.revision)
    shape = measure_shape(source.path, source.revision, settings.lora.lora_targets)
    # Without the data: as many tokens as each pass of a step can have.
    examples = settings.optimization.batch_size * settings.optimization.grad_accum
    chosen, _, tokens = choose_memory_plan(shape, settings, [settings.data.max_length] * examples)
    print(table(shape, settings, chosen, tokens))
    return 0


def _read_runs(args: argparse.Namespace) -> int:
    """Runs a command that only reads; its reader may close the pipe when it has seen enough."""
    from qlora_harness.results.output import PipedConsole, close_quietly

    try:
        if args.command == "compare":
            from qlora_harness.compare.command import run

            run(args)
        elif args.command == "plan-study":
            from qlora_harness.study_plan import report

            print(report(args.runs, args.margin, args.discordance, args.seed_sd))
        else:
            from qlora_harness.results.listing import print_run, print_runs

            console = PipedConsole(highlight=False)
            if args.command == "runs":
                print_runs(args.folder, console)
            else:
                print_run(args.run, console)
        sys.stdout.flush()
    except BrokenPipeError:
        close_quietly()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments, or None for those of this process.

    Returns:
        The exit status: 0, or 2 for a mistake in the input.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["plan"]:
        return _plan(words[1:])
    args = build_parser().parse_args(words)
    if args.command in ("compare", "plan-study", "runs", "show"):
        return _read_runs(args)
    if args.command == "schema":
        _print_schema(args.kind)
        return 0
    if args.command == "benchmark-scoring":
        _benchmark(args)
        return 0
    if args.command == "benchmark-training":
        _benchmark_training(args)
        return 0
    from qlora_harness.model.random_model import write_random_model

    write_random_model(args.folder, shape=args.shape, tokenizer=args.tokenizer, seed=args.seed)
    print(f"wrote {args.folder}: {args.shape}, random weights, seed {args.seed}")
    return 0

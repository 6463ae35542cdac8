"""The flags of `generate`, `chat` and `export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import SettingsError
from qlora_harness.flag_checks import check_at_least, check_output_file, why_not_writable

if TYPE_CHECKING:
    from qlora_harness.inference.chat_model import Sampling

COMMANDS = ("generate", "chat", "export")
_RUN = "a run folder, such as results/4bit, or its adapter folder"
_TOP_P = 0.9


def add_commands(commands: Any) -> None:
    """Adds the three to the subcommands of `qlora-harness`; imports nothing heavy."""
    add = _command(
        commands,
        "chat",
        "talk to a trained adapter",
        "Answers the lines of standard input in the template of the training.",
    )
    add("run", type=Path, metavar="RUN", help=_RUN)
    _add_sampling(add, temperature=0.7)
    _add_generate(commands)
    _add_export(commands)


def _command(commands: Any, name: str, summary: str, description: str) -> Any:
    """Returns what adds arguments to a new subcommand."""
    parser = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
    return parser.add_argument


def _add_generate(commands: Any) -> None:
    add = _command(
        commands,
        "generate",
        "answer a file of prompts, as alpaca_eval reads it",
        "Answers each prompt with the unmerged adapter, in the template of the training. Repeat "
        "the command to continue after an interruption.",
    )
    prompts = "rows with 'instruction', such as JSON Lines, or a .txt with a prompt a line"
    compare = "only print length, repetition and script of the answers in these files"
    add("run", nargs="?", type=Path, metavar="RUN", help=_RUN)
    add("--prompts", type=Path, metavar="FILE", help=prompts)
    add("--output", type=Path, metavar="FILE", help="the JSON file to write")
    add("--base", action="store_true", help="answer with the base alone, as a reference")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default 8)")
    _add_sampling(add, temperature=0.0)
    add("--compare", nargs="+", type=Path, metavar="FILE", help=compare)


def _add_sampling(add: Any, *, temperature: float) -> None:
    longest = "longest answer in tokens (default 512)"
    likeliest = f"0 takes the likeliest token (default {temperature:g})"
    share = f"draw from the likeliest tokens with this total probability (default {_TOP_P})"
    add("--max-new-tokens", type=int, default=512, metavar="N", help=longest)
    add("--temperature", type=float, default=temperature, metavar="T", help=likeliest)
    add("--top-p", type=float, metavar="P", help=share)
    add("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default 0)")


def _add_export(commands: Any) -> None:
    add = _command(
        commands,
        "export",
        "merge an adapter into its base",
        "Writes the merged model, and says how far its answers to 200 MMLU questions are from "
        "those of the unmerged adapter.",
    )
    dtype = "dtype of the merged weights; original is that of the base's files"
    add("run", type=Path, metavar="RUN", help=_RUN)
    add("--merge", required=True, choices=["bf16", "original"], help=dtype)
    add("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    add("--gguf", action="store_true", help="also convert with llama.cpp's converter")


def run_inference(args: argparse.Namespace) -> None:
    """Runs one of the three and prints its result."""
    if args.command == "generate":
        _generate(args)
    elif args.command == "chat":
        from qlora_harness.inference.chat import chat

        chat(args.run, _sampling(args), seed=args.seed)
    else:
        _export(args)


def _sampling(args: argparse.Namespace) -> Sampling:
    from qlora_harness.inference.chat_model import Sampling

    check_at_least({"--max-new-tokens": args.max_new_tokens}, 1)
    check_at_least({"--seed": args.seed}, 0)
    if not 0 <= args.temperature <= 100:
        raise SettingsError(f"--temperature: {args.temperature:g}", "It must be from 0 to 100")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise SettingsError(f"--top-p: {args.top_p:g}", "It must be above 0 and at most 1")
    if args.top_p is not None and args.temperature == 0:
        raise SettingsError(
            f"--top-p {args.top_p:g} has no effect: --temperature is 0", "Give one above 0"
        )
    top_p = _TOP_P if args.top_p is None else args.top_p
    return Sampling(args.max_new_tokens, args.temperature, top_p)


def _generate(args: argparse.Namespace) -> None:
    from rich.console import Console

    from qlora_harness.inference.generate import generate
    from qlora_harness.inference.output_statistics import statistics_table

    files = args.compare
    required = {"RUN": args.run, "--prompts": args.prompts, "--output": args.output}
    if files is not None:
        if useless := [name for name, value in required.items() if value is not None]:
            raise SettingsError(
                f"--compare with {', '.join(useless)}: it answers no prompts",
                "Give one or the other",
            )
    else:
        if missing := [name for name, value in required.items() if value is None]:
            raise SettingsError(f"generate lacks {', '.join(missing)}", "Add it, or use --compare")
        check_at_least({"--batch-size": args.batch_size}, 1)
        check_output_file("--output", args.output)
        count = generate(
            args.run,
            args.prompts,
            args.output,
            _sampling(args),
            seed=args.seed,
            batch_size=args.batch_size,
            base_alone=args.base,
        )
        print(f"wrote {count} answers to {args.output}")
        files = [args.output]
    Console(highlight=False).print(statistics_table(files))


def _export(args: argparse.Namespace) -> None:
    if reason := why_not_writable(args.output.parent):
        raise SettingsError(f"--output {args.output}: {reason}", "Name another folder")
    from qlora_harness.inference.export import export

    record = export(args.run, args.output, original_dtype=args.merge == "original", gguf=args.gguf)
    shift = record.shift
    print(
        f"wrote {args.output}: {record.run}, trained on {record.trained_quant}, merged in "
        f"{record.dtype}\n"
        f"{shift.questions} questions of {shift.questions_file}: log-probabilities moved by "
        f"{shift.mean_logprob_difference:.4f} nats on average, "
        f"{shift.largest_logprob_difference:.4f} at most; {shift.changed_letters} letters changed"
    )

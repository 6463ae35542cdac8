"""The flags of `benchmark-training`, `benchmark-scoring` and `random-model`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qlora_harness.flag_checks import check_above_zero, check_at_least, check_output_file

COMMANDS = ("benchmark-training", "benchmark-scoring", "random-model")


def add_commands(commands: Any) -> None:
    """Adds the three to the subcommands of `qlora-harness`; imports nothing heavy."""
    _add_training(commands)
    _add_scoring(commands)
    _add_random_model(commands)


def run_benchmark(args: argparse.Namespace) -> None:
    """Runs one of `COMMANDS` and prints its result."""
    if args.command == "benchmark-training":
        _benchmark_training(args)
    elif args.command == "benchmark-scoring":
        _benchmark_scoring(args)
    else:
        from qlora_harness.benchmark.random_model import write_random_model

        write_random_model(args.folder, shape=args.shape, tokenizer=args.tokenizer, seed=args.seed)
        print(f"wrote {args.folder}: {args.shape}, random weights, seed {args.seed}")


def _add_training(commands: Any) -> None:
    parser = commands.add_parser(
        "benchmark-training",
        help="time training steps: the published recipe, PEFT, fused layers, TRL and Unsloth",
        description="Runs optimizer steps of several ways on the same base and data, and prints "
        "tokens a second, ratios to the first way, and memory. TRL and Unsloth, if they are "
        "installed, run in processes of their own.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="base model")
    parser.add_argument("--quant", default="nf4,bf16", metavar="A,B", help="default nf4,bf16")
    parser.add_argument(
        "--ways",
        default="published,peft-full,fused-none,fused-selective,fused-full",
        metavar="A,B",
        help="which (default %(default)s); others are published-fused, published-fast, "
        "published-balanced (the recipe with --memory), peft-none, fused-offload, fused-lean and "
        "fused-lean-1; for the peers trl and unsloth PEER-pad, PEER-free (the same batches without "
        "padding) and PEER-pack (conversations packed into rows), each also as PEER-...-full (with "
        "the peer's own checkpointing); NAME@N takes N conversations at a time",
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
        help="seconds for one way of a peer, loading and compiling included (default 600)",
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
    from qlora_harness.benchmark.peers import parse_paths
    from qlora_harness.benchmark.training import Plan, measure_training

    changes = {"batch_size": args.batch_size, "lora_r": args.lora_r}
    plan = Plan(
        model=args.model,
        quants=args.quant.split(","),
        ways=args.ways.split(","),
        dataset=args.dataset,
        max_length=args.max_length,
        compute_dtype=args.compute_dtype,
        steps=args.steps,
        warm_up=args.warm_up,
        changes={name: value for name, value in changes.items() if value is not None},
        peer_paths=parse_paths(args.peer_path),
        peer_timeout=args.peer_timeout,
        output=args.json,
    )
    print(measure_training(plan))


def _add_scoring(commands: Any) -> None:
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


def _benchmark_scoring(args: argparse.Namespace) -> None:
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
    from qlora_harness.benchmark.scoring import Plan, measure_scoring

    plan = Plan(
        model=args.model,
        quant=args.quant,
        dtype=args.dtype,
        file=args.file,
        folder=args.mmlu_dir,
        subjects=args.subjects.split(",") if args.subjects else None,
        rows=args.rows,
        batch_size=args.batch_size,
        margin_batch_size=args.margin_batch_size,
        baseline_questions=args.baseline_questions,
        pack_tokens=args.pack_tokens,
        adapter_rank=args.adapter_rank,
        kernels=args.kernels,
        float32_reference=args.float32_reference,
        output=args.json,
    )
    print(measure_scoring(plan))


def _add_random_model(commands: Any) -> None:
    parser = commands.add_parser(
        "random-model",
        help="write a model folder of a known shape with random weights, to measure with",
        description="Writes a LLaMA folder with random bfloat16 weights. Loss and accuracy of such "
        "a model mean nothing; every record of it says so.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="folder to write; must not exist")
    parser.add_argument("--shape", required=True, choices=["llama-2-7b", "tiny"])
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="tokenizer folder or Hub id"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")

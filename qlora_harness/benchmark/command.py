"""The flags of `benchmark-training`, `benchmark-scoring` and `random-model`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from qlora_harness.benchmark.random_model import SHAPES
from qlora_harness.errors import SettingsError
from qlora_harness.flag_checks import check_above_zero, check_at_least, check_output_file
from qlora_harness.settings import COMPUTE_DTYPES


def add_commands(commands: Any) -> None:
    """Adds the three to the subcommands of `qlora-harness`; imports nothing heavy."""
    _add_training(commands)
    _add_scoring(commands)
    _add_random_model(commands)


def run_benchmark(args: argparse.Namespace) -> None:
    """Runs one of the three and prints its result."""
    values = vars(args).copy()
    command = values.pop("command")
    if command in ("benchmark-training", "benchmark-scoring"):
        measure = _benchmark_training if command == "benchmark-training" else _benchmark_scoring
        table = measure(values)
        if os.environ.get("RANK", "0") == "0":
            print(table)
    else:
        from qlora_harness.benchmark.random_model import write_random_model

        write_random_model(**values)
        when = " on load" if args.weights_on_load else ""
        print(f"wrote {args.folder}: {args.shape}, random weights{when}, seed {args.seed}")


def _comma_separated(text: str) -> list[str]:
    return text.split(",")


def _add_training(commands: Any) -> None:
    parser = commands.add_parser(
        "benchmark-training",
        help="time training steps: the published recipe, PEFT, fused layers, TRL and Unsloth",
        description="Trains a few steps in several ways on the same base and data, and prints "
        "tokens per second, the ratio to the first way, and memory. TRL and Unsloth, if "
        "installed, run in their own processes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="base model")
    add(
        "--quant",
        dest="quants",
        type=_comma_separated,
        default="nf4,bf16",
        metavar="A,B",
        help="default nf4,bf16",
    )
    add(
        "--ways",
        type=_comma_separated,
        default="published,peft-full,fused-none,fused-selective,fused-full",
        metavar="A,B",
        help="ways to train (default %(default)s); also published-fused, published-fast and "
        "published-balanced (the recipe with --memory), peft-none, fused-offload, fused-lean and "
        "fused-lean-1; for the peers trl and unsloth PEER-pad, PEER-free (the same batches without "
        "padding) and PEER-pack (conversations packed into rows), each also as PEER-...-full (with "
        "the peer's checkpointing); NAME-fp8 computes one of our fused ways in FP8; NAME@N sets "
        "the batch size to N",
    )
    add(
        "--peer-path",
        dest="peer_paths",
        action="append",
        default=[],
        metavar="PEER=DIR",
        help="folder from which trl or unsloth is imported (`pip install --target DIR PEER`); "
        "once per peer",
    )
    add(
        "--peer-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds per way of a peer, with loading and compiling (default 600)",
    )
    add("--dataset", default="oasst1", metavar="NAME", help="default oasst1")
    add("--max-length", type=int, default=512, metavar="N", help="default 512")
    add("--compute-dtype", default="bfloat16", choices=COMPUTE_DTYPES)
    add("--steps", type=int, default=5, metavar="N", help="timed steps (default 5)")
    add("--warm-up", type=int, default=3, metavar="N", help="steps before those (default 3)")
    add("--batch-size", type=int, metavar="N", help="for every way")
    add("--lora-r", type=int, metavar="N", help="for every way")
    _add_output(parser)


def _benchmark_training(values: dict[str, Any]) -> str:
    check_at_least({"--steps": values["steps"]}, 1)
    check_at_least({"--warm-up": values["warm_up"]}, 0)
    check_above_zero("--peer-timeout", values["peer_timeout"])
    check_output_file("--json", values["output"])
    from qlora_harness.benchmark.peers import parse_paths
    from qlora_harness.benchmark.training import TrainingPlan, measure_training

    changes = {name: values.pop(name) for name in ("batch_size", "lora_r")}
    values["changes"] = {name: value for name, value in changes.items() if value is not None}
    values["peer_paths"] = parse_paths(values["peer_paths"])
    return measure_training(TrainingPlan(**values))


def _add_scoring(commands: Any) -> None:
    parser = commands.add_parser(
        "benchmark-scoring",
        help="time the packed scoring of MMLU prompts against lm-eval's hf model",
        description="Scores the same prompts with lm-eval's hf model and packed, in one process, "
        "and prints times, ratios, memory and the largest difference. With --engine fsdp2 only "
        "packed: hf needs the whole base.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="base model")
    add("--quant", default="bf16", choices=["nf4", "fp4", "bf16"])
    add("--dtype", default="auto", choices=["auto", *COMPUTE_DTYPES])
    add("--file", default="five_shot_mmlu_test.json", metavar="NAME")
    add("--mmlu-dir", dest="folder", metavar="DIR", help="folder of the file (default: fetched)")
    add("--subjects", type=_comma_separated, metavar="A,B", help="only these subjects")
    add("--rows", type=int, metavar="N", help="at most N rows of each subject")
    add("--batch-size", type=int, default=16, metavar="N", help="of hf")
    add(
        "--margin-batch-size",
        type=int,
        metavar="N",
        help="also time hf with this batch size, to see how much its numbers move",
    )
    add("--pack-tokens", type=int, metavar="N", help="most tokens in a pack")
    add(
        "--baseline-questions",
        type=int,
        metavar="N",
        help="let hf score a random sample of N; its time is scaled by prompt tokens",
    )
    add("--adapter-rank", type=int, metavar="R", help="also time a random unmerged adapter")
    add(
        "--float32-reference",
        action="store_true",
        help="also score with float32 weights, and print how far each way is from that",
    )
    add("--kernels", default="auto", choices=["auto", "none"])
    add("--fp8", action="store_true", help="also time packed scoring with compute=fp8")
    add(
        "--peer-path",
        metavar="DIR",
        help="also time vLLM, imported from this folder (`pip install --target DIR vllm`), in a "
        "process of its own",
    )
    add("--generate", type=int, metavar="N", help="instead continue N prompts of GSM8K's form")
    add("--gsm8k", type=Path, metavar="FILE", help="its JSON Lines (default: synthetic questions)")
    examples = "other examples before each question, as in lm_eval's gsm8k"
    add("--own-examples", action="store_true", help=examples)
    add("--max-new-tokens", type=int, default=128, metavar="N", help="of each (default 128)")
    _add_output(parser)


def _benchmark_scoring(values: dict[str, Any]) -> str:
    counts = ("rows", "batch_size", "margin_batch_size", "pack_tokens", "baseline_questions")
    for name in (*counts, "adapter_rank", "generate", "max_new_tokens"):
        check_at_least({f"--{name.replace('_', '-')}": values[name]}, 1)
    check_output_file("--json", values["output"])
    from qlora_harness.benchmark.peers import peer_folder
    from qlora_harness.benchmark.scoring import ScoringPlan, measure_scoring

    if values["peer_path"] is not None:
        if values["generate"] is not None:
            raise SettingsError("--peer-path with --generate: vLLM only scores", "Leave one out")
        values["peer_path"] = peer_folder(values["peer_path"], "vllm")
    plan = ScoringPlan(**values)
    if plan.generate is None:
        return measure_scoring(plan)
    from qlora_harness.benchmark.generation import measure_generation

    return measure_generation(plan)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=["ddp", "fsdp2"],
        default="ddp",
        help="of several processes: fsdp2 spreads the base over them (default ddp)",
    )
    parser.add_argument(
        "--json", dest="output", type=Path, metavar="FILE", help="write the numbers here"
    )


def _add_random_model(commands: Any) -> None:
    parser = commands.add_parser(
        "random-model",
        help="write a model of a known shape with random weights, for measurements",
        description="Writes a LLaMA folder with random bfloat16 weights. Loss and accuracy of such "
        "a model mean nothing; its records note the random weights.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", type=Path, help="folder to write; must not exist")
    add("--shape", required=True, choices=list(SHAPES))
    add("--tokenizer", required=True, metavar="PATH", help="folder, Hub id or smollm2")
    add("--seed", type=int, default=0, metavar="N", help="default 0")
    add(
        "--weights-on-load",
        action="store_true",
        help="write no weights: they are made from the seed, layer by layer, by whoever loads it",
    )

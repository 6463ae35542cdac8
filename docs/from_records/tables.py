"""The tables and sentences about the records of benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qlora_harness.benchmark.record import (
    GenerationBenchmark,
    GenerationMeasurement,
    ScoringBenchmark,
    ScoringMeasurement,
    TrainingBenchmark,
    TrainingMeasurement,
)
from qlora_harness.results.terminal import gib, optional

RECORDS = Path(__file__).resolve().parents[2] / "results" / "benchmarks"
HF = "lm-eval hf, batch size 16"
NOT_MEASURED = "Not measured yet."

TRAINING_ROWS = {
    "published": "published recipe: PEFT, 1 × 16, full checkpointing, dropout 0.1",
    "published-fused": "the same recipe through fused layers",
    "published-fast": "the recipe with `--memory fast` (no checkpointing)",
    "published-balanced": "the recipe with `--memory balanced` (selective)",
    "peft-full": "PEFT, padded, full checkpointing",
    "fused-none": "fused, no checkpointing",
    "fused-none@28": "fused, no checkpointing, 28 conversations a step",
    "fused-none@31": "fused, no checkpointing, 31 conversations a step",
    "fused-selective": "fused, selective checkpointing",
    "fused-full": "fused, full checkpointing",
    "fused-offload": "fused, offload",
    "fused-lean": "fused, `--memory lean` (offload, paged 8-bit AdamW, bf16 adapter)",
    "fused-lean-1": "fused, one conversation a step, full, paged 8-bit AdamW, bf16 adapter",
}
FP8_ROWS = {
    "fused-none": "no checkpointing",
    "fused-none-fp8": "no checkpointing, FP8",
    "fused-selective": "selective checkpointing",
    "fused-selective-fp8": "selective checkpointing, FP8",
    "fused-offload": "offload",
    "fused-offload-fp8": "offload, FP8",
    "published-fast": "the recipe with `--memory fast`, dropout 0.1",
    "published-fast-fp8": "the recipe with `--memory fast`, dropout 0.1, FP8",
}
LONG_ROWS = {
    "fused-selective": "selective checkpointing",
    "fused-full": "full checkpointing",
    "fused-offload": "offload",
}
LENGTHS = (1024, 4096, 16384, 32768)
SMALL_ROWS = {
    "fused-none": "16 conversations a step in one pass",
    "published-fused": "the published recipe: 16 passes of one conversation",
}
PEER_ROWS = {
    "fused-none": "fused layers",
    "fused-none@28": "fused layers, 28 conversations a step",
    "unsloth-pad": "Unsloth, padded",
    "trl-pad": "TRL with Liger's kernels, padded",
}


def read_training(path: Path) -> TrainingBenchmark:
    """A training record."""
    return TrainingBenchmark.model_validate_json(path.read_text(encoding="utf-8"))


def training(name: str, model: str = "llama7b") -> dict[str, TrainingMeasurement]:
    """The measurements of a training record, by way."""
    record = read_training(RECORDS / name)
    check_model(name, record.title, model)
    return {m.way: m for m in record.measurements if m.failure is None}


def read_scoring(path: Path) -> ScoringBenchmark:
    """A scoring record."""
    return ScoringBenchmark.model_validate_json(path.read_text(encoding="utf-8"))


def scoring(name: str, model: str = "smollm2") -> dict[str, ScoringMeasurement]:
    """The measurements of a scoring record, by name."""
    record = read_scoring(RECORDS / name)
    check_model(name, record.title, model)
    return {m.name: m for m in record.measurements}


def check_model(name: str, title: str, model: str) -> None:
    """Ends the program if a record is of another model than its table says."""
    if not title.startswith(f"{model}, "):
        sys.exit(f"{RECORDS / name} is not a record of {model}: {title}")


def table(head: Iterable[str], rows: Iterable[Iterable[str]], texts: int = 1) -> str:
    """A Markdown table whose first columns are texts and whose others are numbers."""
    columns = list(head)
    rules = ["---"] * texts + ["---:"] * (len(columns) - texts)
    lines = [columns, rules, *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def speed(m: TrainingMeasurement | None) -> str:
    """Tokens a second, and the median of the steps if it is more than 2% off."""
    if m is None:
        return "–"
    text = f"{m.tokens_per_second:,.0f}"
    far = abs(m.median_tokens_per_second / m.tokens_per_second - 1) > 0.02
    return f"{text} (median {m.median_tokens_per_second:,.0f})" if far else text


def peak(m: TrainingMeasurement | None, digits: int = 2) -> str:
    """Peak GiB allocated by torch; † marks a paged optimizer, whose states are not included."""
    if m is None or m.peak_allocated_bytes is None:
        return "–"
    paged = m.changes.get("optimizer", "paged_adamw_32bit").startswith("paged")
    return f"{m.peak_allocated_bytes / 2**30:.{digits}f}" + (" †" if paged else "")


def training_table(prefix: str, ways: Mapping[str, str]) -> str:
    """Speed and memory of both arms, from the records PREFIX_nf4.json and PREFIX_bf16.json."""
    nf4, bf16 = training(f"{prefix}_nf4.json"), training(f"{prefix}_bf16.json")
    rows = [
        [text, speed(nf4.get(way)), peak(nf4.get(way)), speed(bf16.get(way)), peak(bf16.get(way))]
        for way, text in ways.items()
        if way in nf4 or way in bf16
    ]
    head = ["", "NF4 tokens/s", "NF4 peak, GiB", "bf16 tokens/s", "bf16 peak, GiB"]
    return table(head, rows)


def long_table() -> str:
    records = [training(f"training_long_{length}.json", "l32k") for length in LENGTHS]
    rows = [
        [
            text,
            *(
                f"{record[way].tokens_per_second:,.0f} ({peak(record[way], 1)})"
                for record in records
            ),
        ]
        for way, text in LONG_ROWS.items()
    ]
    head = [f"{length:,} tokens a row" for length in LENGTHS]
    return table(["NF4, tokens/s (peak GiB)", *head], rows)


def small_table() -> str:
    """Mean and median speed, and peak memory, of small models in NF4."""
    measurements: dict[str, TrainingMeasurement] = {}
    for size in ("0.5B", "1.5B"):
        name = size.lower()
        record = training(f"training_small_{name}.json", f"q{name}")
        measurements |= {f"{size}, {text}": record[way] for way, text in SMALL_ROWS.items()}
    rows = [
        [text, f"{m.tokens_per_second:,.0f}", f"{m.median_tokens_per_second:,.0f}", peak(m)]
        for text, m in measurements.items()
    ]
    return table(["NF4", "tokens/s", "median of the steps", "peak, GiB"], rows)


def fp8_scoring_table() -> str:
    rows = [
        [f"{m.name}, {base} base", f"{m.scoring_seconds:.1f}", gib(m.peak_allocated_bytes)]
        for base in ("bf16", "NF4")
        for m in scoring(f"scoring_7b_{base.lower()}_fp8.json", "llama7b").values()
        if m.name != HF
    ]
    return table(["", "scoring, s", "peak, GiB"], rows)


def peers_table() -> str:
    hosts = [training(f"training_peers_nf4_{host}.json") for host in "abc"]
    rows = [
        [text]
        + [f"{host[way].median_tokens_per_second:,.0f}" for host in hosts]
        + [peak(hosts[-1][way])]
        for way, text in PEER_ROWS.items()
    ]
    return table(["NF4, median tokens/s", "host A", "host B", "host C", "peak, GiB"], rows)


def peers_ratio(way: str) -> str:
    """The range over hosts of a way's median speed over Unsloth's."""
    hosts = [training(f"training_peers_nf4_{host}.json") for host in "abc"]
    ratios = [
        host[way].median_tokens_per_second / host["unsloth-pad"].median_tokens_per_second
        for host in hosts
    ]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def peers_sentence() -> str:
    return (
        f"The fused layers train {peers_ratio('fused-none')} times as fast as Unsloth on the same "
        f"conversations, and {peers_ratio('fused-none@28')} times as fast with 28 a step, in less "
        "memory than Unsloth takes for 16."
    )


def scoring_table() -> str:
    rows = [
        [
            f"{m.name}, {base} base",
            f"{m.questions:,}",
            f"{m.encoding_seconds:.1f}",
            f"{m.scoring_seconds:.1f}",
            f"{m.computed_tokens:,}",
            gib(m.peak_allocated_bytes),
            f"{m.ratio:.1f}",
            f"{m.scoring_ratio:.1f}",
        ]
        for base in ("bf16", "NF4")
        for m in scoring(f"scoring_7b_{base.lower()}.json", "llama7b").values()
    ]
    head = ["", "questions", "encoding, s", "scoring, s", "computed tokens", "peak, GiB"]
    return table([*head, "ratio", "ratio of scoring alone"], rows)


def generation() -> list[GenerationMeasurement]:
    name = "generation_7b_nf4.json"
    record = GenerationBenchmark.model_validate_json((RECORDS / name).read_text(encoding="utf-8"))
    check_model(name, record.title, "llama7b")
    return record.measurements


def generation_table() -> str:
    rows = [
        [
            m.name,
            f"{m.questions:,}",
            f"{m.seconds:.1f}",
            gib(m.peak_allocated_bytes),
            f"{m.ratio:.0f}",
        ]
        for m in generation()
    ]
    return table(["", "questions", "seconds", "peak, GiB", "ratio"], rows)


def generation_sentence() -> str:
    hf, first, again = generation()
    return (
        f"GSM8K's {first.questions:,} questions after the same five examples, 128 new tokens each, "
        f"take {first.seconds:.0f} s, and {again.seconds:.0f} s once kernels are built, against "
        f"{first.ratio * first.seconds / 60:.0f} min with `hf` at batch size 16 (estimated from "
        f"{hf.questions} of them), in NF4."
    )


def scoring_sentence() -> str:
    record = scoring("scoring_7b_bf16.json", "llama7b")
    hf, packed = record[HF], record["packed"]
    seconds = packed.encoding_seconds + packed.scoring_seconds
    vllm, beside_it = against_vllm()
    return (
        f"The {packed.questions:,} five-shot MMLU prompts take {seconds:.0f} s, against "
        f"{packed.ratio * seconds:.0f} s with lm-eval's `hf` (estimated from {hf.questions:,} of "
        f"them), in bf16; vLLM takes {vllm.scoring_seconds / beside_it.scoring_seconds:.1f} times "
        "as long, without its loading."
    )


def against_vllm() -> tuple[ScoringMeasurement, ScoringMeasurement]:
    record = scoring("scoring_7b_vllm.json", "llama7b")
    peer = next(m for m in record.values() if m.loading_seconds is not None)
    return peer, record["packed"]


def vllm_sentence() -> str:
    """What packed scoring is worth against the best that others have, instead of `hf`."""
    peer, packed = against_vllm()
    return (
        f"{peer.name} scores 60 questions of each subject, {peer.questions:,} in all, in "
        f"{peer.scoring_seconds:.1f} s, packed scoring in {packed.scoring_seconds:.1f} s, on the "
        f"same H200, in bf16. vLLM computes {peer.computed_tokens:,} tokens, packed scoring "
        f"{packed.computed_tokens:,}. Their log-probabilities differ by "
        f"{peer.packed_difference:.2g} nats in the mean, and the likeliest letter is the same for "
        f"{peer.packed_predictions:.0%} of the questions."
    )


def agreement_table() -> str:
    auto, plain = scoring("scoring_smollm2.json"), scoring("scoring_smollm2_kernels_none.json")
    ways = [auto[HF], auto["packed"], plain["packed"]]

    def row(text: str, value: Callable[[ScoringMeasurement], float | None], form: str) -> list[str]:
        return [text] + [optional(value(m), form) for m in ways]

    return table(
        ["", "`hf`", "packed", "packed, `kernels=none`"],
        [
            row("mean difference from float32, nats", lambda m: m.float32_difference, "{:.3f}"),
            row("same letter as float32", lambda m: m.float32_predictions, "{:.2%}"),
            row("same letter as `hf`", lambda m: m.same_predictions, "{:.2%}"),
            row("same, if neither has a tie", lambda m: m.untied_predictions, "{:.2%}"),
            row("questions with a tie", lambda m: m.ties, "{}"),
        ],
    )


def headline_table() -> str:
    nf4, peers = training("training_nf4.json"), training("training_peers_nf4_c.json")

    def cell(m: TrainingMeasurement, median: bool = False) -> str:
        speed = m.median_tokens_per_second if median else m.tokens_per_second
        return f"{speed:,.0f} tokens/s, {peak(m, 1)} GiB"

    rows = [
        [
            "the published recipe: PEFT, 16 passes a step / `--memory fast`",
            cell(nf4["published"]),
            cell(nf4["published-fast"]),
        ],
        [
            "full checkpointing: PEFT, padded / fused layers",
            cell(nf4["peft-full"]),
            cell(nf4["fused-full"]),
        ],
        [
            "no checkpointing: Unsloth, padded / fused layers (medians)",
            cell(peers["unsloth-pad"], True),
            cell(peers["fused-none"], True),
        ],
        ["selective checkpointing", "", cell(nf4["fused-selective"])],
        ["`--memory lean`: 8-bit AdamW, bf16 adapter", "", cell(nf4["fused-lean"])],
    ]
    return table(["NF4, 16 conversations a step", "others", "here"], rows)


def by_machine(kind: str, read: Callable[[Path], Any]) -> Iterator[tuple[Any, Any]]:
    """The records scale_KIND…_N.json of N processes, each after that of one on its machine."""
    for path in sorted(RECORDS.glob(f"scale_{kind}*_1.json")):
        paths = RECORDS.glob(f"{path.stem.removesuffix('1')}?.json")
        records = sorted(map(read, paths), key=lambda record: int(record.processes))
        yield from ((records[0], record) for record in records)


def scaled(record: Any, name: str) -> list[str]:
    """The first cells of a row: model and name, devices, and day."""
    devices = f"{record.processes} × {record.environment['device']}"
    return [f"{record.title.partition(',')[0]}, {name}", devices, record.created[:10]]


def scale_table() -> str:
    """Training on several GPUs beside one GPU of the same machine."""
    rows = []
    for one, record in by_machine("training", read_training):
        base = {(m.way, m.quant): m.median_tokens_per_second for m in one.measurements}
        for m in record.measurements:
            share = m.median_tokens_per_second / record.processes / base[m.way, m.quant]
            speeds = f"{m.tokens / m.steps:,.0f}", f"{m.median_tokens_per_second:,.0f}"
            last = f"{share:.1%}", gib(m.peak_allocated_bytes)
            rows.append([*scaled(record, f"{m.quant}, {m.way}"), *speeds, *last])
    head = ["", "GPUs", "", "tokens/step", "tokens/s", "of linear", "peak of a GPU, GiB"]
    return table(head, rows, texts=3) if rows else NOT_MEASURED


def scale_scoring_table() -> str:
    """Scoring on several GPUs beside one GPU of the same machine."""
    rows = []
    for one, record in by_machine("scoring", read_scoring):
        base = {m.name: m.scoring_seconds for m in one.measurements}
        for m in record.measurements:
            if m.name.startswith("packed"):
                share = m.scoring_seconds / base[m.name]
                numbers = f"{m.questions:,}", f"{m.scoring_seconds:.1f}", f"{share:.2f}"
                rows.append([*scaled(record, m.name), *numbers])
    head = ["", "GPUs", "", "prompts", "scoring, s", "of one GPU's time"]
    return table(head, rows, texts=3) if rows else NOT_MEASURED


BLOCKS: dict[str, Callable[[], str]] = {
    "table: headline": headline_table,
    "table: training": partial(training_table, "training", TRAINING_ROWS),
    "table: fp8": partial(training_table, "training_fp8", FP8_ROWS),
    "table: long": long_table,
    "table: small": small_table,
    "table: scale": scale_table,
    "table: scale scoring": scale_scoring_table,
    "table: fp8 scoring": fp8_scoring_table,
    "table: peers": peers_table,
    "sentence: peers": peers_sentence,
    "table: scoring": scoring_table,
    "sentence: scoring": scoring_sentence,
    "sentence: vllm": vllm_sentence,
    "table: generation": generation_table,
    "sentence: generation": generation_sentence,
    "table: agreement": agreement_table,
}

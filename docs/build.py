"""Writes the tables, the answer and the picture of README.md and docs/ from results/.

    python docs/build.py            # writes them
    python docs/build.py --check    # exits with 1 and names the files that would change

A block is everything between `<!-- NAME -->`, one of `BLOCKS`, and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import qlora_harness as qh
from qlora_harness.benchmark.record import (
    GenerationBenchmark,
    GenerationMeasurement,
    ScoringBenchmark,
    ScoringMeasurement,
    TrainingBenchmark,
    TrainingMeasurement,
)
from qlora_harness.compare.numbers import difference
from qlora_harness.compare.record import Contrast, Endpoint
from qlora_harness.compare.text import differences_line, title
from qlora_harness.results.runs import find_runs
from qlora_harness.results.terminal import gib, optional

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "results" / "benchmarks"
STUDY = ROOT / "results" / "qwen2.5-coder-1.5b"
ON_ALPACA = STUDY.with_name(f"{STUDY.name}-alpaca")
IN_FP8 = ROOT / "results" / "qwen2.5-coder-1.5b-fp8"
AT_CHANCE = ROOT / "results" / "published" / "smollm2"
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


@cache
def study(folder: Path) -> qh.Comparison:
    """The comparison of all runs in a study's folder."""
    return qh.compare(find_runs(folder))


def answer(folder: Path = STUDY) -> str:
    """What `qlora-harness compare` prints about a published study."""
    printed = f"{study(folder)}\n{differences_line(study(folder))}"
    return "\n".join(f"    {line}".rstrip() for line in printed.splitlines())


def fp8_answer(arms: Iterable[str], lines: int) -> str:
    """The comparison of arms in FP8 with the same seeds in bf16."""
    runs = [run for arm in arms for run in find_runs(IN_FP8 / arm)]
    same = [STUDY / run.relative_to(IN_FP8) for run in runs]
    printed = str(qh.compare([*runs, *same])).splitlines()
    return "\n".join(f"    {line}".rstrip() for line in printed[:lines])


STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.note { fill: #59636e; font-size: 12px }
.title, .word { font-weight: 600 }
line { stroke: #59636e; stroke-width: 3; stroke-linecap: round }
.axis { stroke-width: 1; stroke-dasharray: 3 4 }
circle { fill: #59636e }
line.better { stroke: #1a7f37 } .better { fill: #1a7f37 }
line.worse { stroke: #cf222e } .worse { fill: #cf222e }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .note { fill: #9198a1 }
line.better { stroke: #3fb950 } .better { fill: #3fb950 }
line.worse { stroke: #f85149 } .worse { fill: #f85149 }
line, circle { stroke: #9198a1 } circle { stroke: none }
}
</style>"""
KEYS = (("eval_loss", "eval loss, nats"), ("nll", "NLL, nats"), ("accuracy", "accuracy, points"))


def picture() -> str:
    """The differences of the published study as an SVG, for light and dark pages."""
    item = study(STUDY).headline
    body, height = _rows(item) if len(study(STUDY).primary) == 1 else _panels(study(STUDY))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" role="img"
 aria-label="{item.arm} minus {item.baseline} with 95% intervals">
{STYLE}
<text class="title" x="12" y="22">{title(study(STUDY), 90)}</text>
{body}
</svg>
"""


def _numbers(endpoint: Endpoint, factor: float) -> tuple[float, float, float]:
    """Low end, difference and high end; without an interval, the difference three times."""
    middle = endpoint.difference or 0.0
    ends = (endpoint.low, middle, endpoint.high)
    low, middle, high = (factor * (middle if end is None else end) for end in ends)
    return low, middle, high


def _interval(word: str, x: Iterable[float], y: float) -> str:
    low, middle, high = x
    return (
        f'<line class="{word}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
        f'<circle class="{word}" cx="{middle:.1f}" cy="{y}" r="4.5"/>'
    )


def _rows(item: Contrast) -> tuple[str, int]:
    """A row for each quantity of the only contrast, and the height of the picture."""
    rows = []
    for number, (key, name, (factor, digits), unit) in enumerate(
        (
            ("memory", "peak memory", (100, 1), "%"),
            ("eval_loss", "eval loss", (1, 3), " nats"),
            ("nll", "NLL, MMLU", (1, 3), " nats"),
            ("accuracy", "accuracy, MMLU", (100, 2), " points"),
        )
    ):
        endpoint = item[key]
        low, middle, high = _numbers(endpoint, factor)
        scale = 130 / max(abs(low), abs(high))
        y = 66 + 34 * number
        text = f"{middle:+.{digits}f}{unit}  [{low:+.{digits}f}, {high:+.{digits}f}]"
        rows.append(
            f'<text x="12" y="{y + 4}">{name}</text>'
            + _interval(endpoint.word, [290 + scale * end for end in (low, middle, high)], y)
            + f'<text x="440" y="{y + 4}">{text.replace("-", "−").replace("+0.00", "0.00")}</text>'
            f'<text class="word {endpoint.word}" x="668" y="{y + 4}">{endpoint.word}'
            + (" (letters)</text>" if endpoint.letters else "</text>")
        )
    body = "\n".join(rows)
    note = f"{item.arm} minus {item.baseline}, 95% intervals; each row has its own scale"
    return (
        f"""<text class="note" x="12" y="42">{note}</text>
<line class="axis" x1="290" x2="290" y1="52" y2="184"/>
{body}
<text class="note" x="290" y="200" text-anchor="middle">0</text>""",
        206,
    )


def _panels(comparison: qh.Comparison) -> tuple[str, int]:
    """A panel for each quantity with a row for each arm, and the height of the picture."""
    note = f"minus {comparison.headline.baseline}; the 95% intervals hold for all arms together"
    parts = [f'<text class="note" x="12" y="42">{note}</text>']
    bottom = 84 + 44 * len(comparison.primary)
    for row, item in enumerate(comparison.primary):
        memory = item.measured("memory")
        parts.append(f'<text class="word" x="12" y="{96 + 44 * row}">{item.arm}</text>')
        if memory is not None:
            size = f"{difference(memory)} memory"
            parts.append(f'<text class="note" x="12" y="{112 + 44 * row}">{size}</text>')
    for column, (key, name) in enumerate(KEYS):
        left, factor = 150 + 220 * column, 100 if key == "accuracy" else 1
        endpoints = [(r, e) for r, c in enumerate(comparison.primary) if (e := c.measured(key))]
        ends = [0.0, *(end for _, e in endpoints for end in _numbers(e, factor))]
        scale = 180 / ((max(ends) - min(ends)) or 1)
        zero = left - scale * min(ends)
        parts += [
            f'<text class="note" x="{left}" y="66">{name}</text>',
            f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="74" y2="{bottom}"/>',
        ]
        for row, endpoint in endpoints:
            x, y = [zero + scale * end for end in _numbers(endpoint, factor)], 100 + 44 * row
            text = difference(endpoint).removesuffix(" pts")
            parts.append(_interval(endpoint.word, x, y))
            parts.append(
                f'<text class="note" x="{x[1]:.1f}" y="{y - 9}" text-anchor="middle">{text}</text>'
            )
    return "\n".join(parts), bottom + 12


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
    "answer": answer,
    "answer: at chance": partial(answer, AT_CHANCE),
    "answer: on Alpaca": partial(answer, ON_ALPACA),
    "table: headline": headline_table,
    "table: training": partial(training_table, "training", TRAINING_ROWS),
    "table: fp8": partial(training_table, "training_fp8", FP8_ROWS),
    "answer: bf16 in FP8": partial(fp8_answer, ["bf16"], 7),
    "answer: NF4 in FP8": partial(fp8_answer, ["nf4"], 7),
    "answer: in FP8": partial(fp8_answer, ["bf16", "nf4"], 5),
    "answer: bf16 scored in FP8": partial(fp8_answer, ["base_bf16"], 4),
    "answer: NF4 scored in FP8": partial(fp8_answer, ["base_nf4"], 4),
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


def filled(text: str) -> str:
    """Returns a page with new contents in its blocks."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    names = "|".join(map(re.escape, BLOCKS))
    return re.sub(rf"<!-- ({names}) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main() -> int:
    """Writes or checks every page and the picture."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    contents = {page: filled(page.read_text(encoding="utf-8")) for page in pages}
    contents[ROOT / "docs" / "answer.svg"] = picture()
    stale = [
        path
        for path, text in contents.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        print("\n".join(str(path.relative_to(ROOT)) for path in stale), end="")
        return int(bool(stale))
    for path in stale:
        path.write_text(contents[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

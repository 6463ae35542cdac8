"""Writes the tables, the answer and the picture of README.md and docs/ from results/.

    python docs/from_records            # writes them
    python docs/from_records --check    # exits with 1 and names the files that would change

A block is everything between `<!-- NAME -->`, one of `BLOCKS`, and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import tables
from picture import picture

import qlora_harness as qh
from qlora_harness.compare.text import differences_line
from qlora_harness.results.runs import find_runs

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "results" / "qwen2.5-coder-1.5b"
ON_ALPACA = STUDY.with_name(f"{STUDY.name}-alpaca")
IN_FP8 = STUDY.with_name(f"{STUDY.name}-fp8")
AT_CHANCE = ROOT / "results" / "published" / "smollm2"


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


BLOCKS: dict[str, Callable[[], str]] = {
    **tables.BLOCKS,
    "answer": answer,
    "answer: at chance": partial(answer, AT_CHANCE),
    "answer: on Alpaca": partial(answer, ON_ALPACA),
    "answer: bf16 in FP8": partial(fp8_answer, ["bf16"], 7),
    "answer: NF4 in FP8": partial(fp8_answer, ["nf4"], 7),
    "answer: in FP8": partial(fp8_answer, ["bf16", "nf4"], 5),
    "answer: bf16 scored in FP8": partial(fp8_answer, ["base_bf16"], 4),
    "answer: NF4 scored in FP8": partial(fp8_answer, ["base_nf4"], 4),
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
    contents[ROOT / "docs" / "answer.svg"] = picture(study(STUDY))
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

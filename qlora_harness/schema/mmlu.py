"""The MMLU task families, and the hashes that replace prompts in records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import yaml

from qlora_harness.locations import tasks_dir

FOLDER = "mmlu_qlora"
LETTERS = ("A", "B", "C", "D")
PROMPT_DIGITS = 16  # of the 64 hexadecimal digits of a SHA-256, all of which lm_eval stores


def families() -> dict[str, dict[str, Any]]:
    """Returns each family's "file", and its "categories", which list the subjects of each."""
    path = tasks_dir() / FOLDER / "families.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    by_name = {}
    for name, family in content["families"].items():
        categories = {
            category: [s for s in subjects if s in family.get("subjects", subjects)]
            for category, subjects in content["categories"].items()
        }
        by_name[name] = {
            "file": family["file"],
            "categories": {c: s for c, s in categories.items() if s},
        }
    return by_name


def prompt_hash(prompt: str) -> str:
    """Returns the first 16 hexadecimal digits of prompt_hash in lm_eval's samples."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:PROMPT_DIGITS]


def prompts_hash(questions: Iterable[tuple[int, str, str, str]]) -> str:
    """Returns one hash of (index, subject, prompt hash, right letter) tuples in any order."""
    digest = hashlib.sha256()
    for question in sorted(questions):
        digest.update("".join(f"{part}\0" for part in question).encode())
    return digest.hexdigest()

"""The MMLU task families of this project, as tasks/mmlu_qlora/families.yaml names them."""

from __future__ import annotations

from typing import Any

import yaml

from qlora_harness.locations import tasks_dir

FOLDER = "mmlu_qlora"
LETTERS = ("A", "B", "C", "D")


def families() -> dict[str, dict[str, Any]]:
    """Returns the task families: for each its file, and its subjects by category."""
    text = (tasks_dir() / FOLDER / "families.yaml").read_text(encoding="utf-8")
    loaded = yaml.safe_load(text)
    found = {}
    for name, family in loaded["families"].items():
        wanted = family.get("subjects")
        categories = {
            category: [s for s in subjects if wanted is None or s in wanted]
            for category, subjects in loaded["categories"].items()
        }
        found[name] = {
            "file": family["file"],
            "categories": {c: s for c, s in categories.items() if s},
        }
    return found

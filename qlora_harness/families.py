"""The MMLU task families of this project, as tasks/mmlu_qlora/families.yaml names them."""

from __future__ import annotations

from typing import Any

import yaml

from qlora_harness.locations import tasks_dir

FOLDER = "mmlu_qlora"
LETTERS = ("A", "B", "C", "D")


def families() -> dict[str, dict[str, Any]]:
    """Returns for each family its "file" and its "categories", the subjects by category."""
    text = (tasks_dir() / FOLDER / "families.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
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

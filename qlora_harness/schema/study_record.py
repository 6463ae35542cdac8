"""study.json: the plan of a study, and how far each of its cells is."""

# ruff: noqa: RUF012  # pydantic copies mutable defaults
from __future__ import annotations

from typing import Any, Literal

from qlora_harness.schema.section import Amount, Count, Header, Section

State = Literal["planned", "training", "scoring", "completed", "interrupted", "failed"]


class CellRecord(Section):
    """One arm with one seed, or the base of an arm without an adapter."""

    name: str
    """ARM/SEED, or base_ARM."""
    arm: str
    seed: Count | None = None
    """None for a base."""
    folder: str
    """Of its records, below that of the study."""
    state: State = "planned"
    """How far it is; a cell killed with its command is corrected at the next start."""
    failure: str | None = None
    """What ended it, if it failed."""
    commands: list[str] = []
    """The commands that give the same records."""
    steps: Count | None = None
    """Optimizer steps, of which some may have been before an interruption."""
    train_seconds: Amount | None = None
    """Of the optimizer steps, as its record has them."""
    eval_seconds: Amount | None = None
    """Of the evaluation after the last step."""
    score_seconds: Amount | None = None
    """Of lm_eval in the last process, from the loaded tasks to the saved files."""
    seconds: Amount | None = None
    """Of the whole cell in the last process."""


class StudyRecord(Header):
    """study.json: one study."""

    kind: Literal["study"] = "study"
    """What the file is."""
    name: str
    """Of its folder."""
    created: str
    """ISO 8601."""
    updated: str
    """ISO 8601."""
    tasks: list[str] = []
    """Tasks of lm_eval that every cell is scored on."""
    batch_size: Count = 16
    """Of lm_eval's own batches; packs have their own size."""
    arms: dict[str, dict[str, Any]]
    """The training settings of each arm, but for the seed."""
    cells: list[CellRecord]
    """In the order in which they run on one device."""
    seconds: Amount | None = None
    """Of the last command that ran cells, from its start to the answer."""

"""Mixtures of data sets, such as oasst1:0.7,alpaca:0.3."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import DataError, shown
from qlora_harness.locations import expanded

if TYPE_CHECKING:
    import numpy as np

_SUM_TOLERANCE = 1e-6
_REMEDY = "Write a mixture as oasst1:0.7,alpaca:0.3"


@dataclass(frozen=True)
class Part:
    """A data set and its share of the conversations."""

    name: str
    weight: float


def parse_parts(dataset: str) -> list[Part]:
    """Returns the data sets of --dataset; a single one has the weight 1.

    The name of a file or folder that exists is no mixture. Raises DataError if a weight is missing
    or no number above 0, if they don't sum to 1, or if a data set appears twice.
    """
    if not (":" in dataset or "," in dataset) or _exists(dataset):
        return [Part(dataset, 1.0)]
    parts = []
    for text in dataset.split(","):
        name, colon, weight = text.strip().rpartition(":")
        if not colon or not name:
            raise DataError(
                f"--dataset {dataset}: {shown(text.strip())} has no weight, and no file has this "
                "name",
                _REMEDY,
            )
        parts.append(Part(name.strip(), _parse_weight(weight, dataset)))
    total = math.fsum(part.weight for part in parts)
    if abs(total - 1) > _SUM_TOLERANCE:
        raise DataError(f"--dataset {dataset}: the weights sum to {total:g}, not to 1", _REMEDY)
    names = [part.name for part in parts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"--dataset {dataset}: {twice} appears twice", "Add up its weights")
    return parts


def _exists(name: str) -> bool:
    try:
        return expanded(name).exists()
    except OSError:
        return False


def _parse_weight(text: str, dataset: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(
            f"--dataset {dataset}: the weight {shown(text)} is not a number above 0", _REMEDY
        )
    return weight


def mix(
    rows: Sequence[np.ndarray[Any, Any]], parts: Sequence[Part], seed: int
) -> list[np.ndarray[Any, Any]]:
    """Returns the rows of each part that are used, in order.

    Their numbers have the proportion of the weights and are the largest possible, rounded down;
    `seed` draws them. Parts without rows don't count.
    """
    if len(parts) == 1:
        return list(rows)
    sizes = [len(part) / p.weight for part, p in zip(rows, parts, strict=True) if len(part)]
    size = min(sizes, default=0)
    chosen = []
    for index, (part, available) in enumerate(zip(parts, rows, strict=True)):
        count = min(len(available), max(1, math.floor(size * part.weight + _SUM_TOLERANCE)))
        drawn = random.Random(f"{seed} {index}").sample(range(len(available)), count)
        chosen.append(available[sorted(drawn)])
    return chosen

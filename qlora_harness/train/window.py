"""Whether the longest permitted example fits the window of the base."""

from __future__ import annotations

import math

from qlora_harness.errors import SettingsError
from qlora_harness.model.rope import rope_type, window
from qlora_harness.model.source import BaseSource, read_config
from qlora_harness.settings import Settings


def check_window(settings: Settings, source: BaseSource) -> None:
    """Raises SettingsError if `--max-length` exceeds the base's window, and names a scaling.

    Raises ModelError if the base can't have `--rope-scaling`.
    """
    longest, scaling = settings.data.max_length, settings.model.rope_scaling
    reach = window(read_config(source, scaling))
    if reach is None or longest <= reach:
        return
    scaled = f" with --rope-scaling {scaling}" if scaling else ""
    problem = f"--max-length {longest}: {source.name} has a window of {reach} tokens{scaled}"
    config = read_config(source, None)
    unscaled = window(config)
    if unscaled is None or rope_type(config) != "default":
        raise SettingsError(problem, f"Use --max-length {reach}")
    kind = scaling.partition(":")[0] if scaling else "yarn"
    factor = math.ceil(100 * longest / unscaled) / 100
    raise SettingsError(problem, f"Use --rope-scaling {kind}:{factor:g}, or --max-length {reach}")

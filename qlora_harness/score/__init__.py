"""Scoring with lm-evaluation-harness: the model, and tasks from QLoRA's MMLU files."""

from qlora_harness.callable_package import make_callable

_FUNCTION = "qlora_harness.api:score"
make_callable(__name__)

"""The lm-evaluation-harness side: tasks over the QLoRA repository's MMLU files, and the model."""

from qlora_harness.callable_package import make_callable

_FUNCTION = "qlora_harness.api:score"
make_callable(__name__)

"""Training with the Hugging Face Trainer, and a full record of every run."""

from qlora_harness.callable_package import make_callable

_FUNCTION = "qlora_harness.api:train"
make_callable(__name__)

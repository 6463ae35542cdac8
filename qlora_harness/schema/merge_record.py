"""merge.json: which base an adapter was merged into, and how far answers moved."""

from __future__ import annotations

from typing import Any, Literal

from qlora_harness.schema.section import Amount, Count, Environment, Header, Section


class Shift(Section):
    """Answers of the merged model against those of the unmerged one, on the same questions."""

    questions_file: str
    questions: Count
    seed: Count
    """Of the sample."""
    mean_logprob_difference: Amount
    """Mean absolute difference over the four letters of all questions, nats."""
    largest_logprob_difference: Amount
    """Nats."""
    changed_letters: Count
    """Questions whose likeliest letter is another one."""


class MergeRecord(Header):
    """merge.json: one merged model."""

    kind: Literal["merge"] = "merge"
    """What the file is."""
    created: str
    """ISO 8601."""
    run: str
    """Name of the run's folder."""
    base: dict[str, Any]
    """What the adapter was merged into: name, revision, commit, fingerprint of the weights."""
    dtype: str
    """Of the merged weights."""
    trained_quant: str
    """How the base was held in training: nf4, fp4, int8, hqq or bf16."""
    adapter_sha256: str
    """Of its configuration and weights."""
    shift: Shift
    """How far answers moved."""
    environment: Environment = Environment()
    """Versions, and the device that computed the answers."""

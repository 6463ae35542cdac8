"""The lm-evaluation-harness side: tasks over the QLoRA repository's MMLU files, and the model."""

"""qlora-harness: what do the 4 bits of QLoRA cost?

Importing this package loads neither torch nor lm_eval; each subpackage says what it needs.
"""

__version__ = "0.1.0"

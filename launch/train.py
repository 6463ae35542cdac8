"""Trains one arm: `accelerate launch launch/train.py --quant nf4` (or `--quant bf16`)."""

import sys

from qlora_harness.train.command import main

if __name__ == "__main__":
    sys.exit(main())

"""`accelerate launch -m qlora_harness.train`: launch/train.py for an installed wheel."""

import sys

from qlora_harness.train.command import main

if __name__ == "__main__":
    sys.exit(main())

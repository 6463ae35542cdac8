"""`accelerate launch -m qlora_harness.train`: launch/train.py for those who installed a wheel."""

import sys

from qlora_harness.train.command import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m hf_adafisher``, as torchrun and accelerate start it: the same as ``hf-adafisher``."""

import sys

from hf_adafisher.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

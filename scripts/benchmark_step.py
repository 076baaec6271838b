"""``hf-adafisher benchmark`` for a clone."""

import sys

from hf_adafisher.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())

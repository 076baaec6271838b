"""``hf-adafisher list`` for a clone."""

import sys

from hf_adafisher.cli.list_optimizers import main

if __name__ == "__main__":
    sys.exit(main())

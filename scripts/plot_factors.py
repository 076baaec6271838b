"""``hf-adafisher figures factors`` for a clone."""

import sys

from hf_adafisher.cli.figures.factors import main

if __name__ == "__main__":
    sys.exit(main())

"""``hf-adafisher figures fisher-histogram`` for a clone."""

import sys

from hf_adafisher.cli.figures.fisher_histogram import main

if __name__ == "__main__":
    sys.exit(main())

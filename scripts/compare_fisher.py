"""``hf-adafisher figures fisher-accuracy`` for a clone."""

import sys

from hf_adafisher.cli.figures.fisher_accuracy import main

if __name__ == "__main__":
    sys.exit(main())

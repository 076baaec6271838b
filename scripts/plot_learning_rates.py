"""``hf-adafisher figures learning-rates`` for a clone."""

import sys

from hf_adafisher.cli.figures.learning_rates import main

if __name__ == "__main__":
    sys.exit(main())

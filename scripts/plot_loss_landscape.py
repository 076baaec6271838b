"""``hf-adafisher figures landscape`` for a clone."""

import sys

from hf_adafisher.cli.figures.landscape import main

if __name__ == "__main__":
    sys.exit(main())

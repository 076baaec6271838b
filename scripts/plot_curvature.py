"""``hf-adafisher figures curvature`` for a clone."""

import sys

from hf_adafisher.cli.figures.curvature import main

if __name__ == "__main__":
    sys.exit(main())

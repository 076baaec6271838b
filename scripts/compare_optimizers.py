"""``hf-adafisher compare`` for a clone."""

import sys

from hf_adafisher.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())

"""``hf-adafisher image`` for a clone."""

import sys

from hf_adafisher.cli.image import main

if __name__ == "__main__":
    sys.exit(main())

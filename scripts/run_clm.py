"""``hf-adafisher clm`` for a clone."""

import sys

from hf_adafisher.cli.clm import main

if __name__ == "__main__":
    sys.exit(main())

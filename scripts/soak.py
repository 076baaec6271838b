"""``hf-adafisher soak`` for a clone."""

import sys

from hf_adafisher.cli.soak import main

if __name__ == "__main__":
    sys.exit(main())

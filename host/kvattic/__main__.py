"""`python -m kvattic`: see `kvattic.cli`."""

import sys

from kvattic.cli import main

if __name__ == "__main__":
    sys.exit(main())

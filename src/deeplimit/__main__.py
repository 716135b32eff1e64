"""`python -m deeplimit` is the command `deeplimit`."""

import sys

from deeplimit.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m fullattn` is the command line."""

import sys

from fullattn._cli.main import main

if __name__ == "__main__":
    sys.exit(main())

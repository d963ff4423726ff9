"""``python -m cbpq`` is the command line."""

import sys

from cbpq.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m lowrank_utils.comparison`` is ``lowrank-compare``."""

import sys

from lowrank_utils.comparison.command import main

if __name__ == "__main__":
    sys.exit(main())

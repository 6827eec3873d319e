"""``python -m shoal.demo``."""

import sys

from shoal.demo.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

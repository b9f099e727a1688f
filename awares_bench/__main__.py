"""``python -m awares_bench`` is ``awares-bench``."""

import sys

from .cli import main

if __name__ == "__main__":  # a process that this one starts imports it again
    sys.exit(main())

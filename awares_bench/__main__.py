"""``python -m awares_bench`` is ``awares-bench``."""

import sys

from .cli import main

sys.exit(main())

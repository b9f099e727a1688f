"""Runs a module that is also an ``awares-bench`` command as ``python -m``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def run(
    description: str, add_arguments: Callable[[argparse.ArgumentParser], None], main: Callable[[argparse.Namespace], int]
) -> int:
    """Parse the command line and call ``main`` -> its exit status; 1, and one sentence, when it cannot do its work."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        return main(parser.parse_args())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1

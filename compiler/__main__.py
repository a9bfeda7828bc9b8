"""Run the command line as ``python -m attnc``."""

from __future__ import annotations

import sys

from attnc.cli import main

if __name__ == "__main__":
    sys.exit(main())

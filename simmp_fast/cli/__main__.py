"""``python -m simmp_fast.cli``: the command line without an installation."""

from __future__ import annotations

import sys

from simmp_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())

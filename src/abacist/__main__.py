"""``python -m abacist`` is the command ``abacist``."""

from __future__ import annotations

import sys

from abacist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

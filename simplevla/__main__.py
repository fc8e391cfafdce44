"""``python -m simplevla``: the ``simplevla`` command, wherever its script lies."""

import sys

from simplevla.cli import main

if __name__ == "__main__":
    sys.exit(main())

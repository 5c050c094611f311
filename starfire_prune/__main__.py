"""`python -m starfire_prune`, which is the command `starfire`."""

import sys

from starfire_prune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

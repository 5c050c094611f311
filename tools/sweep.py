"""`starfire sweep` as a file: python tools/sweep.py recipes/tables/table1.yaml."""

import sys

from starfire_prune.cli import sweep
from starfire_prune.cli.common import run_command

if __name__ == "__main__":
    sys.exit(run_command(sweep.COMMAND, sys.argv[1:], prog="sweep.py"))

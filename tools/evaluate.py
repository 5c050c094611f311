"""`starfire evaluate` as a file: python tools/evaluate.py runs/quickstart."""

import sys

from starfire_prune.cli import evaluate
from starfire_prune.cli.common import run_command

if __name__ == "__main__":
    sys.exit(run_command(evaluate.COMMAND, sys.argv[1:], prog="evaluate.py"))

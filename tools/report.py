"""`starfire report` as a file: python tools/report.py runs/quickstart."""

import sys

from starfire_prune.cli import report
from starfire_prune.cli.common import run_command

if __name__ == "__main__":
    sys.exit(run_command(report.COMMAND, sys.argv[1:], prog="report.py"))

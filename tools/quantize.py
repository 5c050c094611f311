"""`starfire quantize` as a file: python tools/quantize.py runs/quickstart."""

import sys

from starfire_prune.cli import quantize
from starfire_prune.cli.common import run_command

if __name__ == "__main__":
    sys.exit(run_command(quantize.COMMAND, sys.argv[1:], prog="quantize.py"))

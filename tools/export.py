"""`starfire export` as a file: python tools/export.py --inspect model.safetensors."""

import sys

from starfire_prune.cli import export
from starfire_prune.cli.common import run_command

if __name__ == "__main__":
    sys.exit(run_command(export.COMMAND, sys.argv[1:], prog="export.py"))

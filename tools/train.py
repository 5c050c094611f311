"""`starfire train` as a file: accelerate launch tools/train.py recipes/quickstart.yaml."""

import sys

from starfire_prune.cli import train
from starfire_prune.cli.common import run_command

if __name__ == "__main__":
    sys.exit(run_command(train.COMMAND, sys.argv[1:], prog="train.py"))

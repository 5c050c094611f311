"""The commands, run within the process of the tests."""

from typing import Any

import pytest

from starfire_prune.cli.main import main
from tests.support.commands import Ended, Tool


@pytest.fixture
def starfire(capsys: pytest.CaptureFixture[str]) -> Tool:
    """Runs `starfire` with arguments."""

    def run(*arguments: object) -> Ended:
        try:
            status: Any = main([*map(str, arguments)])
        except SystemExit as ended:  # of argparse
            status = ended.code
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture
def tool(starfire: Tool, request: pytest.FixtureRequest) -> Tool:
    """Runs the command that a test module names as `COMMAND`."""

    def run(*arguments: object) -> Ended:
        return starfire(request.module.COMMAND, *arguments)

    return run

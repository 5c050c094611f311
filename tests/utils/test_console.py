"""Messages of the library on the console."""

import logging
import sys
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from starfire_prune.utils.console import log_to_console

LOGGER = logging.getLogger("starfire_prune.training.train")


@pytest.fixture(autouse=True)
def _unconfigured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package's logger as Python makes it, and again as it was after the test."""
    logger = logging.getLogger("starfire_prune")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(level)


def test_messages_are_printed_as_they_are(capsys):
    log_to_console()
    LOGGER.info("plan\n  model  resnet18 100%")
    LOGGER.warning("hm")
    assert capsys.readouterr() == ("plan\n  model  resnet18 100%\nhm\n", "")


def test_details_below_info_are_not_printed(capsys):
    log_to_console()
    LOGGER.debug("detail")
    assert capsys.readouterr() == ("", "")


def test_calling_it_again_prints_no_message_twice(capsys):
    log_to_console()
    log_to_console()
    LOGGER.info("once")
    assert capsys.readouterr().out == "once\n"


def test_without_it_messages_of_a_run_are_silent(capsys):
    LOGGER.info("epoch 1/4")
    assert capsys.readouterr() == ("", "")


def test_messages_reach_the_handlers_that_a_library_user_configures(caplog):
    caplog.set_level(logging.INFO)
    LOGGER.info("epoch 1/4")
    assert caplog.messages == ["epoch 1/4"]


def test_messages_appear_above_a_progress_bar(capsys):
    log_to_console()
    with tqdm(range(3), file=sys.stdout) as bar:
        next(iter(bar))
        LOGGER.info("message")
    assert "\nmessage\n" not in capsys.readouterr().out.partition("message")[0]


def test_messages_are_printed_without_tqdm(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "tqdm")
    log_to_console()
    LOGGER.info("message")
    assert capsys.readouterr().out == "message\n"


def test_a_broken_pipe_reaches_the_caller(monkeypatch):
    class Broken:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None: ...

    log_to_console()
    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(BrokenPipeError):
        LOGGER.info("message")

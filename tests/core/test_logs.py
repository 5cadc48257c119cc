"""No secret and no forged line in any log."""

from __future__ import annotations

import asyncio
import errno
import logging
import sys

import pytest

from core.logs import Complaints, Redacting, announce

SECRET = "canary-7f3a9b2c"
TELEGRAM = "123456789:AAEhBOweik6ad9r_QXMENQjcrGbqCr4K-bc"


def line(message: str, *args: object, error: bool = False) -> str:
    try:
        raise ValueError(f"at https://api.example/bot{TELEGRAM}/x with {SECRET}\nFORGED")
    except ValueError:
        record = logging.LogRecord("palaver", 20, "f", 1, message, args, sys.exc_info() if error else None)
    return Redacting([SECRET]).format(record)


def test_secrets_are_cut_from_messages_arguments_and_tracebacks() -> None:
    text = line("token %s and %s", SECRET, TELEGRAM, error=True)
    assert SECRET not in text and TELEGRAM not in text and text.count("[secret]") >= 4


def test_a_password_in_an_address_is_cut() -> None:
    assert "hunter2" not in line("cannot reach postgresql+asyncpg://palaver:hunter2@db/palaver")


def test_a_name_cannot_forge_a_line() -> None:
    text = line("from %s", "eve\n2026-01-01 00:00:00 ERROR palaver: all is lost\u2028\u202e\x1b[2J")
    assert len(text.splitlines()) == 1 and "\x1b" not in text and "\u202e" not in text


def test_a_traceback_cannot_forge_a_line() -> None:
    assert all(rest.startswith("| ") for rest in line("x", error=True).splitlines()[1:])


@pytest.mark.parametrize("at_terminal", [True, False])
def test_who_sees_both_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    at_terminal: bool,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: at_terminal)
    with caplog.at_level("INFO"):
        announce(logging.getLogger("palaver"), "ready")
    assert capsys.readouterr().out == "ready\n" and caplog.messages == ([] if at_terminal else ["ready"])


async def test_of_descriptors_that_are_lacking_it_is_told_once_and_of_the_rest_always(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = asyncio.get_running_loop()
    complain = Complaints(loop)
    for _ in range(100):
        complain(loop, {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    for _ in range(100):
        closed = ValueError("Invalid file descriptor: -1")
        complain(
            loop, {"message": "Exception in callback BaseSelectorEventLoop._start_serving(<...", "exception": closed}
        )
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    complain(loop, {"message": "something else", "exception": KeyError("a bug")})
    assert caplog.records[-1].levelno == logging.ERROR and len(caplog.records) == 2

"""No secret and no forged line in any log."""

from __future__ import annotations

import asyncio
import errno
import logging
import sys

import pytest

from core.logs import Complaints, Often, Redacting, announce

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


def test_what_is_told_of_at_each_message_does_not_fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is told once, or is worse, is told."""
    now, often = [0.0], Often()
    monkeypatch.setattr("core.logs.time.monotonic", lambda: now[0])

    def told(text: str, *args: object, level: int = logging.WARNING) -> str | None:
        record = logging.LogRecord("palaver", level, "f", 1, text, args, None)
        return record.getMessage() if often.filter(record) else None

    lines = [told("%s: not stored", number) for number in range(50)]
    assert lines == [f"{number}: not stored" for number in range(10)] + [None] * 40
    assert told("%s: not sent", 1) == "1: not sent"
    assert [told("%s: not stored", 1, level=logging.ERROR) for _ in range(20)] == ["1: not stored"] * 20
    now[0] = 10.5
    assert told("%s: not stored", 50) == "50: not stored (40 such lines before it were left out)"
    assert told("%s: not stored", 51) == "51: not stored"
    now[0] = 30.0
    assert told("%s: not stored", 52) == "52: not stored"
    assert [told(f"no template {number}") is None for number in range(5000)].count(True) == 0
    assert len(often._seen) <= 1001

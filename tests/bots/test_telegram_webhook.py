"""The webhook: who may post, how much, and that 200 is said only after the commit."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from bots.base import Unservable
from bots.telegram import FORGOTTEN, open_telegram
from bots.telegram_webhook import MAX_BODY, parse
from core.messages import Channel
from tests.bots.telegram_world import ANN, BOB, GROUP, serving, settings, until
from tests.fakes.ears import Ears
from tests.fakes.telegram_server import Fault, TelegramServer

SECRET = "correct-horse_battery"
HEADER = "X-Telegram-Bot-Api-Secret-Token"


@pytest.fixture
async def server() -> AsyncIterator[TelegramServer]:
    async with TelegramServer() as server:
        server.private(ANN, "Ann")
        server.group(GROUP)
        yield server


def hook(secret: str | None = SECRET) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "telegram_webhook_url": f"http://127.0.0.1:{port}/telegram/updates",
        "telegram_webhook_port": port,
        "telegram_webhook_secret": SecretStr(secret) if secret else None,
    }


async def post(url: str, body: bytes, secret: str | None = SECRET, **more: str) -> tuple[int, str]:
    headers = {"Content-Type": "application/json", **more} | ({HEADER: secret} if secret is not None else {})
    async with aiohttp.ClientSession() as session, session.post(url, data=io.BytesIO(body), headers=headers) as answer:
        return answer.status, answer.headers.get("Retry-After", "")


async def test_updates_arrive_in_order_and_nothing_is_polled(server: TelegramServer) -> None:
    ears, where = Ears(), hook(secret=None)
    server.say(ANN, ANN, "while you were away")
    async with serving(server, ears, **where):
        for number in range(10):
            server.say(ANN, ANN, f"{number}")
            server.say(GROUP, BOB, f"@palaver_bot {number}")
        server.say(ANN, ANN, "/reset")
        await server.confirmed()
        await server.until(1)
    assert [m.text for m in ears.heard if m.channel.id == "7"] == ["while you were away", *map(str, range(10))]
    assert [m.text for m in ears.heard if m.channel.id == str(GROUP)] == list(map(str, range(10)))
    assert ears.resets == [Channel("telegram", "7")] and server.ledger[0].text == FORGOTTEN
    assert not server.called("getUpdates") and {status for _, status in server.delivered} == {200}
    (given,) = server.called("setWebhook")
    assert given["drop_pending_updates"] == "false" and len(given["secret_token"]) >= 32


async def test_a_webhook_that_was_taken_away_is_set_again(
    server: TelegramServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bots.telegram.TelegramBot.watch", 0.1)
    ears, where = Ears(), hook()
    async with serving(server, ears, **where):
        for number, url in enumerate(("", "https://elsewhere.example.org/")):
            await until(lambda: server.webhook["url"] == where["telegram_webhook_url"])
            server.webhook = {"url": url}
            await until(lambda: server.webhook["url"] == where["telegram_webhook_url"])
            server.say(ANN, ANN, f"still there, {number}?")
            await server.confirmed()
        looks = len(server.called("getWebhookInfo"))
        await until(lambda: len(server.called("getWebhookInfo")) > looks + 3)
    assert ears.texts == ["still there, 0?", "still there, 1?"]
    assert len(server.called("setWebhook")) == 3 and caplog.text.count("took our webhook away") == 2


async def test_200_comes_after_the_commit_and_503_when_there_is_none(server: TelegramServer) -> None:
    ears, where = Ears(), hook()
    ears.refuse = 2
    async with serving(server, ears, **where):
        await until(lambda: server.webhook["url"])
        body = b'{"update_id": 5, "message": %s}' % _message("hi")
        assert await post(where["telegram_webhook_url"], body) == (503, "5")
        assert await post(where["telegram_webhook_url"], body) == (503, "5")
        assert not ears.heard
        assert await post(where["telegram_webhook_url"], body) == (200, "")
        assert await post(where["telegram_webhook_url"], body) == (200, "")
    assert ears.texts == ["hi"]


async def test_telegram_repeats_what_was_not_taken(server: TelegramServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bots.telegram_webhook.COME_AGAIN", 0)
    ears = Ears()
    ears.refuse = 3
    async with serving(server, ears, **hook()):
        server.say(ANN, ANN, "one")
        server.say(ANN, ANN, "two")
        await server.confirmed()
    assert ears.texts == ["one", "two"]
    assert [status for _, status in server.delivered] == [503, 503, 503, 200, 200]


async def test_a_full_house_says_come_again(server: TelegramServer) -> None:
    ears, where = Ears(), hook()
    ears.room.clear()
    async with serving(server, ears, **where):
        await until(lambda: server.webhook["url"])
        assert await post(where["telegram_webhook_url"], b'{"update_id": 5, "message": {}}') == (503, "5")
        assert not ears.calls


@pytest.mark.parametrize("secret", [None, "", "wrong", SECRET + "x", SECRET.upper(), "\xe9" * 21])
async def test_who_does_not_know_the_secret_is_not_heard(server: TelegramServer, secret: str | None) -> None:
    ears, where = Ears(), hook()
    async with serving(server, ears, **where):
        await until(lambda: server.webhook["url"])
        body = b'{"update_id": 5, "message": %s}' % _message("hi")
        assert (await post(where["telegram_webhook_url"], body, secret))[0] == 403
        assert (await post(where["telegram_webhook_url"], b"x" * (MAX_BODY + 1), secret))[0] == 403
        assert not ears.calls


async def test_what_is_too_big_or_no_update_is_refused_and_what_has_a_number_is_recorded(
    server: TelegramServer,
) -> None:
    ears, where = Ears(), hook()
    async with serving(server, ears, **where):
        await until(lambda: server.webhook["url"])
        url = where["telegram_webhook_url"]
        deep = b"[" * 200_000 + b"]" * 200_000
        assert (await post(url, b"x" * (MAX_BODY + 1)))[0] == 413
        assert (await post(url, b""))[0] == 400
        assert (await post(url, b"\xff\xfe"))[0] == 400
        assert (await post(url, deep))[0] == 400
        assert (await post(url, b"[1]"))[0] == 400
        assert (await post(url, b"{}", **{"Content-Encoding": "gzip"}))[0] == 400
        assert not ears.failed
        assert (await post(url, b'{"update_id": 6, "message": %s}' % deep))[0] == 200
        assert (await post(url, b'{"update_id": 7, "message": 7}'))[0] == 200
        assert (await post(url, b'{"update_id": 8, "poll": {}}'))[0] == 200
        assert (await post(url, b'{"update_id": 9, "message": %s}' % _message("hi")))[0] == 200
        assert (await post(url + "/other", b"{}"))[0] == 404
    assert [row.id for row, _ in ears.failed] == ["update 6", "update 7"] and ears.texts == ["hi"]


async def test_a_body_without_a_length_is_bounded_too(server: TelegramServer) -> None:
    ears, where = Ears(), hook()

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * 65536

    async with serving(server, ears, **where):
        await until(lambda: server.webhook["url"])
        async with aiohttp.ClientSession() as session:
            async with session.post(where["telegram_webhook_url"], data=endless(), headers={HEADER: SECRET}) as answer:
                assert answer.status == 413


async def test_a_connection_without_a_request_is_closed(
    server: TelegramServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bots.telegram_webhook.IDLE", 0.1)
    where = hook()
    async with serving(server, Ears(), **where):
        await until(lambda: server.webhook["url"])
        reader, writer = await asyncio.open_connection("127.0.0.1", where["telegram_webhook_port"])
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


async def test_an_address_telegram_does_not_take_is_named(server: TelegramServer) -> None:
    server.faults.append(Fault("error", "setWebhook", value=[400, "Bad Request: bad webhook: IP address is reserved"]))
    with pytest.raises(Unservable, match=r"TELEGRAM_WEBHOOK_URL: .*IP address is reserved"):
        async with asyncio.timeout(30):
            await open_telegram(settings(server, **hook())).serve(Ears().chat)


async def test_a_host_that_is_not_here_and_a_port_that_is_taken_are_named(server: TelegramServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for where, says in (
            ({"telegram_webhook_host": "192.0.2.1"}, "TELEGRAM_WEBHOOK_HOST: .*: name an address of this machine"),
            ({"telegram_webhook_port": taken.getsockname()[1]}, "TELEGRAM_WEBHOOK_PORT: .*: name a free port"),
        ):
            with pytest.raises(Unservable, match=says):
                async with asyncio.timeout(30):
                    await open_telegram(settings(server, **{**hook(), **where})).serve(Ears().chat)


def test_reading_a_body() -> None:
    assert parse(b'{"update_id": 5}') == {"update_id": 5}
    assert parse(b"5") is None
    assert parse(b'{"update_id": 5, "message": {') == {"update_id": 5, "unreadable": '{"update_id": 5, "message": {'}


def _message(text: str) -> bytes:
    return (
        b'{"message_id": 1, "date": 1, "chat": {"id": 7, "type": "private"}, '
        b'"from": {"id": 7, "is_bot": false, "first_name": "Ann"}, "text": "%s"}' % text.encode()
    )

"""The page's server, spoken to as a browser speaks: real HTTP and WebSockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import resource
import signal
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import ValidationError

from bots import web as module
from bots.web import CLOSED, COOKIE, MOST_TABS_EACH, Tab, WebBot, WebSettings, open_web
from core.chat import BUSY, Chat
from core.delivery import Unservable
from core.messages import Author, Channel, Message, Reply
from core.settings import QueueLimits
from tests.bots.house import House, until
from tests.bots.process import PATIENCE as START
from tests.bots.process import command, environment, running
from tests.simulation.memory_journal import Row, Sent

PATIENCE = 20.0


def web(**settings: Any) -> WebBot:
    return open_web(WebSettings(**{"web_port": 0, **settings}))


class Page:
    """The client half of the protocol, frames as they come."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def say(self, id: str, text: str) -> None:
        await self.socket.send_json({"id": id, "text": text})

    async def whole(self, kind: str) -> Any:
        """The next frame of this kind, others skipped; typing comes when it likes."""
        async with asyncio.timeout(PATIENCE):
            while True:
                frame = await self.socket.receive_json()
                if kind in frame:
                    return frame

    async def hears(self, kind: str) -> Any:
        return (await self.whole(kind))[kind]

    async def history(self) -> list[tuple[str, str]]:
        await self.socket.send_json({"hello": True})
        return [(turn["role"], turn["text"]) for turn in await self.hears("history")]


@contextlib.asynccontextmanager
async def browser(bot: WebBot) -> AsyncIterator[aiohttp.ClientSession]:
    await until(lambda: bot.address)
    async with aiohttp.ClientSession(bot.address, cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        yield session


@contextlib.asynccontextmanager
async def tab(session: aiohttp.ClientSession, **headers: str) -> AsyncIterator[Page]:
    async with session.ws_connect("/ws", headers=headers) as socket:
        yield Page(socket)


async def test_a_question_is_stored_and_answered() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        assert await page.history() == []
        await page.say("question-1", "  Hello there!")
        assert await page.hears("stored") == {"id": "question-1", "text": "  Hello there!", "heard": True}
        assert await page.hears("typing") == "question-1"
        assert await page.hears("reply") == {"to": "question-1", "text": "You said Hello there!"}
        assert await page.history() == [("user", "  Hello there!"), ("assistant", "You said Hello there!")]


async def test_a_question_said_again_is_answered_once() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        for _ in range(3):
            await page.say("question-1", "once")
        await page.say("question-2", "twice")
        assert (await page.hears("reply"))["to"] == "question-1"
        assert (await page.hears("reply"))["to"] == "question-2"
        assert len(house.engine.prompts) == 2


async def test_tabs_share_a_conversation_and_browsers_do_not() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as mine, browser(bot) as other:
        async with tab(mine) as first, tab(mine) as second, tab(other) as foreign:
            await first.say("question-1", "my cat is called Ink")
            assert (await second.hears("stored"))["text"] == "my cat is called Ink"
            assert (await second.hears("reply"))["to"] == "question-1"
            assert await foreign.history() == []
            await foreign.say("question-1", "who is Ink?")
            await foreign.hears("reply")
            assert house.engine.prompts[-1] == ["who is Ink ?"]


async def test_the_key_is_a_strict_cookie_and_its_channel_does_not_show_it() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session:
        async with session.get("/") as response:
            assert "Set-Cookie" not in response.headers
        async with session.ws_connect("/ws") as socket:
            cookie = socket._response.headers["Set-Cookie"]
            key = socket._response.cookies[COOKIE].value
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Path=/" in cookie and len(key) == 32
        assert "Secure" not in cookie
        async with tab(session) as page:
            await page.say("question-1", "hi")
            await page.hears("reply")
        assert [row.message.channel.platform for row in house.disk.rows] == ["web"]
        id = house.disk.rows[0].message.channel.id
        assert len(id) == 24 and id not in key
        headers = {"Host": "localhost", "Origin": "https://localhost"}
        async with session.ws_connect("/ws", headers=headers) as socket:
            assert "Secure" in socket._response.headers["Set-Cookie"]


async def test_a_made_up_cookie_is_replaced() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session:
        for bad in ("short", "x" * 32 + "y", "../../etc/passwd-and-some-more-xx"):
            async with session.ws_connect("/ws", headers={"Cookie": f"{COOKIE}={bad}"}) as socket:
                assert socket._response.cookies[COOKIE].value != bad


async def test_the_cookie_is_there_before_the_socket() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session:
        async with session.post("/cookie") as response:
            assert response.status == 204
            key = response.cookies[COOKIE].value
        async with session.post("/cookie") as response:
            assert response.cookies[COOKIE].value == key
        async with session.ws_connect("/ws") as socket:
            assert socket._response.cookies[COOKIE].value == key
        async with session.post("/cookie", headers={"Origin": "http://evil.example"}) as response:
            assert response.status == 403 and "Set-Cookie" not in response.headers
        async with session.get("/cookie") as response:  # so no link from elsewhere can change it
            assert response.status == 405


async def refused(session: aiohttp.ClientSession) -> str:
    """Why, to show; then the socket is closed."""
    async with session.ws_connect("/ws") as socket:
        said: dict[str, str] = await socket.receive_json(timeout=20)
        assert (await socket.receive(timeout=20)).type is aiohttp.WSMsgType.CLOSE
        return said["full"]


async def test_one_browser_does_not_take_everybodys_places() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, browser(bot) as other, contextlib.AsyncExitStack() as stack:
        await session.post("/cookie")
        tabs = [await stack.enter_async_context(tab(session)) for _ in range(MOST_TABS_EACH)]
        assert await refused(session) == "Too many pages of this browser are open; close some."
        async with tab(other) as page:
            assert await page.history() == []
        await tabs[0].socket.close()
        await until(lambda: sum(map(len, bot._tabs.values())) < MOST_TABS_EACH)
        async with tab(session) as page:
            assert await page.history() == []


async def test_when_very_many_are_here_nobody_more_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TABS", 1)
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, browser(bot) as other:
        async with tab(session):
            assert await refused(other) == "Too many people are here."
        await until(lambda: not bot._tabs)
        async with tab(other) as page:
            assert await page.history() == []


async def test_what_is_no_text_gets_a_hint_and_no_answer() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        await page.say("question-1", "🦄🦄")
        assert await page.hears("stored") == {"id": "question-1", "text": "🦄🦄", "heard": False}
        assert [row.state for row in house.disk.rows] == ["heard"]


async def test_reset_starts_anew_in_every_tab() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page, tab(session) as second:
        await page.say("question-1", "remember me")
        await page.hears("reply")
        await page.socket.send_json({"reset": True})
        assert await page.hears("forgotten") is True
        assert await second.hears("forgotten") is True
        assert await page.history() == []
        await page.say("question-2", "hello")
        await page.hears("reply")
        assert house.engine.prompts[-1] == ["hello"]


async def test_long_and_broken_texts() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        await page.say("question-1", "word " * 1000)
        assert len((await page.hears("stored"))["text"]) == 2000
        await page.socket.send_str('{"id": "question-2", "text": "a\\u0000b\\ud800c\\u202ed"}')
        assert (await page.hears("stored"))["text"] == "abcd"


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "no json",
        "[1]",
        '"text"',
        "{}",
        "[" * 20_000,
        '{"id": "question-1"}',
        '{"id": 1, "text": "a"}',
        '{"id": "short", "text": "a"}',
        '{"id": "with space!", "text": "a"}',
        '{"id": "question-1", "text": ["a"]}',
        '{"id": "' + "x" * 65 + '", "text": "a"}',
    ],
)
async def test_a_bad_frame_is_an_error_and_the_talk_goes_on(frame: str) -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        await page.socket.send_str(frame)
        assert await page.hears("error")
        await page.socket.send_bytes(b"bytes")
        assert await page.hears("error")
        await page.say("question-9", "still there?")
        assert await page.hears("reply")
        assert len(house.disk.rows) == 1


async def test_a_frame_too_long_ends_the_connection() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        await page.say("question-1", "x" * 40_000)
        message = await page.socket.receive()
        assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
        assert page.socket.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG


async def test_a_journal_that_takes_nothing_is_said_and_heals() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        house.journal._refuse = 1.0
        await page.say("question-1", "hello")
        assert await page.hears("later") == "question-1"
        await page.socket.send_json({"reset": True})
        assert await page.hears("error")
        house.journal._refuse = 0.0
        await page.say("question-1", "hello")
        assert (await page.hears("reply"))["to"] == "question-1"


async def test_more_than_fits_is_told_so() -> None:
    house, bot = House(QueueLimits(per_channel=1)), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        house.engine.gate.clear()
        await page.say("question-1", "one")
        await until(lambda: house.engine.prompts)
        for number in (2, 3, 4):
            await page.say(f"question-{number}", "more")
        assert await page.hears("reply") == {"to": "question-3", "text": BUSY}
        house.engine.gate.set()
        assert [(await page.hears("reply"))["to"] for _ in range(2)] == ["question-1", "question-2"]


async def test_what_ends_without_a_reply_is_told_to_every_tab() -> None:
    house, bot = House(QueueLimits(per_channel=1, deadline=2.0)), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page, tab(session) as other:
        house.engine.gate.clear()
        await page.say("question-1", "hello")
        await until(lambda: house.engine.prompts)
        for number in (2, 3, 4):
            await page.say(f"question-{number}", "hello")
        for each in (page, other):  # the third is answered that it is too much
            assert await each.whole("closed") == {"closed": "question-4", "note": CLOSED["shed"]}
            assert await each.whole("closed") == {"closed": "question-2", "note": CLOSED["expired"]}


async def test_what_another_process_answered_has_not_expired() -> None:
    house, other, bot = House(QueueLimits(deadline=3.0)), House(), web()
    other.disk = house.disk
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        house.engine.gate.clear()
        await page.say("question-0", "this takes long")
        await page.say("question-1", "hello")
        await until(lambda: house.engine.prompts)
        async with other.serve(web()):
            assert await page.whole("closed") == {"closed": "question-1", "note": ""}
    assert [row.state for row in house.disk.rows] == ["answered", "answered"]


async def test_a_reply_that_another_process_took_at_its_start_is_told_of() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        begin = house.journal.begin_send

        async def too_late(reply: Reply) -> Reply | None:
            await house.journal.sent(reply, "another's")
            return await begin(reply)

        house.journal.begin_send = too_late  # type: ignore[method-assign]
        await page.say("question-1", "hello")
        assert await page.whole("closed") == {"closed": "question-1", "note": ""}
        assert await page.history() == [("user", "hello"), ("assistant", "You said hello")]


async def test_what_had_ended_when_it_was_said_again_is_told_so() -> None:
    house, bot = House(QueueLimits(deadline=1.0)), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page, tab(session) as other:
        await page.say("question-1", "hello")
        await page.hears("reply")
        house.engine.gate.clear()
        await page.say("question-0", "this takes long")
        await page.say("question-2", "are you there?")
        assert await page.hears("closed") == "question-2"
        await page.socket.send_json({"reset": True})
        await page.hears("forgotten")
        await other.hears("forgotten")
        await page.say("question-2", "are you there?")
        assert await page.whole("closed") == {"closed": "question-2", "note": CLOSED["expired"]}
        await page.say("question-1", "hello")
        assert await page.whole("closed") == {"closed": "question-1", "note": ""}
        await page.say("question-3", "still there?")
        await page.hears("stored")
        assert (await other.hears("stored"))["id"] == "question-3"  # it need not hear of what is forgotten


async def test_typing_is_told_with_the_question_it_is_for() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        house.engine.gate.clear()
        await page.say("question-1", "one")
        await page.say("question-2", "two")
        assert await page.hears("typing") == "question-1"
        house.engine.gate.set()
        assert await page.hears("typing") == "question-2"


async def test_a_reply_made_while_nobody_looks_is_there_later() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session:
        house.engine.gate.clear()
        async with tab(session) as page:
            await page.say("question-1", "hello")
            await page.hears("stored")
        house.engine.gate.set()
        await until(lambda: house.disk.replies and house.disk.replies[0].reply.state == "sent")
        async with tab(session) as page:
            assert await page.history() == [("user", "hello"), ("assistant", "You said hello")]


async def test_a_restart_answers_what_was_asked() -> None:
    house, bot = House(), web()
    async with browser_over_restarts() as session:
        async with house.serve(bot):
            await until(lambda: bot.address)
            house.engine.gate.clear()
            async with session.ws_connect(bot.address + "/ws") as socket:
                await Page(socket).say("question-1", "hello")
                await Page(socket).hears("stored")
        house.engine.gate.set()
        bot = web()
        async with house.serve(bot):
            await until(lambda: bot.address)
            async with session.ws_connect(bot.address + "/ws") as socket:
                page = Page(socket)
                await page.say("question-1", "hello")  # as the page does for what has no answer yet
                await until(lambda: house.disk.replies)
                assert await page.history() == [("user", "hello"), ("assistant", "You said hello")]
    assert len(house.disk.rows) == len(house.disk.replies) == 1


@contextlib.asynccontextmanager
async def browser_over_restarts() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        yield session


async def test_what_is_said_while_the_history_is_read_comes_after_it() -> None:
    house, bot = House(), web()
    async with house.serve(bot) as chat, browser(bot) as session, tab(session) as page:
        await page.history()
        (channel,) = bot._tabs
        read = chat.history

        async def slowly(*args: Any, **kwargs: Any) -> Any:
            turns = await read(*args, **kwargs)
            await bot.typing(channel)
            return turns

        chat.history = slowly  # type: ignore[method-assign]  # a reply arrives between the query and its frame
        await page.socket.send_json({"hello": True})
        async with asyncio.timeout(PATIENCE):
            assert "history" in await page.socket.receive_json()
            assert "typing" in await page.socket.receive_json()


async def test_who_talks_too_fast_is_slowed_and_loses_nothing() -> None:
    house, bot = House(QueueLimits(per_channel=1000)), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        await page.history()
        began = asyncio.get_running_loop().time()
        for number in range(23):
            await page.say(f"question-{number}", f"number {number}")
        assert [(await page.hears("reply"))["to"] for _ in range(23)] == [f"question-{n}" for n in range(23)]
        assert asyncio.get_running_loop().time() - began > 1.4


async def knock(bot: WebBot, *sent: str) -> socket.socket:
    """A connection that says this and reads nothing more."""
    await until(lambda: bot.address)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", int(bot.address.rpartition(":")[2])))
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    head = {
        "Host": "127.0.0.1",
        "Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw==",
        **upgrade,
        "Cookie": f"{COOKIE}={KEY}",
    }
    frames = b"".join(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text.encode() for text in sent)
    raw.sendall("\r\n".join(["GET /ws HTTP/1.1", *(f"{k}: {v}" for k, v in head.items()), "", ""]).encode() + frames)
    raw.setblocking(False)
    return raw


KEY = "k" * 32


@contextlib.asynccontextmanager
async def full_house(bot: WebBot) -> AsyncIterator[aiohttp.ClientSession]:
    """In which the browser with KEY has said much more than a connection's buffers hold."""
    house, now = House(), datetime.now(UTC)
    channel = Channel("web", hashlib.sha256(KEY.encode()).hexdigest()[:24])
    for row in range(1, 101):
        message = Message(channel, f"question-{row}", Author("guest", "guest"), "☃" * 2000, now)
        house.disk.rows.append(Row(row, message, "answered", now, turn=row))
        house.disk.replies.append(
            Sent(Reply(row, channel, message.id, "yes", "", state="sent", message=row), "yes", False)
        )
    async with house.serve(bot), browser(bot) as session:
        session.headers["Cookie"] = f"{COOKIE}={KEY}"
        yield session


async def deaf_tab(bot: WebBot) -> tuple[socket.socket, Tab]:
    """The only one, which asks for the history again and again and does not read it."""
    raw = await knock(bot, *['{"hello":true}'] * 15)
    await until(lambda: bot._tabs)
    ((deaf,),) = bot._tabs.values()
    assert deaf._transport
    left = 0
    while not left or left != deaf._transport.get_write_buffer_size():  # until the machine's buffers are full
        left = deaf._transport.get_write_buffer_size()
        await asyncio.sleep(0.2)
    assert deaf.owed_history and not deaf._line.qsize()  # of all that was asked for, one is under way
    return raw, deaf


async def test_who_reads_nothing_is_owed_one_history_and_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SENT_WITHIN", 1.0)
    bot = web()
    async with full_house(bot) as session:
        raw, deaf = await deaf_tab(bot)
        async with tab(session) as page:
            for _ in range(3):  # others have it as often as they read it
                assert len(await page.history()) == 200
            await until(lambda: all(deaf not in tabs for tabs in bot._tabs.values()))
            assert len(await page.history()) == 200
        raw.close()


async def test_who_cannot_be_answered_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SENT_WITHIN", 1.0)
    heard, receive = list[Message](), Chat.receive

    async def listen(chat: Chat, *messages: Message) -> bool:
        heard.extend(messages)
        return await receive(chat, *messages)

    monkeypatch.setattr(Chat, "receive", listen)
    bot = web()
    async with full_house(bot):
        said = [f'{{"id":"another-{number}","text":"hello"}}' for number in range(30)]
        raw = await knock(bot, *['{"hello":true}'] * 15, *said)
        await until(lambda: heard)
        await until(lambda: not bot._tabs)
        assert 0 < len(heard) < 30
        raw.close()


async def test_who_answers_no_ping_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.2)
    house, bot = House(), web()
    async with house.serve(bot):
        raw = await knock(bot, '{"hello":true}')
        await until(lambda: bot._tabs)
        await until(lambda: not bot._tabs)
        raw.close()


async def test_who_pings_and_is_gone_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    house, bot = House(), web()
    async with house.serve(bot):
        raw = await knock(bot, '{"hello":true}')
        await until(lambda: bot._tabs)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.send(b"\x89\x80\0\0\0\0" * 1000)
        raw.close()
        await until(lambda: not bot._tabs)
    assert "Traceback" not in caplog.text


async def test_a_line_that_is_full_ends_the_connection_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_UNSENT", 5)
    bot = web()
    async with full_house(bot) as session:
        raw, deaf = await deaf_tab(bot)
        async with tab(session) as page:
            for number in range(10):
                await page.say(f"picture-{number}", "🦄")
                await page.hears("stored")
            await until(lambda: all(deaf not in tabs for tabs in bot._tabs.values()), 5.0)
        raw.close()


async def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE", 0.3)
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session, tab(session) as page:
        host, port = "127.0.0.1", int(bot.address.rpartition(":")[2])
        for begun in (b"", b"GET / HTTP/1.1\r\nHost: 127", b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(begun)
            answer = await asyncio.wait_for(reader.read(), 5.0)
            assert answer.startswith(b"HTTP/1.1 200") if begun.endswith(b"\r\n\r\n") else answer == b""
            writer.close()
        assert await page.history() == []  # a tab may be silent for longer


async def test_more_connections_than_descriptors_end_in_few_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path) as (process, address):
        hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (64, hard))
        port = int(address.rpartition(":")[2])
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(120)]
        idle[0].sendall(b"POST /cookie HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n")  # a stop waits for it
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(START):
            assert await process.wait() == 0
        for each in idle:
            each.close()
    errors = capfd.readouterr().err
    assert "no connection can be accepted now" in errors
    assert "Traceback" not in errors and len(errors) < 5000


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
async def test_pages_of_others_may_not_talk(origin: str) -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect("/ws", headers={"Origin": origin})
        assert refused.value.status == 403


async def test_which_page_was_refused_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """So that who forgets WEB_ORIGIN, or a proxy that sends another Host, sees why the page does not connect."""
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session:
        for _ in range(3):
            async with session.post("/cookie", headers={"Origin": "https://chat.example.com"}) as response:
                assert response.status == 403
    (told,) = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert told == "a page at https://chat.example.com was refused: if that is this one, set WEB_ORIGIN to it"


async def test_our_own_page_may_talk_and_a_proxy_that_is_set() -> None:
    house, bot = House(), web(web_origin="https://Chat.example.com/")
    async with house.serve(bot), browser(bot) as session:
        for origin in (bot.address, "https://chat.example.com"):
            async with tab(session, Origin=origin) as page:
                assert await page.history() == []
        async with session.get("/", headers={"Host": "chat.example.com"}) as response:
            assert response.status == 200


async def test_a_foreign_name_for_this_machine_is_refused() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session:
        for host, status in (
            ("evil.example:80", 421),
            ("127.0.0.1.evil.example", 421),
            ("localhost:1", 200),
            ("[::1]", 200),
        ):
            async with session.get("/", headers={"Host": host}) as response:
                assert response.status == status, host


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "["}, 421),
        ({"Host": "[::1"}, 421),
        ({"Host": "[::1]", "Origin": "http://["}, 403),
        ({"Origin": "http://[::1"}, 403),
    ],
)
async def test_names_that_are_none_are_refused(
    headers: dict[str, str], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect("/ws", headers=headers)
        assert refused.value.status == status
    assert "Traceback" not in caplog.text


async def test_an_open_house_behind_a_proxy_talks_under_its_name_only() -> None:
    house, bot = House(), web(web_host="0.0.0.0", web_origin="https://chat.example.com")
    async with house.serve(bot):
        await until(lambda: bot.address)
        address = bot.address.replace("0.0.0.0", "127.0.0.1")
        async with aiohttp.ClientSession(address) as session:
            for host in ("chat.example.com", "chat.example.com:443", "localhost:8080", "127.0.0.1"):
                async with session.get("/", headers={"Host": host}) as response:
                    assert response.status == 200, host
            for host in ("evil.example", "evil.example:443", "chat.example.com:80", "192.0.2.7:8080", "["):
                for path, status in (("/", 421), ("/ws", 421), ("/livez", 200), ("/readyz", 503), ("/metrics", 200)):
                    async with session.get(path, headers={"Host": host}) as response:
                        assert response.status == status, (host, path)
            for origin in ("https://evil.example", "http://chat.example.com", "http://127.0.0.1:1"):
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await session.ws_connect("/ws", headers={"Host": "chat.example.com", "Origin": origin})
                assert refused.value.status == 403, origin
            headers = {"Host": "chat.example.com", "Origin": "https://chat.example.com"}
            async with session.ws_connect("/ws", headers=headers) as socket:
                assert await Page(socket).history() == []


async def test_the_page_and_its_headers() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session:
        for path, kind in (
            ("/", "text/html"),
            ("/style.css", "text/css"),
            ("/script.js", "text/javascript"),
            ("/icon.svg", "image/svg+xml"),
        ):
            async with session.get(path) as response:
                assert response.status == 200 and response.content_type == kind
                assert "default-src 'none'" in response.headers["Content-Security-Policy"]
                assert "unsafe" not in response.headers["Content-Security-Policy"]
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                text = await response.text()
                assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
        for path in ("/index.html", "/../web.py", "/%2e%2e/web.py", "/nothing"):
            async with session.get(path) as response:
                assert response.status == 404


async def test_metrics_and_health() -> None:
    house, bot = House(), web()
    async with house.serve(bot), browser(bot) as session:
        async with session.get("/metrics") as response:
            assert response.status == 200 and response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert "palaver_messages_received_total" in await response.text()
        async with session.get("/livez") as response:
            assert (response.status, await response.text()) == (200, "ok\n")
        missing = ""

        async def readiness() -> str:
            return missing

        async with session.get("/readyz") as response:
            assert (response.status, await response.text()) == (503, "starting\n")
        bot.readiness = readiness
        async with session.get("/readyz") as response:
            assert (response.status, await response.text()) == (200, "ready\n")
        missing = "journal: the disk is full"
        async with session.get("/readyz") as response:
            assert (response.status, await response.text()) == (503, "journal: the disk is full\n")


async def test_the_address_is_printed(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    house, bot = House(), web()
    with caplog.at_level(logging.INFO):
        async with house.serve(bot), browser(bot):
            assert capsys.readouterr().out == f"Palaver talks at {bot.address}\n"
            assert f"Palaver talks at {bot.address}" in caplog.text and "whoever" not in caplog.text
    assert bot.address == ""


@pytest.mark.parametrize(
    ("output", "serving", "line"),
    [
        ("/dev/full", ["run"], b"Palaver talks at http://127.0.0.1:"),
        ("a reader that is gone", ["run"], b"Palaver talks at http://127.0.0.1:"),
        ("/dev/full", ["engine", "unix:here"], b"engine ready at unix:here"),
    ],
)
async def test_an_address_that_cannot_be_printed_is_logged(
    tmp_path: Path, output: str, serving: list[str], line: bytes
) -> None:
    if output == "/dev/full":
        stdout = os.open(output, os.O_WRONLY)
    else:
        read, stdout = os.pipe()
        os.close(read)
    process = await asyncio.create_subprocess_exec(
        *command(*serving), cwd=tmp_path, env=environment(WEB_PORT="0"), stdout=stdout, stderr=subprocess.PIPE
    )
    os.close(stdout)
    assert process.stderr
    async with asyncio.timeout(START):
        while line not in (heard := await process.stderr.readline()):
            assert heard and b"starting it again" not in heard, heard
        process.send_signal(signal.SIGTERM)
        rest = await process.stderr.read()
        assert await process.wait() == 0, rest
    assert b"Error" not in rest


async def test_an_open_house_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    house, bot = House(), web(web_host="0.0.0.0")
    async with house.serve(bot), browser(bot):
        assert "whoever reaches this machine may chat" in caplog.text


async def test_a_port_that_is_taken_says_the_mend() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Unservable, match=f"^WEB_PORT: port {port} is taken; set another, .* WEB_PORT={port + 1}$"):
            async with House().serve(bot := web(web_port=port)):
                await until(lambda: bot.address or house_ended())


def house_ended() -> bool:
    """The bot's task is gone as soon as nothing serves."""
    return not any("WebBot.serve" in repr(task.get_coro()) for task in asyncio.all_tasks())


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
async def test_a_host_that_is_not_ours_says_the_mend(host: str) -> None:
    with pytest.raises(Unservable, match=r"^WEB_HOST: .* WEB_HOST=127\.0\.0\.1$"):
        async with House().serve(web(web_host=host)):
            await until(house_ended)


@pytest.mark.parametrize("origin", ["chat.example.com", "https://a/b", "ftp://a", "https://u:p@a", "https://"])
def test_an_origin_is_a_scheme_and_a_host(origin: str) -> None:
    with pytest.raises(ValidationError, match="must be http:// or https://"):
        WebSettings(web_origin=origin)


@pytest.mark.parametrize(
    "host", ["http://127.0.0.1", "127.0.0.1:8080", "[::1]", "localhost/", "my host", "999.1.1.1", "80"]
)
def test_a_host_that_is_more_than_one_is_refused(host: str) -> None:
    with pytest.raises(ValidationError, match="must be an address or a name alone"):
        WebSettings(web_host=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "fe80::1%eth0", "chat.example.com", "münchen"])
def test_a_host_as_it_is(host: str) -> None:
    assert WebSettings(web_host=host).web_host == host


@pytest.mark.parametrize(
    ("origin", "browsers"),
    [
        ("https://Chat.example.com:443/", "https://chat.example.com"),
        ("http://chat.example.com:80", "http://chat.example.com"),
        ("http://chat.example.com:8080", "http://chat.example.com:8080"),
        ("https://пример.рф", "https://xn--e1afmkfd.xn--p1ai"),
    ],
)
def test_an_origin_is_spelt_as_browsers_do(origin: str, browsers: str) -> None:
    assert WebSettings(web_origin=origin).web_origin == browsers

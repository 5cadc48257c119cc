"""The wire: how each end of a call is named, and how often may be called."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from typing import Any

import pytest

from bots import telegram_api
from bots.telegram_api import Pace, Rejected, TelegramApi, Unreadable, wait_after
from core.delivery import MaybeSent, NotSent, RetryAfter, SendError, Unservable
from tests.fakes.telegram_server import Fault, TelegramServer
from tests.simulation.virtual_time import VirtualLoop, run

HELLO: dict[str, Any] = {"chat_id": 7, "text": "hello"}


async def test_a_call_and_its_parameters() -> None:
    async with TelegramServer() as server:
        server.private(7)
        api = TelegramApi(server.token, server.base)
        assert (await api.call("getMe"))["username"] == "palaver_bot"
        await api.call("sendMessage", **HELLO, reply_parameters={"message_id": 5, "allow_sending_without_reply": True})
        assert [sent.text for sent in server.ledger] == ["hello"]
        await api.aclose()
        with pytest.raises(NotSent):
            await api.call("getMe")
        await api.open()
        await api.call("getMe")
        await api.aclose()


@pytest.mark.parametrize(
    ("fault", "ending", "arrives"),
    [
        (Fault("reset_before"), MaybeSent, False),
        (Fault("reset_after"), MaybeSent, True),
        (Fault("garbage"), Unreadable, False),
        (Fault("page"), Rejected, False),
        (Fault("blocked"), Rejected, False),
        (Fault("flood"), Rejected, False),
        (Fault("migrated", value=-1005), Rejected, False),
    ],
)
async def test_how_a_call_can_end(fault: Fault, ending: type[Exception], arrives: bool) -> None:
    async with TelegramServer() as server:
        server.private(7)
        server.faults.append(fault)
        api = TelegramApi(server.token, server.base)
        with pytest.raises(ending) as caught:
            await api.call("sendMessage", **HELLO)
        assert bool(server.ledger) is arrives
        if isinstance(caught.value, Rejected) and fault.kind == "migrated":
            assert caught.value.moved_to == -1005
        await api.aclose()


async def test_calls_that_are_cancelled_take_no_place_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telegram_api, "SENDS", 1)
    loop, dice = asyncio.get_running_loop(), random.Random(1)
    async with TelegramServer() as server:
        server.private(7)
        api = TelegramApi(server.token, server.base)
        await api.open()
        for _ in range(60):
            calls = [asyncio.create_task(api.call("sendChatAction", chat_id=7, action="typing")) for _ in range(8)]
            for call in calls:
                loop.call_later(dice.uniform(0, 0.03), call.cancel)
            await asyncio.gather(*calls, return_exceptions=True)
            async with asyncio.timeout(60):
                while api._under_way:  # httpx is slow when hundreds wait
                    await asyncio.sleep(0.005)
        async with asyncio.timeout(60):
            await api.call("sendMessage", **HELLO)
            while api._under_way:
                await asyncio.sleep(0.01)
        await api.aclose()


async def test_nobody_there_is_not_sent() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        api = TelegramApi("1:x", f"http://127.0.0.1:{taken.getsockname()[1]}/bot")
        with pytest.raises(NotSent):
            await api.call("getMe")
        await api.aclose()
    api = TelegramApi("1:x", "http://no-such-host.invalid/bot")
    with pytest.raises(NotSent):
        await api.call("getMe")
    await api.aclose()


async def test_silence_is_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bots.telegram_api.READ_TIMEOUT", 0.1)
    async with TelegramServer() as server:
        server.private(7)
        server.faults.append(Fault("delay", value=2.0))
        api = TelegramApi(server.token, server.base)
        with pytest.raises(MaybeSent):
            await api.call("sendMessage", **HELLO)
        await api.aclose()


async def test_an_answer_that_never_ends_is_in_doubt_and_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    timeout = asyncio.timeout
    monkeypatch.setattr(asyncio, "timeout", lambda seconds: timeout(seconds / 300))
    async with TelegramServer() as server:
        server.private(7)
        server.faults.append(Fault("delay", value=10.0))
        api = TelegramApi(server.token, server.base)
        with pytest.raises(MaybeSent):
            await api.call("sendMessage", **HELLO)
        await asyncio.sleep(0.1)
        assert not api._under_way
        await api.aclose()


@pytest.mark.parametrize("parameters", [{"retry_after": float("nan")}, {"retry_after": -5}, {}, {"retry_after": "x"}])
async def test_a_strange_retry_after_is_a_second(parameters: dict[str, Any]) -> None:
    async with TelegramServer() as server:
        server.private(7)
        server.faults.append(Fault("flood", value=parameters))
        api = TelegramApi(server.token, server.base)
        with pytest.raises(Rejected) as caught:
            await api.call("sendMessage", **HELLO)
        assert caught.value.code == 429
        assert RetryAfter(caught.value.retry_after).seconds == 1.0
        await api.aclose()


async def test_no_error_and_no_log_shows_the_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with TelegramServer() as server:
        shown = [400, f"Not Found: /bot{server.token}/x"]
        server.faults += [
            Fault("error", "getMe", value=shown),
            Fault("reset_before", "getMe"),
            Fault("garbage", "getMe"),
        ]
        api = TelegramApi(server.token, server.base)
        for _ in range(3):
            with pytest.raises((Rejected, Unreadable, SendError)) as caught:
                await api.call("getMe")
            error: BaseException | None = caught.value
            assert server.token not in f"{error} {error!r}"
        wrong = TelegramApi("42:wrong-token", server.base)
        with pytest.raises(Unservable) as final:
            await wrong.insist("getMe")
        await wrong.aclose()
        await api.aclose()
        assert "wrong-token" not in str(final.value) and "@BotFather" in str(final.value)
    assert server.token not in caplog.text and "wrong-token" not in caplog.text


async def test_insist_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bots.telegram_api.backoff", lambda failures: 0.02)
    async with TelegramServer() as server:
        server.faults += [Fault("page", "getMe", value=code) for code in (400, 401, 403, 404, 502)]
        server.faults += [Fault("reset_before", "getMe")]
        api = TelegramApi(server.token, server.base)
        assert (await api.insist("getMe"))["is_bot"] is True
        await api.aclose()


async def test_what_is_not_found_at_all_says_the_mend() -> None:
    async with TelegramServer() as server:
        server.faults.append(Fault("error", "getMe", value=[404, "Not Found"]))
        api = TelegramApi(server.token, server.base)
        with pytest.raises(Unservable, match="TELEGRAM_API_BASE"):
            await api.insist("getMe")
        await api.aclose()


async def test_as_long_is_waited_as_telegram_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bots.telegram_api.backoff", lambda failures: 0.0)
    began = asyncio.get_running_loop().time()
    await wait_after(Rejected(429, "Too Many Requests", {"retry_after": 0.3}), 1)
    assert asyncio.get_running_loop().time() - began >= 0.3


def test_all_chats_together_are_sent_thirty_a_second() -> None:
    async def scene() -> None:
        pace, times = Pace(), list[float]()
        for chat in range(100, 200):
            await pace.turn(chat)
            times.append(asyncio.get_running_loop().time())
        assert all(last - first > 1 for first, last in zip(times, times[30:], strict=False)) and times[-1] < 4

    run(VirtualLoop(), scene())


async def test_a_chat_that_must_wait_keeps_no_other_waiting() -> None:
    pace = Pace()
    pace.hold(7, 3600)
    with pytest.raises(RetryAfter) as caught:
        await pace.turn(7)
    assert 3590 < caught.value.seconds <= 3600
    async with asyncio.timeout(20):
        await asyncio.gather(*(pace.turn(chat) for chat in range(100, 120)))


def test_who_waits_for_a_turn_in_a_chat_that_is_told_to_wait_waits_on() -> None:
    loop, sent = VirtualLoop(), list[float]()

    async def topic(pace: Pace) -> None:
        while True:
            try:
                await pace.turn(-100)
            except RetryAfter as error:
                await asyncio.sleep(error.seconds)
            else:
                sent.append(loop.time())
                return

    async def forum() -> None:
        pace = Pace()
        topics = [asyncio.create_task(topic(pace)) for _ in range(12)]
        await asyncio.sleep(5)
        pace.hold(-100, 30)
        await asyncio.gather(*topics)

    run(loop, forum())
    assert len(sent) == 12 and not [at for at in sent if 5 < at < 35]


async def test_old_chats_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "MANY", 10)
    pace = Pace()
    pace._quotas(-1)[1].take(asyncio.get_running_loop().time())
    for chat in range(100):
        pace._quotas(chat)
    assert len(pace._chats) <= 11 and -1 in pace._chats

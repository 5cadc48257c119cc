"""The real discord.py client against the fake, event by event."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import discord
import pytest
import yarl
from discord import client as discord_client
from discord.gateway import DiscordWebSocket
from discord.http import Route
from pydantic import SecretStr

from bots import discord as module
from bots import discord_hearing as hearing
from bots.base import Line
from bots.discord import FORGOTTEN, DiscordBot, DiscordSettings, open_discord
from bots.discord_api import Client, call
from core.delivery import MaybeSent, NotSent, Refused, RetryAfter, SendError, Unservable
from core.messages import Channel, Reply
from core.settings import WrongSettings, read
from tests.fakes.discord_server import EPOCH_MS, DiscordServer, Fault
from tests.fakes.ears import Ears

CLOUDFLARES = [403, 40333, "internal network error"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hearing, "MARK_EVERY", 0.05)
    monkeypatch.setattr(hearing, "AGAIN", 0.05)

    async def at_once(client: discord.Client, shard: int | None, *, initial: bool = False) -> None: ...

    monkeypatch.setattr(discord.Client, "before_identify_hook", at_once)  # five seconds before each new session


@pytest.fixture
async def server() -> AsyncIterator[DiscordServer]:
    async with DiscordServer() as opened:
        yield opened


def bot_for(server: DiscordServer, token: str = "", content: bool = False) -> DiscordBot:
    bot = open_discord(
        DiscordSettings(
            discord_token=SecretStr(token or server.token),
            discord_message_content=content,
            discord_api_base=server.base,
            discord_gateway_url=server.gateway,
        )
    )
    bot.guild_ready_timeout = 0.1
    return bot


@contextlib.asynccontextmanager
async def serving(server: DiscordServer, ears: Ears, content: bool = False) -> AsyncIterator[DiscordBot]:
    bot = bot_for(server, content=content)
    task = asyncio.create_task(bot.serve(ears.chat))
    try:
        await server.until(connected=True)
        yield bot
    finally:
        if task.done():
            task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(true: Callable[[], bool], timeout: float = 30) -> None:
    async with asyncio.timeout(timeout):
        while not true():
            await asyncio.sleep(0.01)


def reply(server: DiscordServer, channel: str, to: str, text: str = "Hello.", nonce: str = "n" * 20) -> Reply:
    return Reply(1, Channel("discord", channel), to, text, nonce)


async def test_it_hears_direct_messages_mentions_and_replies_and_nothing_else(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    thread, direct = server.channel("a thread", thread_of=general), server.direct("ann")
    async with serving(server, ears) as bot:
        asked = server.say(general, "ann", ", are you there?", mention=True)
        await until(lambda: len(ears.heard) == 1)
        sent = await bot.send(reply(server, general, asked))
        server.say(general, "ann", "not to you")
        server.say(general, "ann", "@everyone look")
        server.say(general, "robot", "hi", mention=True, bot=True)
        server.say(general, "hook", "hi", mention=True, webhook_id="5")
        server.say(general, "ann", "pinned", mention=True, type=6)
        server.say(general, "ann", "", mention=True)
        server.say(general, "bob", "why?", reply_to=sent, mentions=[server.me])
        server.say(thread, "bob", "in here", mention=True)
        server.say(direct, "ann", "psst")
        await until(lambda: len(ears.heard) == 4)
    assert ears.texts == ["are you there?", "why?", "in here", "psst"]
    first, _, third, last = ears.heard
    assert (first.channel, first.author.name, first.server) == (Channel("discord", general), "ann", server.guild)
    assert third.channel.id == thread and (last.channel.id, last.server) == (direct, "")


async def test_a_burst_is_heard_in_order(server: DiscordServer) -> None:
    ears, places = Ears(), [server.channel(f"c{i}") for i in range(5)]
    async with serving(server, ears):
        for number in range(40):
            server.say(places[number % 5], "ann", str(number), mention=True)
        await until(lambda: len(ears.heard) == 40)
    assert ears.texts == [str(number) for number in range(40)]


async def test_a_reply_pings_nobody_and_shows_no_previews(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears) as bot:
        asked = server.say(general, "ann", "hi", mention=True)
        await bot.send(reply(server, general, asked, "@everyone https://example.org"))
    (sent,) = server.ledger
    assert sent.body["allowed_mentions"] == {"parse": [], "replied_user": False}
    assert sent.body["flags"] & 4 and sent.body["enforce_nonce"] and sent.reply_to == asked


async def test_what_was_answered_is_gone_the_answer_is_not(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears) as bot:
        asked = server.say(general, "ann", "hi", mention=True)
        server.delete(general, asked)
        server.faults = [Fault("error", value=[400, 50035, "Invalid Form Body: message_reference: Unknown message"])]
        await bot.send(reply(server, general, asked))
        await until(lambda: [message.kind for message in ears.heard] == ["ask", "delete"])
    assert [sent.text for sent in server.ledger] == ["Hello."]


@pytest.mark.parametrize("code", [160002, 160009])
async def test_where_the_history_may_not_be_read_the_answer_is_no_reply(server: DiscordServer, code: int) -> None:
    general = server.channel("general")
    server.no_history[general] = code
    async with serving(server, Ears()) as bot:
        asked = server.say(general, "ann", "hi", mention=True)
        assert await bot.send(reply(server, general, asked)) == server.ledger[0].id
        assert await bot.find_sent(reply(server, general, asked)) is None, "nobody can tell"
    assert [(sent.text, sent.reply_to) for sent in server.ledger] == [("Hello.", None)]


@pytest.mark.parametrize(
    ("fault", "ending"),
    [
        (Fault("error", value=[401, 0, "401: Unauthorized"], times=9), NotSent),
        (Fault("error", value=[403, 50001, "Missing Access"], times=9), Refused),
        (Fault("error", value=[404, 10003, "Unknown Channel"], times=9), Refused),
        (Fault("error", value=[503, 0, "unavailable"], times=9), MaybeSent),
        (Fault("page", times=9), MaybeSent),
        (Fault("page", value=403, times=9), MaybeSent),
        (Fault("page", value=404, times=9), MaybeSent),
        (Fault("error", value=CLOUDFLARES, times=9), MaybeSent),
        (Fault("flood", value=300.0, times=9), RetryAfter),
        (Fault("reset_before", times=9), MaybeSent),
        (Fault("reset_after", times=9), MaybeSent),
    ],
)
async def test_how_a_send_can_end(server: DiscordServer, fault: Fault, ending: type[SendError]) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears) as bot:
        asked = server.say(general, "ann", "hi", mention=True)
        server.faults = [fault]
        with pytest.raises(ending) as caught:
            await bot.send(reply(server, general, asked))
        assert server.token not in str(caught.value)
        if isinstance(caught.value, RetryAfter):
            assert caught.value.seconds == 300


async def test_without_a_connection_nothing_was_sent(server: DiscordServer) -> None:
    async with serving(server, Ears()) as bot:
        Route.BASE = "http://127.0.0.1:9/api/v10"
        with pytest.raises(NotSent):
            await bot.send(reply(server, server.channel("general"), "1"))


async def test_a_send_that_broke_off_after_it_arrived_is_found_and_not_doubled(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears) as bot:
        asked = server.say(general, "ann", "hi", mention=True)
        server.faults = [Fault("reset_after")]
        with pytest.raises(MaybeSent):
            await bot.send(reply(server, general, asked))
        assert await bot.find_sent(reply(server, general, asked)) == server.ledger[0].id
        assert await bot.find_sent(reply(server, general, asked, "Another part.")) == ""
        assert await bot.send(reply(server, general, asked)) == server.ledger[0].id, "the nonce is the same"
    assert len(server.ledger) == 1


async def test_a_reply_in_doubt_whose_question_is_gone_is_found(server: DiscordServer) -> None:
    general = server.channel("general")
    async with serving(server, Ears()) as bot:
        asked = server.say(general, "ann", "hi", mention=True)
        server.delete(general, asked)
        server.say(general, "ann", "Hello.")
        assert await bot.find_sent(reply(server, general, asked)) == "", "somebody else's"
        id = await bot.send(reply(server, general, asked))
        assert server.ledger[0].id == id and await bot.find_sent(reply(server, general, asked)) == id
        assert await bot.find_sent(reply(server, general, asked, "Another part.")) == ""
        later = replace(reply(server, general, asked), created_at=datetime.now(UTC) + timedelta(minutes=2))
        assert await bot.find_sent(later) == "", "it was said before"
    bot = bot_for(server)
    task = asyncio.create_task(bot.serve(Ears().chat))
    assert await bot.find_sent(reply(server, general, asked)) == id, "asked before it is logged in"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_one_channel_that_must_wait_delays_no_other(server: DiscordServer) -> None:
    ears, slow, fast = Ears(), server.channel("slow"), server.channel("fast")
    async with serving(server, ears) as bot:
        server.faults = [Fault("flood", channel=slow, value=2.0)]
        waiting = asyncio.create_task(bot.send(reply(server, slow, "1", nonce="a" * 20)))
        await asyncio.sleep(0.2)
        await bot.send(reply(server, fast, "1", nonce="b" * 20))
        assert not waiting.done()
        await waiting
    assert [sent.channel for sent in server.ledger] == [fast, slow]


@pytest.mark.parametrize(
    "fault", [Fault("flood_global", path="/typing", value=1.0), Fault("page", path="/typing", value=429)]
)
async def test_a_global_limit_or_ban_holds_for_all_and_ends_though_who_met_it_went_away(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr("bots.discord_api.SHUT_OUT", 1.0)
    ears, general, other = Ears(), server.channel("general"), server.channel("other")
    async with serving(server, ears) as bot:
        server.faults = [fault]
        typing = asyncio.create_task(bot.typing(Channel("discord", general)))
        await until(lambda: any(path.endswith("/typing") for _, path, _ in server.calls))
        await asyncio.sleep(0.2)
        typing.cancel()
        await asyncio.gather(typing, return_exceptions=True)
        with pytest.raises(RetryAfter) as caught:
            await bot.send(reply(server, other, "1"))
        assert not server.ledger and 0 < caught.value.seconds <= 1
        await asyncio.sleep(caught.value.seconds)
        await asyncio.wait_for(bot.send(reply(server, other, "1")), 20)


async def test_all_channels_together_keep_discords_limit(server: DiscordServer) -> None:
    """Fifty calls a second, whatever they are; what can be left out is, where a message would wait for it."""
    places = [server.channel(f"c{number}") for number in range(130)]
    async with serving(server, Ears()) as bot:

        async def answer(place: str) -> None:
            await bot.typing(Channel("discord", place))
            await bot.turn(Channel("discord", place))
            await bot.send(reply(server, place, "1", nonce=f"n{place}"))

        await asyncio.gather(*map(answer, places))
    assert len(server.ledger) == 130 and 1 <= len(server.typing) < 65 and keeps_the_limit(server.limited)


def keeps_the_limit(times: list[float]) -> bool:
    return all(late - early > 0.9 for early, late in zip(times, times[50:], strict=False))


async def test_what_is_owed_at_a_start_keeps_discords_limit(server: DiscordServer) -> None:
    places = [server.channel(f"c{number}") for number in range(110)]
    bot = bot_for(server)

    async def answer(place: str) -> None:
        await bot.turn(Channel("discord", place))
        await bot.send(reply(server, place, "1", nonce=f"n{place}"))

    owed = asyncio.gather(*map(answer, places))
    turn = asyncio.create_task(bot.turn(Channel("discord", places[0])))
    await asyncio.sleep(0.05)
    assert not turn.done(), "nothing is under way before the login"
    task = asyncio.create_task(bot.serve(Ears().chat))
    await asyncio.gather(owed, turn)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(server.ledger) == 110 and keeps_the_limit(server.limited)


async def test_calls_that_waited_after_their_turn_keep_the_limit_and_stop_at_a_ban(server: DiscordServer) -> None:
    """As for a commit, or for the limit of their route: they would all come at once."""
    places = [server.channel(f"c{number}") for number in range(110)]
    async with serving(server, Ears()) as bot:
        await asyncio.gather(*(bot.turn(Channel("discord", place)) for place in places))
        sending = [asyncio.create_task(bot.send(reply(server, place, "1", nonce=f"n{place}"))) for place in places]
        server.faults = [Fault("flood_global", channel=places[60], value=20.0)]
        ends = await asyncio.gather(*sending, return_exceptions=True)
    assert keeps_the_limit(server.limited) and 60 <= len(server.ledger) < 90
    assert all(isinstance(end, str | RetryAfter) for end in ends)
    assert sum(isinstance(end, str) for end in ends) == len(server.ledger)


async def test_a_login_that_must_wait_says_for_how_long(server: DiscordServer) -> None:
    server.faults = [Fault("flood_global", "GET", path="/users/@me", value=1234.0)]
    with pytest.raises(RetryAfter) as caught:
        await bot_for(server).serve(Ears().chat)
    assert caught.value.seconds == 1234.0


async def test_a_gateway_that_is_deaf_for_a_while_is_told(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Line, "PATIENCE", 0.2)
    monkeypatch.setattr(module.Backoff, "delay", lambda _: 0.02)
    server.closes_sessions = 10**9
    bot = bot_for(server)
    assert not bot.line.trouble
    task = asyncio.create_task(bot.serve(Ears().chat))
    await until(lambda: bot.line.trouble == "no session on Discord's gateway")
    assert "Discord ended a session before it began (code 4000)" in caplog.text
    server.closes_sessions = 0
    await server.until(connected=True)
    await until(lambda: not bot.line.trouble)
    await server.drop()  # a session is resumed
    await until(lambda: server.resumes == 1)
    await asyncio.sleep(0.3)
    assert not bot.line.trouble
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_command_that_is_not_ours_is_a_line(server: DiscordServer, caplog: pytest.LogCaptureFixture) -> None:
    general = server.channel("general")
    async with serving(server, Ears()):
        asked = asyncio.create_task(server.command(general, "ann", "imagine"))
        await until(lambda: "could not be obeyed: Application command 'imagine' not found" in caplog.text)
        asked.cancel()
    assert not any(record.exc_info for record in caplog.records)


async def test_a_limit_for_all_is_one_line_and_no_failure_of_a_history(
    server: DiscordServer, caplog: pytest.LogCaptureFixture
) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        await until(lambda: general in ears.marks)
    server.say(general, "ann", "away", mention=True)
    server.faults = [Fault("flood_global", "GET", times=7, value=0.05)]
    async with serving(server, ears):
        await until(lambda: ears.texts == ["away"], 20)
    assert "Discord takes no calls for 0.1 s" in caplog.text and "is read later" not in caplog.text


async def test_it_goes_through_the_environments_proxy(server: DiscordServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[bytes]()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    async with await asyncio.start_server(proxy, "127.0.0.1") as listening:
        address = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        monkeypatch.setenv("HTTP_PROXY", address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        async with serving(server, Ears()):  # past it
            assert not asked
        bot = bot_for(server)
        monkeypatch.setattr(Route, "BASE", "http://discord.test/api/v10")
        with pytest.raises(ConnectionError):
            await bot.serve(Ears().chat)
        assert asked[0].startswith(b"GET http://discord.test/api/v10/")
        monkeypatch.delenv("HTTP_PROXY")
        monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
        with pytest.raises(Unservable, match=r"^ALL_PROXY: Discord is reached through proxies of HTTP alone"):
            await bot.serve(Ears().chat)


@pytest.mark.parametrize("asked", [None, "soon", float("nan"), -5])
async def test_a_wait_that_is_no_number_is_a_second(server: DiscordServer, asked: object) -> None:
    general = server.channel("general")
    async with serving(server, Ears()) as bot:
        server.faults = [Fault("flood", value=asked)]
        await asyncio.wait_for(bot.send(reply(server, general, "1")), 30)
    assert len(server.ledger) == 1


async def test_a_reply_in_doubt_is_found_behind_much_chatter(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    general = server.channel("general")
    async with serving(server, Ears()) as bot:
        asked = server.say(general, "ann", "hi", mention=True)
        for number in range(250):
            server.say(general, "bob", f"chatter {number}")
        await bot.send(reply(server, general, asked))
        assert await bot.find_sent(reply(server, general, asked)) == server.ledger[0].id
        monkeypatch.setattr(module, "LOOK_BACK", 2)
        assert await bot.find_sent(reply(server, general, asked)) is None, "nobody can tell"


async def test_typing_is_shown(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears) as bot:
        await bot.typing(Channel("discord", general))
    assert [channel for _, channel in server.typing] == [general]


async def test_reset_is_a_slash_command(server: DiscordServer) -> None:
    ears, general, direct = Ears(), server.channel("general"), server.direct("ann")
    async with serving(server, ears):
        await until(lambda: bool(server.commands))
        assert await server.command(general, "ann", "reset") == FORGOTTEN
        assert await server.command(direct, "ann", "reset") == FORGOTTEN
        ears.refuse = 1
        assert "again" in await server.command(general, "ann", "reset")
    assert [channel.id for channel in ears.resets] == [general, direct]


@pytest.mark.parametrize("done", ["not done", "done"])
async def test_a_reset_that_discord_does_not_wait_for_is_one_line(
    server: DiscordServer, caplog: pytest.LogCaptureFixture, done: str
) -> None:
    ears, general = Ears(), server.channel("general")
    gone = Fault("error", path="", value=[404, 10062, "Unknown interaction"])
    async with serving(server, ears):
        await until(lambda: bool(server.commands))
        server.faults = [gone] if done == "not done" else [Fault("delay", path="/callback", value=0), gone]
        command = asyncio.create_task(server.command(general, "ann", "reset"))
        await until(lambda: "could not be answered" in caplog.text)
        command.cancel()
    assert f"/reset in channel {general}, {done}, could not be answered: 404 Not Found" in caplog.text
    assert "Traceback" not in caplog.text and len(ears.resets) == (done == "done")


async def test_reset_is_offered_until_discord_takes_it(server: DiscordServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "backoff", lambda tries, longest, first: 0.01)
    server.faults = [Fault("error", "PUT", "/commands", times=2, value=[503, 0, "down"])]
    async with serving(server, Ears()):
        await until(lambda: bool(server.commands))


async def test_what_was_said_before_a_reset_is_before_it(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        await until(lambda: general in ears.marks)
    server.say(general, "ann", "said while away", mention=True)
    server.faults = [Fault("error", "GET", value=[503, 0, "down"])]
    async with serving(server, ears) as bot:
        await until(lambda: bool(server.commands))
        assert await server.command(general, "ann", "reset") == FORGOTTEN
        ears.full = True
        server.say(general, "ann", "not stored yet", mention=True)
        calls = ears.calls
        resetting = asyncio.create_task(server.command(general, "ann", "reset"))
        await until(lambda: ears.calls > calls)
        await until(lambda: sum("/interactions/" in path for _, path, _ in server.calls) == 2)  # Discord does not wait
        server.say(general, "ann", "said after it", mention=True)
        await until(lambda: bot._hearing._inbox.qsize() >= 3)
        ears.full = False
        await resetting
        await until(lambda: "said after it" in ears.order)
    assert ears.order == ["said while away", "reset", "not stored yet", "reset", "said after it"]


async def test_a_reset_waits_for_no_history_that_does_not_come(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESET_SECONDS", 0.1)
    ears, direct = Ears(), server.direct("ann")
    ears.marks = {direct: server._id()}
    server.faults = [Fault("error", "GET", times=-1, value=[503, 0, "down"])]
    async with serving(server, ears):
        await until(lambda: bool(server.commands))
        assert "again" in await server.command(direct, "ann", "reset")
    assert not ears.resets


async def test_edits_and_deletes_are_heard(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        id = server.say(general, "ann", "one", mention=True)
        server.edit(general, id, f"<@{server.me['id']}> two")
        server.delete(general, id)
        await until(lambda: len(ears.heard) == 3)
    assert [(message.kind, message.text) for message in ears.heard] == [("ask", "one"), ("edit", "two"), ("delete", "")]


async def test_an_edit_that_leaves_no_text_takes_the_message_back(server: DiscordServer) -> None:
    ears, general, direct = Ears(), server.channel("general"), server.direct("ann")
    async with serving(server, ears):
        said = [server.say(place, "ann", "my secret", mention=True) for place in (general, direct, general)]
        for place, id, left in zip((general, direct, general), said, ("", "", f"<@{server.me['id']}>, "), strict=True):
            server.edit(place, id, left)
        await until(lambda: len(ears.heard) == 6)
    assert [(message.kind, message.text, message.id) for message in ears.heard[3:]] == [
        ("delete", "", id) for id in said
    ]


async def test_a_mention_that_is_edited_in_is_heard_once(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    long_ago = str((int((time.time() - 600) * 1000) - EPOCH_MS) << 22)
    async with serving(server, ears):
        said = [server.say(general, "ann", "hi", id=id) for id in (long_ago, server._id())]
        for id in [*said, said[1]]:
            server.edit(general, id, f"<@{server.me['id']}> hi there")
        await until(lambda: len(ears.heard) == 4)
    assert [(message.kind, message.id) for message in ears.heard if message.kind == "ask"] == [("ask", said[1])]


async def test_a_preview_that_appears_is_no_edit(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        id = server.say(general, "ann", "see https://example.org", mention=True)
        seen = {**(server.find(general, id) or {}), "guild_id": server.guild, "embeds": [{"type": "link"}]}
        server.publish_raw("MESSAGE_UPDATE", seen)
        server.edit(general, id, f"<@{server.me['id']}> two")
        await until(lambda: len(ears.heard) == 2)
    assert ears.texts == ["see https://example.org", "two"]


async def test_an_event_nobody_can_read_ends_nothing(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        server.publish_raw("MESSAGE_CREATE", {"id": "x", "channel_id": general, "author": None})
        server.publish_raw("MESSAGE_UPDATE", {"nonsense": True})
        server.publish_raw("GUILD_CREATE", {"id": 5})
        server.say(general, "ann", "still there?", mention=True)
        await until(lambda: bool(ears.heard) and bool(ears.failed))
    assert ears.texts == ["still there?"] and "unreadable" in ears.failed[0][1]


async def test_what_cannot_be_stored_now_is_kept_and_its_mark_waits(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        await until(lambda: server.identifies == 1)
        await asyncio.sleep(0.2)
        ears.refuse = 3
        id = server.say(general, "ann", "one", mention=True)
        server.say(general, "ann", "chatter")
        await until(lambda: ears.refuse < 2)
        assert int(ears.marks.get(general, 0)) < int(id)
        await until(lambda: ears.texts == ["one"] and int(ears.marks.get(general, 0)) > int(id))


async def test_while_messages_are_refused_no_mark_passes_them_and_they_keep_their_order(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        await until(lambda: general in ears.marks)
        ears.full = True
        id = server.say(general, "ann", "one", mention=True)
        calls = ears.calls
        await until(lambda: ears.calls > calls)
        server.say(general, "ann", "two", mention=True)
        other = server.channel("other")
        await until(lambda: other in ears.marks)  # marks are written all the while
        await asyncio.sleep(0.2)
        assert int(ears.marks[general]) < int(id)
        ears.full = False
        await until(lambda: ears.texts == ["one", "two"] and int(ears.marks[general]) > int(id))


async def test_a_first_mark_that_is_refused_is_written_later(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        await until(lambda: general in ears.marks)
        ears.refuse = 1
        new = server.channel("new")
        await until(lambda: new in ears.marks, 10)
        assert not ears.refuse


async def test_what_is_gone_has_no_mark(server: DiscordServer) -> None:
    ears, general, made = Ears(), server.channel("general"), server.channel("made")
    thread, post = server.channel("a thread", thread_of=general), server.channel("a post", thread_of=general)
    ears.marks = {server._id(): server._id()}  # of a server that was left
    async with serving(server, ears):
        await until(lambda: set(ears.marks) == {general, made, thread, post})
        server.publish_raw("CHANNEL_DELETE", server.channels[made])
        server.publish_raw("THREAD_DELETE", server.channels[post])
        place = server.channels[thread]
        server.publish_raw("THREAD_UPDATE", place | {"thread_metadata": place["thread_metadata"] | {"archived": True}})
        await until(lambda: set(ears.marks) == {general})
        server.publish_raw("THREAD_UPDATE", place)
        server.say(thread, "ann", "open again", mention=True)
        await until(lambda: set(ears.marks) == {general, thread})
        server.publish_raw("CHANNEL_DELETE", server.channels[general])  # of the threads in it nothing is said
        await until(lambda: not ears.marks)


async def test_a_thread_that_was_archived_while_away_is_looked_for_once(server: DiscordServer) -> None:
    ears, direct, general = Ears(), server.direct("ann"), server.channel("general")
    thread = server.channel("a thread", thread_of=general)
    async with serving(server, ears):
        server.say(direct, "ann", "before")
        server.say(thread, "bob", "chatter")
        await until(lambda: set(ears.marks) == {direct, general, thread})
    server.channels[thread]["thread_metadata"]["archived"] = True
    async with serving(server, ears):
        await until(lambda: set(ears.marks) == {direct, general}, 5)


async def test_channels_of_a_server_that_was_left_are_not_looked_for_before_people(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hearing, "CATCH_UP_DIRECT", 1)
    monkeypatch.setattr(hearing, "GUILDS_SECONDS", 0.1)
    ears, direct, general = Ears(), server.direct("ann"), server.channel("general")
    thread = server.channel("a thread", thread_of=general)
    async with serving(server, ears):
        server.say(direct, "ann", "before")
        chatter = [server.say(place, "bob", "chatter") for place in (general, thread)]
        await until(lambda: [ears.marks.get(place) for place in (general, thread)] == chatter)
        server.publish_raw("GUILD_DELETE", {"id": server.guild})
        server._away = True
        await until(lambda: set(ears.marks) == {direct}, 5)
    server.say(direct, "ann", "away")
    async with serving(server, ears):
        await until(lambda: ears.texts[-1] == "away", 5)


async def test_what_is_empty_or_hidden_is_not_read_at_every_start(server: DiscordServer) -> None:
    ears, empty, hidden = Ears(), server.channel("empty"), server.channel("hidden")
    async with serving(server, ears):
        await until(lambda: set(ears.marks) == {empty, hidden})
    said = server.say(hidden, "bob", "about you", mention=True)
    server.faults = [Fault("error", "GET", channel=hidden, value=[403, 50001, "Missing Access"])]
    async with serving(server, ears):
        await until(lambda: ears.marks[hidden] == said)
    async with serving(server, ears):
        server.say(empty, "ann", "hi", mention=True)
        await until(lambda: bool(ears.heard))
    assert ears.texts == ["hi"]
    assert [path for _, path, _ in server.calls if "/messages" in path] == [f"/channels/{hidden}/messages"]


@pytest.mark.parametrize("trouble", ["drop", "break", "op 7", "invalid", "silence"])
async def test_nothing_is_missed_when_the_gateway_fails(
    server: DiscordServer, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "silence":
        monkeypatch.setattr(DiscordBot, "heartbeat_timeout", 3.0)
    ears, general, direct = Ears(), server.channel("general"), server.direct("ann")
    async with serving(server, ears):
        for place in (general, direct):
            server.say(place, "ann", "before", mention=True)
        await until(lambda: len(ears.heard) == 2 and len(ears.marks) == 2)
        if trouble == "drop":
            await server.drop(4000)
        elif trouble == "break":
            await server.drop(1006)
        elif trouble == "op 7":
            await server.ask_to_reconnect()
        elif trouble == "invalid":
            await server.invalidate()
        else:
            server.go_silent()
        for place in (general, direct):
            server.say(place, "ann", "meanwhile", mention=True)
        await until(lambda: sorted(ears.texts) == ["before"] * 2 + ["meanwhile"] * 2, timeout=90)
        await server.until(connected=True)
        server.say(general, "ann", "after", mention=True)
        await until(lambda: ears.texts[-1] == "after")


@pytest.mark.parametrize("forgotten", [False, True])
async def test_where_the_last_session_was_there_may_be_nobody_any_more(server: DiscordServer, forgotten: bool) -> None:
    server.resume_gateway = "ws://127.0.0.1:9/"
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        await until(lambda: general in ears.marks)
        server.refuse_sessions = int(forgotten)
        await server.drop(4000)
        server.say(general, "ann", "hello", mention=True)
        await until(lambda: ears.texts == ["hello"])
    assert (server.identifies, server.resumes) == ((2, 0) if forgotten else (1, 1))


async def test_a_quiet_gateway_is_not_taken_for_a_dead_one(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Discord's heartbeats and our patience, 15 times as fast, for longer than either."""
    server.heartbeat_seconds = 41.25 / 15
    monkeypatch.setattr(DiscordBot, "heartbeat_timeout", DiscordBot.heartbeat_timeout / 15)
    async with serving(server, Ears()):
        await asyncio.sleep(5.0)
    assert (server.identifies, server.resumes) == (1, 0)


@pytest.mark.parametrize("again", [False, True])
async def test_a_session_that_is_never_confirmed_is_given_up(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, again: bool
) -> None:
    monkeypatch.setattr(module, "CONFIRM_SECONDS", 1.5)
    ears, general = Ears(), server.channel("general")
    ears.marks = {general: server._id()}
    server.unconfirmed = 0 if again else 1
    async with serving(server, ears):
        if again:
            server.unconfirmed = 1
            await server.drop(4000)
            await until(lambda: not server.unconfirmed and not server.connected)
        server.say(general, "ann", "hello", mention=True)
        await until(lambda: ears.texts == ["hello"])
        await asyncio.sleep(2.0)  # this one is confirmed
        server.say(general, "ann", "still there?", mention=True)
        await until(lambda: ears.texts == ["hello", "still there?"])
    assert caplog.messages.count("Discord does not confirm the session, connecting anew") == 1
    assert (server.identifies, server.resumes) == (1 + again, 0)


async def test_what_was_said_while_away_is_heard_in_order_before_what_comes_after(server: DiscordServer) -> None:
    ears, general, quiet, direct = Ears(), server.channel("general"), server.channel("quiet"), server.direct("ann")
    async with serving(server, ears):
        for place in (general, direct):
            server.say(place, "ann", "before", mention=True)
        server.say(quiet, "ann", "chatter")
        await until(lambda: len(ears.heard) == 2 and set(ears.marks) >= {general, quiet, direct})
    for number in range(150):
        server.say(general, "ann", f"away {number}", mention=number % 2 == 0)
    server.say(direct, "ann", "away, direct")
    async with serving(server, ears):
        server.say(general, "ann", "back", mention=True)
        await until(lambda: len(ears.heard) == 2 + 75 + 1 + 1, 8)
        server.say(general, "ann", "live", mention=True)
        await until(lambda: ears.texts[-1] == "live")
    here = [message.text for message in ears.heard if message.channel.id == general]
    assert here == ["before", *(f"away {number}" for number in range(0, 150, 2)), "back", "live"]
    assert all(message.server == server.guild for message in ears.heard if message.channel.id == general)
    missed = {message.text for message in ears.heard if message.missed}
    assert missed - {"back"} == {text for text in ears.texts if text.startswith("away")}


async def test_a_channel_and_a_thread_made_while_away_are_read_from_their_beginning(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        server.say(general, "ann", "before", mention=True)
        await until(lambda: general in ears.marks)
    channel, thread = server.channel("made"), server.channel("a thread", thread_of=general)
    server.say(channel, "ann", "in a new channel", mention=True)
    server.say(thread, "ann", "in a new thread", mention=True)
    async with serving(server, ears):
        await until(lambda: len(ears.heard) == 3)
    assert sorted(ears.texts) == ["before", "in a new channel", "in a new thread"]


async def test_a_thread_made_while_away_from_an_older_message_is_read(server: DiscordServer) -> None:
    """Its id is its first message's, older than what we saw last."""
    ears, general = Ears(), server.channel("general")
    post = server._id()
    async with serving(server, ears):
        server.say(general, "ann", "before", mention=True)
        await until(lambda: general in ears.marks)
    thread = server.channel("a thread", thread_of=general)
    server.channels[post] = server.channels.pop(thread) | {"id": post}
    server.say(post, "ann", "in the thread", mention=True)
    async with serving(server, ears):
        await until(lambda: len(ears.heard) == 2)
    assert ears.texts == ["before", "in the thread"]


async def test_what_was_said_between_kicked_and_invited_again_is_not_heard(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        await until(lambda: general in ears.marks)
    server.say(general, "ann", "good riddance", mention=True)
    await asyncio.sleep(0.01)
    server.joined = datetime.now(UTC).isoformat()
    async with serving(server, ears):
        server.say(general, "ann", "welcome back", mention=True)
        await until(lambda: "welcome back" in ears.texts)
    assert ears.texts == ["welcome back"]


async def test_a_thread_that_is_named_is_not_read_yet(server: DiscordServer) -> None:
    """Because it is new, its first post about to come; or because we are added to it once more."""
    ears, general = Ears(), server.channel("general")
    thread, post = server.channel("a thread", thread_of=general), server._id()
    async with serving(server, ears):
        await until(lambda: thread in ears.marks)
        ears.full = True
        id = server.say(thread, "ann", "not stored yet", mention=True)
        place = server.channels[thread]
        server.publish_raw("THREAD_CREATE", place)
        server.publish_raw("THREAD_CREATE", place | {"id": post, "last_message_id": post, "newly_created": True})
        await until(lambda: post in ears.marks)
    assert int(ears.marks[thread]) < int(id) and int(ears.marks[post]) < int(post)


@pytest.mark.parametrize("away", ["a session lost", "a start"])
async def test_what_a_stranger_wrote_while_away_is_heard_when_they_write_again(
    server: DiscordServer, away: str
) -> None:
    ears, general = Ears(), server.channel("general")

    def write(*texts: str) -> None:
        for text in texts:
            server.say(server.direct("zoe"), "zoe", text)

    async with serving(server, ears):
        server.say(general, "ann", "before", mention=True)
        await until(lambda: int(ears.marks.get(general, 0)) > int(general) and bool(ears.heard))
        if away == "a session lost":
            await server.invalidate()
            write("hello", "are you there?")
            await until(lambda: server.identifies == 2 and server.connected)
            write("hello?")
            await until(lambda: len(ears.heard) == 4)
    if away == "a start":
        write("hello", "are you there?")
        async with serving(server, ears):
            write("hello?")
            await until(lambda: len(ears.heard) == 4)
    assert ears.texts == ["before", "hello", "are you there?", "hello?"]
    assert not any(message.server for message in ears.heard[1:])


async def test_what_a_stranger_wrote_before_the_first_start_is_not_heard(server: DiscordServer) -> None:
    ears, zoe = Ears(), server.direct("zoe")
    server.say(zoe, "zoe", "long ago")
    async with serving(server, ears):
        server.say(zoe, "zoe", "now")
        await until(lambda: bool(ears.heard))
    assert ears.texts == ["now"]


async def test_offline_for_longer_than_a_day_the_old_expires_and_the_newest_of_a_channel_is_heard(
    server: DiscordServer, caplog: pytest.LogCaptureFixture
) -> None:
    ears, general, quiet = Ears(), server.channel("general"), server.channel("quiet")

    def hours_ago(hours: float) -> str:
        return str((int((time.time() - 3600 * hours) * 1000) - EPOCH_MS) << 22)

    ears.marks = {place: hours_ago(72) for place in (general, quiet)}
    for hours in (40, 25, 23):
        server.say(general, "ann", f"{hours} hours ago", mention=True, id=hours_ago(hours))
    server.say(quiet, "ann", "two days ago", mention=True, id=hours_ago(48))
    server.say(general, "ann", "now", mention=True)
    async with serving(server, ears):
        await until(lambda: len(ears.heard) == 3 and len(ears.marks) == 2)
        await until(lambda: min(int(mark) for mark in ears.marks.values()) > int(hours_ago(49)))
    assert sorted(ears.texts) == ["23 hours ago", "now", "two days ago"]
    assert [message.text for message, _ in ears.expired] == ["40 hours ago", "25 hours ago"] and not ears.failed
    assert f"missed in channel {general} and too old to be answered now: 2 messages to us" in caplog.messages


async def test_a_history_out_of_reach_is_read_later_and_before_what_comes_after(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        server.say(general, "ann", "before", mention=True)
        await until(lambda: general in ears.marks)
    server.say(general, "ann", "away", mention=True)
    server.faults.append(Fault("error", "GET", times=-1, value=[503, 0, "down"]))
    async with serving(server, ears):
        await until(lambda: sum(method == "GET" and "/messages" in path for method, path, _ in server.calls) >= 6)
        server.say(general, "ann", "back", mention=True)
        server.faults.clear()
        await until(lambda: len(ears.heard) == 3)
    assert ears.texts == ["before", "away", "back"]


@pytest.mark.parametrize("trouble", [[429, 0, "limited"], [502, 0, "bad gateway"]])  # a second each
async def test_a_history_that_must_wait_holds_up_no_other(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch, trouble: list[Any]
) -> None:
    monkeypatch.setattr(hearing, "READERS", 1)
    ears, places = Ears(), [server.channel(f"c{number}") for number in range(3)]
    async with serving(server, ears):
        await until(lambda: set(ears.marks) >= set(places))
    for place in places:
        server.say(place, "ann", "away", mention=True)
    server.faults = [Fault("error", "GET", channel=places[0], times=2, value=trouble)]
    async with serving(server, ears):
        server.say(places[0], "ann", "back", mention=True)
        await until(lambda: len(ears.heard) == 4)
    heard = [(message.channel.id, message.text) for message in ears.heard]
    assert heard == [(places[1], "away"), (places[2], "away"), (places[0], "away"), (places[0], "back")]


async def test_what_is_said_where_nothing_is_read_waits_for_no_history(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hearing, "CATCH_UP_DIRECT", 1)
    ears, quiet, loud = Ears(), server.direct("ann"), server.direct("bob")
    ears.marks = {place: server._id() for place in (quiet, loud)}
    server.faults = [Fault("error", "GET", times=-1, value=[503, 0, "down"])]
    async with serving(server, ears):
        await until(lambda: any("/messages" in path for _, path, _ in server.calls))
        server.say(quiet, "ann", "now")
        await until(lambda: ears.texts == ["now"], 10)


def slow_reads(
    monkeypatch: pytest.MonkeyPatch, general: str, other: str
) -> tuple[list[str], asyncio.Event, asyncio.Event]:
    """One history at a time: the channels as they are read, and what the first of `general` and the second of `other`
    wait for."""
    reads: list[str] = []
    old_read, new_read = asyncio.Event(), asyncio.Event()

    async def slow(client: Client, route: Route, **arguments: Any) -> Any:
        answer = await call(client, route, **arguments)
        reads.append(str(route.channel_id))
        if reads[-1] == general and reads.count(general) == 1:
            await old_read.wait()
        elif reads[-1] == other and reads.count(other) == 2:
            await new_read.wait()
        return answer

    monkeypatch.setattr(hearing, "call", slow)
    monkeypatch.setattr(hearing, "READERS", 1)
    return reads, old_read, new_read


async def test_a_gap_that_opens_while_an_older_one_is_read_is_not_jumped(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ears, other, general = Ears(), server.channel("other"), server.channel("general")
    async with serving(server, ears):
        await until(lambda: set(ears.marks) >= {general, other})
    reads, old_read, new_read = slow_reads(monkeypatch, general, other)
    for place in (other, general):
        server.say(place, "ann", "one", mention=True)
    async with serving(server, ears):
        await until(lambda: general in reads)
        await server.invalidate()
        for place in (other, general):
            server.say(place, "ann", "two", mention=True)
        await until(lambda: reads.count(other) == 2)
        old_read.set()
        await asyncio.sleep(0.2)
        server.say(general, "ann", "three", mention=True)
        await asyncio.sleep(0.5)
        new_read.set()
        await until(lambda: len(ears.heard) == 5)
    assert [message.text for message in ears.heard if message.channel.id == general] == ["one", "two", "three"]


async def test_what_waits_behind_a_gap_is_not_lost_when_another_opens(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        id = server.say(general, "ann", "one", mention=True)
        await until(lambda: len(ears.heard) == 1 and int(ears.marks.get(general, 0)) >= int(id))
        server.faults = [Fault("error", "GET", times=-1, value=[503, 0, "down"])]
        await server.invalidate()
        server.say(general, "ann", "away", mention=True)
        await until(lambda: any("/messages" in path for _, path, _ in server.calls))
        server.edit(general, id, f"<@{server.me['id']}> uno")  # no history tells of it
        await asyncio.sleep(0.2)
        await server.invalidate()
        await until(lambda: server.identifies == 3 and server.connected)
        server.faults.clear()
        await until(lambda: len(ears.heard) == 3)
    assert ears.texts == ["one", "away", "uno"]


async def test_what_was_missed_in_an_outage_of_a_server_is_heard_before_what_comes_after(server: DiscordServer) -> None:
    ears, places = Ears(), [server.channel(f"c{number}") for number in range(3)]
    async with serving(server, ears):
        await until(lambda: set(ears.marks) >= set(places))
        server.outage()
        for place in places:
            server.say(place, "ann", "away", mention=True)
        server.faults = [Fault("delay", "GET", times=-1, value=0.2)]
        server.outage_ends()
        for place in places:
            server.say(place, "ann", "back", mention=True)
        await until(lambda: len(ears.heard) == 6)
    for place in places:
        assert [message.text for message in ears.heard if message.channel.id == place] == ["away", "back"]


async def test_an_outage_while_an_older_one_is_read_is_not_jumped(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ears, other, general = Ears(), server.channel("other"), server.channel("general")
    reads, old_read, new_read = slow_reads(monkeypatch, general, other)
    async with serving(server, ears):
        await until(lambda: set(ears.marks) >= {general, other})
        for text in ("one", "two"):
            server.outage()
            for place in (other, general):
                server.say(place, "ann", text, mention=True)
            server.outage_ends()
            await until(lambda: general in reads)
        await asyncio.sleep(0.2)
        old_read.set()
        await until(lambda: reads.count(other) == 2)
        server.say(general, "ann", "three", mention=True)
        await asyncio.sleep(0.5)
        new_read.set()
        await until(lambda: len(ears.heard) == 5)
    assert [message.text for message in ears.heard if message.channel.id == general] == ["one", "two", "three"]


async def test_a_server_that_comes_late_is_read_though_many_channels_are_not(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hearing, "CATCH_UP_DIRECT", 1)
    monkeypatch.setattr(hearing, "GUILDS_SECONDS", 0.1)
    ears, places = Ears(), [server.channel(f"c{number}") for number in range(3)]
    async with serving(server, ears):
        await until(lambda: set(ears.marks) >= set(places))
    server.outage()
    for place in places:
        server.say(place, "ann", "away", mention=True)
    server.faults = [Fault("delay", "GET", path=place, times=-1, value=0.9) for place in places]
    server.faults.append(Fault("delay", "GET", times=-1, value=1.5))
    async with serving(server, ears):  # they come while it is asked whether they are late
        await until(lambda: any(path.startswith("/channels/") for _, path, _ in server.calls))
        server.outage_ends()
        await asyncio.sleep(0.5)
        for place in places:
            server.say(place, "ann", "back", mention=True)
        await until(lambda: len(ears.heard) == 6)
    for place in places:
        assert [message.text for message in ears.heard if message.channel.id == place] == ["away", "back"]


async def test_servers_that_are_late_take_no_place_from_people(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hearing, "CATCH_UP_DIRECT", 1)
    monkeypatch.setattr(hearing, "GUILDS_SECONDS", 0.5)
    ears, direct, places = Ears(), server.direct("ann"), [server.channel(f"c{number}") for number in range(3)]
    async with serving(server, ears):
        server.say(direct, "ann", "before")
        chatter = [server.say(place, "bob", "chatter") for place in places]
        await until(lambda: [ears.marks.get(place) for place in places] == chatter)
    server.outage()
    server.say(direct, "ann", "away")
    for place in places:
        server.say(place, "ann", "away", mention=True)
    async with serving(server, ears):
        await until(lambda: ears.texts[-1] == "away")
        server.outage_ends()
        await until(lambda: ears.texts.count("away") == 4, 10)


async def test_when_very_much_was_missed_the_newest_is_heard_and_the_rest_expires(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hearing, "CATCH_UP_MESSAGES", 200)
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        await until(lambda: general in ears.marks)
    for number in range(330):
        server.say(general, "ann", str(number), mention=True)
    async with serving(server, ears):
        server.say(general, "ann", "now", mention=True)
        await until(lambda: ears.texts[-1:] == ["now"])
    assert ears.texts == [*map(str, range(131, 330)), "now"] or ears.texts == [*map(str, range(130, 330)), "now"]
    assert [message.text for message, _ in ears.expired] == list(map(str, range(330 - len(ears.texts) + 1)))


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault("page", "GET", times=2, value=status) for status in (200, 403, 404)),
        Fault("error", "GET", times=2, value=CLOUDFLARES),
    ],
)
async def test_an_answer_that_is_not_discords_closes_no_gap(server: DiscordServer, fault: Fault) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        await until(lambda: general in ears.marks)
    server.say(general, "ann", "away", mention=True)
    server.faults = [fault]
    async with serving(server, ears):
        server.say(general, "ann", "back", mention=True)
        await until(lambda: len(ears.heard) == 2)
    assert ears.texts == ["away", "back"]


async def test_an_empty_journal_replays_nothing(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    server.say(general, "ann", "long ago", mention=True)
    async with serving(server, ears):
        await until(lambda: general in ears.marks)
        server.say(general, "ann", "now", mention=True)
        await until(lambda: bool(ears.heard))
    assert ears.texts == ["now"]


async def test_what_carries_our_reply_already_is_not_asked_again(server: DiscordServer) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears) as bot:
        server.say(general, "ann", "zero", mention=True)
        await until(lambda: general in ears.marks)
        old = dict(ears.marks)
        asked = server.say(general, "ann", "one", mention=True)
        await bot.send(reply(server, general, asked))
        server.say(general, "ann", "two", mention=True)
        await until(lambda: len(ears.heard) == 3)
    restored = Ears()
    restored.marks = old
    async with serving(server, restored):
        await until(lambda: len(restored.heard) == 2)
    assert [(message.text, message.kind) for message in restored.heard] == [("one", "heard"), ("two", "ask")]


async def test_sessions_are_counted_and_too_many_starts_a_day_are_spread(
    server: DiscordServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ears = Ears()
    async with serving(server, ears):
        assert server.identifies == ears.sessions == 1
        await server.invalidate()
        await until(lambda: server.identifies == 2 and ears.sessions == 2)
    ears.sessions = hearing.SESSIONS_A_DAY
    monkeypatch.setattr(module, "SESSION_PAUSE", 1.5)
    began = asyncio.get_running_loop().time()
    async with serving(server, ears):
        assert asyncio.get_running_loop().time() - began > 1


async def test_with_too_many_sessions_today_the_client_starts_anew_which_waits(server: DiscordServer) -> None:
    ears = Ears()
    task = asyncio.create_task(bot_for(server).serve(ears.chat))
    await server.until(connected=True)
    ears.sessions = hearing.SESSIONS_A_DAY
    await server.invalidate()
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(task, 60)
    assert server.identifies == 2


async def test_a_reconnect_is_one_line_and_comes_within_half_a_minute(
    server: DiscordServer, caplog: pytest.LogCaptureFixture
) -> None:
    bot = bot_for(server)
    DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL("ws://127.0.0.1:9/")
    task = asyncio.create_task(bot.serve(Ears().chat))
    await until(lambda: "reconnect" in caplog.text)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    told, *_ = [record for record in caplog.records if "reconnect" in record.getMessage()]
    assert (told.levelname, told.exc_info) == ("WARNING", None)
    backoff = discord_client.ExponentialBackoff()  # type: ignore[attr-defined]
    assert max(backoff.delay() for _ in range(200)) <= 32


async def test_a_bad_token_says_the_mend(server: DiscordServer) -> None:
    with pytest.raises(Unservable, match="DISCORD_TOKEN"):
        await asyncio.wait_for(bot_for(server, "MTAwMDAw.a-token.of-nobody").serve(Ears().chat), 30)


@pytest.mark.parametrize("what", ["REST", "gateway", "a page instead", "a page that says 401"])
async def test_discord_out_of_reach_at_the_start_is_a_connection_error(server: DiscordServer, what: str) -> None:
    bot, ears = bot_for(server), Ears()
    if what == "REST":
        Route.BASE = "http://127.0.0.1:9/api/v10"
    elif what == "gateway":
        DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL("ws://127.0.0.1:9/")
    else:
        server.faults = [Fault("page", "GET", "/users/@me", times=-1, value=401 if "401" in what else 200)]
    with pytest.raises(ConnectionError) as caught:
        await asyncio.wait_for(bot.serve(ears.chat), 30)
    assert server.token not in str(caught.value)
    assert not ears.sessions, "no session was asked for"


async def test_an_intent_that_is_off_says_the_mend(server: DiscordServer) -> None:
    with pytest.raises(Unservable, match="Message Content Intent"):
        await asyncio.wait_for(bot_for(server, content=True).serve(Ears().chat), 30)


@pytest.mark.parametrize("code", [4010, 4013])
async def test_a_gateway_closed_for_good_is_named(server: DiscordServer, code: int) -> None:
    task = asyncio.create_task(bot_for(server).serve(Ears().chat))
    await server.until(connected=True)
    await server.drop(code)
    with pytest.raises(Unservable, match=str(code)):
        await asyncio.wait_for(task, 30)


async def test_with_the_intent_a_reply_without_a_ping_and_a_mention_of_our_role_are_heard() -> None:
    async with DiscordServer(granted=1 << 15) as server:
        ears, general = Ears(), server.channel("general")
        async with serving(server, ears, content=True) as bot:
            sent = await bot.send(reply(server, general, "1"))
            server.say(general, "ann", "no ping", reply_to=sent)
            server.say(general, "ann", f"<@&{server.role}>, by your role", mention_roles=[server.role])
            await until(lambda: ears.texts == ["no ping", "by your role"])


def test_the_settings_refuse_placeholders(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("your-token-here", "<token>", "abc", "two words here"):
        monkeypatch.setenv("DISCORD_TOKEN", value)
        with pytest.raises(WrongSettings) as caught:
            read(DiscordSettings)
        assert caught.value.lines[0].startswith("DISCORD_TOKEN: looks like a placeholder") and value not in str(
            caught.value
        )


def test_long_text_is_split_at_2000_characters() -> None:
    pieces = DiscordBot("t").split("word " * 1000)
    assert len(pieces) == 3 and all(len(piece) <= 2000 for piece in pieces)


async def test_the_first_message_of_an_empty_channel_is_not_missed(server: DiscordServer) -> None:
    ears, empty = Ears(), server.channel("empty")
    async with serving(server, ears):
        new = server.channel("new")
        await until(lambda: set(ears.marks) >= {empty, new})
    for channel in (empty, new):
        server.say(channel, "ann", "first", mention=True)
    async with serving(server, ears):
        await until(lambda: ears.texts == ["first", "first"])


async def test_a_history_that_does_not_page_ends(server: DiscordServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ears, general = Ears(), server.channel("general")
    async with serving(server, ears):
        await until(lambda: general in ears.marks)
    for number in range(120):
        server.say(general, "ann", str(number), mention=True)
    monkeypatch.setattr(server, "deaf_to_after", True)
    async with serving(server, ears):
        await until(lambda: len(ears.heard) == 120)

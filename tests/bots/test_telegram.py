"""The bot through the real client against a Bot API server: who is heard, what is confirmed, how sends end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import ValidationError

from bots.base import Line, MaybeSent, NotSent, Refused, RetryAfter, Unservable
from bots.telegram import FORGOTTEN, GREETING, GREETING_GROUP, NOT_NOW, UNHEARD, TelegramSettings, open_telegram
from core.messages import Channel
from core.settings import WrongSettings
from core.settings import read as read_settings
from tests.bots.telegram_world import ANN, BOB, GROUP, reply, serving, settings, until
from tests.fakes.ears import Ears
from tests.fakes.telegram_server import TOKEN, Fault, TelegramServer


@pytest.fixture
async def server() -> AsyncIterator[TelegramServer]:
    async with TelegramServer() as server:
        server.private(ANN, "Ann")
        server.group(GROUP, topics=(45,))
        yield server


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bots.telegram_api", "bots.telegram_polling"):
        monkeypatch.setattr(f"{module}.backoff", lambda failures, longest=30.0: 0.02)


async def test_direct_messages_mentions_replies_and_topics_are_heard_in_order(server: TelegramServer) -> None:
    ears = Ears()
    async with serving(server, ears) as bot:
        server.say(ANN, ANN, "one")
        server.say(GROUP, BOB, "not for you")
        server.say(GROUP, BOB, "@Palaver_Bot two")
        number = int(await bot.send(reply(GROUP, "said")))
        server.say(GROUP, BOB, "three", reply_to=number, topic=45)
        server.say(ANN, ANN, "four")
        await until(lambda: len(ears.heard) == 4)
        await server.confirmed()
    assert ears.texts == ["one", "two", "three", "four"]
    assert [m.channel.id for m in ears.heard] == ["7", str(GROUP), f"{GROUP}:45", "7"]
    assert [m.server for m in ears.heard] == ["", str(GROUP), str(GROUP), ""]
    assert server.called("deleteWebhook") == []
    assert all("drop_pending_updates" not in call and int(call.get("offset", 0)) >= 0 for _, call in server.calls)


async def test_what_came_before_the_start_is_not_lost(server: TelegramServer) -> None:
    for number in range(120):
        server.say(ANN, ANN, f"while you were away {number}")
    ears = Ears()
    async with serving(server, ears):
        await until(lambda: len(ears.heard) == 120)
        await server.confirmed()
        server.say(ANN, ANN, "back")
        await until(lambda: len(ears.heard) == 121)
        await server.confirmed()
        server.faults.append(Fault("page", "getUpdates"))
        server.say(ANN, ANN, "and here")  # ends the poll under way
        await until(lambda: not server.faults)
        server.say(ANN, ANN, "after an outage")
        await until(lambda: len(ears.heard) == 123)
    assert "offset" not in server.called("getUpdates")[0]
    assert [message.missed for message in ears.heard] == [*[True] * 120, False, False, True]
    assert ears.adopted == [("telegram", str(server.me["id"]))]


async def test_confirmed_only_after_the_commit(server: TelegramServer) -> None:
    ears = Ears()
    ears.refuse = -1
    server.say(ANN, ANN, "hi")
    async with serving(server, ears):
        await until(lambda: ears.calls >= 3)
        assert len(server.pending) == 1 and len(server.called("getUpdates")) == 1
        ears.refuse = 0
        await until(lambda: ears.heard)
        await server.confirmed()
    assert ears.texts == ["hi"]


async def test_killed_before_the_commit_it_comes_again(server: TelegramServer) -> None:
    ears = Ears()
    ears.refuse = -1
    server.say(ANN, ANN, "hi")
    async with serving(server, ears):
        await until(lambda: ears.calls)
    assert len(server.pending) == 1
    ears.refuse = 0
    async with serving(server, ears):
        await until(lambda: ears.heard)


async def test_one_that_cannot_be_read_harms_no_other(server: TelegramServer) -> None:
    ears = Ears()
    server.say(ANN, ANN, "one")
    server.update(message={"chat": {"id": ANN}, "text": ["a"] * 10})
    server.update(message=7)
    server.update(unheard_of={})
    server.say(ANN, ANN, "two")
    async with serving(server, ears):
        await until(lambda: len(ears.heard) == 2)
        await server.confirmed()
    assert ears.texts == ["one", "two"]
    assert [row.channel.id for row, _ in ears.failed] == ["7", "unknown"]


async def test_one_that_cannot_be_stored_harms_no_other(server: TelegramServer) -> None:
    ears = Ears()
    ears.poison = "\x1a"
    for text in ("one", "\x1a", "two"):
        server.say(ANN, ANN, text)
    async with serving(server, ears):
        await until(lambda: len(ears.heard) == 2)
        await server.confirmed()
    assert ears.texts == ["one", "two"]
    assert [(row.channel.id, row.text, note) for row, note in ears.failed] == [("7", "\\x1a", "ValueError")]


async def test_one_that_is_no_json_harms_no_other(server: TelegramServer) -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    ears = Ears()
    server.say(ANN, ANN, "one")
    server.raw(b'{"update_id": %d, "message": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    server.say(ANN, ANN, "two")
    async with serving(server, ears):
        await until(lambda: len(ears.heard) == 2)
        await server.confirmed()
    assert ears.texts == ["one", "two"] and len(ears.failed) == 1


async def test_two_answers_cut_off_at_different_places_are_the_wires_fault(server: TelegramServer) -> None:
    ears = Ears()
    server.say(ANN, ANN, "one")
    server.say(ANN, ANN, "two")
    cut = f'{{"ok": true, "result": [{{"update_id": {server.pending[0]["update_id"]}, "mess'
    server.faults += [Fault("garbage", "getUpdates", value=seen) for seen in (cut + 'age": {', cut)]
    async with serving(server, ears):
        await until(lambda: len(ears.heard) == 2)
        await server.confirmed()
    assert ears.texts == ["one", "two"] and not ears.failed


async def test_the_same_again_out_of_order_and_with_new_numbers(server: TelegramServer) -> None:
    ears = Ears()
    server.duplicates, server.reordered = 0.5, 0.3
    async with serving(server, ears):
        for round in range(4):
            for number in range(10):
                server.say(ANN, ANN, f"{round} {number}")
            await server.confirmed()
            server.jump()
    assert sorted(ears.texts) == [f"{round} {number}" for round in range(4) for number in range(10)]


async def test_updates_of_one_poll_are_heard_in_the_order_of_their_numbers(server: TelegramServer) -> None:
    ears, server.reordered = Ears(), 1.0
    for number in range(5):
        server.say(ANN, ANN, str(number))
    async with serving(server, ears):
        await until(lambda: len(ears.heard) == 5)
    assert ears.texts == ["0", "1", "2", "3", "4"]


async def test_numbers_that_start_anew_below_the_last_one(
    server: TelegramServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bots.telegram_polling.HOLD", 1)
    server.literal = True
    ears = Ears()
    async with serving(server, ears):
        server.say(ANN, ANN, "before")
        await server.confirmed()
        asked = len(server.called("getUpdates"))
        await until(lambda: any("offset" not in call for call in server.called("getUpdates")[asked:]))
        server.jump(to=1)
        server.say(ANN, ANN, "a quiet week later")
        await until(lambda: len(ears.heard) == 2)
        await server.confirmed()
    assert ears.texts == ["before", "a quiet week later"]


async def test_a_reset_that_fails_says_so(server: TelegramServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(channel: Channel, asked: object) -> bool:
        raise OSError("no engine")

    ears = Ears()
    monkeypatch.setattr(ears, "reset", broken)
    async with serving(server, ears):
        server.say(ANN, ANN, "/reset")
        await server.until(1)
    assert [sent.text for sent in server.ledger] == [NOT_NOW]


async def test_a_reset_stands_between_what_was_said_before_and_after_it(server: TelegramServer) -> None:
    ears = Ears()
    for text in ("before", "/reset", "after"):
        server.say(ANN, ANN, text)
    async with serving(server, ears):
        await server.confirmed()
    assert ears.order == ["before", "reset", "after"]


async def test_a_reset_that_is_not_accepted_is_not_confirmed_and_comes_again(server: TelegramServer) -> None:
    ears = Ears()
    ears.refuse = 1
    server.say(ANN, ANN, "/reset")
    async with serving(server, ears):
        await server.until(1)
        await server.confirmed()
    assert (ears.order, [sent.text for sent in server.ledger]) == (["reset"], [FORGOTTEN])


async def test_reset_and_start(server: TelegramServer) -> None:
    ears = Ears()
    async with serving(server, ears) as bot:
        server.say(ANN, ANN, "/start")
        server.say(ANN, ANN, "before")
        again = server.say(ANN, ANN, "/reset")
        server.say(GROUP, BOB, "/reset@palaver_bot", topic=45)
        server.say(GROUP, BOB, "/reset@other_bot")
        server.update(message=again)
        sent = await server.until(3)
        await server.confirmed()
        await until(lambda: not bot._confirming, 10)
    assert ears.resets == [Channel("telegram", "7"), Channel("telegram", f"{GROUP}:45")]
    assert ears.texts == ["before"]
    assert {(s.chat, s.thread, s.text) for s in sent} == {
        (ANN, None, GREETING),
        (ANN, None, FORGOTTEN),
        (GROUP, 45, FORGOTTEN),
    }


async def test_a_confirmation_that_did_not_arrive_is_tried_again(
    server: TelegramServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bots.telegram.AGAIN", 0.05)
    flood = Fault("flood", value={"retry_after": 0.05})
    async with serving(server, Ears()) as bot:
        server.faults += [flood, Fault("error", value=[409, "Conflict"])]
        server.say(ANN, ANN, "/start")
        await server.until(1)
        for end in (Fault("flood", value={"retry_after": 61}), Fault("reset_after")):
            server.faults.append(end)
            server.say(GROUP, BOB, "/help@palaver_bot")
            await until(lambda: not (server.faults or bot._confirming))
            bot._pace.hold(GROUP, 0.0)
    assert [sent.chat for sent in server.ledger] == [ANN, GROUP] and len(server.called("sendMessage")) == 5


async def test_the_greeting_in_a_group_says_what_is_heard_there(server: TelegramServer) -> None:
    async with serving(server, Ears()):
        server.say(GROUP, BOB, "/start@palaver_bot")
        await server.until(1)
    assert [(sent.chat, sent.text) for sent in server.ledger] == [(GROUP, GREETING_GROUP)]


async def test_who_sends_no_words_is_told_so_once_and_groups_are_not(server: TelegramServer) -> None:
    ears = Ears()
    server.private(BOB)
    async with serving(server, ears) as bot:
        server.say(GROUP, BOB, "@palaver_bot \u043f\u0440\u0438\u0432\u0435\u0442")
        server.say(ANN, ANN, "", location={"latitude": 1.0, "longitude": 1.0})
        server.say(BOB, BOB, "", sticker={"file_id": "x"})
        for chat in (ANN, BOB):
            server.say(chat, chat, "\u043f\u0440\u0438\u0432\u0435\u0442")
        server.say(ANN, ANN, "hello")
        await server.confirmed()
        await until(lambda: not bot._confirming)
    assert sorted((sent.chat, sent.text) for sent in server.ledger) == [(ANN, UNHEARD), (BOB, UNHEARD)]
    assert ears.texts == ["\u043f\u0440\u0438\u0432\u0435\u0442"] * 3 + ["hello"], (
        "what has no words is kept all the same"
    )


async def test_a_group_that_calls_its_name_alone_is_told_once_how_to_talk(server: TelegramServer) -> None:
    async with serving(server, Ears()) as bot:
        server.say(GROUP, BOB, "@palaver_bot")
        server.say(GROUP, ANN, "@palaver_bot ")
        await server.confirmed()
        await until(lambda: bool(server.ledger) and not bot._confirming)
    assert [(sent.chat, sent.text) for sent in server.ledger] == [(GROUP, GREETING_GROUP)]


async def test_what_is_said_while_the_first_poll_waits_was_not_missed(
    server: TelegramServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bots.telegram_polling.HELD", 0.2)
    ears = Ears()
    async with serving(server, ears):
        await until(lambda: bool(server.called("getUpdates")))
        await asyncio.sleep(0.4)
        server.say(ANN, ANN, "live")
        await until(lambda: ears.heard)
    assert [message.missed for message in ears.heard] == [False]


async def test_commands_do_not_fill_the_line_of_replies(server: TelegramServer) -> None:
    ears = Ears()
    server.faults.append(Fault("delay", chat=GROUP, times=-1, value=60))
    async with serving(server, ears) as bot:
        for _ in range(40):
            server.say(GROUP, BOB, "/start@palaver_bot")
        server.say(GROUP, ANN, "@palaver_bot hello")
        await until(lambda: len(ears.heard) == 1)
        assert bot._confirming[Channel("telegram", str(GROUP))] == 3


async def test_an_edit_and_a_group_that_moves(server: TelegramServer) -> None:
    ears = Ears()
    server.group(-55, kind="group")
    async with serving(server, ears) as bot:
        said = server.say(-55, BOB, "@palaver_bot hi")
        server.edit(-55, said["message_id"], "@palaver_bot hello")
        await until(lambda: len(ears.heard) == 2)
        assert [(m.kind, m.text, m.id) for m in ears.heard] == [
            ("ask", "hi", f"g{said['message_id']}"),
            ("edit", "hello", f"g{said['message_id']}"),
        ]
        server.edit(-55, said["message_id"], "@palaver_bot")
        await until(lambda: len(ears.heard) == 3)
        assert (ears.heard[2].kind, ears.heard[2].text) == ("delete", "")
        server.migrate(-55, -1007777777777)
        await until(lambda: ears.moves)
        await bot.send(reply(-55, "still here", ears.heard[0].id))
        await server.confirmed()
    assert set(ears.moves) == {(Channel("telegram", "-55"), Channel("telegram", "-1007777777777"))}
    assert (server.ledger[-1].chat, server.ledger[-1].reply_to) == (-1007777777777, None)


async def test_a_group_that_moved_unseen_is_followed_by_the_send(server: TelegramServer) -> None:
    ears = Ears()
    server.group(-55, kind="group")
    async with serving(server, ears) as bot:
        await until(lambda: server.called("getUpdates"))
        server.group(-1007777777777)
        server.messages[-1007777777777, 5] = {"message_id": 5}
        server.faults.append(Fault("migrated", chat=-55, times=-1, value=-1007777777777))
        ears.refuse = 1
        with pytest.raises(NotSent):
            await bot.send(reply(-55, "hello", "g5"))
        await bot.send(reply(-55, "hello", "g5"))
        await bot.send(reply(-55, "again", "g5"))
    assert ears.moves == [(Channel("telegram", "-55"), Channel("telegram", "-1007777777777"))]
    assert [(s.text, s.reply_to) for s in server.ledger] == [("hello", None), ("again", None)]
    assert len(server.called("sendMessage")) == 4


async def test_a_group_that_moves_for_ever_is_not_followed_for_ever(server: TelegramServer) -> None:
    ears = Ears()
    server.faults.append(Fault("migrated", times=-1, value=-1007777777777))
    async with serving(server, ears) as bot:
        with pytest.raises(NotSent):
            await asyncio.wait_for(bot.send(reply(-55)), 20)
    assert len(ears.moves) == 1 and len(server.called("sendMessage")) == 2


async def test_a_reply_as_it_goes_out(server: TelegramServer) -> None:
    ears = Ears()
    async with serving(server, ears) as bot:
        said = server.say(GROUP, BOB, "@palaver_bot hi", topic=45)
        text = "see https://example.org *bold* <b>&amp;</b> @everyone"
        number = await bot.send(reply(f"{GROUP}:45", text, str(said["message_id"])))
        await bot.send(reply(f"{GROUP}:45", "its question is gone", "999999"))
        await bot.typing(Channel("telegram", f"{GROUP}:45"))
        assert await bot.find_sent(reply(GROUP)) is None
    first, second = server.ledger
    assert (first.text, first.thread, first.reply_to) == (text, 45, said["message_id"])
    assert str(first.message_id) == number and second.reply_to is None
    assert "parse_mode" not in first.params and '"is_disabled": true' in first.params["link_preview_options"]
    assert [(chat, thread) for _, chat, thread in server.typing] == [(GROUP, 45)]


async def test_a_server_that_will_not_reply_to_what_is_gone_gets_a_plain_message(server: TelegramServer) -> None:
    server.faults.append(Fault("error", value=[400, "Bad Request: message to be replied not found"]))
    async with serving(server, Ears()) as bot:
        await bot.send(reply(ANN, "hello", "5"))
    assert [s.text for s in server.ledger] == ["hello"]


@pytest.mark.parametrize(
    ("fault", "ending"),
    [
        (Fault("blocked"), Refused),
        (Fault("error", value=[400, "Bad Request: chat not found"]), Refused),
        (Fault("error", value=[404, "Not Found"]), Refused),
        (Fault("error", value=[413, "Request Entity Too Large"]), Refused),
        (Fault("error", value=[302, "Found"]), NotSent),
        (Fault("error", value=[401, "Unauthorized"]), NotSent),
        (Fault("error", value=[408, "Request Timeout"]), MaybeSent),
        (Fault("error", value=[409, "Conflict: terminated by other long poll"]), NotSent),
        *((Fault("page", value=code), MaybeSent) for code in (401, 403, 404, 502)),
        (Fault("error", value=[500, "Internal Server Error: restart"]), MaybeSent),
        (Fault("garbage"), MaybeSent),
        (Fault("reset_before"), MaybeSent),
        (Fault("reset_after"), MaybeSent),
    ],
)
async def test_how_a_send_can_end(server: TelegramServer, fault: Fault, ending: type[Exception]) -> None:
    server.faults.append(fault)
    async with serving(server, Ears()) as bot:
        with pytest.raises(ending) as caught:
            await bot.send(reply(ANN))
        assert TOKEN not in str(caught.value)
        assert len(server.ledger) == (fault.kind == "reset_after")


async def test_a_chat_that_is_no_chat_is_refused(server: TelegramServer) -> None:
    bot = open_telegram(settings(server))
    for channel in ("x", "5:y", ""):
        with pytest.raises(Refused):
            await bot.send(reply(channel))


async def test_a_flood_in_one_chat_stops_no_other(server: TelegramServer) -> None:
    server.private(BOB)
    server.faults.append(Fault("flood", chat=GROUP, times=1, value={"retry_after": 3000}))
    async with serving(server, Ears()) as bot:
        with pytest.raises(RetryAfter) as caught:
            await bot.send(reply(GROUP))
        assert caught.value.seconds == 3000
        with pytest.raises(RetryAfter) as caught:
            await bot.turn(Channel("telegram", f"{GROUP}:45"))
        await bot.typing(Channel("telegram", str(GROUP)))
        assert caught.value.seconds > 2900 and len(server.called("sendMessage")) == 1 and not server.typing
        for chat in (ANN, BOB):
            await bot.turn(Channel("telegram", str(chat)))
            await bot.send(reply(chat))
    assert [s.chat for s in server.ledger] == [ANN, BOB]


async def test_typing_that_must_wait_holds_back_no_reply(server: TelegramServer) -> None:
    server.faults.append(Fault("flood", "sendChatAction", value={"retry_after": 3000}))
    channel = Channel("telegram", str(ANN))
    async with serving(server, Ears()) as bot:
        with pytest.raises(RetryAfter):
            await bot.typing(channel)
        await bot.typing(channel)
        assert len(server.called("sendChatAction")) == 1
        await bot.turn(channel)
        await bot.send(reply(ANN))
    assert [s.chat for s in server.ledger] == [ANN]


async def test_a_stuck_chat_stops_no_other(server: TelegramServer) -> None:
    server.faults.append(Fault("delay", chat=GROUP, value=30.0))
    async with serving(server, Ears()) as bot:
        stuck = asyncio.create_task(bot.send(reply(GROUP)))
        await until(lambda: server.called("sendMessage"))
        await bot.send(reply(ANN))
        stuck.cancel()
    assert [s.chat for s in server.ledger] == [ANN]


async def test_sends_work_before_it_serves(server: TelegramServer) -> None:
    bot = open_telegram(settings(server))
    await bot.send(reply(ANN, "owed from before"))
    assert server.ledger
    await bot.aclose()


def test_a_long_text_is_split_in_telegrams_units() -> None:
    bot = open_telegram(TelegramSettings(telegram_token=TOKEN))
    parts = bot.split("\U0001f600" * 5000)
    assert len(parts) == 3 and all(len(part.encode("utf-16-le")) <= 2 * 4096 for part in parts)
    assert "".join(parts) == "\U0001f600" * 5000
    assert bot.split("a\0\u202eb\ud800") == ["ab"] and bot.split("\u200b \x07") == []


async def test_a_wrong_token_says_how_to_mend_it(server: TelegramServer) -> None:
    bot = open_telegram(settings(server, token="123456789:" + "B" * 35))
    with pytest.raises(Unservable, match=r"TELEGRAM_TOKEN: .*@BotFather") as caught:
        async with asyncio.timeout(30):
            await bot.serve(Ears().chat)
    assert "BBB" not in str(caught.value)


async def test_a_token_revoked_while_it_polls(server: TelegramServer) -> None:
    server.faults.append(Fault("error", "getUpdates", value=[401, "Unauthorized"]))
    bot = open_telegram(settings(server))
    with pytest.raises(Unservable):
        async with asyncio.timeout(30):
            await bot.serve(Ears().chat)


async def test_a_webhook_in_the_way_is_removed_and_nothing_dropped(server: TelegramServer) -> None:
    server.webhook = {"url": "https://elsewhere.example/"}
    server.say(ANN, ANN, "hi")
    ears = Ears()
    async with serving(server, ears):
        await until(lambda: ears.heard)
    assert [call.get("drop_pending_updates") for call in server.called("deleteWebhook")] == ["false"]


async def test_another_poller_is_named_and_outlived(
    server: TelegramServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bots.telegram_polling.CONFLICT_PAUSE", (0.01, 0.05))
    server.faults.append(Fault("conflict", "getUpdates", times=5))
    server.say(ANN, ANN, "hi")
    ears = Ears()
    with caplog.at_level(logging.WARNING):
        async with serving(server, ears):
            await until(lambda: ears.heard)
    assert caplog.text.count("stop the other instance") == 1 and TOKEN not in caplog.text


async def test_a_full_house_is_not_fed(server: TelegramServer) -> None:
    ears = Ears()
    ears.room.clear()
    async with serving(server, ears):
        server.say(ANN, ANN, "hi")
        await until(lambda: server.called("getMe"))
        await asyncio.sleep(0.2)
        assert not server.called("getUpdates")
        ears.room.set()
        await until(lambda: ears.heard)


async def test_trouble_on_the_line_is_outlived(server: TelegramServer) -> None:
    kinds: list[Any] = ["page", "reset_before", "reset_after", "garbage", "flood"]
    server.faults += [Fault(kind, "getUpdates", value={} if kind == "flood" else None) for kind in kinds]
    server.faults += [Fault("page", "getUpdates", value=code) for code in (401, 404)]  # some proxy's, not Telegram's
    server.say(ANN, ANN, "hi")
    ears = Ears()
    async with serving(server, ears):
        await until(lambda: ears.heard)
        await server.confirmed()
    assert ears.texts == ["hi"] and not ears.failed


async def test_a_telegram_that_is_out_of_reach_for_a_while_is_told(
    server: TelegramServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Line, "PATIENCE", 0.0)
    async with serving(server, Ears()) as bot:
        await until(lambda: bool(server.called("getUpdates")) and not bot.line.trouble)
        server.faults += [Fault("error", "getUpdates", value=[502, "Bad Gateway"], times=4)]
        server.say(ANN, ANN, "hi")
        await until(lambda: "502" in bot.line.trouble)
        await until(lambda: not bot.line.trouble)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TELEGRAM_TOKEN", "your-token-here"),
        ("TELEGRAM_TOKEN", "123456:changeme"),
        ("TELEGRAM_TOKEN", "123456789:" + "x" * 35),
        ("TELEGRAM_TOKEN", "123456789:" + "x" * 20 + " " + "y" * 15),
        ("TELEGRAM_API_BASE", "localhost:9"),
        ("TELEGRAM_API_BASE", "http://127.0.0.1:port/bot"),
        ("TELEGRAM_WEBHOOK_URL", "http://bot.example.org/"),
        ("TELEGRAM_WEBHOOK_SECRET", "two words"),
        ("TELEGRAM_WEBHOOK_PORT", "99999"),
    ],
)
def test_a_wrong_setting_is_one_line_without_its_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, variable: str, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    with pytest.raises(WrongSettings) as caught:
        read_settings(TelegramSettings)
    (line,) = caught.value.lines
    assert line.startswith(f"{variable}: ") and "for example" in line and value not in line


def test_settings_as_people_write_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert TelegramSettings().telegram_token is None
    monkeypatch.setenv("TELEGRAM_TOKEN", f" {TOKEN}\n")
    monkeypatch.setenv("TELEGRAM_API_BASE", "http://127.0.0.1:8081/")
    found = TelegramSettings()
    assert found.telegram_api_base == "http://127.0.0.1:8081/bot"
    assert found.telegram_token and found.telegram_token.get_secret_value() == TOKEN
    assert TOKEN not in repr(found)
    monkeypatch.setenv("TELEGRAM_TOKEN", "42:TEST")
    assert TelegramSettings().telegram_token
    monkeypatch.delenv("TELEGRAM_API_BASE")
    with pytest.raises(ValidationError):
        TelegramSettings()

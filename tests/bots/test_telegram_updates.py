"""Reading updates: who is heard, what is left of the text, which conversation it is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bots.telegram_updates import Command, Me, Moved, failed, read, strip_mention, target
from core.messages import Channel, Message

ME = Me(123, "Palaver_Bot")
PRIVATE = {"id": 7, "type": "private", "first_name": "Ann"}
GROUP = {"id": -100123, "type": "supergroup", "title": "Us"}
OURS = {"message_id": 3, "date": 1, "chat": GROUP, "from": {"id": 123, "is_bot": True, "first_name": "Palaver"}}


def said(text: str | None, chat: dict[str, Any] = PRIVATE, kind: str = "message", **more: Any) -> dict[str, Any]:
    author = {"id": 7, "is_bot": False, "first_name": "Ann", "last_name": "Lee"}
    message = {"message_id": 17, "date": 1_700_000_000, "chat": chat, "from": author, "text": text}
    message |= {name.rstrip("_"): value for name, value in more.items()}
    return {"update_id": 1, kind: {name: value for name, value in message.items() if value is not None}}


def heard(update: dict[str, Any]) -> Message:
    message = read(update, ME)
    assert isinstance(message, Message)
    return message


def test_a_private_message() -> None:
    message = heard(said(" hi there "))
    assert (message.channel, message.id, message.text) == (Channel("telegram", "7"), "17", "hi there")
    assert (message.author.id, message.author.name, message.server) == ("7", "Ann Lee", "")
    assert message.account == str(ME.id)
    assert (message.kind, message.sent_at) == ("ask", datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("@Palaver_Bot hi", "hi"),
        ("@palaver_bot, how are you?", "how are you?"),
        ("PALAVER is @PALAVER_BOT there", "PALAVER is there"),
        ("hi @palaver_bot", "hi"),
        ("hi\n@palaver_bot\nthere", "hi\n \nthere"),
        ("\U0001f600 @palaver_bot \U0001f600", "\U0001f600 \U0001f600"),
        ("/joke@Palaver_Bot now", "joke now"),
        ("@palaver_bot /joke now", "joke now"),
        ("/joke, @palaver_bot", "joke,"),
    ],
)
def test_a_mention_in_a_group_is_answered_and_cut(text: str, left: str) -> None:
    message = heard(said(text, GROUP))
    assert (message.text, message.server, message.kind) == (left, "-100123", "ask")


@pytest.mark.parametrize(
    "text", ["hi", "@palaver_bot2 hi", "mail me@palaver_bot.org"[:19], "/joke", "/reset@other_bot", "@@palaver_bot"]
)
def test_what_is_for_others_is_not_heard(text: str) -> None:
    assert read(said(text, GROUP), ME) is None


def test_a_mention_by_link_and_a_reply_are_for_us() -> None:
    link = {"type": "text_mention", "offset": 0, "length": 3, "user": {"id": 123}}
    assert heard(said("you there", GROUP, entities=[link])).text == "you there"
    assert heard(said("why?", GROUP, reply_to_message=OURS)).text == "why?"
    opened = OURS | {"forum_topic_created": {"name": "x"}}
    assert read(said("why?", GROUP, reply_to_message=opened), ME) is None


def test_bots_channels_service_messages_and_bare_media_are_not_heard() -> None:
    robot = {"id": 9, "is_bot": True, "first_name": "R"}
    assert read(said("@palaver_bot hi", GROUP, from_=robot), ME) is None
    assert read(said("@palaver_bot hi", GROUP | {"type": "channel"}), ME) is None
    assert read(said(None, new_chat_title="x"), ME) is None
    assert read(said(None, GROUP, photo=[{"file_id": "x"}], reply_to_message=OURS), ME) is None
    assert read(said("@palaver_bot post", GROUP, is_automatic_forward=True, sender_chat={"id": -5}), ME) is None
    assert read({"update_id": 5, "poll": {}}, ME) is None
    assert read(said("@palaver_bot hi", GROUP | {"is_direct_messages": True}), ME) is None


def test_media_alone_are_a_question_without_text_in_a_private_chat() -> None:
    message = heard(said(None, sticker={"file_id": "x"}))
    assert (message.kind, message.text) == ("ask", "")
    assert heard(said(None, dice={"emoji": "x", "value": 6})).text == ""
    assert read(said(None, photo=[{"file_id": "x"}], media_group_id="7"), ME) is None


def test_an_anonymous_admin_is_a_person() -> None:
    anonymous = {"id": 1087968824, "is_bot": True, "first_name": "Group"}
    message = heard(said("@palaver_bot hi", GROUP, sender_chat=GROUP, from_=anonymous))
    assert (message.author.id, message.author.name, message.author.is_bot) == ("-100123", "Us", False)


def test_a_caption_is_text_and_a_topic_a_channel() -> None:
    message = heard(
        said(None, GROUP, caption="@palaver_bot look", photo=[{}], message_thread_id=45, is_topic_message=True)
    )
    assert (message.text, message.channel.id, message.server) == ("look", "-100123:45", "-100123")
    chain = heard(said("@palaver_bot look", GROUP, message_thread_id=45))
    assert chain.channel.id == "-100123"


def test_commands() -> None:
    for typed, chat, name, channel in (
        ("/reset", PRIVATE, "reset", "7"),
        ("/Start deep-link", PRIVATE, "start", "7"),
        ("/reset@PALAVER_bot", GROUP, "reset", "-100123"),
        ("@palaver_bot, /reset", GROUP, "reset", "-100123"),
        ("/reset@palaver_bot, please", GROUP, "reset", "-100123"),
    ):
        what = read(said(typed, chat), ME)
        assert isinstance(what, Command) and what.name == name
        assert (what.message.channel, what.message.id) == (Channel("telegram", channel), "17")
        assert (what.message.kind, what.message.text) == ("heard", typed)
    assert heard(said("/joke please")).text == "joke please"
    assert heard(said("/ what")).text == "/ what"
    assert heard(said("/reset.txt")).text == "/reset.txt"


def test_edits_keep_the_id() -> None:
    message = heard(said("@palaver_bot better", GROUP, "edited_message"))
    assert (message.kind, message.id, message.text) == ("edit", "17", "better")
    assert heard(said("without the mention", GROUP, "edited_message")).kind == "edit"
    for typed, left in (("/joke please", "joke please"), ("/joke@other_bot", "/joke@other_bot"), ("/help", "/help")):
        assert heard(said(typed, kind="edited_message")).text == left


@pytest.mark.parametrize("left", [{"photo": [{}]}, {"caption": "@palaver_bot "}, {"location": {}}])
def test_an_edit_that_leaves_no_text_takes_the_message_back(left: dict[str, Any]) -> None:
    message = heard(said(None, GROUP, "edited_message", **left))
    assert (message.kind, message.id, message.text) == ("delete", "17", "")


def test_a_group_that_moves_and_the_ids_of_its_past() -> None:
    basic = {"id": -55, "type": "group", "title": "Us"}
    moved = Moved(Channel("telegram", "-55"), Channel("telegram", "-100123"))
    assert read(said(None, basic, migrate_to_chat_id=-100123), ME) == moved
    assert read(said(None, GROUP, migrate_from_chat_id=-55), ME) == moved
    assert heard(said("@palaver_bot hi", basic)).id == "g17"
    assert target("g17", -55) == 17
    assert target("g17", -1001234567890) is None
    assert target("17", 7) == 17
    assert target("", 7) is None


@pytest.mark.parametrize("date", [None, -(10**20), 10**20, "x", float("nan"), [], True])
def test_a_strange_date_is_now(date: Any) -> None:
    assert abs((heard(said("hi", date=date)).sent_at - datetime.now(UTC)).total_seconds()) < 10**10


@pytest.mark.parametrize(
    "update",
    [
        {"update_id": 1, "message": 5},
        {"update_id": 1, "message": {}},
        said("hi", chat={}),
        said("hi", chat={"id": "7", "type": "private"}),
        said("hi", message_id=None),
        said("hi", message_id=True),
        said("hi", from_=3),
        {"update_id": 1, "message": said("x")["message"] | {"text": 5}},
        said("hi", GROUP, reply_to_message="x"),
        {"update_id": 1, "unreadable": '{"update_id": 1'},
    ],
)
def test_what_is_not_as_it_should_be_is_an_error_and_a_row(update: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        read(update, ME)
    row = failed(update, ME)
    assert (row.id, row.account) == ("update 1", str(ME.id)) and row.channel.platform == "telegram" and row.text


nasty = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = "text caption from chat date message_id entities caption_entities reply_to_message sender_chat"
fields = st.sampled_from([*NAMES.split(), "migrate_to_chat_id", "message_thread_id", "is_topic_message"])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(fields, nasty, max_size=3), st.text(st.characters(), max_size=50))
def test_whatever_comes_is_read_or_named(changed: dict[str, Any], text: str) -> None:
    update = {"update_id": 4, "message": said(text, GROUP)["message"] | changed}
    try:
        what = read(update, ME)
    except (ValueError, TypeError, KeyError, AttributeError):
        row = failed(update, ME)
        row.text.encode()
        return
    if isinstance(what, Message):
        assert "\0" not in what.text and len(what.text) <= 4096
        what.text.encode()
        what.author.name.encode()
        assert "\n" not in what.author.name


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(), max_size=200))
def test_stripping_never_fails(text: str) -> None:
    assert strip_mention(text, ME) == strip_mention(strip_mention(text, ME), ME) or "@" in text
